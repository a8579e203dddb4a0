"""When each pipeline stage works and when it waits: Megatron's 1F1B and interleaved schedules with uneven stages.

The order of work on each rank is megatron-core's (``pipeline_parallel.schedules``): a warm-up of forward passes, then
one forward and one backward in turn, then the remaining backward passes (Narayanan et al. 2021, arXiv 2104.04473). A
pass starts when its rank is free and its input has arrived; sending takes no time of either rank's. Pure Python.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of one microbatch through one chunk.

    Attributes:
        rank: pipeline rank.
        chunk: virtual stage on that rank; the global stage is ``chunk * ranks + rank``.
        microbatch: which.
        backward: which way.
        start, end: seconds since the step's beginning; 0 in an order without times.
    """

    rank: int
    chunk: int
    microbatch: int
    backward: bool
    start: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    ranks: pipeline ranks.
    passes: all of them, each rank's in its order.
    seconds: from the first pass's start to the last one's end.
    """

    ranks: int
    passes: tuple[Pass, ...]
    seconds: float

    def busy(self, rank: int) -> float:
        """Seconds that a rank works."""
        return sum(done.end - done.start for done in self.passes if done.rank == rank)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait, 0 to 1."""
        return 1.0 - sum(self.busy(rank) for rank in range(self.ranks)) / (self.ranks * self.seconds)


def order(ranks: int, rank: int, microbatches: int, chunks: int = 1) -> list[Pass]:
    """What one rank does, in megatron-core's order.

    Raises:
        ValueError: interleaved, and the microbatches are no multiple of the ranks.
    """
    if min(ranks, microbatches, chunks) < 1 or not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} with {chunks} chunks and {microbatches} microbatches")
    if chunks > 1 and microbatches % ranks:
        raise ValueError(f"{microbatches} microbatches, and the interleaved schedule takes {ranks} at a time")
    total = microbatches * chunks
    if chunks == 1:
        warmup = ranks - rank - 1
        visits = [(0, microbatch) for microbatch in range(microbatches)]
    else:
        warmup = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        visits = [
            (chunk, microbatch)
            for first in range(0, microbatches, ranks)
            for chunk in range(chunks)
            for microbatch in range(first, first + ranks)
        ]
    warmup = min(warmup, total)
    forward = [Pass(rank, chunk, microbatch, False) for chunk, microbatch in visits]
    backward = [Pass(rank, chunks - 1 - chunk, microbatch, True) for chunk, microbatch in visits]
    result = forward[:warmup]
    for index in range(total - warmup):
        result += [forward[warmup + index], backward[index]]
    return result + backward[total - warmup :]


def simulate(
    forward: Sequence[float],
    backward: Sequence[float],
    *,
    ranks: int,
    microbatches: int,
    latency: float = 0.0,
) -> Schedule:
    """Run one step.

    Args:
        forward, backward: seconds of each global stage's pass, length ``ranks * chunks``.
        latency: seconds that a tensor travels from one stage to the next.

    Raises:
        ValueError: the stages do not divide among the ranks, or a time is negative.
    """
    stages = len(forward)
    if len(backward) != stages or not stages or stages % ranks:
        raise ValueError(f"{stages} forward and {len(backward)} backward times for {ranks} ranks")
    if min(*forward, *backward, latency, 0.0) < 0.0:
        raise ValueError("a time is negative")
    chunks = stages // ranks
    queues = [order(ranks, rank, microbatches, chunks) for rank in range(ranks)]
    free = [0.0] * ranks
    ends: dict[tuple[bool, int, int], float] = {}
    done: list[list[Pass]] = [[] for _ in range(ranks)]
    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            while queue:
                work = queue[0]
                arrival = _arrival(work, ranks, stages, ends, latency)
                if arrival is None:
                    break
                queue.pop(0)
                stage = work.chunk * ranks + rank
                start = max(free[rank], arrival)
                free[rank] = end = start + (backward if work.backward else forward)[stage]
                ends[work.backward, stage, work.microbatch] = end
                done[rank].append(Pass(rank, work.chunk, work.microbatch, work.backward, start, end))
                moved = True
        if not moved:
            raise RuntimeError("the schedule is stuck: every rank waits for another")
    return Schedule(ranks, tuple(entry for entries in done for entry in entries), max(free))


def _arrival(
    work: Pass, ranks: int, stages: int, ends: dict[tuple[bool, int, int], float], latency: float
) -> float | None:
    """When the input of a pass is there; None while what makes it has not been done."""
    stage = work.chunk * ranks + work.rank
    if not work.backward:
        source = (False, stage - 1, work.microbatch) if stage else None
    elif stage == stages - 1:  # its own forward pass, which comes before it in the rank's order
        source = None
    else:
        source = (True, stage + 1, work.microbatch)
    if source is None:
        return 0.0
    if source not in ends:
        return None
    return ends[source] + (latency if ranks > 1 else 0.0)


@functools.lru_cache(maxsize=4096)
def in_flight(ranks: int, rank: int, microbatches: int, chunks: int = 1) -> frozenset[tuple[int, tuple[int, ...]]]:
    """What a rank may hold most of when a backward pass begins: ``(chunk that goes back, microbatches held of each)``.

    Moments at which another one holds as much of every chunk are left out. A microbatch is held of a chunk from its
    forward to the end of its backward pass.

    Raises:
        ValueError: as :func:`order`.
    """
    # The warm-up takes two groups of `ranks` microbatches at most, and then every group is like the one before it.
    if microbatches > 4 * ranks:
        microbatches = 4 * ranks + (microbatches % ranks if chunks > 1 else 0)
    held = [0] * chunks
    moments: list[set[tuple[int, ...]]] = [set() for _ in range(chunks)]
    for work in order(ranks, rank, microbatches, chunks):
        if work.backward:
            moments[work.chunk].add(tuple(held))
            held[work.chunk] -= 1
        else:
            held[work.chunk] += 1
    return frozenset((chunk, most) for chunk, counts in enumerate(moments) for most in _maximal(counts))


def _maximal(moments: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other one equals or exceeds in every place."""
    kept: list[tuple[int, ...]] = []
    for counts in sorted(moments, key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(other, counts, strict=True)) for other in kept):
            kept.append(counts)
    return kept


def least_seconds(
    forward: Sequence[float], backward: Sequence[float], *, ranks: int, microbatches: int, latency: float = 0.0
) -> float:
    """A bound below :func:`simulate`'s seconds, at no cost; arguments as there.

    A rank cannot begin before the ranks ahead of it have passed the first microbatch on, nor may the step end before
    they have taken the last one back.
    """
    best = 0.0
    for rank in range(ranks):
        busy = microbatches * (sum(forward[rank::ranks]) + sum(backward[rank::ranks]))
        best = max(best, busy + sum(forward[:rank]) + sum(backward[:rank]) + 2 * rank * latency)
    return best
