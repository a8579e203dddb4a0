"""Microbatches of this rank: which samples, in which order, as tensors with the targets of all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.documents import document_boundaries, document_mask
from mtp_megatron.targets import context_shard, document_ends_from_tokens, future_targets
from mtp_megatron.training.recipe import Recipe


@dataclass(frozen=True)
class Microbatch:
    """Inputs of one forward pass; all None on pipeline stages that neither embed tokens nor own heads, unless the
    layers of all stages must know the documents (``data.reset_attention_mask``).

    Attributes:
        tokens: ``[b, s]`` input ids.
        position_ids: ``[b, s]`` 0 .. s - 1.
        targets: ``[n, b, s]`` (:func:`mtp_megatron.targets.future_targets`).
        document_ends: ``[b, s]`` bool, of the whole sequence, where the layers take a mask of documents.
        context: size of the context parallel group and rank in it, which the mask is for.
        packed_seq_params: megatron-core's PackedSeqParams for Transformer Engine's attention within documents; then
            the rows above are one, ``[1, b * s]``.
        parts: ``[b]`` on the host: of a blend, which data set each sample is of.
    """

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    targets: Tensor | None = None
    document_ends: Tensor | None = None
    context: tuple[int, int] = (1, 0)
    packed_seq_params: Any = None
    parts: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor | None:
        """``[b, 1, s/cp, s]`` (:func:`mtp_megatron.documents.document_mask`); None: causal.

        Made where it is asked for: an evaluation, and a step of DeepSpeed's, keep a whole global batch's microbatches.
        """
        return None if self.document_ends is None else document_mask(self.document_ends, *self.context)

    def through(self, model: Callable[..., Any]) -> Any:
        """What the model (wrapped or not) returns for it."""
        packed = {} if self.packed_seq_params is None else {"packed_seq_params": self.packed_seq_params}
        return model(self.tokens, self.position_ids, self.attention_mask, labels=self.targets, **packed)


def rows_of(recipe: Recipe) -> tuple[int, int]:
    """Rows of a microbatch as the model sees it and their length, over all context parallel ranks: ``(b, s)``, or
    ``(1, b * s)`` packed."""
    rows, length = recipe.train.micro_batch_size, recipe.train_seq_length
    return (1, rows * length) if is_packed(recipe) else (rows, length)


def is_packed(recipe: Recipe) -> bool:
    """Whether documents are told apart by their boundaries; else it takes a mask, where they are."""
    return recipe.data.reset_attention_mask and recipe.train.transformer_engine


def chunk_iterators(
    recipe: Recipe, eod: int, loader: Callable[..., Iterator[dict[str, Tensor]]]
) -> list[Iterator[Microbatch] | None]:
    """One iterator for each model chunk of this rank, None where a chunk neither embeds tokens nor owns heads, nor has
    to know the documents.

    Every rank that needs it reads the data itself: the files are mapped into memory and each rank touches its own
    samples only, so there is nothing to broadcast.

    Args:
        eod: the id that ends a document.
        loader: makes an iterator of this rank's samples (:mod:`mtp_megatron.data.loader`); called with the size
            of a microbatch and the data parallel rank and size.
    """
    from megatron.core import parallel_state

    iterators: list[Iterator[Microbatch] | None] = []
    here, ranks = parallel_state.get_pipeline_model_parallel_rank(), recipe.parallel.pipeline
    for holds in recipe.stages[here::ranks]:
        if not (holds.first or holds.heads or recipe.data.reset_attention_mask):
            iterators.append(None)
            continue
        samples = loader(
            micro_batch_size=recipe.train.micro_batch_size,
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
    if is_packed(recipe):
        tokens, positions, targets = (t.reshape(*t.shape[:-2], 1, -1) for t in (tokens, positions, targets))
        packed = packed_documents(sample["tokens"], eod)
        return Microbatch(tokens, positions, targets, packed_seq_params=packed, parts=sample.get("part"))
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    ends = document_ends_from_tokens(tokens, eod) if recipe.data.reset_attention_mask else None
    # The targets are complete, so nothing has to be rolled across context parallel ranks.
    tokens, positions, targets = (context_shard(t, size, rank) for t in (tokens, positions, targets))
    return Microbatch(tokens, positions, targets, ends, (size, rank), parts=sample.get("part"))


def packed_documents(tokens: Tensor, eod: int) -> Any:
    """PackedSeqParams of ``[b, s]`` tokens on the CPU, where nothing has to be waited for."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = document_boundaries(document_ends_from_tokens(tokens, eod)).to(compat.device(), non_blocking=True)
    # An upper bound: the longest document's own length would be another one in each microbatch, and for cuDNN a plan.
    longest = tokens.shape[1]
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
