"""Importing torch and megatron-core without the garbage collector's part in it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """Inside, Python's garbage collector is off; what there is at the end it never looks at again.

    These imports make a million objects that live as long as the process. Going through them again and again while they
    get more takes a quarter of the import's time, and once more at every later full collection.
    """
    enabled = gc.isenabled()
    gc.collect()  # or garbage of the caller's would stay too, tensors among it
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
