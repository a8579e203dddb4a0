"""The loss's softmax and gradient as two Triton kernels: the logits are read once, then read and written once.

No fp32 copy of them exists. Importing this module imports triton; :func:`mtp_megatron.loss_softmax.softmax_for` says
where that is done. With ``TRITON_INTERPRET=1`` set before, the kernels run on the CPU in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_megatron.loss_softmax import RowSums

BLOCK = 2048
"""Columns that a program handles at a time."""
WARPS = 8
_ALIGNED = 64  # elements to which rows are padded, so that whole vectors of 16 bytes are loaded in every row
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32, where an infinity would make NaN of a difference


class TritonSoftmax:
    """The two steps of :class:`mtp_megatron.loss_softmax.Softmax` on the logits alone, for bf16, fp16 and fp32."""

    def __init__(self, hidden: Tensor, tokens: int, rows: int) -> None:
        self.logits = hidden.new_empty(tokens, -(-rows // _ALIGNED) * _ALIGNED)[:, :rows]

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype) -> int:
        return dtype.itemsize

    def sums(self, logits: Tensor, column: Tensor) -> RowSums:
        tokens, rows = logits.shape
        top, total, target_logit = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        best = torch.empty_like(column)
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _sums[(tokens,)](
                logits, column, top, best, total, target_logit, rows, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS
            )
        return RowSums(top, best, total, target_logit)

    def gradient(self, logits: Tensor, column: Tensor, own: RowSums, whole: RowSums, scale: Tensor) -> Tensor:
        tokens, rows = logits.shape
        grid = (tokens, triton.cdiv(rows, BLOCK))
        with torch.cuda.device_of(logits):
            _gradient[grid](
                logits, column, whole.top, whole.total, scale, rows, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS
            )
        return logits


@triton.jit
def _include(logit, columns, top, best, total):  # type: ignore[no-untyped-def]
    """One more block of logits into the sums that each lane keeps of its own columns (Milakov & Gimelshein 2018).

    Of the two exponentials, of the old sum's and of the new logit's correction, one is always exp(0).
    """
    above = logit - top
    larger = above > 0
    fraction = tl.exp(-tl.abs(above))
    total = tl.where(larger, total * fraction + 1, total + fraction)
    return tl.where(larger, logit, top), tl.where(larger, columns, best), total


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    logits, column, top_out, best_out, total_out, target_out, rows, stride, BLOCK: tl.constexpr
):
    """One program per token: :class:`RowSums` of its logits. NaN and +inf among them make ``total`` NaN."""
    token = tl.program_id(0).to(tl.int64)  # tokens x vocabulary exceeds 2**31
    row = logits + token * stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), _LOWEST, tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    even = rows // BLOCK * BLOCK
    for begin in range(0, even, BLOCK):  # without a mask, which would break up the loads where rows are odd
        columns = begin + lanes
        logit = tl.load(row + columns).to(tl.float32)
        top, best, total = _include(logit, columns, top, best, total)
    if even < rows:
        columns = even + lanes
        logit = tl.load(row + columns, mask=columns < rows, other=float("-inf")).to(tl.float32)
        top, best, total = _include(logit, columns, top, best, total)
    highest = tl.max(top, axis=0)
    tl.store(top_out + token, highest)
    tl.store(best_out + token, tl.min(tl.where(top == highest, best, rows), axis=0).to(tl.int64))
    tl.store(total_out + token, tl.sum(total * tl.exp(top - highest), axis=0))
    target = tl.load(column + token)
    target_logit = tl.load(row + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(target_out + token, target_logit)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, column, top_in, total_in, scale_in, rows, stride, BLOCK: tl.constexpr
):
    """One program per token and block of columns: ``scale * (softmax - onehot)`` in the logits' place."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    begin = tl.program_id(1) * BLOCK
    columns = begin + tl.arange(0, BLOCK)
    top = tl.load(top_in + token)
    scale = tl.load(scale_in + token)
    of_whole = scale / tl.load(total_in + token)
    target = tl.load(column + token)
    if begin + BLOCK <= rows:
        logit = tl.load(row + columns).to(tl.float32)
        share = tl.exp(logit - top) * of_whole
        tl.store(row + columns, tl.where(columns == target, share - scale, share).to(logits.dtype.element_ty))
    else:
        inside = columns < rows
        logit = tl.load(row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        share = tl.exp(logit - top) * of_whole
        gradient = tl.where(columns == target, share - scale, share).to(logits.dtype.element_ty)
        tl.store(row + columns, gradient, mask=inside)
