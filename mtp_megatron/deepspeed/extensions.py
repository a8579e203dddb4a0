"""What DeepSpeed compiles at its first start: which of it is done without, and the lock of a build that was killed, for
which others wait without a word and without end (``torch.utils.file_baton``)."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

STALE_AFTER = 300.0  # seconds; what DeepSpeed compiles without a GPU takes 40 to 80
logger = logging.getLogger(__name__)


def stale_locks(now: float | None = None) -> list[Path]:
    """Locks in torch's cache of extensions that are older than any build should take.

    Args:
        now: seconds since the epoch; None: by the clock.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    now = time.time() if now is None else now
    found = []
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):  # with and without a folder for each Python
        try:
            if now - lock.stat().st_mtime > STALE_AFTER:
                found.append(lock)
        except FileNotFoundError:  # its build has just ended
            continue
    return sorted(found)


def warn_of_stale_locks() -> None:
    """Say, once on each host, which locks may hold the job up for ever. They are left: a build may still run."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for lock in stale_locks():
        logger.warning(
            f"{lock} is older than {STALE_AFTER / 60:g} minutes: if no other job compiles extensions now, a build was "
            "killed, and DeepSpeed will wait for it without end. Delete the file, then start again."
        )


def why_no_fused_adam(cuda: bool) -> str | None:
    """Why DeepSpeed's own Adam is done without on a machine with or without a GPU; None where it is taken."""
    if not cuda:
        return "the one for CPUs takes a minute to compile"
    from deepspeed.git_version_info import installed_ops
    from torch.utils import cpp_extension

    if installed_ops.get("fused_adam") or cpp_extension.CUDA_HOME is not None:
        return None
    return "its kernels were not installed with it, and compiling them needs a CUDA toolkit (nvcc), which is not here"
