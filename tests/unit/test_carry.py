"""A stage's output that carries the loss of its heads, as megatron-core's schedule treats it."""

from __future__ import annotations

import pytest
import torch

from mtp_megatron import compat
from mtp_megatron.carry import carry


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_loss_runs_backward_with_what_was_sent(freed: bool, scale: float) -> None:
    compat.prepare()
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    weight = torch.tensor([2.0, 3.0, 5.0], requires_grad=True)
    z = torch.arange(6.0).view(2, 3) * weight
    loss = (z * z).sum()
    sent = carry(z, loss, None if scale == 1.0 else lambda one: torch.tensor([scale]) * one)  # shaped as upstream's
    assert torch.equal(sent, z)
    assert sent.data_ptr() == z.data_ptr(), "z was copied"
    came_back = torch.full((2, 3), 0.5)
    if freed:
        deallocate_output_tensor(sent, deallocate_pipeline_outputs=True)
        assert sent.numel() == 1
        custom_backward(sent, came_back)
    else:
        sent.backward(came_back)
    want = (came_back + scale * 2 * z.detach()) * torch.arange(6.0).view(2, 3)
    assert torch.equal(weight.grad, want.sum(0))


def test_a_frozen_trunk_still_gets_its_heads_backward() -> None:
    z, weight = torch.ones(2, 3), torch.ones((), requires_grad=True)
    carry(z, weight * z.sum(), None).backward(torch.zeros(2, 3))
    assert weight.grad == 6.0
