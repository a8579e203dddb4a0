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
    ``vocab_parallel_cross_entropy``). With ``heads.z_loss`` the z-losses are in it.
    """
    total = torch.zeros((), dtype=report.loss_sum.dtype, device=z.device)
    shard, z_loss = model.vocab_shard(), model.heads_config.z_loss
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
            log_z_squared = torch.where(valid, _log_z(logits).square(), 0).sum() if z_loss else None
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits, torch.where(valid, target, 0))
            loss = torch.where(valid, losses, 0).sum()
            total = total + report.weights[head] * loss
            if log_z_squared is not None:
                total = total + report.weights[head] * z_loss * log_z_squared
            with torch.no_grad():
                whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
                correct = (valid & (whole.argmax(-1) == target)).sum()
                sums = TokenSums(loss.detach(), correct.to(loss.dtype), None, log_z_squared=log_z_squared)
                report.record(head, sums)
    return total


def _log_z(logits: Tensor) -> Tensor:
    """``[s, b]`` over the whole vocabulary, in fp32 at least. Of a copy: upstream's cross entropy overwrites logits."""
    whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits.clone())
    return whole.to(torch.promote_types(whole.dtype, torch.float32)).logsumexp(-1)
