"""Everything below a folder, in an order that the file system has no part in."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mtp_megatron.data.reading import UNREADABLE_REMEDY, Source
from mtp_megatron.errors import DataError

_LEADS_NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


@dataclass
class Found:
    """What lies below a folder, in the order of names: files, links to folders, and what leads to neither with why."""

    files: list[Source] = field(default_factory=list)
    links: list[Source] = field(default_factory=list)
    lost: list[tuple[Source, str]] = field(default_factory=list)


@dataclass
class Walker:
    """Walks folders, hidden files and folders excepted, and remembers them, so that links can be followed once.

    Args:
        excluded: names of folders that are not entered.
        skip_unreadable: a folder that cannot be listed is lost, in place of the error.
    """

    excluded: frozenset[str]
    skip_unreadable: bool = False
    _entered: set[tuple[int, int]] = field(default_factory=set)  # device and inode

    def walk(self, root: Path) -> Found:
        """What lies below ``root``; links to folders are listed, not followed.

        Raises:
            DataError: a folder that cannot be listed.
        """
        return self._walk(Source(root, root.resolve().name), known_too=True)

    def follow(self, links: list[Source]) -> Iterator[Found]:
        """What lies in the folders behind the links, and behind the links in them, wherever that was not walked yet.

        Raises:
            DataError: a folder that cannot be listed.
        """
        while links:
            beyond: list[Source] = []
            for link in links:
                found = self._walk(link, known_too=False)
                beyond += found.links
                yield found
            links = beyond

    def _walk(self, root: Source, *, known_too: bool) -> Found:
        found = Found()

        def lose(error: OSError) -> None:
            path = Path(error.filename)
            reason = f"cannot be read ({error.strerror})"
            if not self.skip_unreadable:
                raise DataError(f"{path}: {reason}. {UNREADABLE_REMEDY}") from error
            found.lost.append((_below(root, path), reason))

        for here, folders, files in os.walk(root.path, onerror=lose):
            try:
                new = self._enter(here)
            except OSError as error:
                lose(error)
                new = False
            if not new and not known_too:
                folders.clear()
                continue
            shown = [name for name in folders if name not in self.excluded and not name.startswith(".")]
            folders[:] = [name for name in shown if not os.path.islink(os.path.join(here, name))]
            found.links += [_below(root, Path(here, name)) for name in set(shown).difference(folders)]
            for path in [Path(here, name) for name in files if not name.startswith(".")]:
                try:
                    if stat.S_ISREG(path.stat().st_mode):
                        found.files.append(_below(root, path))
                except OSError as error:
                    if error.errno not in _LEADS_NOWHERE:
                        lose(error)
                    elif path.is_symlink():
                        found.lost.append((_below(root, path), f"a link that leads nowhere (to {os.readlink(path)})"))
        found.files.sort(key=lambda source: source.name)
        found.links.sort(key=lambda source: source.name)
        found.lost.sort(key=lambda item: item[0].name)
        return found

    def _enter(self, folder: str) -> bool:
        """Whether the folder is new."""
        state = os.stat(folder)
        identity = (state.st_dev, state.st_ino)
        new = identity not in self._entered
        self._entered.add(identity)
        return new


def _below(root: Source, path: Path) -> Source:
    name = root.name if path == root.path else f"{root.name}/{path.relative_to(root.path).as_posix()}"
    return Source(path, name)
