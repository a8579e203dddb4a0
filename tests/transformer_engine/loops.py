"""Whole trainings for ``run_world`` with ``fresh=True``: its processes pass for an H100 for as long as they live."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron.training.batches import Microbatch
from tests import fp8_runs, parity
from tests.fp8_runs import Seen
from tests.parity import Case
from tests.transformer_engine import runs


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
    """One step of each case, as :func:`tests.parity.step_body` returns it; ``engine``: kinds of its linear layers."""
    monkeypatch = become_a_gpu()
    found = []
    built = fp8_runs.watch(monkeypatch, parity, "build_chunks")
    for case in cases:
        parameters = parity.make_parameters(case)
        step = parity.step_body(rank, world_size, case, parameters, parity.make_batches(case, parameters), None)
        _, chunks = built.pop()
        kinds = [type(layer).__name__ for chunk in chunks for layer in fp8_runs.linear_layers(chunk).values()]
        found.append(step | {"engine": kinds})
    return found


@dataclass
class Unfed:
    """What a rank saw of a trunk whose tokens all go to the first experts.

    Attributes:
        tokens: that its experts got in the last microbatch, over all layers.
        gradients: largest entry of any of its experts' gradients.
        loss: of head 1.
    """

    tokens: int
    gradients: float
    loss: float
    seen: Seen


def unfed_experts(rank: int, world_size: int, tree: dict[str, Any]) -> Unfed:
    """Two steps of two microbatches whose routers send every token to experts 0 and 1."""
    monkeypatch = become_a_gpu()
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.step import train_step
    from mtp_megatron.training.validate import check_recipe
    from mtp_megatron.training.world import model_parallel_world

    recipe = check_recipe(parse_recipe(tree), world_size=world_size, tokenizer_vocab_size=runs.VOCAB)
    manager, tokens = fp8_runs.Manager(monkeypatch), []
    with model_parallel_world(recipe):
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        layers = [layer.mlp for layer in model.decoder.layers]
        for layer in layers:
            monkeypatch.setattr(layer.router, "forward", _first_experts(layer.router))
            layer.experts.register_forward_pre_hook(lambda _, given: tokens.append(int(given[1].sum())))
        given = runs.microbatch(recipe)
        batch = Microbatch(given["input_ids"], given["position_ids"], given["labels"])
        for _ in range(2):
            figures = train_step(recipe, trainable, [iter([batch] * runs.MICROBATCHES)], runs.MICROBATCHES, False)
        experts = [parameter for layer in layers for parameter in layer.experts.parameters()]
        largest = max(float(parameter.main_grad.abs().max()) for parameter in experts)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        seen = fp8_runs.seen_of(manager, [model])
        return Unfed(sum(tokens[-len(layers) :]), largest, float(figures.head_loss[0]), seen)


def _first_experts(router: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """In the place of its forward pass: the first ``k`` experts, evenly, whatever comes."""

    def route(hidden: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros(hidden.shape[:-1].numel(), router.config.num_moe_experts, dtype=torch.bool)
        chosen[:, : router.topk] = True
        # Of the weights, so that these have a gradient.
        weight = (1 + 0 * router.weight.float().sum()) / router.topk
        return chosen * weight, chosen

    return route
