"""Another number of heads than the source has: the first ones are kept, new ones are copies of head 1 or fresh."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Literal

import torch
from torch import Tensor

from mtp_megatron.checkpoint.description import ModelDescription
from mtp_megatron.checkpoint.source import TensorSource
from mtp_megatron.errors import ConfigError

NewHeads = Literal["copy", "fresh"]
_FIRST = "heads.0."


class WithHeads:
    """A model's tensors with ``n`` heads.

    Args:
        source: tensors by Megatron key.
        description: of the source.
        n: heads wanted.
        new: where heads that the source lacks come from; fresh ones depend on their name alone.
    """

    def __init__(self, source: TensorSource, description: ModelDescription, n: int, new: NewHeads) -> None:
        self.folder = source.folder
        self.fingerprint = f"{source.fingerprint} {n} {new}"
        self._source, self._new = source, new
        self._layers = description.shape.num_trunk_layers
        self._deviation = float(description.raw["model"].get("init_method_std", 0.02))
        known = description.shape.num_heads
        dropped = tuple(f"heads.{i}." for i in range(n, known))
        self._origins = {key: key for key in source.keys() if not key.startswith(dropped)}  # noqa: SIM118
        for head in range(known, n):
            for key in [key for key in self._origins if key.startswith(_FIRST)]:
                self._origins[f"heads.{head}.{key.removeprefix(_FIRST)}"] = key

    def keys(self) -> list[str]:
        """Keys of the model's tensors."""
        return list(self._origins)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values."""
        return self._source.meta(self._origins[key])

    def read(self, key: str) -> Tensor:
        """The values."""
        origin = self._origins[key]
        if origin == key or self._new == "copy":
            return self._source.read(origin)
        return self._fresh(key, self._source.meta(origin))

    def _fresh(self, key: str, meta: Tensor) -> Tensor:
        """Initial values as megatron-core draws them: matrices that write to the residual stream are scaled down."""
        if key.endswith(".bias"):
            return torch.zeros(meta.shape, dtype=meta.dtype)
        if meta.dim() == 1:
            return torch.ones(meta.shape, dtype=meta.dtype)
        deviation = self._deviation
        if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
            deviation /= math.sqrt(2 * self._layers)
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return torch.empty(meta.shape).normal_(0.0, deviation, generator=generator).to(meta.dtype)


def with_heads(
    source: TensorSource, description: ModelDescription, n: int, new: NewHeads
) -> tuple[TensorSource, ModelDescription]:
    """The model with ``n`` heads, and its description.

    Raises:
        ConfigError: ``n`` is no number of heads, or new ones were to be made of head 1, which is not a layer here.
    """
    shape = description.shape
    if n > shape.num_heads and not shape.heads_are_layers:
        raise ConfigError(
            "--heads",
            n,
            f"the model has {shape.num_heads}, and heads.kind={shape.head_kind} has no layer to make more from",
            "Add heads in training: run.load=MODEL heads.n=N.",
        )
    if n < 1:
        raise ConfigError("--heads", n, "a model has at least head 1", "Give 1 or more.")
    if n == description.shape.num_heads:
        return source, description
    raw = {**description.raw, "heads": {**description.raw["heads"], "n": n, "loss_weights": None}}
    changed = dataclasses.replace(description, shape=dataclasses.replace(description.shape, num_heads=n), raw=raw)
    return WithHeads(source, description, n, new), changed
