"""Heads on several pipeline stages against the oracle; training runs of them against all heads on the last stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity import (
    Case,
    assemble,
    assert_same_step,
    gradient_problems,
    make_batches,
    make_parameters,
    megatron_step,
    reference_step,
    step_body,
)
from tests.training_runs import interrupted_copy, largest_difference, metrics, tiny_tree, train_body

FOUR = {"n": 4}
PP2 = Case(world=2, pp=2, layout="Ettttmm|mmL", heads=FOUR)
PP4 = Case(world=4, pp=4, layout="Ett|ttm|mm|mL", heads=FOUR)
VPP = Case(world=2, pp=2, vp=2, layout="Ett|ttm|m|mmL", heads=FOUR)  # rank 1 holds two stages with heads
CASES = {
    "pp2": PP2,
    "pp4": PP4,
    "vpp": VPP,
    "tp2-pp2-sp": replace(PP2, world=4, tp=2, sequence_parallel=True),
    "cp2-pp2": replace(PP2, world=4, cp=2),
    "tied-pp2": replace(PP2, tied=True),
    "tied-pp4": replace(PP4, tied=True),  # the embedding's stage has no heads
    "tied-vpp": replace(VPP, tied=True),
    "tied-tp2-pp2-sp": replace(PP2, world=4, tp=2, sequence_parallel=True, tied=True, heads={"n": 4, "z_loss": 0.05}),
    "dp2-overlap": replace(PP2, world=4, overlap=True),
    "dp2-overlap-tied-vpp": replace(VPP, world=4, overlap=True, tied=True),
    "medusa": replace(PP2, heads={"n": 4, "kind": "medusa"}),
    "weights": replace(PP2, heads={"n": 4, "loss_weights": [1.0, 0.0, 0.0, 0.5]}),
    "idle-stage": replace(PP2, heads={"n": 4, "loss_weights": [1.0, 0.5, 0.0, 0.0]}),
    "joint": replace(PP2, heads={"n": 4, "execution": "joint", "z_loss": 0.05}),
    "loss-scale": replace(PP2, loss_scale=2.0**16),
}


@pytest.mark.parametrize("name", CASES)
def test_spread_heads_equal_the_reference(name: str) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    ranks = run_world(step_body, case.world, case, parameters, make_batches(case, parameters), None)
    assert_same_step(assemble(case, ranks), reference_step(case, parameters), 1e-5)
    assert copies_differ_by(ranks) == 0.0


def _free_what_was_sent(chunks: list) -> None:
    chunks[0].config.deallocate_pipeline_outputs = True


@pytest.mark.parametrize("name", ["pp2", "pp4", "tp2-pp2-sp", "tied-pp4", "dp2-overlap", "idle-stage", "joint"])
def test_outputs_that_are_freed_once_they_are_sent(name: str) -> None:
    """As on GPUs; not interleaved, where gloo would still be reading them."""
    case = CASES[name]
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters, _free_what_was_sent), reference_step(case, parameters), 1e-5)


def copies_differ_by(ranks: list[dict]) -> float:
    """Largest difference between gradients of one shard of a shared tensor on different stages (and replicas)."""
    first: dict[tuple[str, str], torch.Tensor] = {}
    largest = 0.0
    for rank in ranks:
        for name, _, index, value in rank["gradients"]:
            if name in ("final_norm.weight", "output_layer.weight", "embedding.word_embeddings.weight"):
                other = first.setdefault((name, str(index)), value)
                largest = max(largest, float((value - other).abs().max()))
    return largest


def test_fp64_equals_the_reference_to_machine_precision() -> None:
    case = replace(CASES["tied-vpp"], dtype=torch.float64)
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-12)


def _keep_gradients_apart(chunks: list) -> None:
    from megatron.core.distributed import finalize_model_grads

    chunks[0].config.finalize_model_grads_func = finalize_model_grads


def _stop_at_the_stage(chunks: list) -> None:
    for chunk in chunks:
        if not chunk.post_process and chunk.owned_heads:
            chunk.heads_config = chunk.heads_config.model_copy(update={"trainable": "heads"})


def _forget_the_scale(chunks: list) -> None:
    """As if the loss scale reached the last stage alone."""
    for chunk in chunks:
        if not chunk.post_process:
            loss, scale = chunk.future_heads_loss, chunk.config.grad_scale_func
            chunk.future_heads_loss = lambda *a, loss=loss, scale=scale, **k: _divided(loss(*a, **k), scale)


def _divided(result: tuple, scale: Callable) -> tuple:
    loss, report = result
    return loss / scale(1.0), report


@pytest.mark.parametrize(
    ("mutate", "suspects"),
    [
        (_keep_gradients_apart, {"final_norm.weight", "output_layer.weight"}),
        (_stop_at_the_stage, {"decoder.layers."}),
        (_forget_the_scale, {"decoder.layers.", "heads.2.", "heads.3.", "output_layer.weight"}),
    ],
)
def test_the_comparison_can_fail(mutate: Callable, suspects: set[str]) -> None:
    case = CASES["loss-scale"]
    parameters = make_parameters(case)
    problems = gradient_problems(megatron_step(case, parameters, mutate), reference_step(case, parameters), 1e-3)
    for suspect in suspects:
        assert any(problem.startswith(suspect) for problem in problems), problems


# --- training runs ---

SPREAD = {"parallel__pipeline": 2, "parallel__layout": "Ettttm|mmL"}  # three heads
SPREAD_VPP = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__layout": "Ett|ttm|m|mL"}
LAST = {"parallel__pipeline": 2, "parallel__layout": "Etttt|L"}
SHARDED = {
    "optimizer__distributed": True,
    "optimizer__overlap_grad_reduce": True,
    "optimizer__overlap_param_gather": True,
}


def _built(rank: int, world: int, tree: dict[str, Any]) -> tuple[int, dict[str, torch.Tensor], tuple[int, ...]]:
    """Parameters of the model as counted, this rank's copies of shared tensors, and the heads it holds."""
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.checkpointing import count_parameters
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.world import model_parallel_world

    recipe = parse_recipe(tree).resolved(vocab_size=64)
    with model_parallel_world(recipe):
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        copies = {"norm": model.final_norm.weight, "unembedding": model.unembedding()}
        held = tuple(head for head, layer in enumerate(model.heads) if layer is not None)
        return count_parameters(trainable), {name: value.detach().clone() for name, value in copies.items()}, held


