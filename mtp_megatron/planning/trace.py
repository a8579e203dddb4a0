"""The memory of one rank of a job, from the code that trains: built and stepped on fake tensors, in seconds, anywhere.

The figure is the largest sum of living tensors during a training step in steady state (Adam's moments exist). It holds
no CUDA context, no library workspace and no fragmentation: leave room for those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_megatron.compat.fake import fake_rank
from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.categories import CATEGORIES, categorise
from mtp_megatron.planning.live_memory import Allocation, LiveMemory
from mtp_megatron.planning.makers import Maker, Makers
from mtp_megatron.training.batches import Microbatch, chunk_iterators
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.step import BatchIterator, LossFunction, train_step
from mtp_megatron.training.validate import num_microbatches
from mtp_megatron.training.world import model_parallel_world

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


@dataclass(frozen=True)
class Trace:
    """What :func:`trace_rank` found.

    Attributes:
        recipe: as traced.
        rank, world_size: which of how many.
        coordinates: of the rank, by kind of parallelism.
        parameters: of this rank.
        num_microbatches: of a step; ``traced_microbatches`` of them were run, enough to reach the steady state.
        fused_kernels: attention, norms and SwiGLU took the memory of a GPU's fused kernels.
        seconds: that the trace took.
    """

    recipe: Recipe
    rank: int
    world_size: int
    coordinates: dict[str, int]
    parameters: int
    num_microbatches: int
    traced_microbatches: int
    fused_kernels: bool
    memory: StepMemory
    seconds: float


def trace_rank(recipe: Recipe, rank: int, world_size: int, *, fused_kernels: bool | None = None) -> Trace:
    """Build rank ``rank`` of the job and take one training step, on fake tensors.

    Args:
        recipe: resolved and checked (:func:`mtp_megatron.training.validate.check_recipe`).
        fused_kernels: attention, norms and SwiGLU take the memory of fused kernels, as on GPUs, instead of
            megatron-core's own, which keep more (``[s, s]`` matrices); None: where the recipe asks for Transformer
            Engine.

    Raises:
        ConfigError: a recipe that cannot be traced: experts, DeepSpeed.
    """
    check_traceable(recipe, rank, world_size)
    start = time.perf_counter()
    fused = recipe.train.transformer_engine if fused_kernels is None else fused_kernels
    # Transformer Engine needs a GPU: megatron-core's own layers stand for its.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"transformer_engine": False})})
    logging.getLogger("megatron").setLevel(logging.ERROR)
    whole = num_microbatches(recipe, world_size)
    makers = Makers()
    memory = LiveMemory(makers)
    with fake_rank(rank, world_size, fused_kernels=fused), model_parallel_world(recipe), memory:
        from mtp_megatron.training.build import build_trainable

        trainable = build_trainable(recipe)
        if fused:  # as transformer_config sets them on GPUs
            trainable.config.deallocate_pipeline_outputs = True
            trainable.config.bias_activation_fusion = True
        coordinates = _coordinates()
        enough = min(whole, _steady_state(recipe, coordinates["PP"]))
        measured = step_memory(recipe, trainable, memory, makers, enough)
        parameters = sum(parameter.numel() for model in trainable.models for parameter in model.parameters())
        del trainable
    return Trace(
        recipe=recipe,
        rank=rank,
        world_size=world_size,
        coordinates=coordinates,
        parameters=parameters,
        num_microbatches=whole,
        traced_microbatches=enough,
        fused_kernels=fused,
        memory=measured,
        seconds=time.perf_counter() - start,
    )


def check_traceable(recipe: Recipe, rank: int, world_size: int) -> None:
    """Refuse by name what a trace cannot follow."""
    if not 0 <= rank < world_size:
        raise ConfigError("--trace", rank, f"the job has ranks 0 to {world_size - 1}", "Choose one of them.")
    if recipe.run.deepspeed is not None:
        raise ConfigError(
            "run.deepspeed", recipe.run.deepspeed, "a trace follows megatron-core's optimizer", "Set it to null."
        )
    if recipe.model.num_experts is not None:
        raise ConfigError(
            "model.num_experts",
            recipe.model.num_experts,
            "how many tokens an expert gets depends on the data, which a trace has none of",
            "Trace a dense model.",
        )


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
        tuple(weight.shape) for model in trainable.models if model.post_process for weight in model.unembeddings()
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
    optimizer = trainable.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
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
            yield batch
            del batch

    iterators = chunk_iterators(recipe, 0, samples)
    return [None if iterator is None else named(iterator) for iterator in iterators]


def _steady_state(recipe: Recipe, stage: int) -> int:
    """Microbatches after which more of them take no more memory on this stage."""
    stages = recipe.parallel.pipeline
    if recipe.parallel.virtual_pipeline:
        return 2 * stages
    return stages - stage + 1  # stages - stage - 1 that warm the pipeline up, and two


def _coordinates() -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "TP": parallel_state.get_tensor_model_parallel_rank(),
        "PP": parallel_state.get_pipeline_model_parallel_rank(),
        "CP": parallel_state.get_context_parallel_rank(),
        "DP": parallel_state.get_data_parallel_rank(),
    }
