"""One layer of the exported model in plain torch, with its key/value cache; or several layers side by side.

Shapes: ``S`` layers run side by side (1 in the trunk, n - 1 for the further heads), ``r`` rows (positions), ``h``
hidden, ``d`` per attention head, ``nq`` query and ``nk`` key/value heads. One sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.serving.export import DecoderConfig

# Leading axis S, then these, so that each weight broadcasts over [S, r, ...] or, per attention head, [S, heads, r, d].
_STACKED_AXES = {"attention_norm": 1, "mlp_norm": 1, "qkv_bias": 1, "query_norm": 2, "key_norm": 2}


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, or of several stacked along a leading axis ``S`` (vectors then ``[S, 1, ...]``).

    ``qkv_bias`` is Qwen2's, ``query_norm`` and ``key_norm`` are Qwen3's; None in a Llama. A layer has one MLP, or a
    router and ``e`` experts of width ``f``; those layers are not stacked.
    """

    attention_norm: Tensor  # [h]
    qkv: Tensor  # [(nq + 2 nk) d, h]
    output: Tensor  # [h, nq d]
    mlp_norm: Tensor  # [h]
    gate_up: Tensor  # [2 f, h]; experts: [e, 2 f, h]
    down: Tensor  # [h, f]; experts: [e, h, f]
    qkv_bias: Tensor | None = None  # [(nq + 2 nk) d]
    query_norm: Tensor | None = None  # [d]
    key_norm: Tensor | None = None  # [d]
    router: Tensor | None = None  # [e, h]

    def weights(self) -> dict[str, Tensor]:
        """Those that the layer has, by field."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: weight for name, weight in found.items() if weight is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> Layer:
        """The layer with every weight changed."""
        return Layer(**{name: change(weight) for name, weight in self.weights().items()})

    def first(self, count: int) -> Layer:
        """The first ``count`` of stacked layers, without a copy."""
        return self.each(lambda weight: weight[:count])

    @staticmethod
    def stack(layers: list[Layer]) -> Layer:
        """Several layers as one that runs them side by side."""
        stacked = {name: torch.stack([layer.weights()[name] for layer in layers]) for name in layers[0].weights()}
        for name, count in _STACKED_AXES.items():
            for _ in range(count if name in stacked else 0):
                stacked[name] = stacked[name].unsqueeze(1)
        return Layer(**stacked)


class LayerCache:
    """Keys and values of one layer, or of ``S`` side by side, for the positions seen so far.

    Attributes:
        length: positions held; what lies beyond is overwritten by the next rows.
        routing: how close it was, at any row so far, between an expert that was chosen and one that was not: the
            distance of their scores, relative to the largest score (at least 1). Infinite without experts.
    """

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, stacked: int = 1) -> None:
        shape = (stacked, config.num_key_value_heads, capacity, config.head_dim)
        self._keys, self._values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.length = 0
        self.routing = math.inf

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``[S, nk, r, d]`` keys and values; returns all that are held, ``[S, nk, length, d]``."""
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on, those of rejected tokens."""
        self.length = min(self.length, length)


class Block(NamedTuple):
    """Consecutive positions that go through the model together.

    Attributes:
        cos, signed_sin: rotary factors ``[r, d]``; the sine of the first half of d is negative.
        mask: what each row sees, ``[nq / nk * r, start + r]``: the rows of every query head in turn; None for r = 1.
    """

    cos: Tensor
    signed_sin: Tensor
    mask: Tensor | None


def take_layer(tensors: dict[str, Tensor], prefix: str, config: DecoderConfig, experts: int | None = None) -> Layer:
    """Move a layer's tensors, named as Hugging Face does, out of ``tensors``.

    Args:
        tensors: by key.
        prefix: of the layer's keys.
        config: which parts a layer has.
        experts: that it has; None: one MLP.

    Raises:
        KeyError: one of them is not there.
    """

    def take(name: str, part: str = "weight") -> Tensor:
        return tensors.pop(f"{prefix}{name}.{part}")

    def take_qkv(part: str) -> Tensor:
        return torch.cat([take(f"self_attn.{name}_proj", part) for name in "qkv"])

    def take_mlp(name: str) -> tuple[Tensor, Tensor]:
        return torch.cat((take(f"{name}.gate_proj"), take(f"{name}.up_proj"))), take(f"{name}.down_proj")

    if experts is None:
        gate_up, down = take_mlp("mlp")
    else:
        gate_up, down = map(torch.stack, zip(*(take_mlp(f"mlp.experts.{e}") for e in range(experts)), strict=True))
    return Layer(
        attention_norm=take("input_layernorm"),
        qkv=take_qkv("weight"),
        output=take("self_attn.o_proj"),
        mlp_norm=take("post_attention_layernorm"),
        gate_up=gate_up,
        down=down,
        qkv_bias=take_qkv("bias") if config.qkv_bias else None,
        query_norm=take("self_attn.q_norm") if config.qk_norm else None,
        key_norm=take("self_attn.k_norm") if config.qk_norm else None,
        router=None if experts is None else take("mlp.gate"),
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis; ``weight`` is of that axis, or broadcasts over stacked layers."""
    if weight.dim() == 1:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    return F.rms_norm(x, (x.shape[-1],), None, epsilon) * weight


