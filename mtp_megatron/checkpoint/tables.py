"""Which Megatron tensor is which tensor of another layout: data, from which both directions are derived.

A rule's keys may hold ``{layer}``: a section says how Megatron and the other layout number its layers. Megatron
keys are those of a distributed checkpoint with the stacked trunk layers named one by one
(:mod:`.megatron_reader`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mtp_megatron.checkpoint.transforms import TRANSFORMS, ModelShape
from mtp_megatron.errors import CheckpointError


class Rule(NamedTuple):
    """One Megatron key, the other layout's keys of its parts, and the name of the transform between them.

    ``when`` names a flag of :class:`ModelShape` without which a model has no such tensor.
    """

    megatron: str
    parts: tuple[str, ...]
    transform: str = "copy"
    when: str | None = None


class Section(NamedTuple):
    """Rules under a pair of prefixes, repeated for each ``(megatron index, other index)`` that ``layers`` gives.

    Prefixes that hold ``{expert}`` too are repeated for each expert of a layer, which both layouts number alike.
    """

    megatron_prefix: str
    prefix: str
    rules: tuple[Rule, ...]
    layers: Callable[[ModelShape], Iterable[tuple[int, int]]]


# The norms go by Transformer Engine's fused names in every distributed checkpoint, whatever module wrote them; the
# reader sees to the one exception (:data:`mtp_megatron.compat.checkpoints.NORM_BEFORE_EXPERTS`).
_LLAMA_ATTENTION = (
    Rule("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    Rule(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    Rule(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
        when="qkv_bias",
    ),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), when="qk_norm"),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), when="qk_norm"),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Rule("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
)
_LLAMA_MLP = (
    Rule("linear_fc1.weight", ("gate_proj.weight", "up_proj.weight"), "gate_up"),
    Rule("linear_fc2.weight", ("down_proj.weight",)),
)
LLAMA_LAYER = (
    *_LLAMA_ATTENTION,
    *(
        rule._replace(megatron=f"mlp.{rule.megatron}", parts=tuple(f"mlp.{part}" for part in rule.parts))
        for rule in _LLAMA_MLP
    ),
)
# A layer with experts, without them: they are a section of their own.
_ROUTED_LAYER = (*_LLAMA_ATTENTION, Rule("mlp.router.weight", ("mlp.gate.weight",)))
# A head that reads the normed trunk output (mtp_megatron.heads.PostNormHead).
POST_NORM_HEAD = (
    Rule("linear.weight", ("linear.weight",)),
    Rule("linear.bias", ("linear.bias",), when="medusa_heads"),
)
META_LAYER = (
    Rule("self_attention.linear_qkv.layer_norm_weight", ("attention_norm.weight",)),
    Rule(
        "self_attention.linear_qkv.weight",
        ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
        "qkv_pairs",
    ),
    Rule("self_attention.linear_proj.weight", ("attention.wo.weight",)),
    Rule("mlp.linear_fc1.layer_norm_weight", ("ffn_norm.weight",)),
    Rule("mlp.linear_fc1.weight", ("feed_forward.w1.weight", "feed_forward.w3.weight"), "gate_up"),
    Rule("mlp.linear_fc2.weight", ("feed_forward.w2.weight",)),
)


def _once(shape: ModelShape) -> Iterable[tuple[int, int]]:
    return [(0, 0)]


def _untied(shape: ModelShape) -> Iterable[tuple[int, int]]:
    return [] if shape.tied_embeddings else [(0, 0)]


def _trunk(shape: ModelShape) -> Iterable[tuple[int, int]]:
    return ((k, k) for k in range(shape.num_trunk_layers))


def _dense_trunk(shape: ModelShape) -> Iterable[tuple[int, int]]:
    return [] if shape.num_experts else _trunk(shape)


def _routed_trunk(shape: ModelShape) -> Iterable[tuple[int, int]]:
    return _trunk(shape) if shape.num_experts else []


def _head_1(shape: ModelShape) -> Iterable[tuple[int, int]]:
    return [(0, shape.num_trunk_layers)] if shape.heads_are_layers else []


def _further(shape: ModelShape) -> Iterable[tuple[int, int]]:
    """Megatron counts heads from 0, the other layout from 1 as the paper does."""
    return ((i - 1, i) for i in range(2, shape.num_heads + 1))


def _next_token_model(
    layer: tuple[Rule, ...],
    layers: str,
    embedding: str,
    norm: str,
    unembedding: str,
    routed: tuple[Section, ...] = (),
) -> tuple[Section, ...]:
    """Trunk + head 1 as a plain model; where heads are layers, its last one is head 1 (``heads.0``).

    ``routed`` is the trunk of a model with experts.
    """
    return (
        Section("", "", (Rule("embedding.word_embeddings.weight", (embedding,), "vocabulary"),), _once),
        Section("decoder.layers.{layer}.", layers, layer, _dense_trunk),
        *routed,
        Section("heads.{layer}.", layers, layer, _head_1),
        Section("", "", (Rule("final_norm.weight", (norm,)),), _once),
        Section("", "", (Rule("output_layer.weight", (unembedding,), "vocabulary"),), _untied),
    )


LLAMA = _next_token_model(
    LLAMA_LAYER,
    "model.layers.{layer}.",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    (
        Section("decoder.layers.{layer}.", "model.layers.{layer}.", _ROUTED_LAYER, _routed_trunk),
        Section(
            "decoder.layers.{layer}.mlp.experts.experts.{expert}.",
            "model.layers.{layer}.mlp.experts.{expert}.",
            _LLAMA_MLP,
            _routed_trunk,
        ),
    ),
)
FURTHER_HEADS: tuple[Section, ...] = (
    Section(
        "heads.{layer}.",
        "mtp_heads.{layer}.",
        LLAMA_LAYER,
        lambda shape: _further(shape) if shape.heads_are_layers else [],
    ),
    Section(
        "heads.{layer}.",
        "mtp_heads.{layer}.",
        POST_NORM_HEAD,
        lambda shape: [] if shape.heads_are_layers else _further(shape),
    ),
)
# The paper's release: `layers` ends with head 1, `extra_heads.0` is head 2.
META: tuple[Section, ...] = (
    *_next_token_model(META_LAYER, "layers.{layer}.", "tok_embeddings.weight", "norm.weight", "output.weight"),
    Section(
        "heads.{layer}.",
        "extra_heads.{layer}.",
        META_LAYER,
        lambda shape: ((i, i - 1) for i in range(1, shape.num_heads)),
    ),
)
# Buffers that some releases store and every reader computes again.
DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope\.freqs)")


@dataclass(frozen=True)
class Mapping:
    """A rule with its layer filled in: one Megatron tensor and the tensors of the other layout that it holds."""

    megatron: str
    parts: tuple[str, ...]
    transform: str

    def split(self, weight: Tensor, shape: ModelShape) -> dict[str, Tensor]:
        """The other layout's tensors in ``weight``, by key; views where possible."""
        return dict(zip(self.parts, TRANSFORMS[self.transform].split(weight, shape), strict=True))

    def join(self, parts: Collection[Tensor], shape: ModelShape) -> Tensor:
        """The Megatron tensor made of ``parts``, which are in the order of the rule's."""
        return TRANSFORMS[self.transform].join(list(parts), shape)


