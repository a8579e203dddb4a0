"""What a preprocess says while it works; nothing under ``--quiet``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

_T = TypeVar("_T")


def say(text: str, *, quiet: bool) -> None:
    """Print a line."""
    if not quiet:
        print(text, file=sys.stderr)


def document_bar(items: Iterable[_T], label: str, total: int | None, *, done: int = 0, quiet: bool) -> Iterator[_T]:
    """Pass the items on and count them, from ``done`` on; ``total`` is that of all, those done before included."""
    yield from tqdm(
        items, desc=label, total=total, initial=done, unit=" documents", disable=_hidden(quiet), leave=False
    )


def byte_bar(label: str, total: int, *, done: int = 0, quiet: bool) -> Any:
    """A bar to be told of bytes, which begins at ``done``."""
    return tqdm(desc=label, total=total, initial=done, unit="B", unit_scale=True, disable=_hidden(quiet), leave=False)


def _hidden(quiet: bool) -> bool:
    return quiet or not sys.stderr.isatty()
