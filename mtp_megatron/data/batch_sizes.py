"""How many samples each step of a run takes, and with that where it is in the data. Pure Python: every count of samples
or tokens by step comes from here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class BatchSizes:
    """Global batch sizes by step. Steps count from 1; step k reads the samples ``samples(k - 1)`` to
    ``samples(k) - 1``.

    Attributes:
        entries: ``(first step, samples)``: from that step on, each step takes so many. The first is for step 1, and
            steps ascend.
    """

    entries: tuple[tuple[int, int], ...]

    @property
    def largest(self) -> int:
        return max(size for _, size in self.entries)

    @property
    def last(self) -> int:
        """Of the steps at the end."""
        return self.entries[-1][1]

    @property
    def merged(self) -> tuple[tuple[int, int], ...]:
        """Entries without those that change nothing: equal where every step takes as many."""
        return _merged(self.entries)

    def at(self, step: int) -> int:
        """Samples of ``step``."""
        return next(size for first, size in reversed(self.entries) if first <= step)

    def samples(self, step: int) -> int:
        """Of all steps up to ``step``, trained or passed over; 0 at step 0."""
        return sum(size * steps for size, steps in self._spans(step))

    def steps_within(self, samples: int) -> int:
        """How many steps, from the first on, so many samples are enough for."""
        for (first, size), (following, _) in pairwise(self.entries):
            if samples < size * (following - first):
                return first - 1 + samples // size
            samples -= size * (following - first)
        return self.entries[-1][0] - 1 + samples // self.last

    def until(self, step: int) -> tuple[tuple[int, int], ...]:
        """Entries of the steps up to ``step`` alone, without those that change nothing: equal where each of these steps
        takes as many."""
        return _merged(entry for entry in self.entries if entry[0] <= step)

    def after(self, step: int) -> tuple[tuple[int, int], ...]:
        """Entries of the steps after ``step`` alone: the first of them is for the next one."""
        return ((step + 1, self.at(step + 1)), *(entry for entry in self.entries if entry[0] > step + 1))

    def joined(self, step: int, later: BatchSizes) -> BatchSizes:
        """These up to ``step``, and then those of ``later``."""
        return BatchSizes(_merged((*self.until(step), *later.after(step))))

    def _spans(self, step: int) -> Iterator[tuple[int, int]]:
        """Sizes up to ``step``, each with the number of steps that take it."""
        ends = [first - 1 for first, _ in self.entries[1:]]
        for (first, size), end in zip(self.entries, [*ends, step], strict=True):
            yield size, max(0, min(end, step) - first + 1)

    def __str__(self) -> str:
        """As in a recipe."""
        return str([list(entry) for entry in self.entries])


def _merged(entries: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    kept: list[tuple[int, int]] = []
    for first, size in entries:
        if not kept or kept[-1][1] != size:
            kept.append((first, size))
    return tuple(kept)
