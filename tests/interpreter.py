"""Triton on a CPU: its interpreter and its compiler, in worker processes that alone can import it.

CPU builds of torch come without triton, and megatron-core takes other paths through its code where it finds it. So
tools/setup.sh puts it into a folder of its own. Without that folder the one that torch has brought is used.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.harness import run_world

FOLDER = Path(sys.prefix) / "triton"


def _why_not() -> str | None:
    if (FOLDER / "triton").is_dir():
        return None
    if importlib.util.find_spec("triton") is None:
        return "needs triton: run tools/setup.sh"
    return (
        "needs triton 3.7, which works with numpy 2.4" if Version(metadata.version("triton")) < Version("3.7") else None
    )


needs_triton = pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")


def run_interpreted(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`run_world` in new processes in which triton can be imported and is its interpreter."""
    return run_world(_with_triton, world_size, fn, args, env={"TRITON_INTERPRET": "1"}, fresh=True)


def run_compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(0, 1, *args)` in a new process in which triton can be imported and compiles, which takes no GPU."""
    return run_world(_with_triton, 1, fn, args, env={"TRITON_INTERPRET": "0"}, fresh=True)[0]


def _with_triton(rank: int, world: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    sys.path.insert(0, str(FOLDER))
    return fn(rank, world, *args)
