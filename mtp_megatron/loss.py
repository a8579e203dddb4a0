"""Vocabulary-parallel linear cross entropy: hidden states and unembedding in, loss sums and gradients out.

The logits of one chunk of tokens exist at a time, ``[chunk, V/tp]``; the full ``[tokens, V]`` never does. Two
collectives per chunk cross the tensor-parallel group: the maximum, then one packed sum. The softmax is computed in fp32
(fp64 for fp64), on a GPU by Triton kernels (:mod:`mtp_megatron.loss_softmax`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_megatron.loss_softmax import RowSums, Softmax, TorchSoftmax, softmax_for
from mtp_megatron.targets import IGNORE_INDEX

CHUNK_ELEMENTS = 1 << 24
"""Default size of one chunk's logits, in elements (64 MiB in fp32)."""
MAX_CHUNK_TOKENS = 1024
# On a GPU every chunk reads the unembedding and its fp32 gradient again, so that short ones are bound by bandwidth:
# chunks may be longer there, as far as its memory allows.
CUDA_MEMORY_SHARE = 32
"""A chunk's logits, and their softmax if it has a buffer, take at most one part in this many of a GPU's memory."""
CUDA_MAX_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class VocabShard:
    """The rows of the unembedding that this rank holds.

    Attributes:
        start: first vocabulary entry of this rank's shard.
        rows: how many of its rows are real vocabulary entries; rows past them are padding and take no part. May be 0.
        vocab_size: entries of the whole vocabulary, without padding.
        group: tensor-parallel group over which the vocabulary is split; None for an unsplit one.
    """

    start: int
    rows: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, vocab_size: int, rows_per_rank: int, group: dist.ProcessGroup | None) -> VocabShard:
        """This rank's shard when ``vocab_size`` entries are laid out ``rows_per_rank`` to a rank, the last padded."""
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        if rows_per_rank * size < vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size} does not fit into {size} shards of {rows_per_rank} rows; pad the unembedding"
            )
        start = rank * rows_per_rank
        rows = max(0, min(rows_per_rank, vocab_size - start))
        return cls(start, rows, vocab_size, group if size > 1 else None)

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()


@dataclass(frozen=True)
class TokenSums:
    """What one head made of its targets: sums over tokens, identical on every rank of the tensor-parallel group.

    Attributes:
        loss: ``[]`` sum of the negative log likelihoods of the valid targets, fp32 (fp64 for fp64 inputs).
        correct: ``[]`` how many valid targets were the most likely entry (ties go to the lowest index), same dtype.
        predictions: ``[tokens]`` int64 most likely entry of every position, or None when not asked for.
        losses: ``[tokens]`` what every position adds to ``loss``, or None when predictions were not asked for.
        log_z_squared: ``[]`` sum over the valid targets of ``log(Z)**2``, Z being the sum of exponentials over the
            position's logits; same dtype. None without a z-loss. No part of ``loss``.
    """

    loss: Tensor
    correct: Tensor
    predictions: Tensor | None
    losses: Tensor | None = None
    log_z_squared: Tensor | None = None


