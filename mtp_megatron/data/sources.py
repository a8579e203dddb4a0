"""Which files a corpus is made of, in a stable order."""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtp_megatron.data.corpus import Tally
from mtp_megatron.data.formats import decompressed, extension, not_read
from mtp_megatron.data.reading import Rejected, Source
from mtp_megatron.errors import ConfigError, DataError

DEFAULT_EXTENSIONS = (".py", ".txt", ".md", ".jsonl", ".ndjson")
_NEVER_ENTERED = frozenset({"__pycache__"})
_INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages"})
_TESTS = frozenset({"test", "tests", "idle_test"})


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_sources(
    paths: Sequence[Path],
    extensions: Sequence[str] = DEFAULT_EXTENSIONS,
    *,
    with_tests: bool = False,
    tally: Tally | None = None,
) -> tuple[Source, ...]:
    """List the files of a corpus in a stable order: the paths as given, each folder's files sorted by relative path.

    Args:
        paths: files and folders. A file is taken whatever its extension; a folder is searched recursively, hidden
            files and folders and ``__pycache__`` excepted. Without paths: the Python source of the running
            interpreter's standard library, without installed packages.
        extensions: which files of a folder to take, for example ``(".py", ".md")``; upper and lower case are alike,
            and ``.jsonl`` means ``.jsonl.gz`` too.
        with_tests: take the standard library's own tests too (not every distribution ships them).
        tally: what is left out of a folder for another reason than its extension is added to it.

    Raises:
        ConfigError: an extension that is not one, or one of files that are not read.
        DataError: a path that does not exist or is not read, or nothing to take.
    """
    _check_extensions(extensions)
    if not paths:
        return _standard_library_sources(with_tests)
    wanted = {wish.lower() for wish in extensions}
    sources: dict[Path, Source] = {}  # keyed by the resolved path: a file reachable twice is one document
    left_out: dict[Path, Rejected] = {}
    passed_over: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for source in _walk(path, excluded=_NEVER_ENTERED):
                if reason := _reason_against(source.path, wanted):
                    left_out.setdefault(source.path.resolve(), Rejected(source.name, reason))
                elif _is_wanted(source.path, wanted):
                    sources.setdefault(source.path.resolve(), source)
                else:
                    passed_over[source.path.suffix.lower() or "(no extension)"] += 1
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder. Check the paths given to preprocess.")
        elif refusal := not_read(path):
            raise DataError(f"{path}: {refusal.problem}. {refusal.remedy}")
        else:
            sources.setdefault(path.resolve(), Source(path, path.name))
    if not sources:
        seen = ", ".join(f"{count} x {name}" for name, count in passed_over.most_common(8)) or "no files at all"
        lost = "".join(f"\n  {item}" for item in list(left_out.values())[:5])
        raise DataError(
            f"{', '.join(map(str, paths))}: no file with the extension {', '.join(sorted(wanted))}; found {seen}. "
            f"Name the extensions to take with --extensions.{lost}"
        )
    for item in left_out.values():
        (Tally() if tally is None else tally).reject(item)
    return tuple(sources.values())


def _check_extensions(extensions: Sequence[str]) -> None:
    for wish in extensions:
        if not wish.startswith(".") or len(wish) < 2:
            raise ConfigError("--extensions", wish, "is not a file extension", "Write it like .py.")
        if refusal := not_read(Path(f"x{wish}")):
            raise ConfigError("--extensions", wish, f"such a file {refusal.problem}", refusal.remedy)


def _is_wanted(path: Path, wanted: set[str]) -> bool:
    """By the extension of its text (``.jsonl``), or that with its compression (``.jsonl.gz``)."""
    return extension(path) in wanted or "".join(path.suffixes[-2:]).lower() in wanted


def _reason_against(path: Path, wanted: set[str]) -> str | None:
    """Why a file in a folder is left out though a user may expect it to be read."""
    plain = decompressed(path)
    if plain is not None and extension(path) in wanted and plain.is_file():
        return f"{plain.name} lies beside it and is read in its place"
    refusal = not_read(path)
    return refusal and f"{refusal.problem}. {refusal.remedy}"


def _standard_library_sources(with_tests: bool) -> tuple[Source, ...]:
    root = standard_library()
    excluded = _NEVER_ENTERED | _INSTALLED_PACKAGES | (frozenset() if with_tests else _TESTS)
    sources = tuple(
        source
        for source in _walk(root, excluded=excluded)
        # _sysconfigdata_*.py records how and where this interpreter was built: not source, and never the same twice.
        if source.path.suffix == ".py" and not source.path.name.startswith("_sysconfigdata")
    )
    if not sources:
        raise DataError(
            f"{root}: this interpreter's standard library has no .py files (a stripped or zipped installation). "
            "Give preprocess the files or folders to read."
        )
    return sources


def _walk(root: Path, excluded: frozenset[str]) -> Iterator[Source]:
    found: list[Source] = []
    for folder, folders, files in os.walk(root):  # does not follow links to folders: no loops
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        for name in files:
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                found.append(Source(path, f"{root.resolve().name}/{path.relative_to(root).as_posix()}"))
    yield from sorted(found, key=lambda source: source.name)
