"""Batches for one data-parallel rank, as a pure function of the steps that are over.

Step k reads the samples ``samples(k - 1)`` to ``samples(k) - 1`` (:class:`.batch_sizes.BatchSizes`), however many ranks
share them, so a run can be resumed at any step and at any data-parallel size. Within a global batch, micro-batch j of
rank r is the block ``j * dp_size + r`` of ``micro_batch_size`` samples, as in Megatron-LM's MegatronPretrainingSampler.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.data.dataset import AnySamples
from mtp_megatron.errors import ConfigError
from mtp_megatron.signals import leave_stopping_to_parent

Batch = dict[str, torch.Tensor]


def build_train_iterator(
    dataset: AnySamples,
    *,
    step: int,
    batch_sizes: BatchSizes,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches in order: ``batch size / (micro_batch_size * dp_size)`` for every step.

    Ends before a global batch that the data set can no longer fill.

    Args:
        dataset: the training samples.
        step: how many steps of the run are over, trained or passed over.
        batch_sizes: samples that all ranks together use in each step.
        workers: processes that read ahead; 0 reads in this one.

    Yields:
        ``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` fp32, each ``[micro_batch_size, seq_length]``.

    Raises:
        ConfigError: sizes of coming steps that do not divide, or more samples consumed than there are.
    """
    for _, size in batch_sizes.after(step):
        _check(micro_batch_size, size, dp_rank, dp_size)
    consumed = batch_sizes.samples(step)
    if consumed > len(dataset):
        remedy = "Ask build_datasets for as many training samples as all steps need."
        raise ConfigError("step", step, f"{consumed} samples were used before, of {len(dataset)}", remedy)
    stop = batch_sizes.samples(batch_sizes.steps_within(len(dataset)))
    # Every step takes whole rounds over the ranks, so where one ends the next begins with rank 0, whatever their sizes.
    sampler = _MicroBatches(consumed, stop, micro_batch_size, dp_rank, dp_size)
    return iter(_loader(dataset, sampler, workers))


def build_valid_batches(
    dataset: AnySamples,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    batches: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the first ``batches`` global batches of the held-out samples, always the same.

    Every sample is used once at most. The last global batch is filled up with samples whose loss mask is zero, so that
    all ranks get the same number of micro-batches; :func:`count_valid_batches` says how many global batches there are.

    Raises:
        ConfigError: sizes that do not divide.
    """
    _check(micro_batch_size, global_batch_size, dp_rank, dp_size)
    stop = count_valid_batches(dataset, global_batch_size=global_batch_size, batches=batches) * global_batch_size
    sampler = _MicroBatches(0, stop, micro_batch_size, dp_rank, dp_size, available=len(dataset))
    return iter(_loader(dataset, sampler, workers))


def count_valid_batches(dataset: AnySamples, *, global_batch_size: int, batches: int | None = None) -> int:
    """Number of global batches that :func:`build_valid_batches` covers: as asked, or as many as the samples make."""
    there = -(-len(dataset) // global_batch_size)
    return there if batches is None else min(batches, there)


class _MicroBatches(Sampler[list[int | None]]):
    """Indices of one rank's micro-batches between two samples; None stands for a filler beyond ``available``."""

    def __init__(
        self, start: int, stop: int, micro_batch_size: int, dp_rank: int, dp_size: int, available: int | None = None
    ) -> None:
        self._start, self._stop = start + dp_rank * micro_batch_size, stop
        self._size, self._stride = micro_batch_size, micro_batch_size * dp_size
        self._available = stop if available is None else available

    def __iter__(self) -> Iterator[list[int | None]]:
        for first in range(self._start, self._stop, self._stride):
            yield [index if index < self._available else None for index in range(first, first + self._size)]

    def __len__(self) -> int:
        return len(range(self._start, self._stop, self._stride))


def _loader(dataset: AnySamples, sampler: _MicroBatches, workers: int) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=leave_stopping_to_parent if workers else None,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed when it starts: from the global generator it would change dropout and initialisation.
        generator=torch.Generator(),
    )


def _check(micro_batch_size: int, global_batch_size: int, dp_rank: int, dp_size: int) -> None:
    for field, value in (("train.micro_batch_size", micro_batch_size), ("train.global_batch_size", global_batch_size)):
        if value < 1:
            raise ConfigError(field, value, "must be 1 or more", "Set it to a positive number.")
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            "train.global_batch_size",
            global_batch_size,
            f"is not a multiple of micro_batch_size x data-parallel size = {micro_batch_size} x {dp_size}",
            f"Set it to a multiple of {micro_batch_size * dp_size}.",
        )
    if not 0 <= dp_rank < dp_size:
        raise ConfigError("dp_rank", dp_rank, f"lies outside 0 to {dp_size - 1}", "Pass the rank in its group.")
