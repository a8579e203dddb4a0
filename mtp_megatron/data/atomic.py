"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mtp_megatron.errors import DataError


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` to write into; it becomes ``target`` when the block ends well.

    On an exception the hidden folder is removed. After a crash (``kill -9``, power) it stays, with a name that nothing
    takes for a data set, and the next run removes it. Two runs at once: the second is refused.

    Args:
        target: must not exist, or be an empty folder.

    Raises:
        DataError: the folder cannot be written, or another process is writing it.
    """
    target = target.absolute()
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{target}: cannot be created ({error}). Choose a folder that you may write.") from error
    try:
        _claim(lock, partial)
        try:
            _empty(partial)  # what a killed run left
            yield partial
            _sync(partial)
            os.rename(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise DataError(f"{target}: could not be written ({error}). Nothing was left behind.") from error
            raise
    finally:
        os.close(lock)  # and so releases the lock


def _claim(lock: int, partial: Path) -> None:
    """Lock the folder itself: the lock ends with the process, so a killed run never blocks the next one."""
    busy = DataError(f"{partial}: another process is writing this folder. Wait, or choose another --output.")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    # Between opening and locking, the other run may have finished and renamed the folder that was opened.
    mine = os.fstat(lock)
    try:
        there = os.stat(partial)
    except FileNotFoundError:
        raise busy from None
    if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
        raise busy


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    """Put the content on the disk before the name: a power cut must not leave a whole-looking folder of nothing."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
