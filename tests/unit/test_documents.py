"""Masks and boundaries of documents by hand, and what of them reaches the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtp_megatron.documents import document_boundaries, document_mask
from mtp_megatron.errors import ConfigError
from mtp_megatron.targets import context_positions, document_ends_from_tokens
from mtp_megatron.training.batches import chunk_iterators, is_packed, rows_of, to_microbatch
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from mtp_megatron.training.world import model_parallel_world
from tests.training_runs import VOCAB, tiny_tree

EOD = 9
TOKENS = torch.tensor([[5, 9, 7, 8], [4, 4, 4, 9]])
ENDS = document_ends_from_tokens(TOKENS, EOD)


def rows(mask: torch.Tensor) -> list[list[str]]:
    return [["".join("1" if masked else "0" for masked in row) for row in sequence[0]] for sequence in mask]


def test_a_query_sees_its_own_document_up_to_itself() -> None:
    mask = document_mask(ENDS)
    assert (mask.shape, mask.dtype) == ((2, 1, 4, 4), torch.bool)
    assert rows(mask) == [["0111", "0011", "1101", "1100"], ["0111", "0011", "0001", "0000"]]


def test_without_a_document_that_ends_it_is_causal() -> None:
    ends = torch.zeros(1, 6, dtype=torch.bool)
    assert torch.equal(document_mask(ends)[0, 0], torch.ones(6, 6, dtype=torch.bool).triu(1))


def test_a_context_parallel_rank_has_its_queries_and_all_keys() -> None:
    ends = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.2
    whole = document_mask(ends)
    for rank in range(2):
        assert torch.equal(document_mask(ends, 2, rank), whole[:, :, context_positions(16, 2, rank)])


def test_ends_that_are_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[batch, sequence\], got shape \(4,\)"):
        document_mask(ENDS[0])


def test_boundaries_of_rows_that_follow_one_another() -> None:
    bounds = document_boundaries(ENDS)
    assert (bounds.tolist(), bounds.dtype) == ([0, 2, 4, 8], torch.int32)
    assert ENDS.tolist() == [[False, True, False, False], [False, False, False, True]], "its input stays as it was"


def recipe_of(world_size: int = 1, **overrides: Any) -> Any:
    settings = {"data__reset_attention_mask": True, "train__micro_batch_size": 2, **overrides}
    tree = tiny_tree(Path("data"), Path("run"), **settings)
    return check_recipe(parse_recipe(tree), world_size=world_size, tokenizer_vocab_size=VOCAB)


def microbatch(recipe: Any) -> Any:
    sample = {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1), "loss_mask": torch.ones(TOKENS.shape)}
    with model_parallel_world(recipe):
        return to_microbatch(recipe, sample, eod=EOD)


def received(batch: Any) -> dict[str, Any]:
    """What a model is called with."""

    def model(tokens: Any, positions: Any, mask: Any, **more: Any) -> dict[str, Any]:
        return {"tokens": tokens, "positions": positions, "mask": mask, **more}

    told: dict[str, Any] = batch.through(model)
    return told


def test_megatrons_own_layers_get_a_mask() -> None:
    recipe = recipe_of()
    told = received(microbatch(recipe))
    assert torch.equal(told.pop("mask"), document_mask(ENDS))
    assert [told[name].shape for name in ("tokens", "positions", "labels")] == [(2, 4), (2, 4), (3, 2, 4)]
    assert "packed_seq_params" not in told, "an engine of DeepSpeed's, say, may pass it on"
    assert (is_packed(recipe), rows_of(recipe)) == (False, (2, 32))


def test_a_microbatch_that_waits_holds_no_mask() -> None:
    """All of a global batch do, in an evaluation and under DeepSpeed: 64 of 32768 tokens would be 64 GiB."""
    batch = microbatch(recipe_of())
    held = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 4
    assert max(value.numel() for value in held) == batch.targets.numel() < document_mask(ENDS).numel()


def test_transformer_engines_layers_get_boundaries_and_one_row() -> None:
    recipe = recipe_of(train__transformer_engine=True)
    told, masked = received(microbatch(recipe)), received(microbatch(recipe_of()))
    packed = told["packed_seq_params"]
    assert (packed.qkv_format, packed.max_seqlen_q, packed.max_seqlen_kv) == ("thd", 4, 4)
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 2, 4, 8]
    assert told["mask"] is None
    for name in ("tokens", "positions", "labels"):
        assert torch.equal(told[name], masked[name].flatten(-2).unsqueeze(-2)), name
    assert (is_packed(recipe), rows_of(recipe)) == (True, (1, 64))


def test_without_the_setting_nothing_changes() -> None:
    for engine in (False, True):
        recipe = recipe_of(data__reset_attention_mask=False, train__transformer_engine=engine)
        told = received(microbatch(recipe))
        assert (told["mask"], "packed_seq_params" in told) == (None, False)
        assert (is_packed(recipe), rows_of(recipe)) == (False, (2, 32))


@pytest.mark.parametrize(("masked", "reads"), [(False, [True, False]), (True, [True, True])])
def test_every_stage_reads_the_documents(monkeypatch: pytest.MonkeyPatch, masked: bool, reads: list[bool]) -> None:
    """Those between the first and the ones with heads, which read nothing else, too."""
    recipe = recipe_of(
        2,
        parallel__pipeline=2,
        parallel__virtual_pipeline=2,
        train__micro_batch_size=1,
        data__reset_attention_mask=masked,
    )

    def samples(**_: int) -> Iterator[dict[str, torch.Tensor]]:
        yield {"tokens": TOKENS, "labels": TOKENS, "loss_mask": torch.ones(TOKENS.shape)}

    with model_parallel_world(recipe_of()):  # as its first rank: one process has no pipeline
        iterators = chunk_iterators(recipe, EOD, samples)
        assert [iterator is not None for iterator in iterators] == reads
        for iterator in filter(None, iterators):
            mask = next(iterator).attention_mask
            assert (mask is not None) == masked
            assert mask is None or torch.equal(mask, document_mask(ENDS))


def test_transformer_engine_with_context_parallelism_is_refused() -> None:
    recipe_of(2, parallel__context=2)
    with pytest.raises(ConfigError) as caught:
        recipe_of(2, parallel__context=2, train__transformer_engine=True)
    assert (caught.value.field, caught.value.value) == ("data.reset_attention_mask", True)
    assert "parallel.context=2" in caught.value.problem


def fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex's two for the softmax of attention, in torch."""

    def masked(scores: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (scores.float() * scale).masked_fill(mask, -10000.0).softmax(-1).to(scores.dtype)

    def causal(scores: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return masked(scores, torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), scale)

    blocks = {"get_batch_per_block": lambda *_: 1}
    monkeypatch.setitem(sys.modules, "scaled_masked_softmax_cuda", SimpleNamespace(forward=masked, **blocks))
    monkeypatch.setitem(sys.modules, "scaled_upper_triang_masked_softmax_cuda", SimpleNamespace(forward=causal))


def attend(kind: Any, fused: bool, mask: torch.Tensor | None, **settings: Any) -> torch.Tensor:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        bf16=True,
        params_dtype=torch.bfloat16,
        attention_softmax_in_fp32=True,
        attention_dropout=0.0,
        masked_softmax_fusion=fused,
        **settings,
    )
    attention = kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(32, 2, 4, 16, generator=generator).bfloat16() for _ in range(3))
    with torch.no_grad():
        output: torch.Tensor = attention(query, key, value, mask)
    return output


