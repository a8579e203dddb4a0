"""Evaluation on the held-out split: loss and accuracy of each head, and expected tokens per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron.metrics import agreement_counts, expected_tokens_per_forward, per_token
from mtp_megatron.targets import context_positions
from mtp_megatron.training.batches import Microbatch
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.step import BatchIterator, Trainer, evaluation_loss, sum_over_world

if TYPE_CHECKING:
    from mtp_megatron.sequential import HeadReport


@dataclass(frozen=True)
class Evaluation:
    """Figures of the held-out split, equal on every rank.

    Attributes:
        loss: weighted sum over heads of their loss sums, divided by head 1's count of targets (nats).
        head_loss: mean negative log likelihood of each head (nats).
        head_accuracy: share of each head's targets that were its most likely token.
        tokens_per_forward: expected tokens per forward pass of greedy self-speculative decoding
            (:func:`mtp_megatron.metrics.agreement_counts`), 1 to n.
    """

    loss: float
    head_loss: list[float]
    head_accuracy: list[float]
    tokens_per_forward: float


@torch.no_grad()
def evaluate(
    recipe: Recipe, trainable: Trainer, iterators: Sequence[BatchIterator], batches: int, num_microbatches: int
) -> Evaluation:
    """Run ``batches`` global batches forward only; collective over all ranks."""
    n = recipe.heads.n
    counts: list[Tensor] = []
    with trainable.evaluating():
        for model in trainable.models:
            model.keep_predictions = True
        for _ in range(batches):
            results = trainable.forward(recipe, iterators, num_microbatches, evaluation_loss)
            counts += [evaluation_counts(batch, report) for batch, report in results]
        for model in trainable.models:
            model.keep_predictions = False
    sums = sum_over_world(counts, 5 * n + 1)
    losses, correct, tokens, accepted, positions = (sums[i * n : (i + 1) * n] for i in range(5))
    total = sum(weight * loss for weight, loss in zip(recipe.heads.base_weights(), losses, strict=True))
    return Evaluation(
        loss=per_token([total], [sums[5 * n]])[0],
        head_loss=per_token(losses, tokens),
        head_accuracy=per_token(correct, tokens),
        tokens_per_forward=expected_tokens_per_forward(accepted, positions),
    )


def evaluation_counts(batch: Microbatch, report: HeadReport) -> Tensor:
    """``[5n + 1]`` sums of one microbatch: losses, correct, targets, accepted, positions, normalizer; fp64."""
    from megatron.core import parallel_state

    if report.predictions is None or batch.targets is None:
        raise RuntimeError("evaluation needs the heads' predictions and the targets on the last stage")
    predictions, targets = whole_sequences(report.predictions), whole_sequences(batch.targets)
    accepted, positions = agreement_counts(predictions, targets)
    if parallel_state.get_context_parallel_rank() > 0:  # all of them counted the same whole sequences
        accepted, positions = torch.zeros_like(accepted), torch.zeros_like(positions)
    figures = [report.loss_sum, report.correct, report.tokens, accepted, positions, report.normalizer[None]]
    return torch.cat([figure.to(torch.float64) for figure in figures])


def whole_sequences(share: Tensor) -> Tensor:
    """``[..., s / cp]`` of each context parallel rank -> ``[..., s]`` in the text's order; collective over them."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(group.size())]
    dist.all_gather(shares, share.contiguous(), group=group)
    length = share.shape[-1] * group.size()
    places = [context_positions(length, group.size(), rank, share.device) for rank in range(group.size())]
    return torch.cat(shares, dim=-1).index_select(-1, torch.argsort(torch.cat(places)))
