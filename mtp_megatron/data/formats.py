"""What a file's name says of its format, and how each format is opened (pure Python)."""

from __future__ import annotations

import contextlib
import importlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from packaging.version import Version

from mtp_megatron.errors import DataError
from mtp_megatron.install import EXPLANATION, install_command

JSON_LINES = frozenset({".jsonl", ".ndjson"})
JSON = ".json"  # lines or one document: the content decides
PARQUET = ".parquet"
# Module whose open() reads it as a stream. Imported when used: some builds of Python lack one or the other.
_DECOMPRESSORS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "mtp_megatron.data.zst"}
_COMPRESSED = "is compressed, and only JSON lines are read so (.jsonl.gz)"


class NotRead(NamedTuple):
    """What is wrong with a format, and what to do about it."""

    problem: str
    remedy: str


_NOT_READ = {
    ".gz": NotRead(_COMPRESSED, "Decompress it with gunzip."),
    ".bz2": NotRead(_COMPRESSED, "Decompress it with bunzip2."),
    ".xz": NotRead(_COMPRESSED, "Decompress it with unxz."),
    ".zst": NotRead(_COMPRESSED, "Decompress it with zstd -d."),
    # A truncated stream of Arrow's, which a cache of Hugging Face datasets is, cannot be told from a whole one.
    ".arrow": NotRead(
        "is an Arrow table, which is not read", "Write it as Parquet: datasets.Dataset.from_file(...).to_parquet(...)."
    ),
}


class Package(NamedTuple):
    """A package that a format takes: its name, the module that reads, the extra of this project that installs it, the
    oldest release that will do."""

    name: str
    module: str
    extra: str
    least: str


# pyarrow before 14.0.1 runs code that a Parquet file holds (CVE-2023-47248); these are the oldest that were run.
_PACKAGES = {
    PARQUET: Package("pyarrow", "pyarrow.parquet", "parquet", "17"),
    ".zst": Package("zstandard", "zstandard", "zst", "0.22"),
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


def import_packages(paths: Iterable[Path]) -> None:
    """Import what the formats of the files take: a package that is missing should not end a pass in its middle.

    Raises:
        DataError: see :func:`import_package`.
    """
    first: dict[str, Path] = {}
    for path in paths:
        first.setdefault(path.suffix.lower(), path)
    for suffix, path in first.items():
        if suffix in _PACKAGES:
            import_package(path)


def import_package(path: Path) -> None:
    """Import the package that the format of the file takes.

    It is an error not to have it, in a folder too: without these files, the same folder would make another data set on
    another machine.

    Raises:
        DataError: it cannot be imported or is too old; with the command that installs it and the way to do without.
    """
    package = _PACKAGES[path.suffix.lower()]
    try:
        importlib.import_module(package.module)
        version = importlib.import_module(package.name).__version__
    except ImportError as error:
        problem = f"which cannot be imported ({error})"
    else:
        if Version(version) >= Version(package.least):
            return
        problem = f"{package.least} or newer, and {version} is installed"
    raise DataError(
        f"{path}: reading it takes the package {package.name}, {problem}. Install it: "
        f"{install_command(package.extra)} ({EXPLANATION}). To leave such files out of a folder, name the extensions "
        "to take with --extensions."
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where :func:`decompressed` says so.

    Raises:
        DataError: this Python was built without what decompresses it, or the package that does is not there.
        UnreadableError: the file cannot be opened, or reading it fails within the block.
    """
    suffix = path.suffix.lower()
    name = "io" if decompressed(path) is None else _DECOMPRESSORS[suffix]
    if name != "io" and suffix in _PACKAGES:
        import_package(path)
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
