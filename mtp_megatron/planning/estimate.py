"""Step time, bubble and MFU of a job, from its arithmetic, hardware figures that the user gives, and the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_megatron.planning.cost import RankCost, rank_costs
from mtp_megatron.planning.simulate import Schedule, simulate
from mtp_megatron.training.operations import StepOperations
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes
from mtp_megatron.training.validate import data_parallel_size, num_microbatches


@dataclass(frozen=True)
class Hardware:
    """What one GPU does. The defaults are an H100 SXM's data sheet and a guess at how much of it a layer reaches:
    measure a layer of your own and give what it did.

    Attributes:
        tflops: dense matrix multiplication at its peak, in the training precision, 1e12 operations per second.
        efficiency: share of it that a layer reaches.
        link: GB/s (1e9) from one GPU to another of its node, each way.
        network: GB/s from one GPU to one of another node.
        memory: GB (1e9) on one GPU.
        reserve: GB of them that a plan leaves alone: for the CUDA context, NCCL's and cuBLAS's buffers, fragmentation.
        gpus_per_node: ranks that have a link to one another; a group that spans more goes through the network.
    """

    tflops: float = 989.0
    efficiency: float = 0.5
    link: float = 450.0
    network: float = 50.0
    memory: float = 80.0
    reserve: float = 4.0
    gpus_per_node: int = 8

    @property
    def room(self) -> float:
        """Bytes of one GPU that a plan may take."""
        return (self.memory - self.reserve) * 1e9

    def between(self, ranks: int) -> float:
        """Bytes per second between members of a group that lies within so many ranks that follow one another.

        Megatron counts tensor parallel ranks first, then context parallel ones, replicas and stages.
        """
        return 1e9 * (self.link if ranks <= self.gpus_per_node else self.network)

    def room_in_words(self) -> str:
        return f"{self.memory:g} GB" + (f" with {self.reserve:g} GB in reserve" if self.reserve else "")


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch, of each global stage.

    Attributes:
        forward, backward: of the whole pass; heads run in the backward pass.
        heads: the part of the backward pass that runs heads.
        exchange: the part of both passes in which tensor and context parallel ranks exchange activations.
        latency: of a tensor from one stage to the next.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    heads: tuple[float, ...]
    exchange: tuple[float, ...]
    latency: float


@dataclass(frozen=True)
class Terms:
    """What a step's seconds are made of; they add up to it.

    Attributes:
        arithmetic: of a pipeline rank on average, recomputation included.
        exchange: of activations between tensor and context parallel ranks, on average over pipeline ranks.
        slowest_stage: what the slowest rank works more than the average.
        bubble: what the slowest rank waits.
        reduction: exchange of gradients and parameters that is not overlapped.
    """

    arithmetic: float
    exchange: float
    slowest_stage: float
    bubble: float
    reduction: float

    @property
    def total(self) -> float:
        return self.arithmetic + self.exchange + self.slowest_stage + self.bubble + self.reduction


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    ranks: cost of each pipeline rank.
    schedule: one step's passes, without the reduction of gradients.
    head_seconds: of each global stage's backward pass, the part that runs heads.
    terms: what a step's seconds are made of.
    imbalance: work of the slowest pipeline rank over the mean of all, 1 or more.
    step_seconds: of a whole step, without the optimizer's own arithmetic.
    tokens_per_second: of the whole job.
    mfu: model operations (no recomputation) over what the GPUs could have done, 0 to 1.
    """

    ranks: tuple[RankCost, ...]
    schedule: Schedule
    head_seconds: tuple[float, ...]
    terms: Terms
    imbalance: float
    step_seconds: float
    tokens_per_second: float
    mfu: float

    @property
    def fullest(self) -> RankCost:
        """The rank that takes most memory."""
        return max(self.ranks, key=lambda rank: rank.memory)


def estimate(recipe: Recipe, world_size: int, hardware: Hardware) -> Estimate:
    """Cost and time of one training step.

    Args:
        recipe: resolved and checked.

    Raises:
        ConfigError: a recipe that the cost model does not know.
    """
    costs = rank_costs(recipe, world_size)
    times = stage_times(recipe, costs, world_size, hardware)
    microbatches, ranks = num_microbatches(recipe, world_size), len(costs)
    schedule = simulate(times.forward, times.backward, ranks=ranks, microbatches=microbatches, latency=times.latency)
    reduction = reduction_seconds(recipe, costs, times, world_size, hardware)
    busy = work_of_ranks(times, ranks, microbatches)
    mean, exchange = sum(busy) / ranks, microbatches * sum(times.exchange) / ranks
    seconds = schedule.seconds + reduction
    return Estimate(
        ranks=tuple(costs),
        schedule=schedule,
        head_seconds=times.heads,
        terms=Terms(
            arithmetic=mean - exchange,
            exchange=exchange,
            slowest_stage=max(busy) - mean,
            bubble=schedule.seconds - max(busy),
            reduction=reduction,
        ),
        imbalance=max(busy) / mean,
        step_seconds=seconds,
        tokens_per_second=recipe.train.batch_sizes.largest * recipe.train_seq_length / seconds,
        mfu=StepOperations(recipe)(recipe.heads.base_weights()) / (seconds * world_size * hardware.tflops * 1e12),
    )


