"""How far a long pass has come, on the disk: files that only grow, and a small record of how much of them counts.

What a record counts is on the disk before the record is, and what a killed process wrote after it is cut off, so a pass
goes on from its last record whatever ended it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mtp_megatron.data.atomic import sync
from mtp_megatron.errors import DataError

EVERY = 10.0  # seconds; what is done after the last record is done again
_SHARE = 50  # records take at most this part of the time, where the file system is slow
_REMEDY = "Begin anew with --restart."


class Record(BaseModel):
    """Base of what is recorded of a pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def write(self, path: Path) -> None:
        """Replace the record at ``path``; a crash leaves the one or the other."""
        write_whole(path, json.dumps(self.model_dump()).encode())  # pydantic's own takes no name that is not UTF-8


_R = TypeVar("_R", bound=Record)


def read_record(path: Path, kind: type[_R]) -> _R | None:
    """The record at ``path``, or None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return kind.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{path}: not a record that this release wrote ({error}). {_REMEDY}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that has its old content or the new one, whatever happens, and that is on the disk on return."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    sync(new)
    os.replace(new, path)
    sync(path.parent)


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file to append to its first ``size`` bytes; what comes after them is cut off.

    Raises:
        DataError: it is shorter than that.
    """
    stream = path.open("ab")
    found = stream.tell()
    if found < size:
        stream.close()
        raise DataError(f"{path}: {found} bytes, but {size} were recorded, so it was damaged. {_REMEDY}")
    stream.truncate(size)
    stream.seek(size)
    return stream


def flush(stream: BinaryIO) -> None:
    """Put what was written on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


class Pace:
    """When to record: every 10 seconds, and less often where recording takes long.

    Args:
        record: puts files and record on the disk.
    """

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record
        self._due = time.monotonic() + EVERY

    def tick(self) -> None:
        """To be called where files and record agree: after each document."""
        start = time.monotonic()
        if start >= self._due:
            self._record()
            now = time.monotonic()
            self._due = now + max(EVERY, _SHARE * (now - start))
