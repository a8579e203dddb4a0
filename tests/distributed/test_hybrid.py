"""The heads on megatron-core's HybridModel: every layout against the oracle, as for GPTModel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mtp_megatron import compat
from mtp_megatron.compat.versions import EnvironmentUnsupported
from mtp_megatron.errors import ConfigError
from tests.harness import parallel, run_world
from tests.parity import (
    Case,
    assert_same_step,
    build_chunks,
    gradient_problems,
    make_parameters,
    megatron_step,
    reference_step,
)

HAS_HYBRID = compat.MCORE_VERSION.release >= (0, 19)
needs_hybrid = pytest.mark.skipif(not HAS_HYBRID, reason="needs the HybridModel of megatron-core 0.19")

ONE, TWO = "*-*-*-*-", "*-*-|*-*-"
LAYOUTS = {
    "one": Case(pattern=ONE),
    "tp2-sp": Case(pattern=ONE, world=2, tp=2, sequence_parallel=True),
    "pp2": Case(pattern=TWO, world=2, pp=2),
    "tp2-pp2": Case(pattern=TWO, world=4, tp=2, pp=2),
    "pp2-uneven": Case(pattern="*-*-*-|*-", world=2, pp=2),
    "vpp": Case(pattern="*-|*-|*-|*-", world=2, pp=2, vp=2),
    "cp2": Case(pattern=ONE, world=2, cp=2),
    "dp2-overlap": Case(pattern=ONE, world=2, overlap=True),
    "tied-pp2": Case(pattern=TWO, world=2, pp=2, tied=True),
    "causal": Case(pattern=ONE, heads={"n": 3, "arrangement": "causal"}),
    "recomputed": Case(
        pattern=ONE,
        world=2,
        tp=2,
        config={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
}


@needs_hybrid
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_reference(name: str) -> None:
    case = LAYOUTS[name]
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-5)


def _swap_attention_layers(chunks: list) -> None:
    """Two layers change places and keep their numbers, by which gradients are named."""
    layers = chunks[0].decoder.layers
    layers[0], layers[2] = layers[2], layers[0]


def _roll_targets(chunks: list) -> None:
    for chunk in chunks:
        loss = chunk.future_heads_loss
        chunk.future_heads_loss = lambda z, t, kw, loss=loss, **more: loss(z, t.roll(1, 0), kw, **more)


@needs_hybrid
@pytest.mark.parametrize(
    ("mutate", "suspect"), [(_swap_attention_layers, "decoder.layers.1."), (_roll_targets, "heads.1.")]
)
def test_the_comparison_can_fail(mutate: Callable, suspect: str) -> None:
    """Controls: the layers in another order, targets given to the wrong heads."""
    case = LAYOUTS["one"]
    parameters = make_parameters(case)
    problems = gradient_problems(megatron_step(case, parameters, mutate), reference_step(case, parameters), 1e-3)
    assert any(problem.startswith(suspect) and "off by" in problem for problem in problems), problems


def builds(rank: int, world_size: int, case: Case) -> str:
    try:
        with parallel(case.tp, case.pp):
            build_chunks(case, make_parameters(case))
    except (ConfigError, EnvironmentUnsupported) as error:
        return f"{type(error).__name__}: {error}"
    return "built"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("M-*-*-*-", "holds M; Mamba"), ("*-*-", "4 layers for num_layers=8"), (TWO, "2 stages for 1 chunks")],
)
@needs_hybrid
def test_patterns_that_cannot_work_are_refused_by_name(pattern: str, says: str) -> None:
    (said,) = run_world(builds, 1, replace(LAYOUTS["one"], pattern=pattern))
    assert said.startswith("ConfigError: pattern")
    assert says in said


@pytest.mark.skipif(HAS_HYBRID, reason="is about megatron-core before 0.19")
def test_older_versions_are_refused_by_name() -> None:
    (said,) = run_world(builds, 1, LAYOUTS["one"])
    assert said.startswith("EnvironmentUnsupported: megatron-core 0.1")
    assert "has no HybridModel" in said
