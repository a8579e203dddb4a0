"""Attention within documents (`data.reset_attention_mask`): a packed sequence gives what its documents give alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_runs import TIMEOUT, assert_alike, deepspeed_tree, zero
from tests.distributed.test_hybrid import HAS_HYBRID
from tests.harness import run_world
from tests.parity import (
    Case,
    assert_same_step,
    gradient_problems,
    make_parameters,
    megatron_step,
    reference_step,
)
from tests.training_runs import largest_difference, make_data, metrics, tiny_tree, train_body

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "one": Case(within_documents=True),
    "tp2-sp-selective": Case(
        world=2, tp=2, sequence_parallel=True, config={"recompute_granularity": "selective"}, within_documents=True
    ),
    "spread-vpp-tied-full": Case(  # stages without embedding or heads, with both, recomputed
        world=2,
        pp=2,
        vp=2,
        layout="Et|t|ttm|mmL",
        tied=True,
        config=FULL,
        within_documents=True,
    ),
    "cp2": Case(world=2, cp=2, within_documents=True),
    **({"hybrid": Case(pattern="*-*-*-*-", within_documents=True)} if HAS_HYBRID else {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_packed_sequence_equals_its_documents_alone(name: str) -> None:
    case = LAYOUTS[name]
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-5)


def _without_a_mask(chunks: list) -> None:
    for chunk in chunks:
        whole = chunk.forward
        chunk.forward = lambda *args, whole=whole, **told: whole(*args, **{**told, "attention_mask": None})


def _heads_without_a_mask(chunks: list) -> None:
    for chunk in chunks:
        whole = chunk.run_head_layer
        chunk.run_head_layer = lambda head, inputs, kwargs, whole=whole: whole(
            head, inputs, {**kwargs, "attention_mask": None}
        )


@pytest.mark.parametrize("mutate", [_without_a_mask, _heads_without_a_mask])
def test_control_a_mask_left_out_would_be_noticed(mutate: Callable[[list[Any]], None]) -> None:
    case = LAYOUTS["one"]
    parameters = make_parameters(case)
    problems = gradient_problems(megatron_step(case, parameters, mutate), reference_step(case, parameters), 1e-2)
    assert any(problem.startswith("heads.1.") for problem in problems), problems


WITHIN = {
    "data__reset_attention_mask": True,
    "model__seq_length": 64,  # the documents have some 30 tokens
    "model__init_method_std": 0.1,
    "train__steps": 3,
    "train__eval_interval": 3,
    "train__eval_batches": 1,
    "optimizer__warmup_steps": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), documents=80, words=10)


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Initial weights that are the same in every layout."""
    run = tmp_path_factory.mktemp("start") / "run"
    run_world(train_body, 1, tiny_tree(data, run, **WITHIN | {"train__steps": 1}))
    return str(run)


@pytest.fixture(scope="module")
def on_one_rank(data: Path, start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_world(train_body, 1, tiny_tree(data, run, **WITHIN, run__load=start))
    return run


def test_every_stage_of_a_run_learns_and_evaluates_within_documents(
    data: Path, start: str, on_one_rank: Path, tmp_path: Path
) -> None:
    """One of the four stages here has neither embedding nor heads, and reads the data for the mask alone."""
    stages = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__layout": "Et|t|ttm|mmL"}
    run_world(train_body, 2, tiny_tree(data, tmp_path / "stages", **WITHIN, **stages, run__load=start))
    across = WITHIN | {"data__reset_attention_mask": False}
    run_world(train_body, 1, tiny_tree(data, tmp_path / "control", **across, run__load=start))
    for kind, steps in (("train", [1, 2, 3]), ("valid", [3])):
        wanted = metrics(on_one_rank, kind)
        assert list(wanted) == steps
        assert largest_difference(metrics(tmp_path / "stages", kind), wanted) < 1e-5
        assert largest_difference(metrics(tmp_path / "control", kind), wanted) > 1e-3


@pytest.mark.deepspeed
def test_under_deepspeed_too(data: Path, start: str, on_one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_world(train_body, 1, deepspeed_tree(data, run, zero(2), **WITHIN, run__load=start), timeout=TIMEOUT)
    assert_alike(metrics(run), metrics(on_one_rank))
    assert largest_difference(metrics(run, "valid"), metrics(on_one_rank, "valid")) < 1e-5