@pytest.mark.parametrize("tied", [False, True])
def test_fresh_copies_are_equal_and_counted_once(tied: bool, tmp_path: Path) -> None:
    def built(**layout: Any) -> list[tuple]:
        return run_world(_built, 2, tiny_tree(tmp_path, tmp_path, model__tied_embeddings=tied, **layout))

    first, last = built(**SPREAD)
    assert (first[2], last[2]) == ((2,), (0, 1))
    assert torch.equal(first[1]["norm"], last[1]["norm"])
    assert torch.equal(first[1]["unembedding"], last[1]["unembedding"])
    assert last[1]["unembedding"].std() > 0
    h, f, rows = 32, 64, 128  # 7 layers of trunk and heads, final norm, embedding and unembedding
    layer = (h + 2 * 16) * h + h * h + 3 * f * h + 2 * h
    assert first[0] == last[0] == 7 * layer + h + (1 if tied else 2) * rows * h


def test_only_heads_learn_alike(data: Path, tmp_path: Path) -> None:
    """With new_heads and this layout the last stage trains nothing, nor does the first stage's trunk."""
    seedling = tmp_path / "seedling"
    run_world(train_body, 2, tiny_tree(data, seedling, **LAST, train__steps=1, optimizer__warmup_steps=0))
    common = {"run__load": str(seedling), "train__steps": 3, "train__eval_batches": 0}
    for trainable in ("heads", "new_heads"):
        for name, layout in {"last": LAST, "spread": {**LAST, "parallel__layout": "Ettttmm|mL"}}.items():
            tree = tiny_tree(data, tmp_path / f"{trainable}-{name}", **layout, **common, heads__trainable=trainable)
            run_world(train_body, 2, tree)
        spread, last = (metrics(tmp_path / f"{trainable}-{name}") for name in ("spread", "last"))
        assert largest_difference(spread, last) < 1e-5
        for step in last:
            assert spread[step]["grad_norm"] == pytest.approx(last[step]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("world", "settings"),
    [(2, {"heads__z_loss": 0.05}), (4, {"model__tied_embeddings": True, **SHARDED})],
    ids=["untied, with a z-loss", "tied, distributed optimizer, overlapped"],
)
def test_a_run_goes_on_alike_in_other_layouts(world: int, settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Fresh weights of a spread layout, whose copies must start equal; saved at step 4, resumed elsewhere and back."""
    whole = tmp_path / "whole"
    run_world(train_body, world, tiny_tree(data, whole, **SPREAD, **settings))
    with_z_loss = "heads__z_loss" in settings
    for records in (metrics(whole), metrics(whole, "valid")):
        assert ["head_z_loss" in record for record in records.values()] == [with_z_loss] * len(records)
    if with_z_loss:  # fresh logits are nearly equal, so both are of log(V)
        first = metrics(whole)[1]
        assert first["head_z_loss"] == pytest.approx([loss**2 for loss in first["head_loss"]], rel=0.05)
        assert metrics(whole)[8]["head_z_loss"] < first["head_z_loss"]
    for name, layout in {"last": LAST, "vpp": SPREAD_VPP, "same": SPREAD}.items():
        resumed = interrupted_copy(whole, tmp_path / name, step=4)
        run_world(train_body, world, tiny_tree(data, resumed, **layout, **settings))
        tolerance = 0.0 if name == "same" else 1e-5
        assert largest_difference(metrics(resumed), metrics(whole)) <= tolerance, name
        assert largest_difference(metrics(resumed, "valid"), metrics(whole, "valid")) <= tolerance, name
        for step, record in metrics(resumed, "valid").items():
            assert record["tokens_per_forward"] == pytest.approx(
                metrics(whole, "valid")[step]["tokens_per_forward"], abs=0.02
            )
            assert record["head_accuracy"] == pytest.approx(metrics(whole, "valid")[step]["head_accuracy"], abs=0.01)
        for step, record in metrics(resumed).items():
            assert record["grad_norm"] == pytest.approx(metrics(whole)[step]["grad_norm"], rel=1e-4)
        for kind in ("train", "valid") if with_z_loss else ():
            for step, record in metrics(resumed, kind).items():
                assert record["head_z_loss"] == pytest.approx(metrics(whole, kind)[step]["head_z_loss"], rel=1e-5)
    again = interrupted_copy(tmp_path / "last", tmp_path / "again", step=8)
    for run, layout in [(again, SPREAD), (tmp_path / "last", LAST)]:
        run_world(
            train_body, world, tiny_tree(data, run, **layout, **settings, train__steps=10, optimizer__decay_steps=8)
        )
    assert largest_difference(metrics(again), metrics(tmp_path / "last")) < 1e-5
