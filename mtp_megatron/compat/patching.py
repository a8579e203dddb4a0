"""Replacing an attribute of a foreign module or class so that it can be put back exactly as it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class Replacement:
    """One attribute to be replaced.

    Attributes:
        owner: dotted path of the module or class that holds the attribute.
        name: the attribute.
        make: maps the original to its stand-in.
        why: what goes wrong without it.
        missing: the attribute is not there, and should be; `make` gets None.
    """

    owner: str
    name: str
    make: Callable[[Any], Any]
    why: str
    missing: bool = False


def _resolve(path: str) -> Any:
    """Module, or class inside a module, at a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def replace(row: Replacement, undo: list[Callable[[], None]]) -> None:
    """Apply one row and append to `undo` the call that reverts it."""
    owner = _resolve(row.owner)
    own = vars(owner).get(row.name, _MISSING)  # methods inherited from TensorBase must be restored by deletion
    setattr(owner, row.name, row.make(None if row.missing else getattr(owner, row.name)))
    undo.append(lambda: delattr(owner, row.name) if own is _MISSING else setattr(owner, row.name, own))
