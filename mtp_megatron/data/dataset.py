"""Fixed-length samples from a data set, through megatron-core's GPTDataset."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.data.manifest import Manifest, SplitInfo
from mtp_megatron.errors import ConfigError, DataError

_SPLITS: tuple[Literal["train", "valid"], ...] = ("train", "valid")


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


class _TokenizerView:
    """What GPTDatasetConfig asks of a tokenizer. Without ``pad``: no id is masked, since samples are never padded."""

    def __init__(self, manifest: Manifest) -> None:
        self.eod, self.vocab_size = manifest.eod, manifest.vocab_size
        self.unique_identifiers = OrderedDict(
            kind=manifest.tokenizer.kind, sha256=manifest.tokenizer.sha256, vocab_size=manifest.vocab_size
        )


def build_datasets(
    manifest: Manifest,
    *,
    seq_length: int,
    train_samples: int,
    valid_samples: int | None = None,
    seed: int,
    cache_dir: str | Path | None = None,
) -> tuple[Samples, Samples]:
    """Training and held-out samples of ``seq_length`` tokens; documents are packed one after another.

    In a distributed job every rank calls it: rank 0 writes the index of samples into the cache, the others wait and
    read it. A problem on rank 0 is raised on every rank.

    Args:
        manifest: a loaded one (:func:`mtp_megatron.data.manifest.load_manifest`).
        seq_length: tokens per sample.
        train_samples: how many samples to offer for training; passes over the data repeat, each in its own order.
        valid_samples: at most how many held-out samples; all when None. They do not repeat: where fewer exist, the
            result is shorter.
        seed: of the shuffles.
        cache_dir: where the index of samples is kept, on a file system that all ranks see; ``cache`` inside the data
            set's folder when None.

    Raises:
        ConfigError: a size below 1 or a seed that does not fit 32 bits.
        DataError: a split with too few tokens for one sample, or a cache that cannot be written or seen.
    """
    for field, value in (("model.seq_length", seq_length), ("train_samples", train_samples)):
        if value < 1:
            raise ConfigError(field, value, "must be 1 or more", "Set it to a positive number.")
    if valid_samples is not None and valid_samples < 1:
        raise ConfigError("valid_samples", valid_samples, "must be 1 or more", "Set it to a positive number, or null.")
    if not 0 <= seed < 2**32:
        raise ConfigError("data.seed", seed, "must fit 32 bits without sign", "Try 1234.")
    for name, split in zip(_SPLITS, (manifest.train, manifest.valid), strict=True):
        _check_tokens(manifest, name, split, seq_length)
    train, valid = _build(manifest, seq_length, seed, Path(cache_dir) if cache_dir else manifest.path / "cache")
    held_out = len(valid) if valid_samples is None else min(valid_samples, len(valid))
    return Samples(train, train_samples, seed), Samples(valid, held_out, seed)


def _check_tokens(manifest: Manifest, name: Literal["train", "valid"], split: SplitInfo, seq_length: int) -> None:
    if split.tokens < seq_length + 1:
        remedy = "a larger --valid-fraction" if name == "valid" else "more text"
        raise DataError(
            f"{manifest.prefix(name)}.bin: {split.tokens} tokens in {split.documents} documents are too few for one "
            f"sample of seq_length={seq_length} (needs {seq_length + 1}, one more for the last label). Shorten "
            f"model.seq_length, or preprocess with {remedy}."
        )


def _build(manifest: Manifest, seq_length: int, seed: int, cache: Path) -> tuple[Any, Any]:
    compat.prepare()
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"megatron-core was installed without its compiled data set helpers ({error}). Install the wheel for this "
            "Python and platform, or build it here: pip install --no-binary megatron-core megatron-core"
        ) from error
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    # megatron-core keys its cache by the path of the data set alone; here another data set, or another release, at the
    # same path is another key.
    identity = f"{manifest.path} {manifest.fingerprint} {seq_length} {seed} {compat.MCORE_VERSION}"
    cache = cache.absolute() / hashlib.sha256(identity.encode()).hexdigest()[:16]
    _on_rank_zero(lambda: _fill_cache(manifest, seq_length, seed, cache))
    if not cache.is_dir():
        raise DataError(
            f"{cache}: rank 0 wrote the index of samples, but rank {dist.get_rank()} does not see it. Choose a cache "
            "folder on a file system that all ranks share."
        )
    config = _dataset_config(manifest, seq_length, seed, cache)
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config).build()
    return train, valid


def _dataset_config(manifest: Manifest, seq_length: int, seed: int, cache: Path) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([manifest.prefix("train")], None), ([manifest.prefix("valid")], None), None],
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=_TokenizerView(manifest),
    )


def _fill_cache(manifest: Manifest, seq_length: int, seed: int, cache: Path) -> None:
    """Write the index of both splits, whole or not at all.

    megatron-core takes a cache for complete when its files exist, so one that a killed job left half written would be
    read; here it is built beside and renamed.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    if cache.is_dir():
        return
    building: str | None = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        building = tempfile.mkdtemp(prefix=f".{cache.name}.", dir=cache.parent)
        config = _dataset_config(manifest, seq_length, seed, Path(building))
        for name in _SPLITS:
            prefix = manifest.prefix(name)
            documents = GPTDataset.build_low_level_dataset(prefix, config)
            chosen = np.arange(GPTDataset.numel_low_level_dataset(documents), dtype=np.int32)
            GPTDataset(documents, prefix, chosen, None, Split[name], config)
        os.chmod(building, 0o755)  # mkdtemp's folders are private, the cache is for all who may read the data set
        os.rename(building, cache)
    except OSError as error:
        if cache.is_dir():  # another job was faster, with the same content
            return
        raise DataError(
            f"{cache.parent}: the index of samples cannot be written ({error}). Name a folder that can be written."
        ) from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def _on_rank_zero(action: Any) -> None:
    """Run the action on rank 0 while the others wait; its DataError is raised everywhere, so that no rank hangs."""
    if not dist.is_initialized():
        action()
        return
    problem: list[str | None] = [None]
    error: DataError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except DataError as caught:
            problem, error = [str(caught)], caught
    dist.broadcast_object_list(problem, src=0, device=compat.device())
    if problem[0] is not None:
        raise error if error is not None else DataError(problem[0])
