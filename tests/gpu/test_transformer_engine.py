"""Gradients of Transformer Engine's modules on a GPU; tests/transformer_engine has every layout without one."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.fp8_runs import skip_without_transformer_engine
from tests.parity import Case, gradient_problems, make_parameters, megatron_step, reference_step
from tests.transformer_engine import runs

pytestmark = pytest.mark.gpu
# It multiplies fp32 in TF32, whose mantissa has 10 bits.
TF32 = 1e-2

CASES = {
    "one": Case(engine=True),
    "tied": Case(engine=True, tied=True),
    "causal": Case(engine=True, heads={"n": 3, "arrangement": "causal"}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_oracles(name: str) -> None:
    skip_without_transformer_engine()
    case = CASES[name]
    parameters = make_parameters(case)
    step = megatron_step(case, parameters)
    assert not gradient_problems(step, reference_step(case, parameters), TF32)
    other = reference_step(case, make_parameters(case, seed=1))
    assert gradient_problems(step, other, TF32), "control: other weights would be noticed"


def experts_pass(grouped: bool, weights: dict[str, Tensor] | None, precision: str) -> tuple[dict[str, Tensor], Any]:
    """A trunk with experts, multiplied together or one after the other, on given weights: these, its losses and every
    gradient, by the names of the latter."""
    recipe = runs.recipe_of(**runs.EXPERTS, train__precision=precision)
    with runs.built(recipe, moe_grouped_gemm=grouped) as model:
        assert type(model.decoder.layers[0].mlp.experts).__name__ == ("TEGroupedMLP" if grouped else "SequentialMLP")
        if weights is not None:
            named = model.named_parameters()
            runs.put_weights(model, {name: weights[runs.local_name(name)] for name, _ in named})
        ran = runs.whole_pass(model, runs.microbatch(recipe))
        found = {runs.local_name(name): value for name, value in runs.weights_of(model).items()}
        grads = {runs.local_name(name): p.grad.clone() for name, p in model.named_parameters()}
        return found, (ran.losses, grads)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", TF32), ("bf16", 2e-2)])
def test_experts_together_are_those_one_after_the_other(precision: str, tolerance: float) -> None:
    skip_without_transformer_engine()
    weights, (losses, grads) = experts_pass(True, None, precision)
    _, (expected, wanted) = experts_pass(False, weights, precision)
    assert runs.relative(losses, expected) < tolerance
    assert grads.keys() == wanted.keys()
    of_experts = [name for name in grads if ".local_experts." in name]
    assert len(of_experts) == 2 * 4 * runs.TRUNK
    assert max(runs.relative(grads[name], grad) for name, grad in wanted.items()) < tolerance
    # Control: experts that had changed places would be noticed.
    first, second = (f".local_experts.{expert}." for expert in range(2))
    assert min(runs.relative(grads[n], grads[n.replace(first, second)]) for n in of_experts if first in n) > 0.1