def stage_times(recipe: Recipe, costs: Sequence[RankCost], world_size: int, hardware: Hardware) -> StageTimes:
    """Seconds of each global stage, from the operations of its rank's chunk."""
    rate = hardware.tflops * 1e12 * hardware.efficiency
    sizes = Sizes.of(recipe)
    times = exchange_seconds(recipe, sizes, hardware)
    forward, backward, heads, exchange = [], [], [], []
    for index, stage in enumerate(recipe.stages):
        chunk, rank = divmod(index, len(costs))
        cost = costs[rank]
        forward.append(cost.forward_flops[chunk] / rate + stage.layers * times.forward)
        head = cost.head_flops[chunk] / rate + len(stage.heads) * times.head
        trunk = cost.backward_flops[chunk] - cost.head_flops[chunk]
        backward.append(trunk / rate + stage.layers * times.backward + head)
        heads.append(head)
        exchange.append(stage.layers * (times.forward + times.backward) + len(stage.heads) * times.head)
    message = sizes.element * sizes.tokens_shard * sizes.hidden / hardware.between(world_size)
    return StageTimes(tuple(forward), tuple(backward), tuple(heads), tuple(exchange), message)


def work_of_ranks(times: StageTimes, ranks: int, microbatches: int) -> list[float]:
    """Seconds that each pipeline rank works in a step."""
    return [
        microbatches * (sum(times.forward[rank::ranks]) + sum(times.backward[rank::ranks])) for rank in range(ranks)
    ]


def reduction_seconds(
    recipe: Recipe, costs: Sequence[RankCost], times: StageTimes, world_size: int, hardware: Hardware
) -> float:
    """Of gradients over replicas and of the unembedding's over its stages, and gathering the parameters: what is
    exposed. Overlapped with it can be no more than one microbatch's pass, the last backward or the first forward."""
    sizes, optimizer, ranks = Sizes.of(recipe), recipe.optimizer, len(costs)
    # Context parallel ranks hold the same parameters, and megatron-core reduces over them together with replicas.
    copies = data_parallel_size(recipe, world_size) * recipe.parallel.context
    network = hardware.between(recipe.parallel.tensor * copies)
    share = (copies - 1) / copies
    slowest = 0.0
    for cost in costs:
        gradients = (4 if optimizer.distributed else 8) * cost.parameters * share / network
        gathering = sizes.element * cost.parameters * share / network if optimizer.distributed else 0.0
        if optimizer.overlap_grad_reduce:
            gradients = max(0.0, gradients - sum(times.backward[cost.rank :: ranks]))
        if optimizer.overlap_param_gather:
            gathering = max(0.0, gathering - sum(times.forward[cost.rank :: ranks]))
        slowest = max(slowest, gradients + gathering)
    holders = sum(bool(stage.heads) or (stage.first and recipe.model.tied_embeddings) for stage in recipe.stages)
    if recipe.heads.unembedding == "replicated":
        holders = 1
    summed = 8 * sizes.rows * sizes.hidden * (holders - 1) / holders / hardware.between(world_size)
    return slowest + summed


@dataclass(frozen=True)
class ExchangeSeconds:
    """Between tensor and context parallel ranks, of one microbatch; nothing overlaps it.

    Attributes:
        forward, backward: of a trunk layer; what its recomputation exchanges again belongs to its backward pass.
        head: of a head's forward pass, loss and backward pass.
    """

    forward: float
    backward: float
    head: float


def exchange_seconds(recipe: Recipe, sizes: Sizes, hardware: Hardware) -> ExchangeSeconds:
    """A gather or a scatter of ``[tokens, h]`` counts one, an all-reduce two.

    A layer's forward pass takes four, its backward pass as many, and two more under sequence parallelism, which gathers
    the inputs of two matrices again for their gradients. A loss takes two: its input is gathered and the gradient of
    that scattered, or summed. Keys and values of the other context parallel ranks come round in a ring, and go round
    again with their gradients.
    """
    parallel, recompute = recipe.parallel, recipe.train.recompute
    tensor, context = parallel.tensor, parallel.context
    one = sizes.element * sizes.tokens * sizes.hidden * (tensor - 1) / tensor / hardware.between(tensor)
    ring = 2 * sizes.element * sizes.tokens * sizes.keys * (context - 1) / hardware.between(tensor * context)
    forward, backward = 4 * one + ring, (6 if parallel.sequence_parallel else 4) * one + 2 * ring
    again = {"full": forward, "selective": ring, None: 0.0}[recompute]
    layer = forward + backward if recipe.heads.kind == "transformer" else 0.0
    return ExchangeSeconds(forward, backward + again, layer + 2 * one)
