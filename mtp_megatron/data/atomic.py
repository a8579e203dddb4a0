"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mtp_megatron.errors import DataError
from mtp_megatron.file_lock import try_lock

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` to write into; it becomes ``target`` when the block ends well.

    On an exception the hidden folder is removed. After a crash (``kill -9``, power) it stays, with a name that nothing
    takes for a data set, and the next run removes it. Two runs at once: the second is refused.

    Args:
        target: must not exist, or be an empty folder.

    Raises:
        DataError: the folder cannot be written or get that name, or another process is writing it.
    """
    target = target.absolute()
    refuse_unnameable(target)
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{target}: cannot be created ({error}). Choose a folder that you may write.") from error
    try:
        claim(lock, partial)
        try:
            empty(partial)  # what a killed run left
            yield partial
            publish(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise DataError(f"{target}: could not be written ({error}). Nothing was left behind.") from error
            raise
    finally:
        os.close(lock)  # and so releases the lock


def refuse_unnameable(target: Path) -> None:
    """Refuse a name that no folder can be given at the end, which would be found after all the work.

    Raises:
        DataError: it is a link, or a file system is mounted there, as a container's volume is.
    """
    if target.is_symlink():
        raise DataError(
            f"{target}: a link (to {target.readlink()}), which a finished folder cannot replace. Give the folder that "
            "it leads to, or remove the link."
        )
    if os.path.ismount(target):
        raise DataError(
            f"{target}: a file system is mounted there, and a finished folder cannot take its place. Give a folder in "
            f"it, say {target / 'out'}."
        )


def claim(lock: int, path: Path) -> None:
    """Lock a folder that is being written, by the descriptor ``lock`` of it or of a file in it, which ``path`` names.

    Raises:
        DataError: another process is writing it.
    """
    busy = DataError(f"{path}: another process is writing this folder. Wait, or choose another --output.")
    try:
        if none := try_lock(lock):
            logger.warning(
                "%s: its file system has no locks (%s), so nobody notices a second process that writes it too. Mount "
                "it with them (Lustre: -o flock), or take care: two of them damage the folder.",
                path,
                none,
            )
    except BlockingIOError as error:
        raise busy from error
    except OSError as error:
        raise DataError(f"{path}: cannot be locked ({error}). Choose another --output.") from error
    # Between opening and locking, the other run may have finished and renamed or removed what was opened.
    mine = os.fstat(lock)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        raise busy from None
    if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
        raise busy


def empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def publish(folder: Path, target: Path) -> None:
    """Put the content on the disk before the name: a power cut must not leave a whole-looking folder of nothing."""
    sync_all(folder)
    os.rename(folder, target)
    sync(target.parent)


def sync_all(folder: Path) -> None:
    """Put a folder and everything in it on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
