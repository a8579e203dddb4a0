"""The oracle itself, against an implementation that shares nothing with it: Hugging Face's Llama.

Trunk + head 1 is a Llama of one layer more; so is trunk + head i, and trunk + the first heads of a causal chain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_megatron.config import HeadsConfig
from mtp_megatron.reference import (
    ReferenceConfig,
    head_outputs,
    parameter_shapes,
    reference_loss,
    rms_norm,
    rotate,
    trunk,
    unembed,
)
from mtp_megatron.targets import future_targets


def config(**changes: Any) -> ReferenceConfig:
    heads = {name: changes.pop(name) for name in list(changes) if name in HeadsConfig.model_fields}
    settings: dict[str, Any] = {
        "num_trunk_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 40,
        "vocab_size": 29,
        "heads": HeadsConfig(**{"n": 3, **heads}),
        "norm_epsilon": 1e-3,  # large enough to be seen if it went to the wrong place
        "rotary_base": 100.0,
    }
    return ReferenceConfig(**{**settings, **changes})


def parameters(of: ReferenceConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in sorted(parameter_shapes(of).items())}
    return {name: 1 + value if name.endswith("norm.weight") else value for name, value in made.items()}


def tokens(of: ReferenceConfig, length: int = 13) -> Tensor:
    return torch.randint(0, of.vocab_size, (2, length), generator=torch.Generator().manual_seed(7))


# Hugging Face's Llama -------------------------------------------------------------------------------------------------


def layer_of_llama(values: dict[str, Tensor], of: ReferenceConfig, prefix: str, number: int) -> dict[str, Tensor]:
    """Megatron's fused matrices taken apart by hand: rows of each group are its queries, its key, its value."""
    size, groups = of.head_size, of.num_query_groups
    queries = of.num_attention_heads // groups
    qkv = values[f"{prefix}self_attention.linear_qkv.weight"].view(groups, queries + 2, size, of.hidden_size)
    fc1 = values[f"{prefix}mlp.linear_fc1.weight"]
    layer = {
        "input_layernorm": values[f"{prefix}input_layernorm.weight"],
        "self_attn.q_proj": qkv[:, :queries].reshape(-1, of.hidden_size),
        "self_attn.k_proj": qkv[:, queries].reshape(-1, of.hidden_size),
        "self_attn.v_proj": qkv[:, queries + 1].reshape(-1, of.hidden_size),
        "self_attn.o_proj": values[f"{prefix}self_attention.linear_proj.weight"],
        "post_attention_layernorm": values[f"{prefix}pre_mlp_layernorm.weight"],
        "mlp.gate_proj": fc1[: of.ffn_hidden_size],
        "mlp.up_proj": fc1[of.ffn_hidden_size :],
        "mlp.down_proj": values[f"{prefix}mlp.linear_fc2.weight"],
    }
    return {f"model.layers.{number}.{name}.weight": value for name, value in layer.items()}


def llama(values: dict[str, Tensor], of: ReferenceConfig, heads: list[int]) -> LlamaForCausalLM:
    """Hugging Face's model of the trunk followed by the layers of `heads` (0-based)."""
    embedding = values["embedding.word_embeddings.weight"]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": values["final_norm.weight"],
        "lm_head.weight": values.get("output_layer.weight", embedding),
    }
    prefixes = [f"decoder.layers.{i}." for i in range(of.num_trunk_layers)] + [f"heads.{i}." for i in heads]
    for number, prefix in enumerate(prefixes):
        state.update(layer_of_llama(values, of, prefix, number))
    settings = LlamaConfig(
        hidden_size=of.hidden_size,
        intermediate_size=of.ffn_hidden_size,
        num_hidden_layers=len(prefixes),
        num_attention_heads=of.num_attention_heads,
        num_key_value_heads=of.num_query_groups,
        vocab_size=of.vocab_size,
        rms_norm_eps=of.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": of.rotary_base},
        tie_word_embeddings=of.tied_embeddings,
        attn_implementation="eager",
        pad_token_id=None,
    )
    model = LlamaForCausalLM(settings)
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def off(values: dict[str, Tensor], of: ReferenceConfig, head: int, path: list[int], **changes: Any) -> float:
    """Largest difference between the logits of `head` and Llama's, relative to the largest logit."""
    x = tokens(of)
    theirs = llama(values, of, path)(x).logits
    wrong = replace(of, **changes)
    ours = unembed(values, wrong, head, head_outputs(values, wrong, trunk(values, wrong, x))[head])
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize(
    "shape", [{}, {"num_query_groups": 4}, {"num_query_groups": 1}, {"tied_embeddings": True}], ids=str
)
def test_trunk_and_any_one_head_is_a_llama(shape: dict, head: int) -> None:
    of = config(**shape)
    assert off(parameters(of), of, head, [head]) <= 1e-5


