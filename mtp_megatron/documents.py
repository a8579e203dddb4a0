"""Attention that stays within documents, where several of them share a sequence ("intra-document masking").

As Llama 3 is trained (arXiv 2407.21783, section 3.2), and by Megatron-LM with ``--reset-attention-mask``. Positions
need no reset: rotary embeddings turn queries and keys by their positions, and scores depend on the difference alone,
which is the same wherever a document begins. So a packed sequence gives what each of its documents gives alone
(tests/distributed/test_document_attention.py).

There are two ways to say it. Megatron-core's own attention takes a mask ``[b, 1, s, s]``. The fused kernels of
Transformer Engine's causal attention ignore one, and take the documents' boundaries, without anything of ``s * s``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_megatron.targets import context_positions


def document_mask(document_ends: Tensor, size: int = 1, rank: int = 0) -> Tensor:
    """Megatron's attention mask for causal attention within documents.

    Args:
        document_ends: ``[b, s]`` bool; True where a token is the last of its document, of the whole sequence.
        size, rank: of the context parallel group; the rank has the rows of its own queries, in its order
            (:func:`.targets.context_positions`), and the columns of all keys in the text's order.

    Returns:
        ``[b, 1, s / size, s]`` bool; True where a query must not see a key: a later one, or another document's.

    Example:
        tokens 5 9 7 (9 ends a document): 0 1 1 | 0 0 1 | 1 1 0
    """
    if document_ends.dim() != 2:
        raise ValueError(f"document_ends must be [batch, sequence], got shape {tuple(document_ends.shape)}")
    ends, length = document_ends.to(torch.int32), document_ends.shape[1]
    number = ends.cumsum(dim=1, dtype=torch.int32) - ends  # of each token's document; the end belongs to its own
    keys = queries = torch.arange(length, device=ends.device)
    if size > 1:
        queries = context_positions(length, size, rank, ends.device)
    mask = number[:, queries, None] != number[:, None, :]
    return mask.logical_or_(keys > queries[:, None])[:, None]


def document_boundaries(document_ends: Tensor) -> Tensor:
    """Where documents begin when the rows of ``[b, s]`` follow one another: Transformer Engine's ``cu_seqlens``.

    Args:
        document_ends: ``[b, s]`` bool, as for :func:`document_mask`. On the CPU: how many there are decides the shape,
            and a GPU would be waited for.

    Returns:
        ``[documents + 1]`` int32, from 0 to ``b * s``. A row ends the document that it ends in.

    Example:
        rows 5 9 7 and 4 4 4 (9 ends a document): 0 2 3 6
    """
    ends = document_ends.to(torch.bool, copy=True)
    ends[:, -1] = True
    return torch.nn.functional.pad(ends.flatten().nonzero().squeeze(1) + 1, (1, 0)).to(torch.int32)
