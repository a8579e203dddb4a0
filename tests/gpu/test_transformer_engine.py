"""Gradients of Transformer Engine's modules on a GPU; tests/transformer_engine has every layout without one."""

from __future__ import annotations

import pytest

from tests.fp8_runs import skip_without_transformer_engine
from tests.parity import Case, gradient_problems, make_parameters, megatron_step, reference_step

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