@pytest.mark.parametrize("arrangement", ["causal", "anticausal"])
def test_a_chain_is_a_deeper_llama(arrangement: str) -> None:
    of = config(arrangement=arrangement)
    paths = {"causal": [[0], [0, 1], [0, 1, 2]], "anticausal": [[2, 1, 0], [2, 1], [2]]}[arrangement]
    for head, path in enumerate(paths):
        assert off(parameters(of), of, head, path) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_base": 101.0},
        {"norm_epsilon": 2e-3},
        {"num_trunk_layers": 1},
        {"heads": HeadsConfig(n=3, arrangement="causal")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_control_small_differences_are_seen(change: dict) -> None:
    of = config()
    assert off(parameters(of), of, 1, [1]) <= 1e-5
    assert off(parameters(of), of, 1, [1], **change) > 1e-4


def test_next_token_loss_and_its_gradients_are_llamas() -> None:
    of = config(n=1)
    values, x = parameters(of), tokens(of)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    result = reference_loss(leaves, of, x[:, :-1], future_targets(x[:, 1:], 1))
    model = llama(values, of, [0])
    loss = model(x, labels=x).loss  # the mean; Hugging Face shifts the labels itself
    torch.testing.assert_close(result.total / result.tokens.sum(), loss, rtol=1e-5, atol=0)
    (result.total / result.tokens.sum()).backward()
    loss.backward()
    theirs = dict(model.named_parameters())
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    checked = 0
    for prefix, number in (("decoder.layers.0.", 0), ("decoder.layers.1.", 1), ("heads.0.", 2)):
        for name, gradient in layer_of_llama(gradients, of, prefix, number).items():
            torch.testing.assert_close(gradient, theirs[name].grad, rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked == 27
    torch.testing.assert_close(
        leaves["embedding.word_embeddings.weight"].grad, theirs["model.embed_tokens.weight"].grad, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(leaves["output_layer.weight"].grad, theirs["lm_head.weight"].grad, rtol=1e-4, atol=1e-6)


# Pieces with answers known beforehand ---------------------------------------------------------------------------------


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 2.0]), 3.5), torch.tensor([[0.75, 2.0]]))


def test_rotation_by_hand() -> None:
    """A size of 2 has one frequency, 1: position p turns by p radians."""
    x = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)
    angle = torch.arange(3.0)
    torch.testing.assert_close(rotate(x, 10000.0)[0, :, 0], torch.stack([angle.cos(), angle.sin()], dim=-1))


def test_attention_sees_the_past_only() -> None:
    of = config()
    values, x = parameters(of), tokens(of)
    changed = x.clone()
    changed[:, 8] = (changed[:, 8] + 1) % of.vocab_size
    targets = future_targets(x, 3)
    before, after = (reference_loss(values, of, t, targets).logits for t in (x, changed))
    assert torch.equal(before[:, :, :8], after[:, :, :8])
    assert (before[:, :, 8:] != after[:, :, 8:]).any(dim=-1).all()


@pytest.mark.parametrize(("kind", "neutral"), [("linear", "identity"), ("medusa", "zero")])
def test_heads_after_the_norm_start_as_head_1(kind: str, neutral: str) -> None:
    of = config(kind=kind)
    values = parameters(of)
    logits = reference_loss(values, of, tokens(of), future_targets(tokens(of), 3)).logits
    assert not torch.allclose(logits[1], logits[0])
    for name in values:
        if name.startswith("heads."):
            eye = neutral == "identity" and name.endswith("weight")
            values[name] = torch.eye(of.hidden_size) if eye else torch.zeros_like(values[name])
    logits = reference_loss(values, of, tokens(of), future_targets(tokens(of), 3)).logits
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_replicated_unembeddings_belong_to_their_heads() -> None:
    of = config(unembedding="replicated", kind="linear")
    values = parameters(of)
    before = reference_loss(values, of, tokens(of), future_targets(tokens(of), 3)).logits
    values["unembedding_heads.1.weight"] = 2 * values["unembedding_heads.1.weight"]
    after = reference_loss(values, of, tokens(of), future_targets(tokens(of), 3)).logits
    torch.testing.assert_close(after, before * torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1))


def test_sums_counts_and_weights() -> None:
    of = config(loss_weights=(1.0, 0.0, 0.5))
    values, x = parameters(of), tokens(of)
    targets = future_targets(x, 3)
    targets[0, 1] = -100  # head 1 learns from the first sequence alone
    result = reference_loss(values, of, x, targets)
    torch.testing.assert_close(result.total, result.loss_sum[0] + 0.5 * result.loss_sum[2])
    assert result.tokens.tolist() == [13, 24, 22]
    by_hand = [0.0, 0.0, 0.0]
    right = [0, 0, 0]
    probabilities = result.logits.softmax(-1)
    for head, row, t in (targets != -100).nonzero().tolist():
        target = int(targets[head, row, t])
        by_hand[head] -= float(probabilities[head, row, t, target].log())
        right[head] += int(result.logits[head, row, t].argmax()) == target
    torch.testing.assert_close(result.loss_sum, torch.tensor(by_hand), rtol=1e-4, atol=0)
    assert result.correct.tolist() == right
