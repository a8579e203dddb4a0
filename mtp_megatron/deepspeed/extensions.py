"""The lock of a build that was killed: DeepSpeed's C++ extensions, compiled at the first start, wait for it without a
word and without end (``torch.utils.file_baton``)."""

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
