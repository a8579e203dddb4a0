"""Deferred sequential heads: the forward pass runs no head; the backward pass runs them one at a time.

For each head: forward, loss, backward, free (Gloeckle et al. 2024, figure 2, moved into the backward pass). Memory
holds one head's activations and one chunk of logits whatever n is, no head's forward runs twice, and the scale of the
loss (loss scaling, microbatches, token counts) is exact because it arrives with the gradient. The price: loss values
exist only after backward, so a :class:`HeadReport` holds NaN until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_megatron.labels import label
from mtp_megatron.loss import TokenSums
from mtp_megatron.targets import IGNORE_INDEX


@dataclass
class HeadReport:
    """Per-head figures of one microbatch on this rank (identical over the tensor-parallel group).

    Attributes:
        loss_sum: ``[n]`` unweighted sum of the negative log likelihoods of each head's valid targets; NaN until
            backward ran.
        correct: ``[n]`` valid targets that were the head's most likely entry; NaN until backward ran.
        tokens: ``[n]`` valid targets of each head.
        normalizer: ``[]`` valid targets of head 1: the one count by which every head's sum is divided (DESIGN.md).
        weights: weight of each head in the total loss. In training a head of weight 0 is not computed: it stays NaN.
        predictions: ``[n, b, s]`` most likely entry of every position, in evaluation only.
        losses: ``[n, b, s]`` what every position adds to ``loss_sum``, in evaluation only.
        log_z_squared: ``[n]`` as in :class:`.TokenSums`, with a z-loss only; NaN until backward ran.

    Where heads are on several pipeline stages, each stage's report holds zeros for the heads of the others, and in
    ``normalizer`` where head 1 is not: the reports of one microbatch add up. ``weights`` is 0 for those heads too.
    """

    loss_sum: Tensor
    correct: Tensor
    tokens: Tensor
    normalizer: Tensor
    weights: tuple[float, ...]
    predictions: Tensor | None = None
    losses: Tensor | None = None
    log_z_squared: Tensor | None = None

    @classmethod
    def empty(
        cls,
        targets: Tensor,
        weights: Sequence[float],
        dtype: torch.dtype,
        predictions: bool = False,
        elsewhere: Sequence[int] = (),
        z_loss: bool = False,
    ) -> HeadReport:
        """Report for ``targets`` ``[n, b, s]``: counts filled, figures NaN; ``dtype`` is that of the sums.

        ``elsewhere`` names the heads (0-based) that other stages report; ``z_loss`` says whether there is one.
        """
        nan = torch.full((targets.shape[0],), torch.nan, dtype=dtype, device=targets.device)
        tokens = (targets != IGNORE_INDEX).sum(dim=(1, 2))
        losses = torch.full_like(targets, torch.nan, dtype=dtype) if predictions else None
        for head in elsewhere:
            nan[head], tokens[head] = 0, 0
            if losses is not None:
                losses[head] = 0
        return cls(
            loss_sum=nan,
            correct=nan.clone(),
            tokens=tokens,
            normalizer=tokens[0],
            weights=tuple(weights),
            predictions=torch.full_like(targets, IGNORE_INDEX) if predictions else None,
            losses=losses,
            log_z_squared=nan.clone() if z_loss else None,
        )

    @property
    def total(self) -> Tensor:
        """``[]`` weighted sum over heads of the loss sums; NaN until backward ran. A head of weight 0 takes no part,
        and neither does a z-loss."""
        parts = [weight * self.loss_sum[head] for head, weight in enumerate(self.weights) if weight]
        return torch.stack(parts).sum() if parts else torch.zeros_like(self.normalizer, dtype=self.loss_sum.dtype)

    def record(self, head: int, sums: TokenSums) -> None:
        self.loss_sum[head] = sums.loss
        self.correct[head] = sums.correct
        if self.log_z_squared is not None and sums.log_z_squared is not None:
            self.log_z_squared[head] = sums.log_z_squared
        if self.predictions is not None and sums.predictions is not None:
            self.predictions[head] = sums.predictions.view(self.predictions.shape[2], -1).t()
        if self.losses is not None and sums.losses is not None:
            self.losses[head] = sums.losses.view(self.losses.shape[2], -1).t()

    def clear(self) -> None:
        """Back to NaN and no predictions, so that nobody reads half a report."""
        self.loss_sum.fill_(torch.nan)
        self.correct.fill_(torch.nan)
        if self.log_z_squared is not None:
            self.log_z_squared.fill_(torch.nan)
        if self.predictions is not None:
            self.predictions.fill_(IGNORE_INDEX)
        if self.losses is not None:
            self.losses.fill_(torch.nan)


class HeadPass(Protocol):
    """One microbatch's work of n heads, as :func:`run_heads` drives it. Tensors ``[s, b, h]`` (``[s/tp, b, h]``)."""

    @property
    def chains(self) -> Sequence[Sequence[int]]:
        """Groups of heads; within a group each head reads the previous one's output, the first reads z."""

    @property
    def shared(self) -> Sequence[Tensor]:
        """Parameters whose gradients are gathered over the heads and delivered once: the unembedding(s)."""

    def forward_head(self, head: int, inputs: Tensor) -> Tensor:
        """Output of one head's layer, with autograd recording where gradients are on."""

    def head_loss(
        self, head: int, outputs: Tensor, scale: Tensor | None, predictions: bool
    ) -> tuple[TokenSums, Tensor | None]:
        """Final norm, unembedding and loss; with ``scale`` = dL/d(loss sum) also their backward, a z-loss's included.

        Returns the sums and dL/doutputs (None without ``scale``). Gradients of ``shared`` are kept until
        :meth:`shared_gradients`; all other parameters' gradients are accumulated at once.
        """

    def shared_gradients(self) -> Sequence[Tensor | None]:
        """Gradients of ``shared``; hands them over and forgets them."""

    def skip(self, head: int, layer: bool) -> None:
        """Give the parameters of a head of weight 0 a zero gradient: of its loss and, with ``layer``, of its layer too.

        Engines count how often each parameter's gradient arrives and must see the same number every step.
        """


