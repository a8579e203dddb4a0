"""Gradient accumulation fusion with the real kernel of NVIDIA Apex; tests/distributed has its bookkeeping without one.

Never run where this was written: there was no GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.parity import Case, assert_same_step, make_parameters, megatron_step, reference_step

pytestmark = pytest.mark.gpu
FUSED = {"gradient_accumulation_fusion": True}

CASES = {
    "fp32": Case(config=FUSED),
    "tied": Case(tied=True, config=FUSED),
    "overlap": Case(overlap=True, config=FUSED),
    "n8": Case(heads={"n": 8}, config=FUSED),
}


@pytest.mark.parametrize("name", CASES)
def test_fused_gradients_equal_reference(name: str) -> None:
    pytest.importorskip("fused_weight_gradient_mlp_cuda", reason="NVIDIA Apex is not installed")
    case = CASES[name]
    parameters = make_parameters(case)
    # TF32 would hide an error of 1e-5 behind one of 1e-3; the workers inherit the default, which is full fp32.
    assert torch.get_float32_matmul_precision() == "highest"
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-4)
