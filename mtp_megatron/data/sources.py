"""Which files a corpus is made of, in a stable order."""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mtp_megatron.data.corpus import Tally
from mtp_megatron.data.formats import decompressed, extension, import_packages, not_read
from mtp_megatron.data.reading import Rejected, Source
from mtp_megatron.data.walk import Found, Walker
from mtp_megatron.errors import ConfigError, DataError

DEFAULT_EXTENSIONS = (".py", ".txt", ".md", ".jsonl", ".ndjson", ".parquet")
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
    skip_unreadable: bool = False,
    tally: Tally | None = None,
) -> tuple[Source, ...]:
    """List the files of a corpus in a stable order: the paths as given, each folder's files sorted by relative path.

    Links to folders are followed, and each folder is read once: under its own name where it lies in one of the paths,
    else under that of the first link to it.

    Args:
        paths: files and folders. A file is taken whatever its extension; a folder is searched recursively, hidden
            files and folders and ``__pycache__`` excepted. Without paths: the Python source of the running
            interpreter's standard library, without installed packages.
        extensions: which files of a folder to take, for example ``(".py", ".md")``; upper and lower case are alike,
            and ``.jsonl`` means ``.jsonl.gz`` and ``.jsonl.zst`` too.
        with_tests: take the standard library's own tests too (not every distribution ships them).
        skip_unreadable: leave out folders that cannot be listed, in place of the error.
        tally: what is left out of a folder for another reason than its extension is added to it.

    Raises:
        ConfigError: an extension that is not one, or one of files that are not read.
        DataError: a path that does not exist, is no file or folder, or is not read; a folder that cannot be listed;
            nothing to take; or a file whose format takes a package that is not installed.
    """
    _check_extensions(extensions)
    if not paths:
        return _standard_library_sources(with_tests)
    choice = _Choice({wish.lower() for wish in extensions})
    walker = Walker(_NEVER_ENTERED, skip_unreadable)
    links: list[list[Source]] = []
    for position, path in enumerate(paths):
        links.append([])
        if not _exists(path):
            raise DataError(f"{path}: no such file or folder. Check the paths given to preprocess.")
        if path.is_dir():
            found = walker.walk(path)
            choice.consider(position, found)
            links[-1] = found.links
        elif not path.is_file():
            raise DataError(
                f"{path}: a pipe or a device, and the corpus is read more than once. Write it to a file, and give that."
            )
        elif refusal := not_read(path):
            raise DataError(f"{path}: {refusal.problem}. {refusal.remedy}")
        else:
            choice.take(position, Source(path, path.name))
    for position in range(len(paths)):
        for found in walker.follow(links[position]):
            choice.consider(position, found)
    if not choice.taken:
        raise DataError(f"{', '.join(map(str, paths))}: {choice.nothing()}")
    import_packages(source.path for _, source in choice.taken.values())
    for item in choice.left_out.values():
        (Tally() if tally is None else tally).reject(item)
    return tuple(source for _, source in sorted(choice.taken.values(), key=lambda item: (item[0], item[1].name)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give yourself the permission.") from error


class _Choice:
    """What is taken of what was found. Keyed by the resolved path: a file reachable twice is one document."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.taken: dict[Path, tuple[int, Source]] = {}  # with the position of the path that led to it
        self.left_out: dict[str, Rejected] = {}  # by the absolute path, for paths that overlap
        self.passed_over: Counter[str] = Counter()

    def take(self, position: int, source: Source) -> None:
        self.taken.setdefault(source.path.resolve(), (position, source))

    def leave_out(self, source: Source, reason: str) -> None:
        self.left_out.setdefault(os.path.abspath(source.path), Rejected(source.name, reason))

    def consider(self, position: int, found: Found) -> None:
        for source, reason in found.lost:
            self.leave_out(source, reason)
        for source in found.files:
            if against := _reason_against(source.path, self.wanted):
                self.leave_out(source, against)
            elif _is_wanted(source.path, self.wanted):
                self.take(position, source)
            else:
                self.passed_over[source.path.suffix.lower() or "(no extension)"] += 1

    def nothing(self) -> str:
        """The complaint that nothing was taken."""
        seen = ", ".join(f"{count} x {name}" for name, count in self.passed_over.most_common(8)) or "no files at all"
        lost = "".join(f"\n  {item}" for item in list(self.left_out.values())[:5])
        return (
            f"no file with the extension {', '.join(sorted(self.wanted))}; found {seen}. Name the extensions to take "
            f"with --extensions.{lost}"
        )


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
        for source in Walker(excluded).walk(root).files
        # _sysconfigdata_*.py records how and where this interpreter was built: not source, and never the same twice.
        if source.path.suffix == ".py" and not source.path.name.startswith("_sysconfigdata")
    )
    if not sources:
        raise DataError(
            f"{root}: this interpreter's standard library has no .py files (a stripped or zipped installation). "
            "Give preprocess the files or folders to read."
        )
    return sources
