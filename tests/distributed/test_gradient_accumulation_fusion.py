"""Gradient accumulation fusion: weight gradients go straight into the fp32 buffer and must be counted exactly once.

The kernel is a CPU double of Apex's `fused_weight_gradient_mlp_cuda`; the real one is tested in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
    reference_step,
    step_body,
)

FUSED = {"gradient_accumulation_fusion": True}

CASES = {
    "one": Case(config=FUSED),
    "tp2-sp": Case(world=2, tp=2, sequence_parallel=True, config=FUSED),
    "tied": Case(tied=True, config=FUSED),
    "tied-pp2-overlap": Case(world=4, pp=2, tied=True, overlap=True, config=FUSED),
    "replicated": Case(heads={"n": 3, "unembedding": "replicated"}, config=FUSED),
    "n8-overlap": Case(world=2, overlap=True, heads={"n": 8}, config=FUSED),
}


class Kernel:
    """`wgrad_gemm_accum_fp32(input, grad_output, main_grad)`: main_grad += grad_output.T @ input."""

    def __init__(self) -> None:
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        self.calls += 1
        inputs, grad_output = inputs.flatten(0, -2), grad_output.flatten(0, -2)
        main_grad.add_((grad_output.t() @ inputs).to(main_grad.dtype))


@contextmanager
def double() -> Iterator[Kernel]:
    from megatron.core.tensor_parallel import layers

    kernel = Kernel()
    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
    ):
        yield kernel


def _fused_body(rank: int, world: int, *args: Any) -> dict[str, Any]:
    from mtp_megatron import compat

    compat.prepare()
    with double() as kernel:
        result = step_body(rank, world, *args)
    assert kernel.calls > 0
    return result


@pytest.mark.parametrize("name", CASES)
def test_fused_gradients_equal_reference(name: str) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    ranks = run_world(_fused_body, case.world, case, parameters, make_batches(case, parameters), None)
    assert_same_step(assemble(case, ranks), reference_step(case, parameters), 1e-5)


def _count_twice(chunks: list) -> None:
    """What happens where the flag is not set: DDP adds the returned gradient to the buffer once more."""
    import mtp_megatron.head_pass as head_pass

    def deliver(self: Any, weight: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        weight.grad_added_to_main_grad = False
        return weight.main_grad.clone()

    head_pass.MegatronHeadPass._deliver = deliver  # the worker is thrown away afterwards


def test_double_counting_is_noticed() -> None:
    case = replace(CASES["one"], microbatches=1)
    parameters = make_parameters(case)
    batches = make_batches(case, parameters)
    ranks = run_world(_fused_body, 1, case, parameters, batches, _count_twice, fresh=True)
    problems = gradient_problems(assemble(case, ranks), reference_step(case, parameters), 1e-3)
    assert [problem.split(":")[0] for problem in problems] == ["output_layer.weight"]


def test_no_temporary_of_the_unembedding() -> None:
    """Fused, the pass holds no gradient buffer of its own: it hands out `main_grad` itself."""
    from mtp_megatron.head_pass import MegatronHeadPass
    from mtp_megatron.parameter_access import PLAIN

    weight = torch.nn.Parameter(torch.zeros(4, 2))
    weight.main_grad = torch.zeros(4, 2)
    model = SimpleNamespace(
        config=SimpleNamespace(gradient_accumulation_fusion=True),
        chains=((0,),),
        owned_heads=(0,),
        heads_are_spread=False,
        unembeddings=lambda: [weight],
        parameter_access=PLAIN,
        final_norm=torch.nn.Identity(),
    )
    heads = MegatronHeadPass(model, torch.zeros(1, 1, 1), {})
    assert heads._weight_gradient(0) is weight.main_grad
    assert weight.grad_added_to_main_grad
