"""One optimizer step on megatron-core's schedules, and the figures of it that every rank agrees on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.errors import MTPError
from mtp_megatron.labels import label
from mtp_megatron.metrics import objective, per_token
from mtp_megatron.training.batches import Microbatch, rows_of
from mtp_megatron.training.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mtp_megatron.model import MTPGPTModel
    from mtp_megatron.sequential import HeadReport

BatchIterator = Iterator[Microbatch] | None  # None on stages that read no data
LossFunction = Callable[..., tuple[Tensor, Tensor, Any]]


class Trainer(Protocol):
    """A model with what trains it: megatron-core's schedules and optimizer (:class:`.build.Trainable`), or a DeepSpeed
    engine (:class:`mtp_megatron.deepspeed.trainer.DeepSpeedTrainer`)."""

    @property
    def scheduler(self) -> OptimizerParamScheduler:
        """Learning rate and weight decay by step."""

    @property
    def models(self) -> list[MTPGPTModel]:
        """This rank's model chunks without wrappers."""

    def backward(self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int) -> list[HeadReport]:
        """Gradients of one global batch; returns the reports of this rank's microbatches, from stages with heads."""

    def update(self) -> float:
        """One optimizer step with them; returns the gradient norm before clipping, infinite where the step was lost."""

    def forward(
        self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int, loss_func: LossFunction
    ) -> list[tuple[Microbatch, HeadReport]]:
        """One global batch forward only; returns the third results of ``loss_func`` (:func:`evaluation_loss`), last
        stage only, their reports with the figures of all heads."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, :meth:`forward` sees whole parameters and no dropout."""

    def may_lose_steps(self) -> bool:
        """Whether a loss scaler may skip a step whose gradients overflowed, as a matter of course."""


