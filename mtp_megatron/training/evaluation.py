"""Evaluation on the held-out split: loss and accuracy of each head, and expected tokens per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.metrics import agreement_counts, expected_tokens_per_forward, objective, per_token
from mtp_megatron.targets import IGNORE_INDEX, context_positions
from mtp_megatron.training.batches import Microbatch
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.step import BatchIterator, Trainer, evaluation_loss, sum_over_world, z_loss_sums

if TYPE_CHECKING:
    from mtp_megatron.sequential import HeadReport


@dataclass(frozen=True)
class FolderFigures:
    """Figures of the held-out samples that are of one folder of a blend; NaN where it gave none.

    Attributes:
        loss, head_loss, head_accuracy: as in :class:`Evaluation`, over its own targets.
        head_tokens: its targets of each head. The folders' ``loss``, weighted with the first of them, add up to the
            whole's, and each head's figures with its own.
    """

    loss: float
    head_loss: list[float]
    head_accuracy: list[float]
    head_tokens: list[int]


@dataclass(frozen=True)
class Evaluation:
    """Figures of the held-out split, equal on every rank.

    Attributes:
        loss: weighted sum over heads of their loss sums, divided by head 1's count of targets (nats).
        head_loss: mean negative log likelihood of each head (nats).
        head_accuracy: share of each head's targets that were its most likely token.
        tokens_per_forward: expected tokens per forward pass of greedy self-speculative decoding
            (:func:`mtp_megatron.metrics.agreement_counts`), 1 to n.
        head_z_loss: mean of ``log(Z)**2`` of each head, without its weight; empty without ``heads.z_loss``. No part of
            ``loss``.
        folders: of a blend, losses and accuracies by folder (:attr:`mtp_megatron.data.blend.Blend.labels`).
    """

    loss: float
    head_loss: list[float]
    head_accuracy: list[float]
    tokens_per_forward: float
    head_z_loss: list[float] = field(default_factory=list)
    folders: dict[str, FolderFigures] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    recipe: Recipe,
    trainable: Trainer,
    iterators: Sequence[BatchIterator],
    batches: int,
    num_microbatches: int,
    folders: Sequence[str] = (),
) -> Evaluation:
    """Run ``batches`` global batches forward only; collective over all ranks.

    Args:
        folders: names of a blend's data sets, where each shall have figures of its own; the microbatches say of which
            each sample is.
    """
    n = recipe.heads.n
    counts: list[Tensor] = []
    by_folder = torch.zeros(len(folders), 3 * n, dtype=torch.float64, device=compat.device())
    with trainable.evaluating():
        for model in trainable.models:
            model.keep_predictions = True
            model.keep_losses = bool(folders)  # nobody else asks for them, and stages with heads tell the last one
        for _ in range(batches):
            results = trainable.forward(recipe, iterators, num_microbatches, evaluation_loss)
            for batch, report in results:
                counts.append(evaluation_counts(batch, report))
                if folders:
                    _add_samples(by_folder, batch, report)
        for model in trainable.models:
            model.keep_predictions, model.keep_losses = False, True
    local = [torch.cat([torch.stack(counts).sum(dim=0), by_folder.flatten()])] if counts else []
    counted = 5 * n + 1 + (n if recipe.heads.z_loss else 0)
    sums = sum_over_world(local, counted + by_folder.numel())
    losses, correct, tokens, accepted, positions = (sums[i * n : (i + 1) * n] for i in range(5))
    z_losses = sums[5 * n + 1 : counted]
    weights, rows = recipe.heads.base_weights(), range(counted, counted + by_folder.numel(), 3 * n)
    return Evaluation(
        loss=objective(weights, losses, sums[5 * n]),
        head_loss=per_token(losses, tokens),
        head_accuracy=per_token(correct, tokens),
        tokens_per_forward=expected_tokens_per_forward(accepted, positions),
        head_z_loss=per_token(z_losses, tokens) if z_losses else [],
        folders={
            name: _folder_figures(weights, sums[row : row + 3 * n]) for name, row in zip(folders, rows, strict=True)
        },
    )


def _folder_figures(weights: Sequence[float], sums: Sequence[float]) -> FolderFigures:
    """From a folder's losses, correct and targets, each ``[n]``."""
    n = len(weights)
    losses, correct, tokens = sums[:n], sums[n : 2 * n], sums[2 * n :]
    return FolderFigures(
        loss=objective(weights, losses, tokens[0]),
        head_loss=per_token(losses, tokens),
        head_accuracy=per_token(correct, tokens),
        head_tokens=[int(count) for count in tokens],
    )


def _add_samples(by_folder: Tensor, batch: Microbatch, report: HeadReport) -> None:
    """Add the losses, correct and targets of a microbatch's samples, each ``[n]``, to their folders' rows."""
    if report.predictions is None or report.losses is None or batch.targets is None or batch.parts is None:
        raise RuntimeError("evaluation by folder needs each sample's figures and folder on the last stage")
    valid = batch.targets != IGNORE_INDEX
    correct = (report.predictions == batch.targets) & valid
    # One row of the microbatch is a sample, or holds all of them one after another.
    shape = (len(valid), len(batch.parts), -1)
    figures = [figure.reshape(shape).sum(dim=2, dtype=torch.float64) for figure in (report.losses, correct, valid)]
    rows = torch.cat(figures).t()
    by_folder.index_add_(0, batch.parts.to(by_folder.device), rows)


def evaluation_counts(batch: Microbatch, report: HeadReport) -> Tensor:
    """``[5n + 1]`` sums of one microbatch: losses, correct, targets, accepted, positions, normalizer; fp64. Where there
    is a z-loss its ``[n]`` follow."""
    from megatron.core import parallel_state

    if report.predictions is None or batch.targets is None:
        raise RuntimeError("evaluation needs the heads' predictions and the targets on the last stage")
    predictions, targets = whole_sequences(report.predictions), whole_sequences(batch.targets)
    accepted, positions = agreement_counts(predictions, targets)
    if parallel_state.get_context_parallel_rank() > 0:  # all of them counted the same whole sequences
        accepted, positions = torch.zeros_like(accepted), torch.zeros_like(positions)
    figures = [report.loss_sum, report.correct, report.tokens, accepted, positions, report.normalizer[None]]
    figures += z_loss_sums(report)
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
