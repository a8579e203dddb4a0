"""The exported model in plain torch: a Llama trunk and n heads, each layer with its own key/value cache.

Shapes: ``S`` layers run side by side (1 in the trunk, n - 1 for the further heads), ``r`` rows (positions), ``h``
hidden, ``d`` per attention head, ``nq`` query and ``nk`` key/value heads. One sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.export import DecoderConfig, Export


@dataclass(frozen=True)
class Layer:
    """Weights of one Llama layer, or of several stacked along a leading axis ``S`` (norms then ``[S, 1, h]``)."""

    attention_norm: Tensor  # [h]
    qkv: Tensor  # [(nq + 2 nk) d, h]
    output: Tensor  # [h, nq d]
    mlp_norm: Tensor  # [h]
    gate_up: Tensor  # [2 f, h]
    down: Tensor  # [h, f]

    def to(self, dtype: torch.dtype) -> Layer:
        """The same weights in another type."""
        return Layer(*(getattr(self, field.name).to(dtype) for field in fields(self)))

    def first(self, count: int) -> Layer:
        """The first ``count`` of stacked layers, without a copy."""
        return Layer(*(getattr(self, field.name)[:count] for field in fields(self)))

    @staticmethod
    def stack(layers: list[Layer]) -> Layer:
        """Several layers as one that runs them side by side."""
        stacked = {field.name: torch.stack([getattr(layer, field.name) for layer in layers]) for field in fields(Layer)}
        for norm in ("attention_norm", "mlp_norm"):
            stacked[norm] = stacked[norm].unsqueeze(1)
        return Layer(**stacked)


class LayerCache:
    """Keys and values of one layer, or of ``S`` side by side, for the positions seen so far.

    Attributes:
        length: positions held; what lies beyond is overwritten by the next rows.
    """

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, stacked: int = 1) -> None:
        shape = (stacked, config.num_key_value_heads, capacity, config.head_dim)
        self._keys, self._values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.length = 0

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


class Caches:
    """All caches of one sequence: trunk layers, head 1, and the further heads side by side.

    Args:
        config: sizes.
        capacity: positions that there is room for.
        dtype: of keys and values.
        further_heads: how many of heads 2 to n will run.
    """

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, further_heads: int) -> None:
        self.further_heads = further_heads
        self.trunk = [LayerCache(config, capacity, dtype) for _ in range(config.num_trunk_layers)]
        self.head1 = LayerCache(config, capacity, dtype)
        self.further = LayerCache(config, capacity, dtype, stacked=further_heads)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(capacity, dtype=torch.float32), config.rope_theta**-exponent)
        cos, sin = angles.cos(), angles.sin()
        self._cos, self._signed_sin = torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)
        self._rows_per_position = config.num_attention_heads // config.num_key_value_heads

    def block(self, start: int, count: int) -> Block:
        """Positions ``start`` to ``start + count - 1``."""
        end = start + count
        mask = None
        if count > 1:  # one position alone sees all before it
            positions = torch.arange(end)
            mask = (positions <= positions[start:].unsqueeze(1)).repeat(self._rows_per_position, 1)
        return Block(self._cos[start:end], self._signed_sin[start:end], mask)

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on, in every layer."""
        for cache in (*self.trunk, self.head1, self.further):
            cache.truncate(length)


