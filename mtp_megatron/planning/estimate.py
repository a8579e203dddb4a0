"""Step time, bubble and MFU of a job, from its arithmetic, hardware figures that the user gives, and the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_megatron.planning.cost import RankCost, rank_costs
from mtp_megatron.planning.shapes import Sizes, stages_of
from mtp_megatron.planning.simulate import Schedule, simulate
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.validate import data_parallel_size, num_microbatches


@dataclass(frozen=True)
class Hardware:
    """What one GPU does. The defaults are an H100 SXM's data sheet and a guess at how much of it a layer reaches:
    measure a layer of your own and give what it did.

    Attributes:
        tflops: dense matrix multiplication at its peak, in the training precision, 1e12 operations per second.
        efficiency: share of it that a layer reaches.
        link: GB/s (1e9) from one GPU to another of its tensor parallel group, each way.
        network: GB/s from one GPU to one of another stage or replica.
        memory: GB (1e9) on one GPU.
    """

    tflops: float = 989.0
    efficiency: float = 0.5
    link: float = 450.0
    network: float = 50.0
    memory: float = 80.0


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    ranks: cost of each pipeline rank.
    schedule: one step's passes, without the reduction of gradients.
    head_seconds: of each global stage's backward pass, the part that runs heads.
    reduction_seconds: of gradients over replicas, where it is not overlapped.
    step_seconds: of a whole step, without the optimizer's own arithmetic.
    tokens_per_second: of the whole job.
    mfu: model operations (no recomputation) over what the GPUs could have done, 0 to 1.
    """

    ranks: tuple[RankCost, ...]
    schedule: Schedule
    head_seconds: tuple[float, ...]
    reduction_seconds: float
    step_seconds: float
    tokens_per_second: float
    mfu: float


def estimate(recipe: Recipe, world_size: int, hardware: Hardware) -> Estimate:
    """Cost and time of one training step.

    Args:
        recipe: resolved and checked.

    Raises:
        ConfigError: a recipe that the cost model does not know.
    """
    costs = rank_costs(recipe, world_size)
    rate = hardware.tflops * 1e12 * hardware.efficiency
    sizes = Sizes.of(recipe)
    message = sizes.element * sizes.tokens_shard * sizes.hidden / (hardware.network * 1e9)
    exchange = _tensor_parallel_seconds(recipe, sizes, hardware)
    forward, backward, heads = [], [], []
    for index, stage in enumerate(stages_of(recipe)):
        chunk, rank = divmod(index, len(costs))
        cost = costs[rank]
        forward.append(cost.forward_flops[chunk] / rate + stage.layers * exchange)
        head = cost.head_flops / rate + 3 * recipe.heads.n * exchange if stage.last else 0.0
        trunk = cost.backward_flops[chunk] - (cost.head_flops if stage.last else 0.0)
        backward.append(trunk / rate + 2 * stage.layers * exchange + head)
        heads.append(head)
    microbatches = num_microbatches(recipe, world_size)
    schedule = simulate(forward, backward, ranks=len(costs), microbatches=microbatches, latency=message)
    reduction = 0.0
    copies = data_parallel_size(recipe, world_size)
    if copies > 1 and not recipe.optimizer.overlap_grad_reduce:
        largest = max(cost.parameters for cost in costs)
        reduction = 2 * 4 * largest * (copies - 1) / copies / (hardware.network * 1e9)
    seconds = schedule.seconds + reduction
    return Estimate(
        ranks=tuple(costs),
        schedule=schedule,
        head_seconds=tuple(heads),
        reduction_seconds=reduction,
        step_seconds=seconds,
        tokens_per_second=recipe.train.global_batch_size * recipe.train_seq_length / seconds,
        mfu=_model_flops(costs) * microbatches / (seconds * len(costs) * hardware.tflops * 1e12),
    )


def _model_flops(costs: Sequence[RankCost]) -> float:
    """Of a microbatch over one GPU of every stage: a forward pass, and a backward pass of twice that."""
    return sum(3 * sum(cost.forward_flops) + cost.head_flops for cost in costs)


def _tensor_parallel_seconds(recipe: Recipe, sizes: Sizes, hardware: Hardware) -> float:
    """Of one layer's forward pass, not overlapped: two exchanges of ``[tokens, h]``, each there and back."""
    size = recipe.parallel.tensor
    moved = 4 * sizes.element * sizes.tokens * sizes.hidden * (size - 1) / size
    return moved / (hardware.link * 1e9)
