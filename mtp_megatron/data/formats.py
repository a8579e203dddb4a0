"""What a file's name says of its format, and how each format is opened (pure Python)."""

from __future__ import annotations

import contextlib
import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from mtp_megatron.errors import DataError

JSON_LINES = frozenset({".jsonl", ".ndjson"})
JSON = ".json"  # lines or one document: the content decides
# Module whose open() reads it as a stream. Imported when used: some builds of Python lack one or the other.
_DECOMPRESSORS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_COMPRESSED = "is compressed, and only JSON lines are read so (.jsonl.gz)"
_TO_LINES = "Write its column of text as JSON lines (.jsonl)."


class NotRead(NamedTuple):
    """What is wrong with a format, and what to do about it."""

    problem: str
    remedy: str


_NOT_READ = {
    ".gz": NotRead(_COMPRESSED, "Decompress it with gunzip."),
    ".bz2": NotRead(_COMPRESSED, "Decompress it with bunzip2."),
    ".xz": NotRead(_COMPRESSED, "Decompress it with unxz."),
    ".zst": NotRead("is compressed with Zstandard, which is not read", "Decompress it with zstd -d."),
    ".parquet": NotRead("is a Parquet table, which is not read", _TO_LINES),
    ".arrow": NotRead("is an Arrow table, which is not read", _TO_LINES),
}


class UnreadableError(Exception):
    """A file that cannot be read to its end: no permission, a failing disk, a damaged or truncated compressed file."""


def extension(path: PurePath) -> str:
    """The extension that says what the text is, in lower case: ``.jsonl`` for ``a.JSONL`` and for ``a.jsonl.gz``."""
    last = path.suffix.lower()
    if last in _DECOMPRESSORS:
        inner = PurePath(path.stem).suffix.lower()
        if inner in JSON_LINES or inner == JSON:
            return inner
    return last


def decompressed(path: Path) -> Path | None:
    """The path without its compression, where it is JSON lines in a compression that is read."""
    return path.with_suffix("") if extension(path) != path.suffix.lower() else None


def not_read(path: PurePath) -> NotRead | None:
    """Why a file of this name is not read; None where it is."""
    return _NOT_READ.get(extension(path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where :func:`decompressed` says so.

    Raises:
        DataError: this Python was built without what decompresses it.
        UnreadableError: the file cannot be opened, or reading it fails within the block.
    """
    name = "io" if decompressed(path) is None else _DECOMPRESSORS[path.suffix.lower()]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{path}: this Python was built without {name}, which decompresses it. Decompress the file first."
        ) from error
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, getattr(module, "LZMAError", OSError))
    try:
        with module.open(path, "rb") as stream:
            yield stream
    except damaged as error:
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
