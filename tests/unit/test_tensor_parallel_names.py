"""How parameters are cut over tensor parallel ranks, by name: splitting and merging are each other's opposite."""

from __future__ import annotations

import pytest
import torch

from mtp_megatron.checkpoint.tensor_parallel import is_sharded, merge, split

SHAPES = {
    "embedding.word_embeddings.weight": (12, 4),
    "output_layer.weight": (12, 4),
    "unembedding_heads.1.weight": (12, 4),
    "decoder.layers.3.self_attention.linear_qkv.weight": (16, 4),
    "decoder.layers.3.self_attention.linear_qkv.bias": (16,),
    "heads.0.self_attention.linear_proj.weight": (4, 8),
    "heads.0.mlp.linear_fc1.weight": (16, 4),
    "heads.0.mlp.linear_fc2.weight": (4, 8),
    "heads.0.input_layernorm.weight": (4,),
    "decoder.layers.0.self_attention.q_layernorm.weight": (4,),
    "heads.1.linear.weight": (4, 4),
    "heads.1.linear.bias": (4,),
    "final_norm.weight": (4,),
}
REPLICATED = {name for name in SHAPES if "norm" in name or ".linear.w" in name or ".linear.b" in name}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merging_undoes_splitting(name: str, ranks: int) -> None:
    whole = torch.arange(float(torch.Size(SHAPES[name]).numel())).view(SHAPES[name])
    shards = split(name, whole, ranks)
    assert torch.equal(merge(name, shards), whole)
    assert is_sharded(name) == (name not in REPLICATED)
    expected = whole.numel() if name in REPLICATED else whole.numel() // ranks
    assert {shard.numel() for shard in shards} == {expected}


def test_gate_and_up_are_cut_each() -> None:
    """A rank holds its share of the gate and its share of the up projection, not the first half of both together."""
    whole = torch.arange(8.0)[:, None]
    first, second = split("heads.0.mlp.linear_fc1.weight", whole, 2)
    assert first.flatten().tolist() == [0, 1, 4, 5]
    assert second.flatten().tolist() == [2, 3, 6, 7]
