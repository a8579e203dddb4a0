"""Exact bytes of the tensors that are alive, over time, with who made them; for real and for fake tensors alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage from its making to its end.

    Attributes:
        nbytes: its size.
        shape, dtype: of the tensor that was made with it.
        operation: the aten operation that made it.
        maker: what the recorder's ``maker`` said when it was made.
        category: set by who knows it.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    maker: Any
    category: str | None = None


class LiveMemory(TorchDispatchMode):
    """While active, records every storage that an operation makes and when it is freed.

    What the allocator rounds up, what kernels use inside, and tensors made without the dispatcher (states of random
    generators) do not count.

    Args:
        maker: asked at each allocation who is making it.

    Attributes:
        current: bytes alive now.
        peak: the most that was alive since the start, or since :meth:`restart_peak`.
        peak_at: how many events had passed then.
    """

    def __init__(self, maker: Callable[[], Any] = tuple) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._maker = maker
        self._live: dict[int, tuple[weakref.ref, Allocation]] = {}
        self._events: list[Allocation] = []  # an allocation's first appearance is its making, the second its end
        self.peak_at = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, func)
        return result

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_at = self.current, len(self._events)

    def restore_peak(self, peak: int, peak_at: int) -> None:
        """Take an earlier peak up again (``peak`` and ``peak_at`` as they were), unless the present one is higher."""
        if peak >= self.peak:
            self.peak, self.peak_at = peak, peak_at

    def of(self, tensor: Tensor) -> Allocation | None:
        """The living allocation that holds ``tensor``; None for one that was made outside."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry else None

    def mark(self, tensors: Sequence[Tensor] | Iterator[Tensor], category: str) -> None:
        """Set the category of these tensors' allocations, unless they have one."""
        for tensor in tensors:
            allocation = self.of(tensor)
            if allocation is not None and allocation.category is None:
                allocation.category = category

    def at_peak(self) -> list[Allocation]:
        """What was alive when the most was."""
        alive: dict[int, Allocation] = {}
        for event in self._events[: self.peak_at]:
            if alive.pop(id(event), None) is None:
                alive[id(event)] = event
        return list(alive.values())

    def _see(self, tensor: Tensor, func: torch._ops.OpOverload) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        allocation = Allocation(size, tuple(tensor.shape), tensor.dtype, func._opname, self._maker())
        self._live[key] = (weakref.ref(storage, lambda _: self._free(key)), allocation)
        self._events.append(allocation)
        self.current += size
        if self.current > self.peak:
            self.peak, self.peak_at = self.current, len(self._events)

    def _free(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self._events.append(entry[1])
            self.current -= entry[1].nbytes
