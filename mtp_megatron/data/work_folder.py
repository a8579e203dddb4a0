"""The folder in which a preprocess works, which outlives it: the next one goes on there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mtp_megatron.data import journal
from mtp_megatron.data.atomic import claim, publish, refuse_unnameable
from mtp_megatron.data.reading import Source
from mtp_megatron.errors import DataError

_INPUTS = "inputs.jsonl"
_WAYS = "--restart removes that work and begins anew, another --output leaves it alone."
_Input = list[Any]  # name, size, time of the last change; None for both where the file cannot be asked


class WorkFolder:
    """What a preprocess has done so far: ``data`` becomes the data set, the rest says how far each pass has come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"

    def refuse_other(self, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse to go on with other options than those that the work here was begun with.

        Raises:
            DataError: naming the options that differ.
        """
        # What was read without an error is the same with --skip-unreadable, though not the other way round.
        waived = {"skip_unreadable"} if now.get("skip_unreadable") else set()
        if changes := differences(recorded, now, waived):
            raise DataError(
                f"{self.path}: the work of an interrupted preprocess with other options ({changes}). The same options "
                f"go on with it, {_WAYS}"
            )

    def refuse_changed(self, sources: Sequence[Source], read: int | None) -> None:
        """Refuse to go on when a file that was read already is another one now (by name, size and time of change).

        Args:
            sources: the files of the corpus.
            read: how many of them were read; all of them when None.

        Raises:
            DataError: naming the first file that differs.
        """
        with (self.path / _INPUTS).open(encoding="utf-8") as lines:
            before = [json.loads(line) for line in lines]
        for old, new in zip_longest(before[:read], map(_input, sources[:read])):
            if old != new:
                raise DataError(
                    f"{self.path}: the work of an interrupted preprocess on other files ({_change(old, new)}). The "
                    f"same files go on with it, {_WAYS}"
                )

    def note_inputs(self, sources: Sequence[Source]) -> None:
        """Record what :meth:`refuse_changed` compares with; to be called before any of it is read."""
        lines = "".join(json.dumps(_input(source)) + "\n" for source in sources)
        journal.write_whole(self.path / _INPUTS, lines.encode())


@contextlib.contextmanager
def work_folder(output: Path, *, restart: bool = False) -> Iterator[WorkFolder]:
    """Yield the hidden folder beside ``output``, locked; its ``data`` becomes ``output`` when the block ends well.

    However else the block ends, the folder stays, and a later call finds in it what was done. It is removed at the end
    of a block that had nothing before and took less than :data:`.journal.EVERY` seconds. ``kill -9`` and power cuts
    are no exception. Two runs at once: the second is refused.

    Args:
        output: must not exist, or be an empty folder.
        restart: remove first what was done.

    Raises:
        DataError: the folder cannot be written or get that name, or another process is writing it.
    """
    output = output.absolute()
    refuse_unnameable(output)
    work = WorkFolder(output.parent / f".{output.name}.preprocess")
    lock_file = work.path / "lock"
    begun = time.monotonic()
    try:
        work.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(f"{output}: cannot be created ({error}). Choose a folder that you may write.") from error
    try:
        claim(lock, lock_file)
        worth_keeping = False
        try:
            if restart or not work.data.is_dir():  # without it: begun just now, published already, or being removed
                _empty(work)
                work.data.mkdir()
            worth_keeping = any(work.path.glob("*.json"))
            yield work
            publish(work.data, output)
        except BaseException as error:
            if worth_keeping or time.monotonic() - begun >= journal.EVERY:
                print(f"{work.path}: keeps what was done. The same command goes on with it.", file=sys.stderr)
            else:
                with contextlib.suppress(OSError):
                    _empty(work)
                    shutil.rmtree(work.path)
            if isinstance(error, OSError):
                raise DataError(f"{output}: could not be written ({error}). Put that right, and run again.") from error
            raise
        else:
            shutil.rmtree(work.path, ignore_errors=True)
    finally:
        os.close(lock)  # and so releases the lock


def remove_published(output: Path) -> None:
    """Remove what is left of the work on a data set that was published, after a crash in just that moment."""
    output = output.absolute()
    path = output.parent / f".{output.name}.preprocess"
    if path.is_dir() and not (path / "data").exists():
        shutil.rmtree(path, ignore_errors=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], waived: set[str] | None = None) -> str:
    """The options that changed, for messages; empty when none did."""
    keys = [key for key in new if old.get(key) != new[key] and key not in (waived or ())]
    return "; ".join(f"{key}={old.get(key)!r}, now {new[key]!r}" for key in keys)


def _empty(work: WorkFolder) -> None:
    """Remove everything but the lock, ``data`` first and at once: without it the rest counts for nothing."""
    gone = work.path / "gone"
    if work.data.exists():
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(work.data, gone)
    for entry in work.path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _input(source: Source) -> _Input:
    try:
        state = os.stat(source.path)
    except OSError:  # reading it says what is wrong
        return [source.name, None, None]
    return [source.name, state.st_size, state.st_mtime_ns]


def _change(old: _Input | None, new: _Input | None) -> str:
    if old is None or new is None or old[0] != new[0]:
        return f"{old[0] if old else 'nothing'} then, {new[0] if new else 'nothing'} in its place now"
    if old[1] != new[1]:
        return f"{old[0]} had {old[1]} bytes, now {new[1]}"
    return f"{old[0]} was written again since"
