"""The key tables and their transforms: hand-written rows, round trips, and every gap named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, check_complete, expand
from mtp_megatron.checkpoint.transforms import TRANSFORMS, ModelShape
from mtp_megatron.errors import CheckpointError
from tests.checkpoints import SHAPE, random_tensors


def rows(*numbers: int) -> torch.Tensor:
    """A weight ``[rows, 1]`` whose rows are numbered."""
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


def test_qkv_rows_written_out_by_hand() -> None:
    """np=4, ng=2, d=2: Megatron has q1 q2 k v of group 1, then of group 2; each is two rows."""
    shape = dataclasses.replace(SHAPE, hidden_size=8, num_attention_heads=4, num_query_groups=2)
    assert shape.head_dim == 2
    q, k, v = TRANSFORMS["qkv"].split(rows(*range(16)), shape)
    assert q.flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.flatten().tolist() == [4, 5, 12, 13]
    assert v.flatten().tolist() == [6, 7, 14, 15]


def test_gate_and_up_and_vocabulary_rows() -> None:
    gate, up = TRANSFORMS["gate_up"].split(rows(0, 1, 2, 3), SHAPE)
    assert (gate.flatten().tolist(), up.flatten().tolist()) == ([0, 1], [2, 3])
    shape = dataclasses.replace(SHAPE, vocab_size=3, padded_vocab_size=5)
    (kept,) = TRANSFORMS["vocabulary"].split(rows(0, 1, 2, 8, 9), shape)
    assert kept.flatten().tolist() == [0, 1, 2]
    assert TRANSFORMS["vocabulary"].join([kept], shape).flatten().tolist() == [0, 1, 2, 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 4),
    queries_per_group=st.integers(1, 4),
    head_dim=st.sampled_from([1, 2, 6]),
    tied=st.booleans(),
    heads=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_there_and_back_is_bit_exact(
    groups: int, queries_per_group: int, head_dim: int, tied: bool, heads: int, dtype: torch.dtype
) -> None:
    np = groups * queries_per_group
    shape = ModelShape(2, heads, np * head_dim, 10, np, groups, 13, 16, tied)
    tensors = random_tensors(shape, dtype=dtype)
    mappings = expand((*LLAMA, *FURTHER_HEADS), shape)
    assert [mapping.megatron for mapping in mappings] == list(tensors)
    seen: set[str] = set()
    for mapping in mappings:
        weight = tensors[mapping.megatron]
        if mapping.transform == "vocabulary":
            weight[shape.vocab_size :] = 0
        parts = mapping.split(weight, shape)
        assert not seen & set(parts), "two Megatron tensors claim the same Hugging Face key"
        seen |= set(parts)
        back = mapping.join(list(parts.values()), shape)
        assert torch.equal(back, weight)
        again = mapping.split(back, shape)
        assert all(torch.equal(again[key], parts[key]) for key in parts)


def test_a_wrong_permutation_would_be_seen() -> None:
    """Control: q, k and v one after the other, as if not interleaved, differs as soon as there are two groups."""
    weight = random_tensors()["decoder.layers.0.self_attention.linear_qkv.weight"]
    d, np, ng = SHAPE.head_dim, SHAPE.num_attention_heads, SHAPE.num_query_groups
    naive = weight.split([np * d, ng * d, ng * d])
    right = TRANSFORMS["qkv"].split(weight, SHAPE)
    assert [part.shape for part in naive] == [part.shape for part in right]
    assert not any(torch.equal(a, b) for a, b in zip(naive, right, strict=True))


def test_the_table_covers_a_llama_exactly() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        shape = dataclasses.replace(SHAPE, tied_embeddings=tied)
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_trunk_layers + 1,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            tie_word_embeddings=tied,
        )
        ours = {
            key: part.shape for m in expand(LLAMA, shape) for key, part in m.split(_meta(m.megatron), shape).items()
        }
        theirs = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}
        if tied:
            del theirs["lm_head.weight"]
        assert ours == theirs


def _meta(key: str) -> torch.Tensor:
    return random_tensors()[key].to("meta")


def test_further_heads_are_numbered_as_in_the_paper() -> None:
    pairs = {mapping.megatron: mapping.parts[0] for mapping in expand(FURTHER_HEADS, SHAPE)}
    assert pairs["heads.1.mlp.linear_fc2.weight"] == "mtp_heads.2.mlp.down_proj.weight"
    assert pairs["heads.2.mlp.linear_fc2.weight"] == "mtp_heads.3.mlp.down_proj.weight"
    assert len(pairs) == 2 * 6


def test_gaps_are_fatal_and_named() -> None:
    keys = {mapping.megatron for mapping in expand((*LLAMA, *FURTHER_HEADS), SHAPE)}
    assert keys == set(random_tensors())
    check_complete(keys, keys, "here", remedy="")
    with pytest.raises(CheckpointError, match=r"here.*1 tensors are missing: final_norm\.weight"):
        check_complete(keys, keys - {"final_norm.weight"}, "here", remedy="")
    with pytest.raises(CheckpointError, match=r"no place in the target: heads\.3\.mlp\.router\.weight"):
        check_complete(keys, keys | {"heads.3.mlp.router.weight"}, "here", remedy="")