class HeadsLlama:
    """Trunk, heads, final norm and unembedding.

    Args:
        config: sizes.
        tensors: Hugging Face keys to tensors: a Llama of ``num_trunk_layers + 1`` layers and ``mtp_heads.{i}.*``.
        dtype: type of weights, activations and caches.

    Raises:
        CheckpointError: a tensor is missing or has no place.
    """

    def __init__(
        self, config: DecoderConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.dtype = config, dtype
        remaining = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        try:
            self.embedding = remaining.pop("model.embed_tokens.weight")
            self.unembedding = self.embedding if config.tied else remaining.pop("lm_head.weight")
            self.final_norm = remaining.pop("model.norm.weight")
            self.trunk = [_take_layer(remaining, f"model.layers.{k}.") for k in range(config.num_trunk_layers)]
            self.head1 = _take_layer(remaining, f"model.layers.{config.num_trunk_layers}.")
            further = [_take_layer(remaining, f"mtp_heads.{i}.") for i in range(2, config.num_heads + 1)]
        except KeyError as error:
            raise CheckpointError(f"the export lacks the tensor {error}. Convert the checkpoint again.") from error
        if remaining:
            raise CheckpointError(f"the export holds {next(iter(remaining))}, which this model has not. Convert again.")
        self.further = Layer.stack(further) if further else None

    @classmethod
    def load(cls, export: Export, dtype: torch.dtype = torch.float32) -> HeadsLlama:
        """Load an export's tensors."""
        return cls(export.config, dict(export.tensors()), dtype)

    @property
    def num_parameters(self) -> int:
        """Weights of the model, heads included."""
        return sum(tensor.numel() for tensor in self._weights())

    def _weights(self) -> Iterator[Tensor]:
        yield self.embedding
        if not self.config.tied:
            yield self.unembedding
        yield self.final_norm
        for layer in (*self.trunk, self.head1, *([self.further] if self.further else [])):
            yield from (getattr(layer, field.name) for field in fields(layer))

    def new_caches(self, capacity: int, further_heads: int | None = None) -> Caches:
        """Empty caches for ``capacity`` positions and the first ``further_heads`` of heads 2 to n (default: all)."""
        count = self.config.num_heads - 1 if further_heads is None else further_heads
        return Caches(self.config, capacity, self.dtype, count)

    def run(self, tokens: Tensor, caches: Caches, rows: int) -> tuple[Tensor, Tensor]:
        """Trunk and head 1 on ``tokens`` ``[r]``, which follow what the caches hold.

        Args:
            tokens: ids.
            caches: of this sequence; all r positions enter them.
            rows: how many of the last positions to give logits for.

        Returns:
            z ``[1, r, h]`` and head 1's logits ``[rows, V]``.
        """
        block = caches.block(caches.head1.length, len(tokens))
        z = F.embedding(tokens, self.embedding).unsqueeze(0)
        for layer, cache in zip(self.trunk, caches.trunk, strict=True):
            z = _run_layer(layer, z, cache, block, self.config, len(tokens))
        hidden = _run_layer(self.head1, z, caches.head1, block, self.config, rows)
        return z, self.logits(hidden)[0]

    def run_further_heads(self, z: Tensor, caches: Caches, rows: int = 1) -> Tensor:
        """Logits ``[S, rows, V]`` of heads 2 to S + 1 at the last ``rows`` positions of z ``[1, r, h]``.

        S is the number of heads that the caches were made for; all r positions enter their caches.
        """
        if self.further is None:
            raise ValueError("the model has no head beside head 1")
        block = caches.block(caches.further.length, z.shape[1])
        heads = self.further.first(caches.further_heads)
        x = z.expand(caches.further_heads, -1, -1)
        return self.logits(_run_layer(heads, x, caches.further, block, self.config, rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., h]`` -> ``[..., V]``: final norm and unembedding."""
        return _norm(hidden, self.final_norm, self.config.norm_epsilon) @ self.unembedding.mT

    def exact_logits(self, tokens: Tensor) -> Tensor:
        """Head 1's logits ``[V]`` after ``tokens`` ``[r]``, in fp64 without any cache: a function of the tokens alone.

        Weights are widened layer by layer, so that the memory needed beside the model's is that of one layer.
        """
        wide, count = torch.float64, len(tokens)
        block = Caches(self.config, count, wide, 0).block(0, count)
        x = F.embedding(tokens, self.embedding).unsqueeze(0).to(wide)
        for layer in (*self.trunk, self.head1):
            rows = 1 if layer is self.head1 else count
            x = _run_layer(layer.to(wide), x, LayerCache(self.config, count, wide), block, self.config, rows)
        return (_norm(x, self.final_norm.to(wide), self.config.norm_epsilon) @ self.unembedding.to(wide).mT)[0, 0]


def _take_layer(tensors: dict[str, Tensor], prefix: str) -> Layer:
    def take(name: str) -> Tensor:
        return tensors.pop(f"{prefix}{name}.weight")

    return Layer(
        attention_norm=take("input_layernorm"),
        qkv=torch.cat((take("self_attn.q_proj"), take("self_attn.k_proj"), take("self_attn.v_proj"))),
        output=take("self_attn.o_proj"),
        mlp_norm=take("post_attention_layernorm"),
        gate_up=torch.cat((take("mlp.gate_proj"), take("mlp.up_proj"))),
        down=take("mlp.down_proj"),
    )


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if weight.dim() == 1:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    return F.rms_norm(x, (x.shape[-1],), None, epsilon) * weight


def _rotate(x: Tensor, block: Block) -> Tensor:
    """Rotary positions on ``[..., r, d]``; the two halves of d are paired, as in Megatron and Hugging Face."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * block.cos, torch.cat((second, first), -1), block.signed_sin)


def _run_layer(layer: Layer, x: Tensor, cache: LayerCache, block: Block, config: DecoderConfig, rows: int) -> Tensor:
    """One layer on ``[S, r, h]`` -> ``[S, rows, h]``: all r positions enter the cache, the last ``rows`` go on."""
    stacked, count, _ = x.shape
    nq, nk, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = _norm(x, layer.attention_norm, config.norm_epsilon) @ layer.qkv.mT
    qkv = qkv.view(stacked, count, nq + 2 * nk, d).transpose(1, 2)
    queries, keys = _rotate(qkv[:, : nq + nk], block).split((nq, nk), 1)
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
    gate, up = (_norm(x, layer.mlp_norm, config.norm_epsilon) @ layer.gate_up.mT).chunk(2, -1)
    return x + (F.silu(gate) * up) @ layer.down.mT
