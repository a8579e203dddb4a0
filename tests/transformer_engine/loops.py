"""Whole trainings for ``run_world`` with ``fresh=True``: its processes pass for an H100 for as long as they live."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from tests import fp8_runs, parity
from tests.fp8_runs import Seen
from tests.parity import Case


def become_a_gpu(megatron_lm: bool = False) -> pytest.MonkeyPatch:
    """This process, for good."""
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # read at its import
    from mtp_megatron.compat import megatron_lm as upstream
    from tests.transformer_engine import pretend

    pretend.import_transformer_engine()
    if megatron_lm:
        upstream.prepare()  # its stand-ins bring a device of their own: an older one
    monkeypatch = pytest.MonkeyPatch()
    pretend.pretend(monkeypatch)
    initialise_as_on_a_gpu(monkeypatch)
    return monkeypatch


def initialise_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's way for CPUs writes weights past Transformer Engine, whose parameters in FP8 remember first values."""
    from mtp_megatron.training import build

    original: Callable[..., Any] = build.transformer_config

    def on_the_device(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        config.use_cpu_initialization = False
        return config

    monkeypatch.setattr(build, "transformer_config", on_the_device)


def train_recipe(rank: int, world_size: int, tree: dict[str, Any]) -> Seen:
    """The recipe's own loop."""
    monkeypatch = become_a_gpu()
    from mtp_megatron.training import build, loop
    from mtp_megatron.training.recipe_io import parse_recipe

    manager = fp8_runs.Manager(monkeypatch)
    built = fp8_runs.watch(monkeypatch, build, "build_trainable")
    loop.train(parse_recipe(tree))
    return fp8_runs.seen_of(manager, built[0].models)


def train_megatron_lm(rank: int, world_size: int, argv: Sequence[str], parameters: dict[str, Tensor]) -> Seen:
    """Megatron-LM's."""
    become_a_gpu(megatron_lm=True)
    return fp8_runs.train_megatron_lm(rank, world_size, argv, parameters)


def masters(rank: int, world_size: int, tree: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """After ``run.load``, on one rank: by name of the trunk's matrices, the optimizer's fp32 numbers and their own."""
    become_a_gpu()
    from mtp_megatron.training.host import host_of
    from mtp_megatron.training.preflight import preflight
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.world import model_parallel_world

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


def steps(rank: int, world_size: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One step of each case, as :func:`tests.parity.step_body` returns it; ``engine``: its linear layers, counted."""
    monkeypatch = become_a_gpu()
    found = []
    built = fp8_runs.watch(monkeypatch, parity, "build_chunks")
    for case in cases:
        parameters = parity.make_parameters(case)
        step = parity.step_body(rank, world_size, case, parameters, parity.make_batches(case, parameters), None)
        _, chunks = built.pop()
        found.append(step | {"engine": sum(len(fp8_runs.linear_layers(chunk)) for chunk in chunks)})
    return found
