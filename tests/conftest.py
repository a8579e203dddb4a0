"""Shared by every test: one thread per process, markers that skip with a reason, and the worker processes' end."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
# What DeepSpeed compiles, beside the interpreter it is made for, by its own ninja (another compiles again). In
# torch's default folder every checkout compiles anew, and a build that was killed leaves a lock that blocks all others.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import pytest

_PACKAGES = {"deepspeed": "deepspeed"}
_SERVING = Path(__file__).resolve().parents[1] / ".venv-serving" / "bin" / "python"


def serving_python() -> str | None:
    """The interpreter that has vLLM: of ``MTP_VLLM_PYTHON``, or what tools/setup_serving.sh made."""
    return os.environ.get("MTP_VLLM_PYTHON") or (
        str(_SERVING) if (_SERVING.parents[1] / ".mtp-setup").exists() else None
    )


def _why_skipped(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None if they can."""
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "needs a CUDA device"
    if marker == "serving":
        return None if serving_python() else "needs vLLM: run tools/setup_serving.sh, or set MTP_VLLM_PYTHON"
    package = _PACKAGES[marker]
    if package == "deepspeed" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "needs a C++ compiler: DeepSpeed compiles its communication for CPUs"
    return None if importlib.util.find_spec(package) else f"needs the package {package}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {marker: _why_skipped(marker) for marker in ("gpu", "serving", *_PACKAGES)}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    gc.freeze()  # what the test modules have imported stays: going through it takes 0.3 s of each full collection


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("deepspeed"):
        _compile_deepspeed()


@functools.cache
def _compile_deepspeed() -> None:
    """Compile what DeepSpeed compiles at its first start, once and before any test's own timeout runs."""
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink(missing_ok=True)  # of a build that was killed
    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if made.returncode:
        pytest.fail(f"DeepSpeed's communication does not compile here:\n{made.stdout[-2000:]}{made.stderr[-2000:]}")


@pytest.fixture(scope="session", autouse=True)
def _worker_processes() -> Iterator[None]:
    """Worlds share worker processes (tests.harness); they end with the session."""
    yield
    if "tests.harness" in sys.modules:
        sys.modules["tests.harness"].close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set for trainings, as ``tests.training_runs`` makes it."""
    from tests.training_runs import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def fast_quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`tools/quickstart.sh --fast`, run once for all tests that look at what it makes: its folder and its output."""
    from tests.quickstart_runs import quickstart

    folder = tmp_path_factory.mktemp("quickstart")
    result = quickstart(folder, "--fast")
    assert result.returncode == 0, result.stdout
    return folder, result.stdout


@pytest.fixture
def without_nohup() -> Iterator[None]:
    """SIGHUP as a terminal has it, also where the tests themselves were started with nohup; put back at the end."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)
