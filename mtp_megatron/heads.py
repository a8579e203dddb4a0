"""Head kinds as Megatron modules: built from the trunk's layer spec, tensor parallel, each saved under its own key."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from mtp_megatron.config import HeadsConfig


class IdentityHead(torch.nn.Module):
    """Head 1 of the linear and Medusa kinds: the trunk's own output, so that trunk + unembedding is a plain model."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


class PostNormHead(MegatronModule):
    """A head that reads the *normed* trunk output: ``A x`` (linear) or ``x + silu(A x + b)`` (Medusa, arXiv
    2401.10774).

    Input and output ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism. The matrix ``[h, h]`` is
    replicated over the tensor-parallel group: it is small, and each rank then works on what it holds without
    communication.
    """

    def __init__(self, config: TransformerConfig, kind: str) -> None:
        super().__init__(config)
        self.kind = kind
        size = config.hidden_size
        self.linear = torch.nn.Linear(size, size, bias=kind == "medusa", dtype=config.params_dtype)
        with torch.no_grad():  # the same on every tensor-parallel rank: drawn outside of the model-parallel RNG region
            if kind == "medusa":
                self.linear.weight.zero_()  # Medusa starts from the next-token head's own prediction
                self.linear.bias.zero_()
            else:
                torch.nn.init.eye_(self.linear.weight)
        for parameter in self.linear.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, normed: Tensor) -> Tensor:
        if self.kind == "medusa":
            return normed + torch.nn.functional.silu(self.linear(normed))
        return self.linear(normed)


class HeadLayers(torch.nn.ModuleList):
    """The n heads; ``heads[i]`` is head i + 1 of the paper, None where another pipeline stage holds it."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        # Megatron takes a plain ModuleList for one replicated blob and would save a single TP shard of each head.
        state: dict[str, Any] = {}
        for index, head in enumerate(self):
            if head is not None:
                state.update(sharded_state_dict_default(head, f"{prefix}{index}.", sharded_offsets, metadata))
        return state


def build_heads(
    config: TransformerConfig,
    heads: HeadsConfig,
    layer_spec: ModuleSpec,
    *,
    first_layer_number: int,
    owned: Collection[int],
    vp_stage: int | None = None,
    pg_collection: Any = None,
) -> HeadLayers:
    """Build the heads of one stage.

    Args:
        layer_spec: spec of a transformer layer, as the trunk has them.
        first_layer_number: 1-based number of head 1's layer: one more than the trunk's layers.
        owned: the stage's heads, 0-based; the others' places hold None.
    """
    layers = HeadLayers()
    for index in range(heads.n):
        if index not in owned:
            layers.append(None)  # type: ignore[arg-type]  # keeps the names of modules and parameters global
        elif heads.kind == "transformer":
            layer = build_module(
                layer_spec, config=config, layer_number=1, vp_stage=vp_stage, pg_collection=pg_collection
            )
            _renumber(layer, first_layer_number + index)
            layers.append(layer)
        else:
            layers.append(IdentityHead() if index == 0 else PostNormHead(config, heads.kind))
    return layers


def _renumber(layer: torch.nn.Module, number: int) -> None:
    """Give a layer its place in the model: built outside a TransformerBlock it counts from its stage's first layer."""
    for module in layer.modules():
        if isinstance(getattr(module, "layer_number", None), int):
            module.layer_number = number  # type: ignore[assignment]
