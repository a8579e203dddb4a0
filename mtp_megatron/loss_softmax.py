"""Softmax and gradient of one chunk's logits, in two steps, and who takes them: torch's operations or Triton kernels.

The first step sums up every row of this rank's logits. Then the ranks of the tensor-parallel group exchange the sums
(:mod:`mtp_megatron.loss`), and the second step turns the logits into their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtp_megatron.compat import kernels


@dataclass(frozen=True)
class RowSums:
    """What the logits of each token come to, over the columns of one rank or over the whole vocabulary.

    All ``[c]``; fp32 (fp64 for fp64 logits) but for ``best``.

    Attributes:
        top: the largest logit.
        best: int64 column of it, the lowest where several tie.
        total: sum of ``exp(logit - top)``.
        target_logit: the target's logit, 0 where it is not among these columns.
    """

    top: Tensor
    best: Tensor
    total: Tensor
    target_logit: Tensor


class Softmax(Protocol):
    """The two steps, on buffers for chunks of up to ``tokens``; made anew for every call of the loss.

    Attributes:
        logits: ``[tokens, rows]`` buffer for the logits, in ``hidden``'s dtype; its last dimension has stride 1.
    """

    logits: Tensor

    def __init__(self, hidden: Tensor, tokens: int, rows: int) -> None:
        """``hidden`` ``[any, h]`` says the dtype and the device."""

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype) -> int:
        """Memory of the buffers for logits of this type."""

    def sums(self, logits: Tensor, column: Tensor) -> RowSums:
        """Sums of ``logits`` ``[c, rows]``, which are the first ``c`` rows of the buffer.

        ``column`` ``[c]`` int64 is the target's column, -1 where it is not among these.
        """

    def gradient(self, logits: Tensor, column: Tensor, own: RowSums, whole: RowSums, scale: Tensor) -> Tensor:
        """``scale * (softmax - onehot(column))`` ``[c, rows]`` in ``logits``' dtype and place, after :meth:`sums`.

        ``own`` is what that returned, ``whole`` the same over the whole vocabulary. Its ``total`` may serve as the
        softmax's divisor alone: a z-loss scales the softmax by it (:mod:`mtp_megatron.loss`). Rows are scaled
        (``scale`` ``[c]``) before the cast: one rounding, and an fp16 gradient never sees an unscaled value.
        """


class TorchSoftmax:
    """Torch's operations, for any dtype and device. Beside the logits they need the softmax in fp32."""

    def __init__(self, hidden: Tensor, tokens: int, rows: int) -> None:
        compute = torch.promote_types(hidden.dtype, torch.float32)
        self.logits = hidden.new_empty(tokens, rows)
        # Where it has their type, the softmax overwrites the logits: one buffer instead of two.
        self._softmax = self.logits if compute == hidden.dtype else torch.empty_like(self.logits, dtype=compute)

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype) -> int:
        compute = torch.promote_types(dtype, torch.float32)
        return dtype.itemsize + (0 if compute == dtype else compute.itemsize)

    def sums(self, logits: Tensor, column: Tensor) -> RowSums:
        softmax = self._softmax[: logits.shape[0]]
        top, best = logits.max(dim=-1)
        target_logit = logits.gather(1, column.clamp_min(0)[:, None]).squeeze(1).to(softmax.dtype)
        if softmax.dtype != logits.dtype:
            softmax.copy_(logits)
        torch.softmax(softmax, dim=-1, out=softmax)
        # The softmax at the largest logit is 1 / (sum of exponentials relative to that logit).
        total = softmax.gather(1, best[:, None]).squeeze(1).reciprocal()
        return RowSums(top.to(softmax.dtype), best, total, torch.where(column >= 0, target_logit, 0))

    def gradient(self, logits: Tensor, column: Tensor, own: RowSums, whole: RowSums, scale: Tensor) -> Tensor:
        softmax = self._softmax[: logits.shape[0]]
        of_whole = own.total * (own.top - whole.top).exp() / whole.total
        softmax.mul_((of_whole * scale)[:, None])
        softmax.scatter_add_(1, column.clamp_min(0)[:, None], torch.where(column >= 0, -scale, 0)[:, None])
        return softmax if softmax.dtype == logits.dtype else logits.copy_(softmax)


def softmax_for(hidden: Tensor) -> type[Softmax]:
    """What takes the two steps for logits of this type on this device: Triton kernels where they run, else torch."""
    if kernels.why_no_triton(hidden.device, hidden.dtype) is not None:
        return TorchSoftmax
    from mtp_megatron.loss_kernels import TritonSoftmax  # which imports triton

    return TritonSoftmax
