"""The exported model in plain torch: a trunk and n heads, each layer with its own key/value cache.

Shapes as in :mod:`mtp_megatron.serving.layer`. Heads are layers beside the trunk, or maps of its normed output (linear
and Medusa), which need no cache; head 1 is then the trunk's own output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.export import DecoderConfig, Export
from mtp_megatron.serving.layer import Block, Layer, LayerCache, rms_norm, run_layer, take_layer


@dataclass(frozen=True)
class PostNormHeads:
    """Heads 2 to n of the linear and Medusa kinds, stacked (:class:`mtp_megatron.heads.PostNormHead`).

    Attributes:
        weight: ``[S, h, h]``.
        bias: ``[S, 1, h]`` of Medusa's residual blocks; None: linear maps.
    """

    weight: Tensor
    bias: Tensor | None

    def first(self, count: int) -> PostNormHeads:
        """The first ``count`` heads, without a copy."""
        return PostNormHeads(self.weight[:count], None if self.bias is None else self.bias[:count])

    def __call__(self, normed: Tensor) -> Tensor:
        """Normed output of the trunk ``[1, rows, h]`` -> what the unembedding reads ``[S, rows, h]``."""
        mapped = normed @ self.weight.mT
        return mapped if self.bias is None else normed + F.silu(mapped + self.bias)


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
        self.head1 = LayerCache(config, capacity, dtype) if config.heads_are_layers else None
        self.further = LayerCache(config, capacity, dtype, stacked=further_heads) if config.heads_are_layers else None
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = config.rope_theta**-exponent
        if config.rope_scaling is not None:
            frequencies = config.rope_scaling.apply(frequencies)
        angles = torch.outer(torch.arange(capacity, dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos, self._signed_sin = torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)
        self._rows_per_position = config.num_attention_heads // config.num_key_value_heads

    @property
    def length(self) -> int:
        """Positions that the trunk has seen."""
        return self.trunk[0].length

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
            if cache is not None:
                cache.truncate(length)


class HeadsLlama:
    """Trunk, heads, final norm and unembedding.

    Args:
        config: sizes.
        tensors: Hugging Face keys to tensors: the plain model (trunk and head 1) and ``mtp_heads.{i}.*``. Of pairs
            each tensor is let go when it has become one of ``dtype``, so that no second copy of the model is held.
        dtype: type of weights, activations and caches.

    Raises:
        CheckpointError: a tensor is missing or has no place.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.dtype = config, dtype
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        remaining = {key: tensor.to(dtype) for key, tensor in pairs}
        try:
            self.embedding = remaining.pop("model.embed_tokens.weight")
            self.unembedding = self.embedding if config.tied else remaining.pop("lm_head.weight")
            self.final_norm = remaining.pop("model.norm.weight")
            trunk, head_1 = [config.num_experts] * config.num_trunk_layers, [None] * config.heads_are_layers
            self.layers = [
                take_layer(remaining, f"model.layers.{k}.", config, experts)
                for k, experts in enumerate((*trunk, *head_1))
            ]
            self.further = _take_heads(remaining, config)
        except KeyError as error:
            raise CheckpointError(f"the export lacks the tensor {error}. Convert the checkpoint again.") from error
        if remaining:
            raise CheckpointError(f"the export holds {next(iter(remaining))}, which this model has not. Convert again.")

    @classmethod
    def load(cls, export: Export, dtype: torch.dtype = torch.float32) -> HeadsLlama:
        """Load an export's tensors."""
        return cls(export.config, export.tensors(), dtype)

    @property
    def num_parameters(self) -> int:
        """Weights of the model, heads included."""
        return sum(tensor.numel() for tensor in self._weights())

    def _weights(self) -> Iterator[Tensor]:
        yield self.embedding
        if not self.config.tied:
            yield self.unembedding
        yield self.final_norm
        for layer in self.layers:
            yield from layer.weights().values()
        if isinstance(self.further, Layer):
            yield from self.further.weights().values()
        elif self.further is not None:
            yield self.further.weight
            if self.further.bias is not None:
                yield self.further.bias

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
        block = caches.block(caches.length, len(tokens))
        z = F.embedding(tokens, self.embedding).unsqueeze(0)
        for layer, cache in zip(self.layers, caches.trunk, strict=False):
            z = run_layer(layer, z, cache, block, self.config, len(tokens))
        hidden = z[:, -rows:]
        if caches.head1 is not None:
            hidden = run_layer(self.layers[-1], z, caches.head1, block, self.config, rows)
        return z, self.logits(hidden)[0]

    def run_further_heads(self, z: Tensor, caches: Caches, rows: int = 1) -> Tensor:
        """Logits ``[S, rows, V]`` of heads 2 to S + 1 at the last ``rows`` positions of z ``[1, r, h]``.

        S is the number of heads that the caches were made for; all r positions enter their caches.
        """
        if self.further is None:
            raise ValueError("the model has no head beside head 1")
        heads = self.further.first(caches.further_heads)
        if isinstance(heads, PostNormHeads):
            return heads(rms_norm(z[:, -rows:], self.final_norm, self.config.norm_epsilon)) @ self.unembedding.mT
        assert caches.further is not None  # made together with these heads
        block = caches.block(caches.further.length, z.shape[1])
        x = z.expand(caches.further_heads, -1, -1)
        return self.logits(run_layer(heads, x, caches.further, block, self.config, rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., h]`` -> ``[..., V]``: final norm and unembedding."""
        return rms_norm(hidden, self.final_norm, self.config.norm_epsilon) @ self.unembedding.mT

    def exact_logits(self, tokens: Tensor) -> Tensor:
        """Head 1's logits ``[V]`` after ``tokens`` ``[r]``, in fp64 without any cache: a function of the tokens alone.

        Weights are widened layer by layer, so that the memory needed beside the model's is that of one layer.
        """
        wide, count = torch.float64, len(tokens)
        block = Caches(self.config, count, wide, 0).block(0, count)
        x = F.embedding(tokens, self.embedding).unsqueeze(0).to(wide)
        for layer in self.layers:
            rows = 1 if layer is self.layers[-1] else count
            exact = layer.each(lambda weight: weight.to(wide))
            x = run_layer(exact, x, LayerCache(self.config, count, wide), block, self.config, rows)
        return (rms_norm(x, self.final_norm.to(wide), self.config.norm_epsilon) @ self.unembedding.to(wide).mT)[0, 0]


def _take_heads(tensors: dict[str, Tensor], config: DecoderConfig) -> Layer | PostNormHeads | None:
    prefixes = [f"mtp_heads.{i}." for i in range(2, config.num_heads + 1)]
    if not prefixes:
        return None
    if config.heads_are_layers:
        return Layer.stack([take_layer(tensors, prefix, config) for prefix in prefixes])
    weight = torch.stack([tensors.pop(f"{prefix}linear.weight") for prefix in prefixes])
    if config.head_kind == "linear":
        return PostNormHeads(weight, None)
    return PostNormHeads(weight, torch.stack([tensors.pop(f"{prefix}linear.bias") for prefix in prefixes]).unsqueeze(1))
