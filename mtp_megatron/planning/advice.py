"""What is too big in a plan that does not fit, and the nearest change that makes it fit: found by trying changes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.candidates import layouts
from mtp_megatron.planning.cost import rank_costs
from mtp_megatron.planning.estimate import Hardware
from mtp_megatron.planning.head_memory import logits_chunk
from mtp_megatron.planning.lines import changed
from mtp_megatron.planning.tensors import Tensors, largest_category, largest_tensors
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes
from mtp_megatron.training.validate import check_recipe

_LEAST_CHUNK = 64
"""Tokens of a chunk of logits below which the loss is not cut: its products would become too thin."""
_REBALANCE = "rebalance"

Option = tuple[float, dict[str, Any]]
"""How far a change is from what the user wrote, and the settings that it changes."""


@dataclass(frozen=True)
class Advice:
    """Attributes:
    stage: pipeline rank that takes most memory.
    excess: bytes that it takes beyond what there is.
    category: attribute of its cost that takes most, ``category_bytes`` of it.
    tensors: those that take most of that category.
    changes: settings of the nearest change that fits, or of the best that was tried.
    memory: of the fullest GPU with them, bytes.
    fits: whether that is little enough.
    """

    stage: int
    excess: float
    category: str
    category_bytes: int
    tensors: Tensors
    changes: dict[str, Any]
    memory: int
    fits: bool


def advise(recipe: Recipe, world_size: int, hardware: Hardware) -> Advice | None:
    """None: the plan fits.

    The number of GPUs, the batch and the model stay as they are. Combinations of changes are tried in the order of
    their distance: first what costs no time (sharding the optimizer, sequence parallelism, smaller chunks of logits),
    then smaller microbatches, another placement of layers and heads, recomputation, and other parallel sizes.

    Args:
        recipe: resolved and checked.
    """
    room = hardware.room
    fullest = max(rank_costs(recipe, world_size), key=lambda cost: cost.memory)
    if fullest.memory <= room:
        return None
    options = _options(recipe, hardware.gpus_per_node)
    changes, memory = _nearest(recipe, options, world_size, hardware)
    category = largest_category(fullest)
    return Advice(
        stage=fullest.rank,
        excess=fullest.memory - room,
        category=category,
        category_bytes=getattr(fullest, category),
        tensors=largest_tensors(recipe, fullest, world_size, category),
        changes=changes,
        memory=memory or fullest.memory,
        fits=memory is not None and memory <= room,
    )


def _options(recipe: Recipe, gpus_per_node: int) -> list[list[Option]]:
    """What may be changed, each from the recipe's own setting (distance 0) to the farthest."""
    parallel, train = recipe.parallel, recipe.train
    keep: Option = (0.0, {})
    options: list[list[Option]] = []
    if not recipe.optimizer.distributed:
        options.append([keep, (1.0, {"optimizer.distributed": True})])
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        options.append([keep, (1.0, {"parallel.sequence_parallel": True})])
    chunk = logits_chunk(recipe, Sizes.of(recipe))
    chunks = [chunk // 2**power for power in (1, 2, 3) if chunk // 2**power >= _LEAST_CHUNK]
    options.append([keep, *((1.1 + 0.1 * i, {"heads.loss_chunk_tokens": size}) for i, size in enumerate(chunks))])
    batches = [size for size in range(train.micro_batch_size - 1, 0, -1) if train.micro_batch_size % size == 0]
    options.append([keep, *((2.0 + 0.1 * i, {"train.micro_batch_size": size}) for i, size in enumerate(batches))])
    if parallel.pipeline > 1:
        options.append([keep, (3.0, {_REBALANCE: True})])
    recompute = {None: ["selective", "full"], "selective": ["full"], "full": []}[train.recompute]
    options.append([keep, *((3.5 + 0.5 * (kind == "full"), {"train.recompute": kind}) for kind in recompute)])
    sizes = [parallel.tensor * 2**power for power in (1, 2, 3) if parallel.tensor * 2**power <= gpus_per_node]
    options.append(
        [
            keep,
            *((5.0 + i, {"parallel.tensor": size, "parallel.sequence_parallel": True}) for i, size in enumerate(sizes)),
        ]
    )
    pipelines = [parallel.pipeline * 2**power for power in (1, 2, 3, 4)]
    options.append(
        [keep, *((5.5 + i, {"parallel.pipeline": size, _REBALANCE: True}) for i, size in enumerate(pipelines))]
    )
    return options


def _nearest(
    recipe: Recipe, options: list[list[Option]], world_size: int, hardware: Hardware
) -> tuple[dict[str, Any], int | None]:
    """The settings that fit at the least distance with the memory of the fullest GPU, or the best of the farthest."""
    room = hardware.room
    # All at their farthest but the parallel sizes, at any of those: if none of these fits, less will not.
    *others, tensors, pipelines = options
    strongest = [(way[-1],) if len(way) > 1 else (way[0],) for way in others]
    best: tuple[dict[str, Any], int | None] = ({}, None)
    for combination in itertools.product(*strongest, tensors, pipelines):
        for changes, memory in _tried(recipe, combination, world_size, hardware):
            if best[1] is None or memory < best[1]:
                best = (changes, memory)
    if best[1] is None or best[1] > room:
        return _trimmed(recipe, best[0], world_size), best[1]
    for combination in sorted(itertools.product(*options), key=lambda ways: sum(distance for distance, _ in ways)):
        for changes, memory in _tried(recipe, combination, world_size, hardware):
            if memory <= room:
                return changes, memory
    return best


def _trimmed(recipe: Recipe, changes: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Without settings that save nothing beside the others."""
    kept: dict[str, Any] = changes
    for key in changes:
        fewer = {other: value for other, value in kept.items() if other != key}
        with contextlib.suppress(ConfigError):  # the others need it
            if _memory(recipe, fewer, world_size) <= _memory(recipe, kept, world_size):
                kept = fewer
    return kept


def _tried(
    recipe: Recipe, combination: tuple[Option, ...], world_size: int, hardware: Hardware
) -> Iterator[tuple[dict[str, Any], int]]:
    """The settings of a combination, with each of its layouts, that pass the recipe's checks; and their memory."""
    changes: dict[str, Any] = {}
    for _, settings in combination:
        changes.update(settings)
    rebalance = changes.pop(_REBALANCE, False)
    try:
        places: list[str | None] = [recipe.parallel.layout]
        if rebalance:
            places = [layout for _, layout in layouts(changed(recipe, changes), world_size, hardware, ())]
        for layout in places:
            if layout != recipe.parallel.layout:
                changes = {**changes, "parallel.layout": layout}
            yield _needed(recipe, changes), _memory(recipe, changes, world_size)
    except ConfigError:  # the recipe's own checks: this is none of the changes to propose
        return


def _memory(recipe: Recipe, changes: dict[str, Any], world_size: int) -> int:
    """Of the fullest GPU of the changed recipe, if it passes its checks."""
    vocab_size = recipe.model.vocab_size or 0
    one = check_recipe(changed(recipe, changes), world_size=world_size, tokenizer_vocab_size=vocab_size)
    return max(cost.memory for cost in rank_costs(one, world_size))


def _needed(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Any]:
    """Without settings that the recipe has already."""
    return {
        key: value
        for key, value in changes.items()
        if getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2]) != value
    }
