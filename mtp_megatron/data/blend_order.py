"""In which order a blend's samples come, found for any position without a table of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_megatron.data.compiled import compiled_helpers

BLOCK = 65_536  # samples; part of what the order is: another number gives another order


class BlendOrder:
    """From the position of a sample in the blend to a data set and a position in that one, the same on every rank.

    The order comes in blocks of :data:`BLOCK` samples. How many of the first b blocks' samples a data set gives is
    its weight's share of them, rounded; within a block megatron-core orders them
    (``helpers.build_exhaustive_blending_indices``, what its BlendedDataset does where it is given numbers of samples).
    So a position is found in milliseconds wherever it is, nothing is written, and what comes at a position does not
    depend on how many samples a run has. megatron-core's table of a whole run takes 10 bytes a sample and is another
    one for another number of steps.

    Args:
        weights: positive, with a sum of 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = np.asarray(weights, dtype=np.float64)
        self._block: int | None = None  # the one that _parts and _positions are of
        self._parts = self._positions = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """``(data set, position in it)`` of the sample at ``position``."""
        block, within = divmod(position, BLOCK)
        self._load(block)
        return int(self._parts[within]), int(self._positions[within])

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first ``samples`` each data set gives: int64 ``[data sets]``."""
        block, within = divmod(samples, BLOCK)
        if not within:
            return shares(self._weights, samples)
        self._load(block)
        rest = np.bincount(self._parts[:within], minlength=len(self._weights))
        return shares(self._weights, block * BLOCK) + rest

    def covered(self, available: Sequence[int], most: int) -> int:
        """The samples, ``most`` at most, up to the first one that asks a data set for more than its ``available``."""
        there = np.asarray(available)
        block = 0
        while block * BLOCK < most and (shares(self._weights, (block + 1) * BLOCK) <= there).all():
            block += 1
        self._load(block)
        beyond = np.flatnonzero(self._positions >= there[self._parts])
        return min(most, block * BLOCK + (int(beyond[0]) if len(beyond) else BLOCK))

    def _load(self, block: int) -> None:
        if block == self._block:
            return
        before = shares(self._weights, block * BLOCK)
        sizes = shares(self._weights, (block + 1) * BLOCK) - before
        taking_part = np.flatnonzero(sizes)  # megatron-core's function never ends a data set of size 0
        which, positions = np.zeros(BLOCK, dtype=np.int16), np.zeros(BLOCK, dtype=np.int64)
        compiled_helpers().build_exhaustive_blending_indices(which, positions, sizes[taking_part], len(taking_part))
        self._parts = taking_part[which]
        self._positions = positions + before[self._parts]
        self._block = block


def shares(weights: np.ndarray, total: int) -> np.ndarray:
    """``total`` divided in proportion to the weights, int64 ``[data sets]``; none gets less when the total is larger.

    Webster's method: the j-th sample of a data set, from 0, is due at (j + 1/2) / weight, and the ``total`` that are
    due first are counted. (Rounding, then giving the rest to the largest remainders, would take samples back as the
    total grows.)
    """
    counts = np.floor(weights * total + 0.5).astype(np.int64)
    # As one comparison decides it everywhere: due up to ``total``, whatever the rounding above.
    counts += (counts + 0.5) / weights <= total
    counts -= (counts > 0) & ((counts - 0.5) / weights > total)
    while (missing := total - int(counts.sum())) != 0:
        if missing > 0:
            counts[np.argmin((counts + 0.5) / weights)] += 1  # of those due together the first
        else:
            last = np.where(counts > 0, (counts - 0.5) / weights, -np.inf)
            counts[len(last) - 1 - np.argmax(last[::-1])] -= 1  # of those due together the last
    return counts
