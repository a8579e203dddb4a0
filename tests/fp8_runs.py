"""Trainings with Transformer Engine and what they saw of FP8; on a GPU, or in a process that passes for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron.compat import packages


@dataclass
class Seen:
    """What one rank saw of FP8.

    Attributes:
        trunk, heads: of each linear layer of Transformer Engine, whether its last forward pass was in FP8.
        regions: of FP8 that were entered.
        updates: of the histories of largest values, by whether after a forward pass.
        scales: of the trunk's layers, forward and backward, ``[quantisers]`` each; empty but for delayed scaling.
    """

    trunk: list[bool] = field(default_factory=list)
    heads: list[bool] = field(default_factory=list)
    regions: int = 0
    updates: Counter[bool] = field(default_factory=Counter)
    scales: list[Tensor] = field(default_factory=list)


class Manager:
    """Counts what Transformer Engine's state manager does, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        self.regions, self.updates = 0, Counter[bool]()
        # Releases before 2.9 name it otherwise.
        name = "autocast_enter" if hasattr(FP8GlobalStateManager, "autocast_enter") else "fp8_autocast_enter"
        enter = getattr(FP8GlobalStateManager, name).__func__
        update = FP8GlobalStateManager.reduce_and_update_fp8_tensors.__func__

        def entering(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self.regions += 1
            return enter(cls, *args, **kwargs)

        def updating(cls: Any, forward: bool = True, **more: Any) -> Any:
            self.updates[forward] += 1
            return update(cls, forward=forward, **more)

        monkeypatch.setattr(FP8GlobalStateManager, name, classmethod(entering))
        monkeypatch.setattr(FP8GlobalStateManager, "reduce_and_update_fp8_tensors", classmethod(updating))


def skip_without_transformer_engine() -> None:
    """Where there is a GPU, for layers in any precision."""
    if packages.transformer_engine(cuda=True).state is not packages.State.USABLE:
        pytest.skip("Transformer Engine is not installed")


def linear_layers(module: torch.nn.Module) -> dict[str, Any]:
    """Transformer Engine's linear layers by name; those of all experts are one."""
    from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, Linear

    kinds = GroupedLinear | LayerNormLinear | Linear
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def in_fp8(module: torch.nn.Module) -> list[bool]:
    """Of each of Transformer Engine's linear layers, whether its last forward pass was in FP8 (its own record)."""
    return [layer.fp8 for layer in linear_layers(module).values()]


def seen_of(manager: Manager, models: Sequence[Any]) -> Seen:
    seen = Seen(regions=manager.regions, updates=manager.updates)
    for model in models:
        seen.trunk += in_fp8(model.decoder)
        seen.heads += in_fp8(getattr(model, "heads", torch.nn.ModuleList()))
        for layer in linear_layers(model.decoder).values():
            states = [layer.fp8_meta.get(key) for key in ("scaling_fwd", "scaling_bwd")]
            seen.scales += [state.scale.cpu() for state in states if hasattr(state, "amax_history")]
    return seen


def train_megatron_lm(rank: int, world_size: int, argv: Sequence[str], parameters: dict[str, Tensor]) -> Seen:
    """For ``run_world``: Megatron-LM's loop on given weights and on samples of :mod:`tests.megatron_lm`."""
    from mtp_megatron import megatron_lm
    from tests.megatron_lm import train_filled

    with pytest.MonkeyPatch.context() as monkeypatch:
        manager = Manager(monkeypatch)
        built = watch(monkeypatch, megatron_lm, "model_provider")
        train_filled(rank, world_size, argv, parameters)
        return seen_of(manager, built)


def watch(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """What a function of a module returns from now on."""
    original: Callable[..., Any] = getattr(module, name)
    returned: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(module, name, watched)
    return returned
