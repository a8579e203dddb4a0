"""Causal attention under context parallelism without Transformer Engine, for machines that cannot have it.

Megatron-core's own DotProductAttention refuses context parallelism. This one gathers keys and values of the whole
sequence on every rank and lets each attend from its own queries: the right numbers, not the memory savings of ring
attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mtp_megatron.errors import ConfigError
from mtp_megatron.targets import context_positions


class GatherContextAttention(DotProductAttention):
    """DotProductAttention whose queries are this rank's share of the sequence and whose keys are all of it."""

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # upstream's constructor refuses anything else; its arithmetic does not mind
        alone.masked_softmax_fusion = False  # the fused causal softmax takes as many queries as keys
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        if self.scale_mask_softmax.window_size is not None:  # upstream's window would replace the mask made below
            raise ConfigError(
                "window_size",
                config.window_size,
                "a sliding window is not cut for context parallelism without Transformer Engine",
                "Leave it out, or set context_parallel_size to 1",
            )
        group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        self.context_group = group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Shapes as upstream: query ``[s/cp, b, heads, size]``, key and value ``[s/cp, b, groups, size]``.

        A mask is ``[b, 1, s/cp, s]``: this rank's queries, and all keys in the text's order
        (:func:`mtp_megatron.documents.document_mask`). Without one it is causal.
        """
        size, rank = self.context_group.size(), self.context_group.rank()
        length = query.shape[0] * size
        where = [context_positions(length, size, other, query.device) for other in range(size)]
        order = torch.argsort(torch.cat(where))
        key, value = (
            gather_from_sequence_parallel_region(part, group=self.context_group).index_select(0, order)
            for part in (key, value)
        )
        if attention_mask is None:
            attention_mask = (torch.arange(length, device=query.device)[None, :] > where[rank][:, None])[None, None]
        elif attention_mask.shape[-2:] != (query.shape[0], length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: a context parallel rank's is "
                f"[b, 1, {query.shape[0]}, {length}]"
            )
        result: Tensor = super().forward(
            query, key, value, attention_mask, AttnMaskType.arbitrary, attention_bias, packed_seq_params
        )
        return result
