"""The torch decoder: caches, rows, stacked heads and the exact logits, against transformers and against each other."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import cast

import pytest
import torch

from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.decode import TIE_MARGIN
from mtp_megatron.serving.export import Export
from mtp_megatron.serving.llama import HeadsLlama
from tests.decoders import CONFIG, SHAPE, random_weights, sentences, trained_decoder

TEXT = sentences(1, 60, seed=5)[0]


@pytest.fixture(scope="module")
def model() -> HeadsLlama:
    return HeadsLlama(CONFIG, random_weights())


@torch.inference_mode()
def everything(model: HeadsLlama, widths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of head 1 ``[60, V]`` and of the further heads ``[3, 60, V]``, TEXT taken in pieces of these widths."""
    caches = model.new_caches(len(TEXT))
    first, further, start = [], [], 0
    for width in widths:
        z, logits = model.run(TEXT[start : start + width], caches, rows=width)
        first.append(logits)
        further.append(model.run_further_heads(z, caches, rows=width))
        start += width
    assert start == len(TEXT)
    return torch.cat(first), torch.cat(further, 1)


def test_the_whole_text_at_once_is_what_transformers_says(model: HeadsLlama) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_trunk_layers + 1,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_query_groups,
        rms_norm_eps=CONFIG.norm_epsilon,
    )
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict({k: v for k, v in random_weights().items() if not k.startswith("mtp_heads.")})
    with torch.inference_mode():
        theirs = reference(TEXT[None]).logits[0]
    torch.testing.assert_close(everything(model, [60])[0], theirs, atol=1e-4, rtol=0)


def test_no_second_copy_of_the_model_is_held_while_it_is_loaded(model: HeadsLlama) -> None:
    """When a stored tensor is asked for, those before the last one are gone: their fp32 copies took their place."""
    given: list[weakref.ref[torch.Tensor]] = []

    class Stored:
        config = CONFIG

        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            for key, weight in random_weights().items():
                assert not any(reference() is not None for reference in given[:-1])
                stored = weight.to(torch.bfloat16)
                given.append(weakref.ref(stored))
                yield key, stored

    loaded = HeadsLlama.load(cast(Export, Stored()))
    assert loaded.num_parameters == model.num_parameters
    assert loaded.embedding.dtype == torch.float32


@pytest.mark.parametrize("widths", [[1] * 60, [7, 1, 4, 4, 2, 30, 12], [4] * 15])
def test_pieces_with_caches_give_what_the_whole_gives_without(model: HeadsLlama, widths: list[int]) -> None:
    for whole, pieces in zip(everything(model, [60]), everything(model, widths), strict=True):
        torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=0)


def test_fewer_rows_give_the_last_rows(model: HeadsLlama) -> None:
    first, further = everything(model, [60])
    with torch.inference_mode():
        for rows in (1, 3):
            caches = model.new_caches(60)
            z, logits = model.run(TEXT, caches, rows=rows)
            torch.testing.assert_close(logits, first[-rows:], atol=2e-5, rtol=0)
            drafts = model.run_further_heads(z, caches, rows=rows)
            torch.testing.assert_close(drafts, further[:, -rows:], atol=2e-5, rtol=0)
            assert caches.head1.length == caches.further.length == 60


def test_some_of_the_further_heads(model: HeadsLlama) -> None:
    _, further = everything(model, [60])
    with torch.inference_mode():
        caches = model.new_caches(60, further_heads=2)
        z, _ = model.run(TEXT, caches, rows=1)
        torch.testing.assert_close(model.run_further_heads(z, caches)[:, 0], further[:2, -1], atol=2e-5, rtol=0)


def test_rejected_positions_leave_no_trace(model: HeadsLlama) -> None:
    with torch.inference_mode():
        clean, dirty = model.new_caches(60), model.new_caches(60)
        model.run(TEXT[:10], clean, rows=1)
        model.run(TEXT[:10], dirty, rows=1)
        model.run(TEXT[20:24], dirty, rows=4)
        dirty.truncate(10)
        rolled_back = model.run(TEXT[10:13], dirty, rows=3)[1]
        assert torch.equal(rolled_back, model.run(TEXT[10:13], clean, rows=3)[1])
        # Control: without the roll-back the same positions see the rejected ones.
        spoilt = model.new_caches(60)
        model.run(TEXT[:10], spoilt, rows=1)
        model.run(TEXT[20:24], spoilt, rows=4)
        assert (model.run(TEXT[10:13], spoilt, rows=3)[1] - rolled_back).abs().max() > 0.01


@pytest.mark.parametrize("name", ["random", "trained"])
def test_what_the_width_of_a_pass_changes_is_far_below_the_tie_margin(model: HeadsLlama, name: str) -> None:
    """Measures the differences that the margin has to cover: 20 times the largest seen must fit into it."""
    model = model if name == "random" else trained_decoder()
    runs = [everything(model, widths)[0] for widths in ([60], [1] * 60, [2] * 30, [3] * 20, [4] * 15, [5] * 12)]
    scale = runs[0].abs().amax(-1).clamp(min=1.0)
    noise = max(((run - runs[0]).abs().amax(-1) / scale).max().item() for run in runs[1:])
    assert noise < TIE_MARGIN / 20
    with torch.inference_mode():
        exact = model.exact_logits(TEXT)
    assert exact.dtype == torch.float64
    assert ((exact - runs[0][-1]).abs().max() / scale[-1]).item() < TIE_MARGIN / 20


def test_exact_logits_of_the_same_tokens_are_the_same_bits() -> None:
    model = trained_decoder()
    with torch.inference_mode():
        assert torch.equal(model.exact_logits(TEXT), model.exact_logits(TEXT.clone()))


def test_a_model_without_further_heads_says_so() -> None:
    import dataclasses

    weights = {k: v for k, v in random_weights().items() if not k.startswith("mtp_heads.")}
    model = HeadsLlama(dataclasses.replace(CONFIG, num_heads=1), weights)
    caches = model.new_caches(4)
    z, _ = model.run(TEXT[:4], caches, rows=1)
    with pytest.raises(ValueError, match="no head beside head 1"):
        model.run_further_heads(z, caches)


def test_missing_and_unknown_tensors_are_named() -> None:
    weights = random_weights()
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'mtp_heads\.4\.mlp\.down_proj\.weight'"):
        HeadsLlama(CONFIG, {k: v for k, v in weights.items() if k != "mtp_heads.4.mlp.down_proj.weight"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.bias"):
        HeadsLlama(CONFIG, weights | {"model.layers.9.bias": torch.ones(1)})