def test_a_fused_softmax_obeys_the_mask_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's layers drop it there, in silence: their specs say causal."""
    fused_kernels(monkeypatch)
    mask = document_mask(torch.rand(2, 32, generator=torch.Generator().manual_seed(0)) < 0.2)
    with model_parallel_world(recipe_of()):
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        from mtp_megatron.compat.masked_attention import MaskedAttention

        wanted, causal = (attend(DotProductAttention, False, given) for given in (mask, None))
        assert not torch.allclose(wanted, causal, atol=1e-2)
        for fused in (False, True):
            assert torch.equal(attend(MaskedAttention, fused, mask), wanted)
            assert torch.equal(attend(MaskedAttention, fused, None), causal)
        assert torch.equal(attend(DotProductAttention, True, mask), causal), "control: it is upstream that drops it"


def test_a_window_that_would_replace_the_mask_is_refused() -> None:
    with model_parallel_world(recipe_of()):
        from mtp_megatron.compat.masked_attention import MaskedAttention

        attend(MaskedAttention, False, None, window_size=(4, 0))
        with pytest.raises(ConfigError, match=r"window_size=\(4, 0\)"):
            attend(MaskedAttention, False, document_mask(ENDS.repeat(1, 8)), window_size=(4, 0))


def test_a_window_that_context_parallelism_would_not_cut_is_refused() -> None:
    with model_parallel_world(recipe_of()):
        from mtp_megatron.compat.context_attention import GatherContextAttention

        with pytest.raises(ConfigError, match=r"window_size=\(4, 0\)"):
            attend(GatherContextAttention, False, None, window_size=(4, 0), context_parallel_size=2)
