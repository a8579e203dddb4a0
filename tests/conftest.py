"""Shared by every test: one thread per process, markers that skip with a reason, and the worker processes' end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
# What DeepSpeed compiles at its first start is kept in the checkout, made by the ninja of this environment: where
# torch would keep it, every environment of a user and every version of ninja compiles it again, most of a minute,
# after another one did.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).resolve().parents[1] / ".torch_extensions"))
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


@pytest.fixture(scope="session", autouse=True)
def _worker_processes() -> Iterator[None]:
    """Worlds share worker processes (tests.harness); they end with the session."""
    yield
    if "tests.harness" in sys.modules:
        sys.modules["tests.harness"].close()
