"""Timing of rivals in turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Measured repeats of one rival.

    Attributes:
        wall: seconds by the clock, one entry for each repeat.
        cpu: seconds of processor time of this process over all its threads; not comparable across processes.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Run every rival ``repeats`` times, one after another in rounds; each round starts with the next rival.

    Args:
        warmup: rounds that are not counted.
        synchronize: called before the clock is read, for work that goes on elsewhere (a device, other ranks).
    """
    names = list(rivals)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            synchronize()
            started, started_cpu = time.perf_counter(), time.process_time()
            rivals[name]()
            synchronize()
            if turn >= 0:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
    return {name: Times(tuple(wall[name]), tuple(cpu[name])) for name in names}


def synchronize_device() -> None:
    """Wait for the CUDA device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
