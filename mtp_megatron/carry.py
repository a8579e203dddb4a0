"""How a pipeline stage before the last one adds its heads' loss: z goes on unchanged and carries the loss with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def carry(z: Tensor, loss: Tensor, scale: Callable[[Tensor], Tensor] | None) -> Tensor:
    """``z``, whose backward pass also runs that of ``loss``.

    On the last stage the schedule starts the backward pass at the loss, scaled; on the others at what they sent, with
    the gradient that came back. Here the loss gets the same scale, and dL/dz is what came back plus the loss's own.
    (megatron-core's ``MTPLossAutoScaler`` does so for its auxiliary loss, with a scale kept in the class.) Without
    ``calculate_per_token_loss`` the schedule divides the last stage's loss besides, which this cannot know:
    :func:`.model_checks.check_spread` refuses that.

    Args:
        z: ``[s, b, h]``, the stage's output.
        loss: ``[]``, a function of ``z``.
        scale: the engine's loss scaling (``TransformerConfig.grad_scale_func``), called in the backward pass; None: 1.

    Returns:
        ``[s, b, h]``, ``z``'s values in ``z``'s memory. No view, so that the schedule may free it once it is sent.
    """
    output: Tensor = _Carry.apply(z, loss, scale)
    return output


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, loss, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        ctx.like = loss.detach()
        output = z.new_empty(())
        output.data = z.data  # an input returned as it is would become a view of it
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        one = torch.ones_like(ctx.like)
        return grad, one if ctx.scale is None else ctx.scale(one).reshape(one.shape), None
