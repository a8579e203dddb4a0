"""How one Megatron tensor becomes another layout's tensors and back: named, exact, and runnable on meta tensors.

Each transform is a pair. ``split`` takes the Megatron tensor and gives the other layout's tensors in the order of the
rule's keys, as views where it can; ``join`` is its inverse. Nothing is computed, only
moved, so both directions are bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide which tensors a model has.

    Attributes:
        num_trunk_layers: layers that all heads share.
        num_heads: future-token heads n; head 1 continues the trunk.
        hidden_size: ``h``.
        ffn_hidden_size: ``f``, the width of SwiGLU's projections.
        num_attention_heads: query heads ``np``.
        num_query_groups: key/value heads ``ng``.
        vocab_size: true number of token ids ``V``.
        padded_vocab_size: rows of Megatron's embedding ``Vpad``.
        tied_embeddings: the unembedding is the embedding.
        head_size: channels of one attention head; None: ``h / np``.
        qkv_bias: queries, keys and values have a bias (Qwen2).
        qk_norm: each query and key is normalised, RMSNorm over its channels (Qwen3).
        num_experts: MLPs of each trunk layer, side by side behind a router; None: one. Heads are dense.
        moe_ffn_hidden_size: width of an expert's projections; None: ``f``.
        head_kind: ``"transformer"``: each head is one more layer; ``"linear"``, ``"medusa"``: head 1 is the trunk's own
            output, the others are maps of it after the final norm.
    """

    num_trunk_layers: int
    num_heads: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool
    head_size: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    head_kind: str = "transformer"

    @property
    def heads_are_layers(self) -> bool:
        return self.head_kind == "transformer"

    @property
    def medusa_heads(self) -> bool:
        return self.head_kind == "medusa"

    @property
    def num_plain_layers(self) -> int:
        """Layers of trunk + head 1 as a plain model."""
        return self.num_trunk_layers + self.heads_are_layers

    @property
    def expert_width(self) -> int:
        """Width of an expert's projections."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


class Transform(NamedTuple):
    """A pair of inverse functions; see the module's text."""

    split: Callable[[Tensor, ModelShape], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor], ModelShape], Tensor]


def _split_qkv(weight: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Weight ``[(np + 2 ng) d, h]`` or bias ``[(np + 2 ng) d]``, by group: queries, key, value -> q ``[np d, ...]``, k
    and v ``[ng d, ...]``."""
    rest = weight.shape[1:]
    grouped = weight.reshape(shape.num_query_groups, shape.queries_per_group + 2, shape.head_dim, *rest)
    parts = grouped.split([shape.queries_per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, *rest) for part in parts)


def _join_qkv(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    rest = parts[0].shape[1:]
    grouped = [part.reshape(shape.num_query_groups, -1, shape.head_dim, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _halves_to_pairs(weight: Tensor, shape: ModelShape) -> Tensor:
    """Rows of each head from (all first channels, all second channels) to pairs side by side."""
    halves = weight.reshape(-1, 2, shape.head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _pairs_to_halves(weight: Tensor, shape: ModelShape) -> Tensor:
    pairs = weight.reshape(-1, shape.head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _split_qkv_pairs(weight: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    q, k, v = _split_qkv(weight, shape)
    return _halves_to_pairs(q, shape), _halves_to_pairs(k, shape), v


def _join_qkv_pairs(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    q, k, v = parts
    return _join_qkv([_pairs_to_halves(q, shape), _pairs_to_halves(k, shape), v], shape)


def _pad_rows(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    (weight,) = parts
    return torch.cat([weight, weight.new_zeros(shape.padded_vocab_size - shape.vocab_size, weight.shape[1])])


TRANSFORMS: dict[str, Transform] = {
    "copy": Transform(lambda weight, shape: (weight,), lambda parts, shape: parts[0]),
    # Rows of q, k and v are interleaved by query group, so that a tensor parallel rank holds whole groups.
    "qkv": Transform(_split_qkv, _join_qkv),
    # Meta's rotary embedding turns neighbouring channels; Megatron's and Hugging Face's turn the two halves of a head.
    "qkv_pairs": Transform(_split_qkv_pairs, _join_qkv_pairs),
    # SwiGLU: the gate's rows, then the up projection's; the checkpoint holds each half whole at any TP.
    "gate_up": Transform(lambda weight, shape: weight.chunk(2), lambda parts, shape: torch.cat(tuple(parts))),
    # Rows beyond the true vocabulary exist only to divide evenly; they come back as zeros.
    "vocabulary": Transform(lambda weight, shape: (weight[: shape.vocab_size],), _pad_rows),
}
