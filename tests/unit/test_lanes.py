"""`tools/test.sh`: which lanes it runs, that a failing one fails the run, and that pytest's summary is the last line.

Environments and tests are stand-ins here: scripts that print what the real ones would.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def environment(checkout: Path, name: str, version: str, outcome: str) -> None:
    """An environment whose pytest prints `outcome`, and fails if that says so."""
    binaries = checkout / name / "bin"
    executable(
        binaries / "python",
        f'if [ "$1" = -c ]; then echo "{version}"; exit; fi\n'
        f'shift 2; echo "{name} runs: $*"; echo "{outcome}"\ncase "{outcome}" in *failed*) exit 1;; esac',
    )
    for tool in ("ruff", "mypy"):
        executable(binaries / tool, "exit 0")
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with both environments, a Python 3.12 among pyenv's versions and a set-up that notes its calls."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/test.sh", tmp_path / "tools")
    executable(tmp_path / "tools/setup.sh", 'echo "${MTP_VENV:-.venv} ${PYTHON:-}" >>"$(dirname "$0")/calls"')
    executable(tmp_path / "tools/setup_serving.sh", 'echo serving >>"$(dirname "$0")/calls"')
    executable(tmp_path / "pyenv/versions/3.12.1/bin/python", 'echo "3 12"')
    environment(tmp_path, ".venv", "3 11", "7 passed in 2 s")
    environment(tmp_path, ".venv-py312", "3 12", "5 passed in 1 s")
    return tmp_path


def run(checkout: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("MTP_LANES", "MTP_SERVING", "PYENV_ROOT")}
    return subprocess.run(
        ["bash", "tools/test.sh", *arguments],
        cwd=checkout,
        env={**kept, "MTP_SERVING": "0", "PATH": "/usr/bin:/bin", "PYENV_ROOT": str(checkout / "pyenv"), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return result.stdout.strip().splitlines()


def test_a_whole_run_has_both_lanes_and_ends_with_the_main_ones_summary(checkout: Path) -> None:
    result = run(checkout)
    assert result.returncode == 0, result.stdout
    assert (checkout / "tools/calls").read_text().split() == [
        ".venv",
        ".venv-py312",
        str(checkout / "pyenv/versions/3.12.1/bin/python"),
    ]
    assert ".venv runs: -rs" in lines(result)
    assert lines(result)[-2:] == ["== main:", "7 passed in 2 s"]
    (second,) = [line for line in lines(result) if line.startswith(".venv-py312 runs: ")]
    chosen = [word for word in second.split() if word.startswith("tests/")]
    assert chosen
    assert all((ROOT / path.split("::")[0]).exists() for path in chosen), "the lane names a test that is not there"


def test_arguments_go_to_the_main_lane_alone(checkout: Path) -> None:
    result = run(checkout, "tests/unit", "-k", "loss")
    assert ".venv runs: -rs tests/unit -k loss" in result.stdout
    assert "py312" not in result.stdout
    chosen = run(checkout, "tests/unit", MTP_LANES="py312")
    assert lines(chosen)[-2:] == [".venv-py312 runs: -rs tests/unit", "5 passed in 1 s"]


@pytest.mark.parametrize("broken", [".venv", ".venv-py312"])
def test_a_failure_in_either_lane_fails_the_run_and_its_summary_is_last(checkout: Path, broken: str) -> None:
    environment(checkout, broken, "3 11" if broken == ".venv" else "3 12", "1 failed, 4 passed in 1 s")
    result = run(checkout)
    assert result.returncode == 1
    assert "7 passed in 2 s" in result.stdout or broken == ".venv"
    assert lines(result)[-2:] == [f"== {'main' if broken == '.venv' else 'py312'}:", "1 failed, 4 passed in 1 s"]


def test_without_python_312_it_says_so_in_one_line_and_goes_on(checkout: Path) -> None:
    shutil.rmtree(checkout / "pyenv")
    if shutil.which("python3.12", path="/usr/bin:/bin"):
        pytest.skip("this machine has a Python 3.12 in /usr/bin")
    result = run(checkout)
    assert result.returncode == 0
    assert len(re.findall("lane py312: left out, no Python 3.12 found", result.stdout)) == 1
    assert lines(result)[-1] == "7 passed in 2 s"
    alone = run(checkout, MTP_LANES="py312")
    assert alone.returncode == 2
    assert "no Python 3.12 found" in alone.stdout


def test_where_the_main_lane_is_312_there_is_no_second_one(checkout: Path) -> None:
    environment(checkout, ".venv", "3 12", "7 passed in 2 s")
    result = run(checkout)
    assert "lane py312: left out, the main lane has Python 3.12 already" in result.stdout
    assert ".venv-py312 runs" not in result.stdout
    assert result.returncode == 0


def test_an_unknown_lane_is_refused(checkout: Path) -> None:
    result = run(checkout, MTP_LANES="main py313")
    assert result.returncode == 2
    assert "MTP_LANES='main py313' may name main and py312" in result.stdout


@pytest.mark.skipif(os.uname().sysname != "Linux" or os.uname().machine != "x86_64", reason="vLLM has no wheel here")
@pytest.mark.parametrize(
    ("arguments", "wanted"), [((), True), (("tests/serving",), True), (("tests/unit",), False)], ids=str
)
def test_vllm_is_set_up_where_its_tests_may_run(checkout: Path, arguments: tuple[str, ...], wanted: bool) -> None:
    assert run(checkout, *arguments, MTP_SERVING="1").returncode == 0
    assert ("serving" in (checkout / "tools/calls").read_text().split()) == wanted
