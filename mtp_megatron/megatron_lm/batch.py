"""One microbatch of Megatron-LM's data sets on every rank that needs it, with the targets of all heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.training import get_args, get_tokenizer
from torch import Tensor

from mtp_megatron.config import HeadsConfig
from mtp_megatron.targets import context_shard, document_ends_from_tokens, future_targets

_INTEGERS = ("tokens", "labels", "position_ids")


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass; all None on pipeline stages that neither embed tokens nor own heads.

    Attributes:
        tokens: ``[b, s/cp]`` input ids.
        position_ids: ``[b, s/cp]``.
        targets: ``[n, b, s/cp]`` (:func:`mtp_megatron.targets.future_targets`), where the heads are.
        attention_mask: ``[b, 1, s, s]`` bool with ``--reset-attention-mask``, else None: causal.
    """

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    targets: Tensor | None = None
    attention_mask: Tensor | None = None


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None, heads: HeadsConfig, vp_stage: int | None) -> Batch:
    """The next microbatch: read by the first tensor parallel rank, sent to the others, cut by context parallelism.

    Targets are built from the whole sequence before it is cut.
    """
    where: dict[str, Any] = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    embeds, owns_heads = (
        parallel_state.is_pipeline_first_stage(**where),
        parallel_state.is_pipeline_last_stage(**where),
    )
    if not embeds and not owns_heads:
        return Batch()
    args = get_args()
    data: dict[str, Tensor] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        if data_iterator is None:
            raise RuntimeError(
                "no data on the first tensor parallel rank: the provider of the data sets must build them on the first "
                "and the last pipeline stage (train_valid_test_datasets_provider.is_distributed = True)"
            )
        data = next(data_iterator)
    # Megatron-LM sends labels to the last stage alone and tokens to the first; the targets need both.
    batch = _sent(_INTEGERS, data, torch.int64) | _sent(["loss_mask"], data, torch.float32)
    mask = _sent(["attention_mask"], data, torch.bool)["attention_mask"] if args.reset_attention_mask else None
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    targets = None
    if owns_heads:
        separate = heads.documents == "separate"
        ends = document_ends_from_tokens(batch["tokens"], get_tokenizer().eod) if separate else None
        targets = future_targets(batch["labels"], heads.n, loss_mask=batch["loss_mask"], document_ends=ends)
        targets = context_shard(targets, size, rank)
    tokens, positions = (context_shard(batch[name], size, rank) for name in ("tokens", "position_ids"))
    return Batch(tokens, positions, targets, mask)


def _sent(keys: Sequence[str], data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """These tensors on every tensor parallel rank's device; with one such rank nobody waits for the copy."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return {key: data[key].cuda(non_blocking=True) for key in keys}
    sent: dict[str, Tensor] = tensor_parallel.broadcast_data(list(keys), data, dtype)
    return sent
