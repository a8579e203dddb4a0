"""Whole trainings with Transformer Engine, for ``run_world`` with ``fresh=True``: processes that pass for an H100."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor


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


def train_recipe(rank: int, world_size: int, tree: dict[str, Any]) -> Seen:
    """The recipe's own loop."""
    manager = _become_a_gpu()
    from mtp_megatron.training import build, loop
    from mtp_megatron.training.recipe_io import parse_recipe

    _initialise_as_on_a_gpu(build)
    built = _watch(build, "build_trainable")
    loop.train(parse_recipe(tree))
    return _seen(manager, built[0].models)


def masters(rank: int, world_size: int, tree: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """After ``run.load``, on one rank: by name of the trunk's matrices, the optimizer's fp32 numbers and their own."""
    _become_a_gpu()
    from mtp_megatron.training import build
    from mtp_megatron.training.host import host_of
    from mtp_megatron.training.preflight import preflight
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.world import model_parallel_world

    _initialise_as_on_a_gpu(build)
    plan = preflight(parse_recipe(tree), world_size)
    with model_parallel_world(plan.recipe):
        trainable = host_of(plan.recipe).build(plan.recipe, plan.initial)
        (model,) = trainable.models
        (optimizer,) = trainable.optimizer.chained_optimizers
        pairs = zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True)
        found = {id(p): master for models, copies in pairs for p, master in zip(models, copies, strict=True)}
        return {
            name: (found[id(parameter)].view(parameter.shape), parameter.detach().float().clone())
            for name, parameter in model.decoder.named_parameters()
            if parameter.dim() == 2
        }


def train_megatron_lm(rank: int, world_size: int, argv: Sequence[str], parameters: dict[str, Tensor]) -> Seen:
    """Megatron-LM's, on given weights and on samples of ``tests.megatron_lm``."""
    manager = _become_a_gpu(megatron_lm=True)
    from mtp_megatron import megatron_lm
    from tests.megatron_lm import train_filled

    built = _watch(megatron_lm, "model_provider")
    train_filled(rank, world_size, argv, parameters)
    return _seen(manager, built)


def _become_a_gpu(megatron_lm: bool = False) -> Any:
    """For as long as this process lives; what counts regions and updates from now on."""
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # read at its import
    from mtp_megatron.compat import megatron_lm as upstream
    from tests.transformer_engine import pretend

    pretend.import_transformer_engine()
    if megatron_lm:
        upstream.prepare()  # its stand-ins bring a device of their own: an older one
    monkeypatch = pytest.MonkeyPatch()
    pretend.pretend(monkeypatch)
    return pretend.Manager(monkeypatch)


def _initialise_as_on_a_gpu(build: Any) -> None:
    """Megatron's way for CPUs writes weights past Transformer Engine, whose parameters in FP8 remember first values."""
    original = build.transformer_config

    def on_the_device(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        config.use_cpu_initialization = False
        return config

    build.transformer_config = on_the_device


def _watch(module: Any, name: str) -> list[Any]:
    """What a function of a module returns from now on."""
    original: Callable[..., Any] = getattr(module, name)
    returned: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        return returned[-1]

    setattr(module, name, watched)
    return returned


def _seen(manager: Any, models: Sequence[Any]) -> Seen:
    from tests.transformer_engine import runs

    seen = Seen(regions=manager.regions, updates=manager.updates)
    for model in models:
        seen.trunk += runs.in_fp8(model.decoder)
        seen.heads += runs.in_fp8(getattr(model, "heads", torch.nn.ModuleList()))
        for layer in runs.linear_layers(model.decoder).values():
            states = [layer.fp8_meta.get(key) for key in ("scaling_fwd", "scaling_bwd")]
            seen.scales += [state.scale.clone() for state in states if hasattr(state, "amax_history")]
    return seen
