"""A trunk with experts under dense heads: every layout against the oracle, load balancing included.

Not covered here: GPUs; Transformer Engine's grouped matrix multiplications (tests/transformer_engine).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_world
from tests.parity import Case, assert_same_step, gradient_problems, make_parameters, megatron_step, reference_step
from tests.training_runs import interrupted_copy, largest_difference, metrics, tiny_tree, train_body

EXPERTS = Case(experts=2, top_k=1, aux_loss=0.5)
LAYOUTS = {
    "one": EXPERTS,
    "dp2": replace(EXPERTS, world=2),
    "ep2-dp2": replace(EXPERTS, world=2, ep=2),
    "ep2-dp2-pp2": replace(EXPERTS, world=4, ep=2, pp=2),
    "ep2-dp4": replace(EXPERTS, world=4, ep=2),
    "ep2-tp2": replace(EXPERTS, world=2, ep=2, tp=2, sequence_parallel=True),
    "ep2-dp2-tp2": replace(EXPERTS, world=4, ep=2, tp=2, sequence_parallel=True),
    "ep2-cp2": replace(EXPERTS, world=2, ep=2, cp=2),
    "ep2-dp2-overlap": replace(EXPERTS, world=2, ep=2, overlap=True),
    "ep2-vpp": replace(EXPERTS, world=4, ep=2, pp=2, vp=2),
    "4-experts-top2": replace(EXPERTS, world=2, ep=2, experts=4, top_k=2),
    "recomputed": replace(
        EXPERTS,
        world=2,
        ep=2,
        config={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_reference(name: str) -> None:
    case = LAYOUTS[name]
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_load_balancing_loss_enters_once_whatever_the_number_of_heads(heads: int) -> None:
    """Control: a loss that is counted once per head, or not at all, would be noticed."""
    case = replace(LAYOUTS["ep2-dp2"], heads={"n": heads})
    parameters = make_parameters(case)
    got = megatron_step(case, parameters)
    for wrong in (0.0, 2 * case.aux_loss):
        problems = gradient_problems(got, reference_step(replace(case, aux_loss=wrong), parameters), 1e-3)
        assert any("router" in problem for problem in problems), problems


SETTINGS: dict[str, Any] = {
    "model__num_experts": 2,
    "model__moe_top_k": 1,
    "model__moe_aux_loss": 0.1,
    "model__moe_ffn_hidden_size": 48,
}


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, from drawn weights."""
    run = tmp_path_factory.mktemp("runs") / "single"
    run_world(train_body, 1, tiny_tree(data, run, **SETTINGS))
    return run


@pytest.fixture(scope="module")
def loaded(data: Path, single: Path) -> Path:
    """One process, from the weights that `single` ended with."""
    run = single.parent / "loaded"
    run_world(train_body, 1, tiny_tree(data, run, **SETTINGS, run__load=str(single)))
    return run


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel__expert": 2}),
        (4, {"parallel__expert": 2, "parallel__pipeline": 2, "optimizer__distributed": True}),
        (4, {"parallel__expert": 2, "parallel__tensor": 2, "parallel__sequence_parallel": True}),
    ],
    ids=str,
)
def test_a_run_goes_like_one_process_and_resumes_there(
    world: int, layout: dict[str, Any], data: Path, single: Path, loaded: Path, tmp_path: Path
) -> None:
    """Without pipeline stages, which draw differently, from drawn weights: any expert parallel size draws the same."""
    run = tmp_path / "run"
    settings = {**SETTINGS, **layout}
    if "parallel__pipeline" in layout:
        settings["run__load"], single = str(single), loaded
    run_world(train_body, world, tiny_tree(data, run, **settings))
    assert largest_difference(metrics(run), metrics(single)) < 1e-5
    assert largest_difference(metrics(run, "valid"), metrics(single, "valid")) < 1e-5
    for step, record in metrics(run).items():
        for name in ("grad_norm", "load_balancing_loss"):
            assert record[name] == pytest.approx(metrics(single)[step][name], rel=1e-4), (step, name)
    resumed = interrupted_copy(run, tmp_path / "resumed", step=4)
    run_world(train_body, world, tiny_tree(data, resumed, **settings))
    assert metrics(resumed) == metrics(run)


def test_weights_move_between_expert_parallel_sizes_and_optimizer_states_do_not(
    data: Path, single: Path, tmp_path: Path
) -> None:
    shared = {**SETTINGS, "parallel__expert": 2, "run__load": str(single), "train__steps": 1, "train__save_interval": 1}
    alone = {**shared, "parallel__expert": 1}
    for name, world, settings in (("shared", 2, shared), ("alone", 1, alone)):
        run_world(train_body, world, tiny_tree(data, tmp_path / name, **settings, optimizer__warmup_steps=0))
    assert largest_difference(metrics(tmp_path / "shared"), metrics(tmp_path / "alone")) < 1e-5
    tree = tiny_tree(data, interrupted_copy(single, tmp_path / "copy", step=4), **SETTINGS, parallel__expert=2)
    with pytest.raises(RuntimeError, match=r"saved with parallel.expert=1, which cannot be resumed with 2"):
        run_world(train_body, 2, tree)


def test_load_balancing_is_reported_without_its_weight(single: Path) -> None:
    """1 is even; all tokens to one of two experts, with certainty, is 2."""
    losses = [record["load_balancing_loss"] for record in metrics(single).values()]
    assert all(0.9 < loss < 2 for loss in losses), losses


def test_a_dense_checkpoint_does_not_pass_for_one_with_experts(data: Path, single: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", run__load=str(single))
    with pytest.raises(RuntimeError, match=r"model.num_experts is 2 there and None here"):
        run_world(train_body, 1, tree)
