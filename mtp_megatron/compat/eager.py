"""megatron-core without torch's compiler, for machines without a GPU.

``megatron.core.jit.jit_fuser`` is ``torch.compile``: decorating with it imports dynamo and inductor, a third of the
processor time that a rank takes to start, and calling what it decorates would compile C++ to gain nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtp_megatron.compat.patching import Replacement


def _leave(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorator with or without options, as ``torch.compile``: the function as it is."""
    return function if function is not None else _leave


# For the modules that are imported later; those of `import_megatron` have taken the name over already.
JIT_FUSER = Replacement("megatron.core.jit", "jit_fuser", lambda original: _leave, "imports torch's compiler")


def import_megatron() -> None:
    """Import ``megatron.core`` with its functions left as they are; does nothing where somebody has imported it."""
    if "megatron.core" in sys.modules:
        return
    with _no_compiler():
        jit: Any = importlib.import_module("megatron.core.jit")
    jit.jit_fuser = torch.compile  # what it would have been: JIT_FUSER replaces it, and puts it back


@contextmanager
def _no_compiler() -> Iterator[None]:
    compiler = torch.compile
    torch.compile = _leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
