"""Microbatches of this rank: which samples, in which order, as tensors with the targets of all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.targets import context_shard, document_ends_from_tokens, future_targets
from mtp_megatron.training.recipe import Recipe


@dataclass(frozen=True)
class Microbatch:
    """Inputs of one forward pass; all None on pipeline stages that neither embed tokens nor own heads.

    Attributes:
        tokens: ``[b, s]`` input ids.
        position_ids: ``[b, s]`` 0 .. s - 1.
        targets: ``[n, b, s]`` (:func:`mtp_megatron.targets.future_targets`).
        parts: ``[b]`` on the host: of a blend, which data set each sample is of.
    """

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    targets: Tensor | None = None
    parts: Tensor | None = None


def chunk_iterators(
    recipe: Recipe, eod: int, loader: Callable[..., Iterator[dict[str, Tensor]]]
) -> list[Iterator[Microbatch] | None]:
    """One iterator for each model chunk of this rank, None where a chunk neither embeds tokens nor owns heads.

    Every rank of the first stage and of those with heads reads the data itself: the files are mapped into memory and
    each rank touches its own samples only, so there is nothing to broadcast.

    Args:
        eod: the id that ends a document.
        loader: makes an iterator of this rank's samples (:mod:`mtp_megatron.data.loader`); called with the batch sizes
            and the data parallel rank and size.
    """
    from megatron.core import parallel_state

    iterators: list[Iterator[Microbatch] | None] = []
    here, ranks = parallel_state.get_pipeline_model_parallel_rank(), recipe.parallel.pipeline
    for holds in recipe.stages[here::ranks]:
        if not (holds.first or holds.heads):
            iterators.append(None)
            continue
        samples = loader(
            micro_batch_size=recipe.train.micro_batch_size,
            global_batch_size=recipe.train.global_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
        iterators.append(to_microbatch(recipe, sample, eod) for sample in samples)
    return iterators


def to_microbatch(recipe: Recipe, sample: dict[str, Tensor], eod: int) -> Microbatch:
    """Collated samples of GPTDataset (``tokens``, ``labels``, ``loss_mask``, each ``[b, s]``) on this rank's device."""
    from megatron.core import parallel_state

    device = compat.device()
    tokens = sample["tokens"].to(device, non_blocking=True)
    labels = sample["labels"].to(device, non_blocking=True)
    separate = recipe.heads.documents == "separate"
    targets = future_targets(
        labels,
        recipe.heads.n,
        loss_mask=sample["loss_mask"].to(device, non_blocking=True),
        document_ends=document_ends_from_tokens(tokens, eod) if separate else None,
    )
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    # The targets are complete, so nothing has to be rolled across context parallel ranks.
    tokens, positions, targets = (context_shard(values, size, rank) for values in (tokens, positions, targets))
    return Microbatch(tokens, positions, targets, sample.get("part"))
