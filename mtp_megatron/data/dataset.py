"""Fixed-length samples from a data set or a blend of them, through megatron-core's GPTDataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mtp_megatron.data.blend import Blend
from mtp_megatron.data.blend_order import BlendOrder
from mtp_megatron.data.manifest import Manifest, SplitInfo
from mtp_megatron.data.sample_index import SampleIndex
from mtp_megatron.data.shared_index import open_together
from mtp_megatron.errors import ConfigError, DataError
from mtp_megatron.signals import StopRequest


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """As many samples as asked for, from one pass of a GPTDataset that is shuffled anew for every epoch.

    Sample k depends on k and the seed alone, not on ``length``: raising the number of training steps of a run that is
    resumed continues the same sequence. (A GPTDataset asked for more than one epoch shuffles all of them together, so
    its order changes with the number of samples.) Epoch 0 is in the GPTDataset's own order. Within an epoch no sample
    occurs twice.

    Args:
        dataset: one epoch of samples, a ``megatron.core.datasets.gpt_dataset.GPTDataset``.
        length: number of samples.
        seed: of the shuffles after the first epoch.
    """

    def __init__(self, dataset: Any, length: int, seed: int) -> None:
        self.dataset, self.seed, self._length = dataset, seed, length
        self._epoch = 0
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def samples_per_epoch(self) -> int:
        """Number of different samples."""
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """Sample ``index``: ``tokens``, ``labels`` (``labels[t]`` is token t + 1) and ``position_ids`` int64 [s],
        ``loss_mask`` fp32 [s]. None gives a sample whose loss mask is zero, to fill up a batch.
        """
        if index is None:
            return self._read(None)
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        epoch, within = divmod(index, len(self.dataset))
        return self._read(int(self._epoch_order(epoch)[within]) if epoch else within)

    def _read(self, index: int | None) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self.dataset[index]
        return sample

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._epoch != epoch:
            # RandomState's streams are frozen; those of numpy's newer generators may change with its version.
            self._order = np.random.RandomState([self.seed, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        return self._order


class BlendedSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples of several data sets in one order, each data set's in its own; sample k depends on k, weights and seed.

    Args:
        parts: of each data set, as many samples as the order takes.
        order: which of them comes when.
        length: number of samples.
        since: the sample with which the order begins; there are none before it.
        before: which sample of each data set is its first one there.
    """

    def __init__(
        self, parts: Sequence[Samples], order: BlendOrder, length: int, since: int, before: Sequence[int]
    ) -> None:
        self.parts, self._order, self._length = tuple(parts), order, length
        self.since, self._before = since, tuple(before)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """As :meth:`Samples.__getitem__`, with ``part`` []: which data set it is of (any for None)."""
        if index is None:
            return {**self.parts[0][None], "part": torch.tensor(0)}
        if not self.since <= index < self._length:
            raise IndexError(f"sample {index} is none of {self.since} to {self._length - 1}")
        part, within = self._order[index - self.since]
        return {**self.parts[part][self._before[part] + within], "part": torch.tensor(part)}


AnySamples = Samples | BlendedSamples


def build_datasets(
    data: Blend,
    *,
    seq_length: int,
    train_samples: int,
    valid_samples: int | None = None,
    seed: int,
    cache_dir: str | Path | None = None,
    stop: StopRequest | None = None,
) -> tuple[AnySamples, AnySamples]:
    """Training and held-out samples of ``seq_length`` tokens; documents are packed one after another.

    Several data sets give samples in proportion to their weights (:class:`.blend_order.BlendOrder`), of both kinds.

    In a distributed job every rank calls it: rank 0 writes the index of samples into the cache while the others wait,
    however long that takes; where a host does not see it, a rank of that host writes another. A problem with it on any
    rank is raised on every rank.

    Args:
        data: loaded (:func:`mtp_megatron.data.blend.load_blend`).
        seq_length: tokens per sample.
        train_samples: how many samples to offer for training; passes over a data set repeat, each in its own order.
        valid_samples: at most how many held-out samples; all when None. They do not repeat: where fewer exist, the
            result is shorter. A blend's keep their proportions, so they end where one data set has no more.
        seed: of the shuffles.
        cache_dir: where the index of samples is kept, shared by the hosts or not; ``cache`` inside each data set's
            folder when None.
        stop: looked at while an index is written.

    Raises:
        ConfigError: a size below 1 or a seed that does not fit 32 bits.
        DataError: a split with too few tokens for one sample, or a cache that cannot be written or read.
        Stopped: on every rank, where any was asked to stop before the index was written.
    """
    for field, value in (("model.seq_length", seq_length), ("train_samples", train_samples)):
        if value < 1:
            raise ConfigError(field, value, "must be 1 or more", "Set it to a positive number.")
    if valid_samples is not None and valid_samples < 1:
        raise ConfigError("valid_samples", valid_samples, "must be 1 or more", "Set it to a positive number, or null.")
    if not 0 <= seed < 2**32:
        raise ConfigError("data.seed", seed, "must fit 32 bits without sign", "Try 1234.")
    for manifest in data.parts:
        _check_tokens(manifest, "train", manifest.train, seq_length)
        _check_tokens(manifest, "valid", manifest.valid, seq_length)
    passes = [
        open_together(SampleIndex(part, seq_length, seed, Path(cache_dir) if cache_dir else part.path / "cache"), stop)
        for part in data.parts
    ]
    held_out = sum(len(valid) for _, valid in passes)
    held_out = held_out if valid_samples is None else min(valid_samples, held_out)
    if len(passes) == 1 and not data.since:
        ((train, valid),) = passes
        return Samples(train, train_samples, seed), Samples(valid, held_out, seed)
    order = BlendOrder(data.weights)
    held_out = order.covered([len(valid) for _, valid in passes], held_out)
    train_samples = max(train_samples, data.since)  # train.steps may have been set back: then none is taken
    trains = [Samples(train, used, seed) for (train, _), used in zip(passes, data.used(train_samples), strict=True)]
    valids = [Samples(valid, int(used), seed) for (_, valid), used in zip(passes, order.counts(held_out), strict=True)]
    return (
        BlendedSamples(trains, order, train_samples, data.since, data.before),
        BlendedSamples(valids, BlendOrder(data.weights), held_out, 0, [0] * len(valids)),
    )


def _check_tokens(manifest: Manifest, name: Literal["train", "valid"], split: SplitInfo, seq_length: int) -> None:
    if split.tokens < seq_length + 1:
        remedy = "a larger --valid-fraction" if name == "valid" else "more text"
        raise DataError(
            f"{manifest.prefix(name)}.bin: {split.tokens} tokens in {split.documents} documents are too few for one "
            f"sample of seq_length={seq_length} (needs {seq_length + 1}, one more for the last label). Shorten "
            f"model.seq_length, or preprocess with {remedy}."
        )