def run_heads(z: Tensor, heads: HeadPass, report: HeadReport, *, detach_trunk: bool = False) -> Tensor:
    """The heads' weighted loss sum as a scalar whose backward pass runs them one at a time.

    Args:
        z: trunk output ``[s, b, h]``.
        heads: the work of this microbatch.
        report: filled during backward; at once where gradients are off.
        detach_trunk: the heads learn alone; z gets a zero gradient (none would stall a pipeline that waits for one).

    Returns:
        ``[]`` fp32 (fp64 for fp64): NaN when gradients are on (read ``report.total`` after backward), else the loss.
    """
    if not torch.is_grad_enabled():
        evaluate_heads(z, heads, report)
        return report.total
    anchor = z.new_zeros((), dtype=report.loss_sum.dtype).requires_grad_()
    return _DeferredHeads.apply(z, anchor, heads, report, detach_trunk, *heads.shared)


@torch.no_grad()
def evaluate_heads(z: Tensor, heads: HeadPass, report: HeadReport) -> None:
    """Fill ``report`` by running the heads one at a time, without gradients."""
    for chain in heads.chains:
        inputs = z
        for head in chain:
            with _named(head, report, "evaluation"), label("head", head + 1, "evaluation"):
                inputs = heads.forward_head(head, inputs)
                sums, _ = heads.head_loss(head, inputs, None, report.predictions is not None)
                report.record(head, sums)


class _DeferredHeads(torch.autograd.Function):
    """Scalar whose gradient the heads make. ``anchor`` keeps the graph alive where z and the unembedding are frozen."""

    @staticmethod
    def forward(ctx, z, anchor, heads, report, detach_trunk, *shared):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z)
        ctx.heads, ctx.report, ctx.detach_trunk = heads, report, detach_trunk
        ctx.autocast = _autocast_state(z.device.type)
        return torch.full_like(anchor, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.heads is None:
            raise RuntimeError("backward through the deferred heads a second time: their gradients were delivered")
        heads, report, (z,) = ctx.heads, ctx.report, ctx.saved_tensors
        ctx.heads = None
        z_grad = None
        z_needs_grad = ctx.needs_input_grad[0] and not ctx.detach_trunk
        device, dtype, enabled = ctx.autocast
        for chain in heads.chains:
            # Autocast is left each time: it keeps the weights' casts.
            with label("heads"), torch.autocast(device, dtype=dtype, enabled=enabled):
                chain_grad = _run_chain(z, z_needs_grad, chain, heads, report, grad)
            if chain_grad is not None:
                if z_grad is None:
                    z_grad = chain_grad.to(torch.promote_types(z.dtype, torch.float32))
                else:  # summed in fp32: in bf16 the sum over heads would lose a hundredth of its value
                    z_grad += chain_grad
            del chain_grad  # or it would lie beside the next head's activations
        shared = heads.shared_gradients()
        if z_grad is not None:
            z_grad = z_grad.to(z.dtype)
        elif ctx.needs_input_grad[0]:
            z_grad = torch.zeros_like(z)
        return z_grad, None, None, None, None, *shared


def _run_chain(
    z: Tensor, z_needs_grad: bool, chain: Sequence[int], heads: HeadPass, report: HeadReport, grad: Tensor
) -> Tensor | None:
    """Forward through a chain's layers, then loss and backward from its last head to its first; returns dL/dz.

    A parallel head is a chain of one: its activations are freed before the next head starts. In a longer chain the
    layers' activations wait for their turn, the logits never do.
    """
    last = max((place for place, head in enumerate(chain) if report.weights[head]), default=-1)
    for head in chain[last + 1 :]:  # nothing that has a loss reads these
        heads.skip(head, layer=True)
    steps: list[tuple[int, Tensor, Tensor]] = []
    inputs, needs_grad = z, z_needs_grad
    for head in chain[: last + 1]:
        with _named(head, report, "forward"), label("head", head + 1, "forward"), torch.enable_grad():
            leaf = inputs.detach().requires_grad_(needs_grad)
            inputs = heads.forward_head(head, leaf)
        steps.append((head, leaf, inputs))
        needs_grad = True
        del leaf
    del inputs
    passed_back: Tensor | None = None
    while steps:
        head, leaf, outputs = steps.pop()
        with _named(head, report, "backward"), label("head", head + 1, "loss and backward"):
            output_grad = passed_back
            if report.weights[head]:
                with label("head", head + 1, "loss"):
                    sums, output_grad = heads.head_loss(head, outputs, grad * report.weights[head], False)
                report.record(head, sums)
                if passed_back is not None and output_grad is not None:
                    output_grad = output_grad + passed_back
            else:
                heads.skip(head, layer=False)
            if outputs.requires_grad:
                torch.autograd.backward(outputs, output_grad)
        passed_back = leaf.grad
    return passed_back


@contextmanager
def _named(head: int, report: HeadReport, phase: str) -> Iterator[None]:
    """Adds the head to an exception that passes (its type is kept), and takes back what the report already held."""
    try:
        yield
    except Exception as error:
        report.clear()
        error.add_note(f"in the {phase} of head {head + 1} of {report.loss_sum.shape[0]} (deferred sequential heads)")
        raise


def _autocast_state(device: str) -> tuple[str, torch.dtype, bool]:
    """The caller's autocast state: backward runs outside of the ``with`` block that the forward pass ran in."""
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
