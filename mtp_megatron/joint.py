"""All heads alive in one autograd graph, through Megatron's own output layer and cross entropy: an oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from mtp_megatron.loss import TokenSums
from mtp_megatron.sequential import HeadReport
from mtp_megatron.targets import IGNORE_INDEX

if TYPE_CHECKING:
    from mtp_megatron.future_heads import FutureHeads


def joint_loss(
    model: FutureHeads, z: Tensor, targets: Tensor, layer_kwargs: dict[str, Any], report: HeadReport
) -> Tensor:
    """Weighted sum of the heads' loss sums by plain autograd; memory grows with n times the vocabulary.

    Shapes as in :meth:`FutureHeads.future_heads_loss`. Fills ``report`` at once. fp32 softmax (megatron-core's
    ``vocab_parallel_cross_entropy``).
    """
    total = torch.zeros((), dtype=report.loss_sum.dtype, device=z.device)
    shard = model.vocab_shard()
    if model.heads_config.trainable != "all":
        z = z * 0 + z.detach()  # z keeps a (zero) gradient, as in the deferred heads
    for chain in model.chains:
        inputs = z
        for head in chain:
            inputs = model.run_head_layer(head, inputs, layer_kwargs)
            logits = model.head_logits(head, inputs)
            padding = torch.arange(logits.shape[-1], device=logits.device) >= shard.rows
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
            target = targets[head].t().contiguous()
            valid = target != IGNORE_INDEX
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits, torch.where(valid, target, 0))
            loss = torch.where(valid, losses, 0).sum()
            total = total + report.weights[head] * loss
            with torch.no_grad():
                whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
                correct = (valid & (whole.argmax(-1) == target)).sum()
                report.record(head, TokenSums(loss.detach(), correct.to(loss.dtype), None))
    return total
