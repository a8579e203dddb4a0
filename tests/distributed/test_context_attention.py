"""Context parallel attention without Transformer Engine: it does without the fused softmax that a GPU may have.

That it attends to the right tokens is in test_exactness.py.
"""

from __future__ import annotations

import torch

from tests.harness import parallel, run_world

SEQUENCE, HEADS, SIZE = 64, 4, 16  # as many keys as the fused kernel takes


def _attend(rank: int, world_size: int) -> None:
    with parallel(cp=2):
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.enums import AttnMaskType

        from mtp_megatron import compat
        from mtp_megatron.compat.context_attention import GatherContextAttention

        results = []
        for fused in (False, True):
            config = TransformerConfig(
                num_layers=1,
                hidden_size=HEADS * SIZE,
                num_attention_heads=HEADS,
                context_parallel_size=2,
                bf16=True,
                params_dtype=torch.bfloat16,
                masked_softmax_fusion=fused,
                attention_softmax_in_fp32=True,
                attention_dropout=0.0,
            )
            attention = GatherContextAttention(
                config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self"
            )
            torch.manual_seed(rank)
            shape = (SEQUENCE // 2, 1, HEADS, SIZE)
            query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device=compat.device()) for _ in range(3))
            results.append(attention(query, key, value, None))
        assert torch.equal(*results)


def test_a_fused_causal_softmax_is_not_asked_for() -> None:
    run_world(_attend, 2)
