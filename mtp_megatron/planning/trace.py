"""The memory of one rank of a job, from the code that trains: built and stepped on fake tensors, in seconds, anywhere.

The figure is the largest sum of living tensors during a training step in steady state (Adam's moments exist). It holds
no CUDA context, no library workspace and no fragmentation: leave room for those.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtp_megatron.compat.checkpoints import chained
from mtp_megatron.compat.fake import fake_rank
from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.live_memory import LiveMemory
from mtp_megatron.planning.makers import Makers
from mtp_megatron.planning.step_memory import StepMemory, step_memory
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.validate import num_microbatches
from mtp_megatron.training.world import model_parallel_world

if TYPE_CHECKING:
    from mtp_megatron.training.build import Trainable


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
        overlap_left_out: the job has ``parallel.tp_comm_overlap``, whose buffers are none of torch's; traced without.
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
    overlap_left_out: bool
    memory: StepMemory
    seconds: float


def trace_rank(
    recipe: Recipe, rank: int, world_size: int, *, fused_kernels: bool | None = None, device: str = "cuda"
) -> Trace:
    """Build rank ``rank`` of the job and take one training step, on fake tensors.

    Args:
        recipe: resolved and checked (:func:`mtp_megatron.training.validate.check_recipe`).
        fused_kernels: attention, norms and SwiGLU take the memory of fused kernels, as on GPUs, instead of
            megatron-core's own, which keep more (``[s, s]`` matrices); None: where the recipe asks for Transformer
            Engine.
        device: ``cpu``: Adam goes from one parameter to the next, as torch's does there. Else it is a GPU's: fused
            with fused kernels, and without them torch's, which works on all parameters at once.

    Raises:
        ConfigError: a recipe that cannot be traced: experts, DeepSpeed.
    """
    check_traceable(recipe, rank, world_size)
    start = time.perf_counter()
    fused = recipe.train.transformer_engine if fused_kernels is None else fused_kernels
    overlap, masked = recipe.parallel.tp_comm_overlap, recipe.data.reset_attention_mask and not fused
    # Transformer Engine needs a GPU: megatron-core's own layers stand for its.
    recipe = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"transformer_engine": False}),
            "parallel": recipe.parallel.model_copy(update={"tp_comm_overlap": False}),
            # Fused kernels are told of documents by their boundaries, and keep what they keep of one.
            "data": recipe.data.model_copy(update={"reset_attention_mask": masked}),
        }
    )
    whole = num_microbatches(recipe, world_size)
    makers = Makers()
    memory = LiveMemory(makers)
    with fake_rank(rank, world_size, fused_kernels=fused), model_parallel_world(recipe), memory:
        from mtp_megatron.training.build import build_trainable

        trainable = build_trainable(recipe)
        if fused:  # as transformer_config sets it on GPUs
            trainable.config.bias_activation_fusion = True
        if device != "cpu":
            trainable.config.deallocate_pipeline_outputs = True
            _as_on_gpus(trainable, "fused" if fused else "foreach")
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
        overlap_left_out=overlap,
        memory=measured,
        seconds=time.perf_counter() - start,
    )


def _as_on_gpus(trainable: Trainable, kind: str) -> None:
    """Let torch's AdamW take the memory of a GPU's: ``fused`` of one without intermediate results, as Transformer
    Engine's and Apex's; ``foreach`` of the one that torch chooses there."""
    for part in chained(trainable.optimizer):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            group[kind] = True


def check_traceable(recipe: Recipe, rank: int, world_size: int) -> None:
    """Refuse by name what a trace cannot follow."""
    if not 0 <= rank < world_size:
        raise ConfigError("--trace", rank, f"the job has ranks 0 to {world_size - 1}", "Choose one of them.")
    if recipe.run.deepspeed is not None:
        raise ConfigError(
            "run.deepspeed", recipe.run.deepspeed, "a trace follows megatron-core's optimizer", "Set it to null."
        )
    for name in ("fp8", "fp4"):
        if getattr(recipe.train, name) is not None:
            problem = "Transformer Engine's layers, which keep what FP8 needs, are not traced"
            raise ConfigError(f"train.{name}", getattr(recipe.train, name), problem, "Trace it in bf16.")
    if recipe.model.num_experts is not None:
        raise ConfigError(
            "model.num_experts",
            recipe.model.num_experts,
            "how many tokens an expert gets depends on the data, which a trace has none of",
            "Trace a dense model.",
        )


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
