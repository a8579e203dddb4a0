"""Names for parts of a step in a profile: of torch.profiler, or NVTX ranges under torch's ``emit_nvtx``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

PREFIX = "mtp/"
_NOTHING: AbstractContextManager[None] = nullcontext()


def label(*words: object) -> AbstractContextManager[object]:
    """A range that a profile shows as ``mtp/`` and ``words``; where none is recorded nothing, in less than a
    microsecond. Torch's own ``record_function`` takes a dispatch of two operations also then."""
    # Torch's flag and not _profiler_enabled(): that one is of a thread, and autograd runs heads in another one.
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(PREFIX + " ".join(map(str, words)))
