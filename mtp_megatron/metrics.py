"""Figures of a run as pure functions: per-head loss, accuracy and agreement, expected tokens per forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_megatron.targets import IGNORE_INDEX


def agreement_counts(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How often the heads up to i would be accepted by greedy self-speculative decoding, teacher-forced.

    At position t, head i proposes token t + i; the model itself, that is head 1, proposes that token at position
    t + i - 1. Head i's proposal is accepted if it equals head 1's and the proposals of heads 2 .. i - 1 at t were
    accepted too (Gloeckle et al. 2024, section 3.2; Stern et al. 2018). The context is the data's, so this is an
    estimate of decoding, where the context is the model's own output.

    Args:
        predictions: ``[n, b, s]`` most likely token of head i at every position.
        targets: ``[n, b, s]``; positions where head i has no target (``IGNORE_INDEX``) are not counted for head i.

    Returns:
        ``accepted [n]``, ``positions [n]``, int64. Head 1 is accepted wherever it has a target.
    """
    if predictions.shape != targets.shape or predictions.dim() != 3:
        shapes = f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: both must be [n, b, s]")
    n, _, length = predictions.shape
    valid = targets != IGNORE_INDEX
    accepted = torch.ones_like(valid[0])
    counts = []
    for shift in range(n):
        kept = max(length - shift, 0)  # the last positions have no later head 1 to compare with
        agrees = predictions[shift, :, :kept] == predictions[0, :, shift:]
        accepted = accepted[:, :kept] & agrees
        counts.append((accepted & valid[shift, :, :kept]).sum())
    return torch.stack(counts), valid.sum(dim=(1, 2))


def expected_tokens_per_forward(accepted: Sequence[float], positions: Sequence[float]) -> float:
    """Mean tokens that one forward pass yields: 1 + sum over heads i >= 2 of P(heads 2 .. i are all accepted).

    Args:
        accepted: per head, as :func:`agreement_counts` gives it, summed over batches and ranks.
        positions: per head, likewise. A head without any position adds nothing.
    """
    pairs = list(zip(accepted, positions, strict=True))[1:]
    return 1.0 + sum(hits / total for hits, total in pairs if total)


def per_token(sums: Sequence[float], tokens: Sequence[float]) -> list[float]:
    """Each head's sum divided by its own count of targets; NaN where a head has none."""
    return [total / count if count else float("nan") for total, count in zip(sums, tokens, strict=True)]


def objective(weights: Sequence[float], loss_sums: Sequence[float], tokens: float) -> float:
    """The loss that is trained: the weighted sum over heads of their loss sums, divided by head 1's count of targets.

    Args:
        weights: of each head. One of weight 0 takes no part, whatever its sum is: in training it is not computed (NaN).
        loss_sums: of each head, over its own targets (nats).
        tokens: targets of head 1; where there are none, the loss is NaN.
    """
    total = sum(weight * loss for weight, loss in zip(weights, loss_sums, strict=True) if weight)
    return per_token([total], [tokens])[0]
