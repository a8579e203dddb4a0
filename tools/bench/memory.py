"""Peak memory of a piece of work: on the CPU tensor by tensor or by the allocator, on CUDA by its allocator."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that were made while the mode was on and are still alive.

    Every storage is counted once however many tensors view it, from the operation that returns it to the moment when
    nobody holds it any more (a weak reference says when). Storages that an operation received from outside, such as
    parameters, gradient buffers and data, are not counted.

    Scratch memory inside an operation is not seen, nor is what compiled code allocates: :func:`allocator_peak` sees it.

    Attributes:
        now: bytes alive.
        peak: largest value that ``now`` had.
        at_peak: ``(bytes, shape, dtype, operation)`` of the storages alive at the peak, the largest first; kept with
            ``explain``.
    """

    def __init__(self, explain: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.at_peak: list[tuple[int, tuple[int, ...], str, str]] = []
        self._explain = explain
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._about: dict[int, tuple[tuple[int, ...], str, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, counted=False, operation="")
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, counted=True, operation=str(func))
        return result

    def _see(self, tensor: Tensor, counted: bool, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if counted else -1  # -1: from outside, never counted
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._about[key] = (tuple(tensor.shape), str(tensor.dtype), operation)
        size = self._sizes[key]
        if size >= 0 and size != storage.nbytes():  # new, or resized
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes() - size
            if self.now > self.peak:
                self.peak = self.now
                if self._explain:
                    alive = [(size, *self._about[key]) for key, size in self._sizes.items() if size > 0]
                    self.at_peak = sorted(alive, reverse=True)

    def _forget(self, key: int) -> None:
        self.now -= max(self._sizes.pop(key, 0), 0)
        self._references.pop(key, None)
        self._about.pop(key, None)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def live_peak(work: Callable[[], object]) -> int:
    """Peak bytes of live tensors that ``work`` made."""
    gc.collect()
    with LiveTensors() as live:
        work()
    return live.peak


def allocator_peak(work: Callable[[], object]) -> int:
    """Peak bytes that ``work`` held of PyTorch's CPU allocator beyond what was held before, scratch memory included.

    The profiler records every allocation and every release of memory that was allocated while it ran.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


def cuda_peak(work: Callable[[], object]) -> int:
    """Peak bytes that ``work`` held of the CUDA caching allocator beyond what was held before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_peak(work: Callable[[], object]) -> int:
    """Peak bytes by the allocator of the device that this process uses."""
    return cuda_peak(work) if torch.cuda.is_available() else allocator_peak(work)
