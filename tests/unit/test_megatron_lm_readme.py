"""What examples/megatron_lm/README.md says: the five lines of its start, and its table of arguments.

The lines run in bash as they stand; GitHub, pip and torchrun have stand-ins, since the test has no network, and the
training itself is tests/e2e/test_megatron_lm.py's.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from mtp_megatron.megatron_lm.arguments import FLAGS
from tests.documents import ROOT, blocks

README = ROOT / "examples" / "megatron_lm" / "README.md"
SCRIPT = "examples/megatron_lm/pretrain_mtp.py"
LAUNCH = """#!/bin/bash
# starts pretrain_gpt.py on this node
{before}torchrun --nproc-per-node 8 {script} \\
  --num-layers 31 "$@"
"""
SAYS = """#!/bin/bash
echo "{name} PYTHONPATH=$PYTHONPATH" >> "$SAID"
printf '{name}: %s\\n' "$@" >> "$SAID"
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This repository as far as the lines touch it, beside a stand-in for upstream's on GitHub with its tag."""
    tree = tmp_path / "checkout"
    (tree / SCRIPT).parent.mkdir(parents=True)
    (tree / SCRIPT).write_text("")
    upstream = tmp_path / "upstream" / "NVIDIA" / "Megatron-LM"
    upstream.mkdir(parents=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "as released"], ["tag", "core_v0.16.1"]):
        subprocess.run(["git", *identity, *command], cwd=upstream, check=True)
    for name in ("pip", "torchrun"):
        executable(tmp_path / "bin" / name, SAYS.format(name=name))
    return tree


@pytest.mark.parametrize(
    ("before", "script"),
    [
        ("", "pretrain_gpt.py"),
        ("", "Megatron-LM/pretrain_gpt.py"),
        ("", "/opt/Megatron-LM/pretrain_gpt.py"),
        ("MEGATRON=/opt/Megatron-LM\n", "${MEGATRON}/pretrain_gpt.py"),
        ("MEGATRON=/opt/Megatron-LM\n", '"$MEGATRON/pretrain_gpt.py"'),
        ("SCRIPT=/opt/Megatron-LM/pretrain_gpt.py\n", "$SCRIPT"),
    ],
    ids=["name", "relative", "absolute", "variable", "quoted", "assigned"],
)
def test_the_five_lines(checkout: Path, tmp_path: Path, before: str, script: str) -> None:
    (checkout / "launch.sh").write_text(LAUNCH.format(before=before, script=script))
    code = blocks(README.read_text(encoding="utf-8"))[0].code
    assert len(code.splitlines()) == 5
    said = tmp_path / "said"
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SAID": str(said),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{tmp_path / 'upstream'}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = said.read_text().splitlines()
    pip, train = ([line for line in lines if line.startswith(name)] for name in ("pip", "torchrun"))
    assert pip[1:] == ["pip: install", "pip: -e", "pip: ."]
    assert train[0] == f"torchrun PYTHONPATH={checkout / 'Megatron-LM'}"
    wanted = ["--nproc-per-node", "8", str(checkout / SCRIPT), "--num-layers", "31", "--mtp-heads", "4"]
    assert train[1:] == [f"torchrun: {word}" for word in wanted]
    assert (checkout / "Megatron-LM" / ".git").exists()


def test_the_table_lists_the_parsers_arguments_and_no_other() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `--mtp")]
    listed = [name for row in rows for name in re.findall(r"`(--mtp-[\w-]+)", row.split("|")[1])]
    assert sorted(listed) == sorted(flag.name for flag in FLAGS)