class TrainingDiverged(MTPError):
    """A loss or gradient norm that is no finite number: the weights of this step are lost, the checkpoints are not.

    Args:
        message: names step and number.
        figures: what is known of the step, by name.
    """

    def __init__(self, message: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


@dataclass(frozen=True)
class StepFigures:
    """What one step (or one evaluation) came to, over the whole global batch; equal on every rank.

    Attributes:
        loss: the objective, the weighted sum over heads of their loss sums divided by head 1's count of targets (nats);
            NaN where that is 0.
        head_loss: mean negative log likelihood of each head over its own targets (nats); NaN where it has none, or was
            not computed.
        head_accuracy: share of each head's targets that were its most likely token; NaN as for ``head_loss``.
        tokens: targets of head 1.
        grad_norm: global gradient norm before clipping; NaN in evaluation.
        lr: learning rate of the step; NaN in evaluation.
        stop: whether any rank was asked to stop.
        writing: whether any rank still wrote a checkpoint when the step began.
        head_z_loss: mean of ``log(Z)**2`` over each head's own targets, without its weight ``heads.z_loss``; NaN as for
            ``head_loss``. Empty where there is none. No part of ``loss``.
        load_balancing_loss: of the routers of a trunk with experts, mean over layers and microbatches, without its
            weight: 1 for even loads, ``num_experts`` at most; NaN without experts, in evaluation, and of a frozen trunk
            that is recomputed in full.
    """

    loss: float
    head_loss: list[float]
    head_accuracy: list[float]
    tokens: int
    grad_norm: float = math.nan
    lr: float = math.nan
    stop: bool = False
    writing: bool = False
    head_z_loss: list[float] = field(default_factory=list)
    load_balancing_loss: float = math.nan


def train_step(
    recipe: Recipe,
    trainable: Trainer,
    iterators: Sequence[BatchIterator],
    num_microbatches: int,
    stop_requested: bool,
    writing: bool = False,
) -> StepFigures:
    """Forward and backward over one global batch, then the optimizer.

    Args:
        iterators: one for each model chunk of this rank.
        num_microbatches: per data parallel rank.
        stop_requested: whether this rank was asked to stop; the figures say whether any rank was.
        writing: likewise, whether this rank still writes a checkpoint (``train.async_save``).

    Raises:
        TrainingDiverged: on every rank, for a loss or gradient norm that is NaN or infinite.
    """
    step = trainable.scheduler.num_steps
    weights = recipe.heads.weights_at(step)
    for model in trainable.models:
        if model.owned_heads:
            model.set_head_weights(weights)
    with label("forward and backward"):
        reports = trainable.backward(recipe, iterators, num_microbatches)
    # Only now do the reports hold numbers: the heads ran inside the backward passes.
    n, z_losses = recipe.heads.n, recipe.heads.n if recipe.heads.z_loss else 0
    local = [torch.cat([r.loss_sum, r.correct, r.tokens, r.normalizer[None], *z_loss_sums(r)]) for r in reports]
    with label("figures over the world"):  # waits for the device, and for the slowest rank
        sums = sum_over_world(local, 3 * n + 1 + z_losses, stop_requested, writing)
    figures = _figures(sums[:-2], weights)
    # The sums, not the means: a head without a target in this global batch has no mean, and has not diverged.
    known: dict[str, Any] = {"head_loss_sum": sums[:n], "head_tokens": sums[2 * n : 3 * n], "head_weights": weights}
    values = [("loss of head", i + 1, sums[i]) for i, weight in enumerate(weights) if weight]
    _require_finite(step + 1, values, known | {"grad_norm": None})
    # Before the optimizer, so that the first step trains at lr/warmup_steps and the last of the decay at min_lr.
    trainable.scheduler.step(increment=1)
    with label("optimizer"):
        grad_norm = trainable.update()
    if not trainable.may_lose_steps():
        _require_finite(step + 1, [("gradient norm", None, grad_norm)], known | {"grad_norm": grad_norm})
    return StepFigures(
        figures.loss,
        figures.head_loss,
        figures.head_accuracy,
        figures.tokens,
        grad_norm=grad_norm,
        lr=trainable.scheduler.get_lr({}),  # not the optimizer's: a stage that trains nothing has no parameter groups
        stop=sums[-2] > 0,
        writing=sums[-1] > 0,
        head_z_loss=figures.head_z_loss,
        load_balancing_loss=_load_balancing_loss(recipe, num_microbatches),
    )


def run_schedule(
    recipe: Recipe,
    chunks: Sequence[torch.nn.Module],
    iterators: Sequence[BatchIterator],
    num_microbatches: int,
    *,
    loss_func: LossFunction,
    forward_only: bool,
) -> list[Any]:
    """Run one global batch through megatron-core's schedule; returns the third results of ``loss_func``, last stage
    only."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: BatchIterator, model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        with label("data"):
            batch = next(iterator) if iterator is not None else Microbatch()
        with label("evaluation" if forward_only else "trunk forward"):
            output = batch.through(model)
        return output, partial(loss_func, batch)

    several = len(chunks) > 1
    rows, length = rows_of(recipe)
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(iterators) if several else iterators[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return results


def training_loss(batch: Microbatch, output: tuple[Tensor, HeadReport]) -> tuple[Tensor, Tensor, HeadReport]:
    """Loss sum, its count of tokens, and the report (which fills during backward)."""
    loss, report = output
    # The schedule scales the loss in place: it must not be the autograd function's own output.
    return loss.clone(), report.normalizer.to(torch.int), report


def evaluation_loss(
    batch: Microbatch, output: tuple[Tensor, HeadReport]
) -> tuple[Tensor, Tensor, tuple[Microbatch, HeadReport]]:
    """Loss sum, count of tokens, and the microbatch with its report."""
    loss, report = output
    return loss.clone(), report.normalizer.to(torch.int), (batch, report)


def z_loss_sums(report: HeadReport) -> list[Tensor]:
    """``[n]`` of a microbatch where there is a z-loss, nothing where there is none."""
    return [] if report.log_z_squared is None else [report.log_z_squared]


def sum_over_world(local: Sequence[Tensor], width: int, *flags: bool) -> list[float]:
    """Sum the vectors of the stages with heads over microbatches and ranks, and tell every rank; one collective.

    Args:
        local: vectors ``[width]`` of this rank's microbatches; empty on other stages.
        width: their length.
        flags: questions of this rank; the answers "did any rank say yes" come back as the last elements, > 0 for yes.
    """
    from megatron.core import parallel_state

    total = torch.zeros(width + len(flags), dtype=torch.float64, device=compat.device())
    if local and parallel_state.get_tensor_model_parallel_rank() == 0:  # tensor parallel ranks hold copies
        total[:width] = torch.stack([vector.to(torch.float64) for vector in local]).sum(dim=0)
    for place, flag in enumerate(flags, start=width):
        total[place] = float(flag)
    dist.all_reduce(total)
    result: list[float] = total.tolist()
    return result


def _load_balancing_loss(recipe: Recipe, num_microbatches: int) -> float:
    """Mean over trunk layers and the global batch's microbatches; collective where there are experts."""
    from megatron.core import parallel_state

    if recipe.model.num_experts is None or not recipe.model.moe_aux_loss:
        return math.nan
    if recipe.heads.trainable != "all" and recipe.train.recompute == "full":
        return math.nan  # routers count where there are gradients: a frozen trunk is never computed with them then
    total = compat.take_load_balancing_loss().to(compat.device())
    dist.all_reduce(total)  # over stages and replicas, and over ranks that hold a share of each sequence
    copies = num_microbatches * parallel_state.get_data_parallel_world_size()
    return float(total) / (copies * recipe.model.num_trunk_layers)


def _figures(sums: Sequence[float], weights: Sequence[float]) -> StepFigures:
    """From losses, correct and targets, each ``[n]``, the normalizer and, where there is one, the z-losses ``[n]``."""
    n = len(weights)
    losses, correct, tokens = sums[:n], sums[n : 2 * n], sums[2 * n : 3 * n]
    z_losses = sums[3 * n + 1 :]
    return StepFigures(
        loss=objective(weights, losses, sums[3 * n]),
        head_loss=per_token(losses, tokens),
        head_accuracy=per_token(correct, tokens),
        tokens=int(sums[3 * n]),
        head_z_loss=per_token(z_losses, tokens) if z_losses else [],
    )


def _require_finite(step: int, values: Sequence[tuple[str, int | None, float]], known: dict[str, Any]) -> None:
    for name, head, value in values:
        if not math.isfinite(value):
            what = name if head is None else f"{name} {head}"
            raise TrainingDiverged(f"step {step}: the {what} is {value}", known)
