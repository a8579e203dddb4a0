"""The memory of one training step, on fake tensors or real ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_megatron.compat.checkpoints import chained
from mtp_megatron.planning.categories import CATEGORIES, categorise
from mtp_megatron.planning.live_memory import Allocation, LiveMemory
from mtp_megatron.planning.makers import Maker, Makers
from mtp_megatron.training.batches import Microbatch, chunk_iterators
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.step import BatchIterator, LossFunction, train_step

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mtp_megatron.model import MTPGPTModel
    from mtp_megatron.sequential import HeadReport
    from mtp_megatron.training.build import Trainable


@dataclass(frozen=True)
class StepMemory:
    """Memory of one rank's training step, in bytes.

    Attributes:
        peak: the most that was alive.
        peaks: the most by phase of the step (``forward and backward``, ``optimizer``).
        standing: alive between steps.
        alive: what was alive at ``peak``, each with its category.
        maker: who made the tensor that reached ``peak``.
    """

    peak: int
    peaks: dict[str, int]
    standing: int
    alive: Sequence[Allocation]
    maker: Maker

    @property
    def categories(self) -> dict[str, int]:
        """Bytes at the peak by category, in the order of :data:`.categories.CATEGORIES`."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for allocation in self.alive:
            sums[allocation.category or "other"] += allocation.nbytes
        return sums


def step_memory(
    recipe: Recipe, trainable: Trainable, memory: LiveMemory, makers: Makers, microbatches: int
) -> StepMemory:
    """Measure a training step of ``trainable``, which was built inside of ``memory``; on fake tensors or real ones."""
    with makers.following(trainable.models, memory):
        with makers.during("first update"):  # makes Adam's moments
            trainable.update()
        _mark_standing(trainable, memory)
        memory.restart_peak()
        standing = memory.current
        followed = _Followed(trainable, memory, makers)
        train_step(recipe, followed, _synthetic(recipe, makers), microbatches, False)
    alive = memory.at_peak()
    unembeddings = {
        tuple(weight.shape) for model in trainable.models if model.owned_heads for weight in model.unembeddings()
    }
    for allocation in alive:
        if allocation.category is None:
            allocation.category = categorise(allocation, allocation.maker, unembeddings)
    return StepMemory(memory.peak, followed.peaks, standing, alive, alive[-1].maker)


def _mark_standing(trainable: Trainable, memory: LiveMemory) -> None:
    """Name what stays between steps: weights, gradient buffers, the optimizer's masters and moments."""
    for chunk, model in zip(trainable.chunks, trainable.models, strict=True):
        memory.mark((parameter.data for parameter in model.parameters()), "weights")
        memory.mark(model.buffers(), "weights")
        memory.mark((buffer.grad_data for buffer in chunk.buffers), "main gradients")
    for part in chained(trainable.optimizer):
        if part.optimizer is None:  # of a stage that trains nothing
            continue
        for group in part.optimizer.param_groups:
            memory.mark((parameter.data for parameter in group["params"]), "master weights")
        for state in part.optimizer.state.values():
            memory.mark((value for value in state.values() if isinstance(value, Tensor)), "Adam moments")


class _Followed:
    """A :class:`.step.Trainer` that tells the phases of a step apart."""

    def __init__(self, trainable: Trainable, memory: LiveMemory, makers: Makers) -> None:
        self._trainable, self._memory, self._makers = trainable, memory, makers
        self.peaks: dict[str, int] = {}

    @property
    def scheduler(self) -> OptimizerParamScheduler:
        return self._trainable.scheduler

    @property
    def models(self) -> list[MTPGPTModel]:
        return self._trainable.models

    def backward(self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int) -> list[HeadReport]:
        with self._makers.during("forward and backward"):
            reports = self._trainable.backward(recipe, iterators, num_microbatches)
        self.peaks["forward and backward"] = self._memory.peak
        return reports

    def update(self) -> float:
        reached = self._memory.peak, self._memory.peak_at
        self._memory.restart_peak()
        with self._makers.during("optimizer"):
            norm = self._trainable.update()
        self.peaks["optimizer"] = self._memory.peak
        self._memory.restore_peak(*reached)
        return norm

    def forward(
        self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int, loss_func: LossFunction
    ) -> list[Any]:
        return self._trainable.forward(recipe, iterators, num_microbatches, loss_func)

    def evaluating(self) -> AbstractContextManager[None]:
        return self._trainable.evaluating()

    def may_lose_steps(self) -> bool:
        return self._trainable.may_lose_steps()


@dataclass(frozen=True)
class _FollowedBatch(Microbatch):
    """A microbatch whose mask, which it makes within the forward pass, counts as the batch's."""

    makers: Makers = field(kw_only=True)

    @property
    def attention_mask(self) -> Tensor | None:
        with self.makers.during("batch"):
            return super().attention_mask


def _synthetic(recipe: Recipe, makers: Makers) -> list[BatchIterator]:
    """Batches of the recipe's shape for each chunk of this rank, through the code that makes real ones."""

    def samples(*, micro_batch_size: int, **_: int) -> Iterator[dict[str, Tensor]]:
        shape = (micro_batch_size, recipe.train_seq_length)
        while True:
            yield {
                "tokens": torch.zeros(shape, dtype=torch.int64),
                "labels": torch.ones(shape, dtype=torch.int64),
                "loss_mask": torch.ones(shape),
            }

    def named(batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
        while True:
            with makers.during("batch"):
                batch = next(batches)
            yield _FollowedBatch(**vars(batch), makers=makers)
            del batch

    iterators = chunk_iterators(recipe, 0, samples)
    return [None if iterator is None else named(iterator) for iterator in iterators]
