"""What `tools/setup.sh` says to a machine that it cannot work on, and that it returns at once where all is done.

Making an environment takes a minute and a network: `tools/test.sh` has done that before this test runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def checkout(tmp_path):
    """A folder with all that the script reads."""
    # Not what other tests may be compiling at this moment.
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def setup(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHON", "MTP_SETUP_FORCE", "MTP_VENV")
    } | env
    return subprocess.run([bash, "tools/setup.sh"], cwd=checkout, env=environment, capture_output=True, text=True)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_interpreter_of_another_version_is_refused_by_name(checkout):
    old = executable(checkout / "old-python", "echo 3.8")
    result = setup(checkout, PYTHON=str(old))
    assert result.returncode == 2
    assert f"PYTHON={old} is 3.8: this project is tested on 3.11 and 3.12" in result.stderr
    assert not (checkout / ".venv").exists()


def test_an_interpreter_that_does_not_run_is_refused(checkout):
    result = setup(checkout, PYTHON="/nowhere/python")
    assert result.returncode == 2
    assert "PYTHON=/nowhere/python is no Python that runs" in result.stderr


def test_a_shim_that_refuses_to_run_is_passed_over(checkout):
    """As pyenv's `python3.12` where another version is selected."""
    shim = executable(checkout / "bin" / "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    for tool in ("dirname", "cat"):
        (checkout / "bin" / tool).symlink_to(shutil.which(tool))
    result = setup(checkout, PATH=str(checkout / "bin"))
    assert result.returncode == 2
    assert f"no usable Python 3.11 or 3.12 found; {shim} is not usable" in result.stderr


@pytest.mark.parametrize("folder", [".venv", ".venv-beside"])
def test_a_finished_environment_is_left_alone(checkout, folder):
    tried = checkout / "tried"
    python = executable(
        checkout / folder / "bin/python", f'case "$1$2" in -mpip) touch {tried}; exit 1;; esac; echo {VERSION}'
    )
    constraints = checkout / f"tools/constraints-cpu-py{VERSION.replace('.', '')}.txt"
    parts = [checkout / "pyproject.toml", constraints, checkout / "tools/setup.sh"]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    stamp = python.parents[1] / ".mtp-setup"
    # Without a GPU; where nvidia-smi lists one, the other stamp is the right one.
    for device in ("cpu", "gpu"):
        stamp.write_text(f"{digest}-{VERSION}-{device}\n")
        if setup(checkout, MTP_VENV=folder).returncode == 0:
            break
    else:
        pytest.fail("a matching stamp did not end the set-up")
    tried.unlink(missing_ok=True)
    stamp.write_text("of another pyproject.toml")
    (checkout / "sleep").mkdir()
    executable(checkout / "sleep" / "sleep", "exit 0")
    result = setup(checkout, MTP_VENV=folder, PATH=f"{checkout / 'sleep'}{os.pathsep}{os.environ['PATH']}")
    assert tried.exists(), "a stale stamp must lead to an installation"
    assert "failed three times" in result.stderr
    assert {entry.name for entry in checkout.glob(".venv*")} == {folder, f"{folder}.lock"}


def test_the_constraints_are_within_the_ranges_of_pyproject():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    paths = sorted((ROOT / "tools").glob("constraints-cpu-py*.txt"))
    assert len(paths) == 2
    for path in paths:
        pins = dict(line.split("==") for line in path.read_text().split())
        python = re.search(r"py(\d)(\d+)", path.name).groups()
        for text in requires("mtp-megatron"):
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": "dev"}):
                continue
            if requirement.name == "mtp-megatron":
                continue
            assert requirement.specifier.contains(pins[requirement.name]), f"{path.name}: {requirement}"
        expected = "0.16.1" if python == ("3", "11") else "0.19.2"
        assert pins["megatron-core"] == expected