def chunk_tokens_for(
    shard: VocabShard,
    chunk_tokens: int | None = None,
    device: torch.device | None = None,
    bytes_per_logit: int = TorchSoftmax.bytes_per_logit(torch.bfloat16),
) -> int:
    """Tokens per chunk: the given number, or as many as keep a chunk's logits at about ``CHUNK_ELEMENTS``.

    On a CUDA device it is what fits into its memory's ``CUDA_MEMORY_SHARE``, if that is more. All of its memory counts,
    in whole powers of two: what is *free* differs between ranks, and each chunk is a collective. For the same reason it
    does not depend on a rank's own share of an uneven vocabulary.
    """
    if chunk_tokens is not None:
        return chunk_tokens
    rows = max(1, -(-shard.vocab_size // shard.size))
    tokens = max(16, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS // rows))
    if device is None or device.type != "cuda":
        return tokens
    elements = cuda_memory(device) // CUDA_MEMORY_SHARE // bytes_per_logit
    return max(tokens, min(CUDA_MAX_CHUNK_TOKENS, elements // rows // 16 * 16))


@functools.cache
def cuda_memory(device: torch.device) -> int:
    """Bytes of a GPU, rounded down to a power of two: those of one model differ by some MB."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    return 1 << (total.bit_length() - 1)


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    grad_scale: Tensor | None = None,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    predictions: bool = False,
    z_loss: float = 0.0,
    softmax: type[Softmax] | None = None,
) -> tuple[TokenSums, Tensor | None]:
    """Sum over tokens of ``-log softmax(hidden @ weight.T)[target]`` and, in the same pass, its gradients.

    Equals ``F.cross_entropy(hidden @ W.T, targets, ignore_index=-100, reduction="sum")`` with W the whole unembedding.
    With a z-loss the gradients are those of this sum plus ``z_loss * log_z_squared`` (:class:`TokenSums`).

    Args:
        hidden: ``[tokens, h]``, the same on every rank of the group.
        weight: ``[V/tp, h]``, this rank's rows.
        targets: ``[tokens]`` int64, ``IGNORE_INDEX`` where there is none. Any other value outside the vocabulary makes
            the loss and its gradients NaN: it cannot be refused here without a device synchronisation, and must not
            pass for a number.
        shard: which vocabulary entries ``weight`` holds.
        grad_scale: scalar dL/d(loss sum). None: no gradient is computed.
        weight_grad: ``[V/tp, h]`` buffer to which this call's dL/dweight is added; None: not wanted.
        chunk_tokens: tokens per chunk; None: :func:`chunk_tokens_for`.
        predictions: return the most likely entry and the loss of every position.
        z_loss: weight of ``log(Z)**2`` of every valid target (Chowdhery et al. 2022, section 5); 0: none.
        softmax: what makes softmax and gradient of the logits; None: :func:`mtp_megatron.loss_softmax.softmax_for`.

    Returns:
        The sums, and dL/dhidden ``[tokens, h]`` in ``hidden``'s dtype (None without ``grad_scale``). The latter is this
        rank's part: the caller sums it over the group (all-reduce, or reduce-scatter under sequence parallelism).
    """
    tokens = hidden.shape[0]
    if targets.shape != (tokens,):
        raise ValueError(f"targets have shape {tuple(targets.shape)}, hidden states {tuple(hidden.shape)}")
    rows = weight[: shard.rows]
    compute = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=compute, device=hidden.device)
    correct = torch.zeros_like(loss)
    predicted = torch.empty(tokens, dtype=torch.int64, device=hidden.device) if predictions else None
    each = torch.empty(tokens, dtype=compute, device=hidden.device) if predictions else None
    log_z_squared = torch.zeros_like(loss) if z_loss else None
    hidden_grad = None if grad_scale is None else torch.empty_like(hidden)
    softmax = softmax or softmax_for(hidden)
    bytes_per_logit = softmax.bytes_per_logit(hidden.dtype)
    chunk = min(chunk_tokens_for(shard, chunk_tokens, hidden.device, bytes_per_logit), max(tokens, 1))
    steps = softmax(hidden, chunk, shard.rows)
    for begin in range(0, tokens, chunk):
        part = slice(begin, min(begin + chunk, tokens))
        x, y = hidden[part], targets[part]
        logits = torch.mm(x, rows.t(), out=steps.logits[: x.shape[0]])
        column = torch.where((y >= shard.start) & (y < shard.start + shard.rows), y - shard.start, -1)
        own = steps.sums(logits, column) if shard.rows else _no_sums(column, compute)
        whole = _over_the_group(own, shard)
        valid, known = y != IGNORE_INDEX, (y >= 0) & (y < shard.vocab_size)
        share = torch.where(valid, torch.where(known, 1.0, torch.nan), 0.0).to(compute)
        losses = whole.total.log() + (whole.top - whole.target_logit)  # in this order: the logits may be large
        losses = torch.where(valid, share * losses, 0)
        loss += losses.sum()
        correct += (valid & (whole.best == y)).sum()
        if predicted is not None and each is not None:
            predicted[part], each[part] = whole.best, losses
        if log_z_squared is not None:
            log_z = whole.total.log() + whole.top
            log_z_squared += torch.where(valid, share * log_z.square(), 0).sum()
            # dL/dlogit = softmax * (1 + 2 * z_loss * log(Z)) - onehot. The second step only divides by the total: put
            # there, this factor costs neither a pass over the logits nor a kernel of its own.
            whole = replace(whole, total=whole.total / (1 + 2 * z_loss * log_z))
        if grad_scale is None or hidden_grad is None:
            continue
        if shard.rows:
            logits = steps.gradient(logits, column, own, whole, share * grad_scale.to(compute))
        torch.mm(logits, rows, out=hidden_grad[part])
        if weight_grad is not None and shard.rows:
            _add_outer(weight_grad[: shard.rows], logits, x)
    return TokenSums(loss, correct, predicted, each, log_z_squared), hidden_grad


def _no_sums(column: Tensor, dtype: torch.dtype) -> RowSums:
    """Of a shard of nothing but padding, which takes part in the collectives all the same."""
    zeros = torch.zeros_like(column, dtype=dtype)
    return RowSums(torch.full_like(zeros, -torch.inf), torch.zeros_like(column), zeros, zeros)


def _over_the_group(own: RowSums, shard: VocabShard) -> RowSums:
    """The sums over the whole vocabulary, with ``best`` as an entry of it, of every rank's ``own``."""
    best = own.best + shard.start
    if shard.group is None:
        return replace(own, best=best)
    top = own.top.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    # One packed sum: exponentials, target logit, and a slot per rank that names its best entry if it ties for the top.
    # The lowest rank with a filled slot wins, so that ties go to the lowest vocabulary entry as in an unsplit argmax.
    packed = top.new_zeros(2 + shard.size, len(top), dtype=torch.float64)
    packed[0], packed[1] = own.total * (own.top - top).exp(), own.target_logit
    packed[2 + shard.rank] = torch.where(own.top == top, best + 1, 0)
    dist.all_reduce(packed, group=shard.group)
    slots = packed[2:].to(torch.int64)
    first = (slots > 0).to(torch.int8).argmax(dim=0)
    best = slots.gather(0, first[None]).squeeze(0) - 1
    return RowSums(top, best, packed[0].to(top.dtype), packed[1].to(top.dtype))


def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left.T @ right``, without a temporary where it can be."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif total.is_cuda and total.dtype == torch.float32:
        # The product is added in fp32: it is neither rounded to bf16 on the way nor written and read once more.
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left.t(), right))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss and only scaled in backward, so the logits are never computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, shard, chunk_tokens, z_loss, softmax):  # type: ignore[no-untyped-def]
        wants = ctx.needs_input_grad
        grads = wants[0] or wants[1]
        weight_grad = torch.zeros_like(weight, dtype=_gradient_dtype(weight)) if wants[1] else None
        one = torch.ones((), device=hidden.device) if grads else None
        sums, hidden_grad = linear_cross_entropy(
            hidden,
            weight,
            targets,
            shard,
            grad_scale=one,
            weight_grad=weight_grad,
            chunk_tokens=chunk_tokens,
            z_loss=z_loss,
            softmax=softmax,
        )
        if hidden_grad is not None and shard.group is not None:
            dist.all_reduce(hidden_grad, group=shard.group)
        ctx.grads = (hidden_grad if wants[0] else None, weight_grad, weight.dtype)
        ctx.mark_non_differentiable(sums.correct)
        loss = sums.loss if sums.log_z_squared is None else sums.loss + z_loss * sums.log_z_squared
        return loss, sums.correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        if ctx.grads is None:
            raise RuntimeError("backward through the linear cross entropy a second time: its gradients were freed")
        (hidden_grad, weight_grad, dtype), ctx.grads = ctx.grads, None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(grad)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad).to(dtype)
        return hidden_grad, weight_grad, None, None, None, None, None


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard | None = None,
    *,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    softmax: type[Softmax] | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable form of :func:`linear_cross_entropy` for use outside the deferred heads.

    Arguments as there; ``shard`` None means that ``weight`` ``[V, h]`` is the whole unembedding. Returns the summed
    loss ``[]``, the z-loss included, and the number of correct predictions ``[]``. The gradient of ``hidden`` is
    already summed over the group.
    """
    shard = shard or VocabShard(0, weight.shape[0], weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, targets, shard, chunk_tokens, z_loss, softmax)


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
