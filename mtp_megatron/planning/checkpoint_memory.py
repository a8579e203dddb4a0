"""Host memory that a save or a load of a checkpoint takes; on the GPU it takes none."""

from __future__ import annotations

from mtp_megatron.compat.optimizer_state import ROUND
from mtp_megatron.planning.cost import RankCost, optimizer_shards
from mtp_megatron.planning.tensors import matrices
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes

_STATE = 12  # bytes of a parameter's fp32 weight and Adam's two moments


def checkpoint_host_memory(recipe: Recipe, cost: RankCost, world_size: int) -> int:
    """Bytes for each GPU of a pipeline rank, beyond what its process holds anyway, at most.

    A tensor is written or read at a time. With the distributed optimizer, a rank has besides the state of parameters
    that it owns among those that ranks share, and parts of it under way (:mod:`mtp_megatron.compat.optimizer_state`).
    Where gradients are reduced early, each bucket is cut among all ranks: they share what may be all, and own even
    parts of it. Elsewhere there is one bucket for each chunk, and a rank shares one parameter at each of its ends.
    The pieces that a load reads are taken to be of this tensor parallel size; a checkpoint of a smaller one has larger.

    Args:
        cost: of the pipeline rank.
        world_size: GPUs of the job.
    """
    largest = _largest(recipe, cost)
    shards, read = optimizer_shards(recipe, world_size), 2 * 4 * largest
    if shards == 1:
        return read
    share = -(-cost.parameters // shards)
    owned, under_way = share + largest, min(share, max(ROUND, largest))
    if not recipe.optimizer.overlap_grad_reduce:
        ends = _ends(recipe, largest)
        owned, under_way = min(owned, ends), min(under_way, ends)
    return _STATE * owned + max(_STATE * under_way, read)


def host_copies(recipe: Recipe, cost: RankCost, world_size: int) -> int:
    """Bytes of host memory that ``train.async_save`` holds besides for a GPU of a pipeline rank, at most, from a save's
    begin until its file is written.

    They are what the rank saves. The first data parallel rank has the weights, for all; without the distributed
    optimizer also the state. With it a rank has its share, and what it owns of parameters that ranks share.

    Args:
        cost: of the pipeline rank.
        world_size: GPUs of the job.
    """
    shards, owned = optimizer_shards(recipe, world_size), cost.parameters
    if shards > 1:
        owned = min(owned, -(-owned // shards) + _ends(recipe, _largest(recipe, cost)))
    weights_are_masters = recipe.train.precision == "fp32" and not recipe.optimizer.distributed
    return cost.weights + (_STATE - 4 * weights_are_masters) * owned


def _largest(recipe: Recipe, cost: RankCost) -> int:
    return max(rows * columns for _, (rows, columns), _ in matrices(recipe, Sizes.of(recipe), cost))


def _ends(recipe: Recipe, largest: int) -> int:
    """Of the parameters that a rank shares where each chunk has one bucket: one at each of its ends."""
    return 2 * (recipe.parallel.virtual_pipeline or 1) * largest
