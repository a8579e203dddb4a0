"""Attention within documents (`data.reset_attention_mask`): a packed sequence gives what its documents give alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.test_hybrid import HAS_HYBRID
from tests.parity import (
    Case,
    assert_same_step,
    gradient_problems,
    make_parameters,
    megatron_step,
    reference_step,
)

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
