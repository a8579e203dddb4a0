"""Ways to cut a model over GPUs: parallel sizes, virtual stages, layouts, recomputation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_megatron.layout import heads_are_spread
from mtp_megatron.planning.balance import as_layout, balance
from mtp_megatron.planning.cost import rank_costs
from mtp_megatron.planning.estimate import Hardware, reduction_seconds, stage_times
from mtp_megatron.planning.lines import changed
from mtp_megatron.planning.presets import balanced_layout
from mtp_megatron.planning.simulate import least_seconds
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.validate import check_recipe, num_microbatches

MAX_CHUNKS = 8
"""Most virtual stages of a rank that are tried."""
MIN_TOKENS = 2048
"""Fewest tokens of a sequence that context parallelism leaves to a rank."""
SEARCHED = (
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.sequence_parallel",
    "parallel.layout",
    "train.recompute",
)
"""What the search chooses, where the user does not."""
_RECOMPUTE = (None, "selective", "full")  # by their arithmetic


AT_THE_END = "heads on 1"
"""The place of a layout whose heads are all on the last stage, the trunk balanced around them."""


@dataclass(frozen=True)
class Candidate:
    """A layout that passes the recipe's checks.

    Attributes:
        recipe: resolved and checked.
        spread: heads are on several stages.
        memory: of its fullest GPU, bytes.
        stage: the pipeline rank of that GPU.
        seconds: a step takes no less.
    """

    recipe: Recipe
    spread: bool
    memory: int
    stage: int
    seconds: float


def describe(recipe: Recipe) -> str:
    """Such as ``TP8 x CP2 x PP4 x 2 chunks, recompute full``."""
    parallel = recipe.parallel
    chunks = f" x {parallel.virtual_pipeline} chunks" if parallel.virtual_pipeline else ""
    recompute = f", recompute {recipe.train.recompute}" if recipe.train.recompute else ""
    context = f" x CP{parallel.context}" if parallel.context > 1 else ""
    return f"TP{parallel.tensor}{context} x PP{parallel.pipeline}{chunks}{recompute}"


def choices(recipe: Recipe, world_size: int, fixed: Sequence[str], gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """Every cut that divides the GPUs; the recipe's checks say which of them the model allows."""
    parallel, stages_at_most = recipe.parallel, recipe.model.num_trunk_layers + recipe.heads.n
    contexts = [1]
    while recipe.train_seq_length // (2 * contexts[-1]) >= MIN_TOKENS:
        contexts.append(2 * contexts[-1])
    if "parallel.context" in fixed:
        contexts = [parallel.context]
    for tensor, context in itertools.product(_divisors(min(gpus_per_node, world_size)), contexts):
        if world_size % (tensor * context):
            continue
        for pipeline, chunks, recompute in itertools.product(
            _divisors(world_size // (tensor * context)), (None, *range(2, MAX_CHUNKS + 1)), _RECOMPUTE
        ):
            if pipeline * (chunks or 1) > stages_at_most or (chunks and pipeline == 1):
                continue
            choice = {
                "parallel.tensor": tensor,
                "parallel.context": context,
                "parallel.pipeline": pipeline,
                "parallel.virtual_pipeline": chunks,
                "parallel.sequence_parallel": tensor > 1,
                "train.recompute": recompute,
            }
            if "parallel.sequence_parallel" in fixed:
                choice["parallel.sequence_parallel"] = parallel.sequence_parallel
            if all(choice[key] == _value(recipe, key) for key in fixed if key in choice):
                yield choice


def _value(recipe: Recipe, key: str) -> Any:
    section, _, leaf = key.partition(".")
    return getattr(getattr(recipe, section), leaf)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(recipe: Recipe, world_size: int, hardware: Hardware, fixed: Sequence[str]) -> list[tuple[str, str | None]]:
    """Ways to place layers and heads on the stages of a cut, with a word for each.

    Raises:
        ConfigError: the cut cannot work with any of them.
    """
    parallel = recipe.parallel
    if "parallel.layout" in fixed:
        return [("given", parallel.layout)]
    plain = changed(recipe, {"parallel.pipeline": 1, "parallel.virtual_pipeline": None, "parallel.layout": None})
    share = world_size // (parallel.pipeline if world_size % parallel.pipeline == 0 else 1)
    checked = check_recipe(plain, world_size=share, tokenizer_vocab_size=recipe.model.vocab_size or 0)
    if parallel.pipeline == 1:
        return [("whole", None)]
    layer, head = unit_seconds(checked, hardware)
    stages, heads = parallel.pipeline * (parallel.virtual_pipeline or 1), recipe.heads.n
    layers = recipe.model.num_trunk_layers
    found: dict[str, str] = {}
    for head_stages in range(1, min(heads, stages) + 1 if spreadable(recipe) else 2):
        balanced = balance(
            ranks=parallel.pipeline,
            chunks=parallel.virtual_pipeline or 1,
            layers=layers,
            heads=heads,
            layer=layer,
            head=head,
            head_stages=head_stages,
        )
        for number, counts in enumerate(balanced):
            found.setdefault(as_layout(counts), f"heads on {head_stages}" + (", by chunk" if number else ""))
    if layers >= stages:
        found.setdefault(balanced_layout(layers, heads, stages), "even")
    return [(place, layout) for layout, place in found.items()]


def spreadable(recipe: Recipe) -> bool:
    """Whether heads may be on several stages: they depend on the trunk alone, and share one unembedding."""
    return all(len(chain) == 1 for chain in recipe.heads.chains) and recipe.heads.unembedding == "shared"


def unit_seconds(recipe: Recipe, hardware: Hardware) -> tuple[float, float]:
    """What a trunk layer and a head take of a microbatch, both ways.

    Args:
        recipe: resolved and checked, of one stage: its pipeline is cut here.
    """
    costs = rank_costs(recipe, recipe.smallest_world)
    times = stage_times(recipe, costs, recipe.smallest_world, hardware)
    trunk = times.forward[0] + times.backward[0] - times.heads[0]
    return trunk / recipe.model.num_trunk_layers, times.heads[0] / recipe.heads.n


def candidate(recipe: Recipe, world_size: int, hardware: Hardware) -> Candidate:
    recipe = check_recipe(recipe, world_size=world_size, tokenizer_vocab_size=recipe.model.vocab_size or 0)
    costs = rank_costs(recipe, world_size)
    times = stage_times(recipe, costs, world_size, hardware)
    microbatches = num_microbatches(recipe, world_size)
    seconds = least_seconds(
        times.forward, times.backward, ranks=len(costs), microbatches=microbatches, latency=times.latency
    )
    fullest = max(costs, key=lambda cost: cost.memory)
    return Candidate(
        recipe=recipe,
        spread=heads_are_spread(recipe.stages),
        memory=fullest.memory,
        stage=fullest.rank,
        seconds=seconds + reduction_seconds(recipe, costs, times, world_size, hardware),
    )