def _rotate(x: Tensor, block: Block) -> Tensor:
    """Rotary positions on ``[..., r, d]``; the two halves of d are paired, as in Megatron and Hugging Face."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * block.cos, torch.cat((second, first), -1), block.signed_sin)


def run_layer(layer: Layer, x: Tensor, cache: LayerCache, block: Block, config: DecoderConfig, rows: int) -> Tensor:
    """One layer on ``[S, r, h]`` -> ``[S, rows, h]``: all r positions enter the cache, the last ``rows`` go on."""
    stacked, count, _ = x.shape
    nq, nk, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = rms_norm(x, layer.attention_norm, config.norm_epsilon) @ layer.qkv.mT
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    qkv = qkv.view(stacked, count, nq + 2 * nk, d).transpose(1, 2)
    queries_keys = qkv[:, : nq + nk]
    if layer.query_norm is not None and layer.key_norm is not None:
        queries_keys = torch.cat(
            (
                rms_norm(queries_keys[:, :nq], layer.query_norm, config.norm_epsilon),
                rms_norm(queries_keys[:, nq:], layer.key_norm, config.norm_epsilon),
            ),
            1,
        )
    queries, keys = _rotate(queries_keys, block).split((nq, nk), 1)
    keys, values = cache.append(keys, qkv[:, nq + nk :])
    # The queries that share a key/value head are rows of one attention, so that keys are never repeated in memory.
    mask = block.mask
    if rows < count:
        queries = queries[:, :, -rows:]
        mask = None if rows == 1 or mask is None else mask.unflatten(0, (-1, count))[:, -rows:].flatten(0, 1)
    folded = queries.reshape(stacked, nk, -1, d)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    attended = attended.view(stacked, nq, rows, d).transpose(1, 2).reshape(stacked, rows, nq * d)
    x = x[:, count - rows :] + attended @ layer.output.mT
    normed = rms_norm(x, layer.mlp_norm, config.norm_epsilon)
    if layer.router is None:
        return x + _swiglu(normed, layer.gate_up, layer.down)
    mixed, routing = _mix_experts(layer, layer.router, normed[0], config.moe_top_k)
    cache.routing = min(cache.routing, routing)
    return x + mixed


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.mT).chunk(2, -1)
    return (F.silu(gate) * up) @ down.mT


def _mix_experts(layer: Layer, router: Tensor, x: Tensor, count: int) -> tuple[Tensor, float]:
    """``[rows, h]`` -> ``[rows, h]``: of each row's ``count`` best experts the sum by the router's weights; and how
    close the choice of them was (:attr:`LayerCache.routing`).

    The router works in fp32 at least, as in training (``moe_router_dtype``).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = x.to(wide) @ router.to(wide).mT
    ranked, order = scores.topk(min(count + 1, len(router)))
    best, chosen = ranked[:, :count], order[:, :count]
    # Over the one alone it would always be 1.
    weights = best.softmax(-1) if count > 1 else scores.softmax(-1).gather(-1, chosen)
    mixed = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        made = _swiglu(x[rows], layer.gate_up[expert], layer.down[expert])
        mixed.index_add_(0, rows, made * weights[rows, place].unsqueeze(1).to(x.dtype))
    if count == len(router):
        return mixed, math.inf
    distance = (ranked[:, -2] - ranked[:, -1]) / ranked[:, 0].abs().clamp(min=1.0)
    return mixed, float(distance.min())
