"""Future-token targets, built from the whole sequence before context parallelism shards it (DESIGN.md)."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Marks a (head, position) without a target; the value of ``torch.nn.functional.cross_entropy``'s ``ignore_index``."""


def future_targets(
    labels: Tensor, n: int, *, loss_mask: Tensor | None = None, document_ends: Tensor | None = None
) -> Tensor:
    """Targets of n heads: head i at position t predicts token t + i (Gloeckle et al. 2024, equation 2).

    Args:
        labels: ``[b, s]`` integer; ``labels[:, t]`` is token t + 1, as Megatron's data sets deliver it. Negative labels
            (-100) are ignored by every head that would predict them.
        n: number of heads.
        loss_mask: ``[b, s]``; 0 where the *label* at that place is not to be learned. It masks every head's prediction
            of that token, not only the next-token head's.
        document_ends: ``[b, s]`` bool; True where the *input* token at that place is the last of its document. No
            target lies beyond the end of the document of the position that predicts it. None: documents run into
            each other.

    Returns:
        ``[n, b, s]`` int64, ``IGNORE_INDEX`` where there is no target. The last i - 1 positions have none for head i.

    Example:
        tokens 5 6 9 7 (9 ends a document), then 8:  labels = 6 9 7 8, ends = 0 0 1 0
        head 1: 6 9 - 8      head 2: 9 - - -
    """
    if n < 1:
        raise ValueError(f"n={n}: needs at least one head")
    if labels.dim() != 2:
        raise ValueError(f"labels must be [batch, sequence], got shape {tuple(labels.shape)}")
    for name, other in (("loss_mask", loss_mask), ("document_ends", document_ends)):
        if other is not None and other.shape != labels.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, labels have {tuple(labels.shape)}")
    length = labels.shape[1]
    labels = labels.to(torch.int64)  # first: in a token file's uint8 or uint16, -100 would be a valid token
    usable = labels >= 0
    if loss_mask is not None:
        usable = usable & (loss_mask != 0)
    nexts = torch.where(usable, labels, IGNORE_INDEX)
    targets = nexts.new_full((n, *labels.shape), IGNORE_INDEX)
    # same_document[:, t]: tokens t .. t + i - 1 hold no end of a document, so token t + i belongs to token t's.
    same_document: Tensor | None = None
    for shift in range(min(n, length)):
        kept = length - shift
        future = nexts[:, shift:]
        if document_ends is not None:
            inside = ~document_ends[:, shift:].bool()
            same_document = inside if same_document is None else same_document[:, :kept] & inside
            future = torch.where(same_document, future, IGNORE_INDEX)
        targets[shift, :, :kept] = future
    return targets


def document_ends_from_tokens(tokens: Tensor, eod: int) -> Tensor:
    """``[b, s]`` bool: True where an input token is the end-of-document token ``eod``."""
    return tokens == eod


def document_ends_from_positions(position_ids: Tensor) -> Tensor:
    """``[b, s]`` bool from position ids that start again at 0 with each packed document.

    Whether the last token of the sequence ends its document cannot be seen; it counts as not ending, as in Megatron's
    own handling of a document that goes on in the next sample.
    """
    ends = torch.zeros_like(position_ids, dtype=torch.bool)
    ends[:, :-1] = position_ids[:, 1:] == 0
    return ends


def context_positions(length: int, size: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Positions of a sequence that one context-parallel rank holds, ``[length / size]``, in the order in which it does.

    Megatron's zigzag (``megatron.core.utils.get_batch_on_this_cp_rank``): of 2 * size chunks, rank r has chunks r and
    2 * size - 1 - r, so that causal attention costs every rank the same.
    """
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} positions cannot be cut into 2 x {size} equal chunks")
    chunk = length // (2 * size)
    starts = (rank * chunk, (2 * size - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])


def context_shard(values: Tensor, size: int, rank: int) -> Tensor:
    """This context-parallel rank's share of ``[..., s]``: ``[..., s / size]``. Build targets first, then cut."""
    if size == 1:
        return values
    return values.index_select(-1, context_positions(values.shape[-1], size, rank, values.device))
