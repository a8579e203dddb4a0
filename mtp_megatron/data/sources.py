"""Which files a corpus is made of, in a stable order."""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtp_megatron.data.reading import Source
from mtp_megatron.errors import ConfigError, DataError

DEFAULT_EXTENSIONS = (".py", ".txt", ".md", ".jsonl")
_NEVER_ENTERED = frozenset({"__pycache__"})
_INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages"})
_TESTS = frozenset({"test", "tests", "idle_test"})


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_sources(
    paths: Sequence[Path], extensions: Sequence[str] = DEFAULT_EXTENSIONS, *, with_tests: bool = False
) -> tuple[Source, ...]:
    """List the files of a corpus in a stable order: the paths as given, each folder's files sorted by relative path.

    Args:
        paths: files and folders. A file is taken whatever its extension; a folder is searched recursively, hidden
            files and folders and ``__pycache__`` excepted. Without paths: the Python source of the running
            interpreter's standard library, without installed packages.
        extensions: which files of a folder to take, for example ``(".py", ".md")``; upper and lower case are alike.
        with_tests: take the standard library's own tests too (not every distribution ships them).

    Raises:
        ConfigError: an extension that is not one.
        DataError: a path that does not exist, or nothing to take.
    """
    for extension in extensions:
        if not extension.startswith(".") or len(extension) < 2:
            raise ConfigError("--extensions", extension, "is not a file extension", "Write it like .py.")
    if not paths:
        return _standard_library_sources(with_tests)
    wanted = {extension.lower() for extension in extensions}
    sources: dict[Path, Source] = {}  # keyed by the resolved path: a file reachable twice is one document
    passed_over: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for source in _walk(path, excluded=_NEVER_ENTERED):
                if source.path.suffix.lower() in wanted:
                    sources.setdefault(source.path.resolve(), source)
                else:
                    passed_over[source.path.suffix.lower() or "(no extension)"] += 1
        elif path.exists():
            sources.setdefault(path.resolve(), Source(path, path.name))
        else:
            raise DataError(f"{path}: no such file or folder. Check the paths given to preprocess.")
    if not sources:
        seen = ", ".join(f"{count} x {name}" for name, count in passed_over.most_common(8)) or "no files at all"
        raise DataError(
            f"{', '.join(map(str, paths))}: no file with the extension {', '.join(sorted(wanted))}; found {seen}. "
            "Name the extensions to take with --extensions."
        )
    return tuple(sources.values())


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