def expand(sections: Iterable[Section], shape: ModelShape) -> list[Mapping]:
    """Every tensor of a model, in the order of the table."""
    return [
        Mapping(
            section.megatron_prefix.format(layer=megatron_layer, expert=expert) + rule.megatron,
            tuple(section.prefix.format(layer=layer, expert=expert) + key for key in rule.parts),
            rule.transform,
        )
        for section in sections
        for megatron_layer, layer in section.layers(shape)
        for expert in range((shape.num_experts or 0) if "{expert}" in section.prefix else 1)
        for rule in section.rules
        if rule.when is None or getattr(shape, rule.when)
    ]


def check_complete(wanted: Iterable[str], present: Iterable[str], source: str, *, remedy: str) -> None:
    """Refuse tensors that no rule covers and rules whose tensors are absent.

    Args:
        wanted: keys of the expanded table.
        present: keys that the source holds.
        source: what to call it in the message.
        remedy: what the user may do.

    Raises:
        CheckpointError: names the keys.
    """
    missing, unmapped = sorted(set(wanted) - set(present)), sorted(set(present) - set(wanted))
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for keys, what in ((missing, "tensors are missing"), (unmapped, "tensors have no place in the target"))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source}: not the model that its configuration describes ({'; '.join(problems)}). {remedy}"
        )
