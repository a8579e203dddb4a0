"""The fastest layout that fits: every way to cut a model over a number of GPUs, costed, and the best ones simulated.

All candidates pass the recipe's own checks. Each is costed by formula; those that fit are simulated in the order of a
lower bound of their step time, until that bound exceeds the times already found: none of the best is missed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.candidates import AT_THE_END, Candidate, candidate, choices, describe, layouts
from mtp_megatron.planning.cost import check_known, rank_costs
from mtp_megatron.planning.estimate import Estimate, Hardware, estimate
from mtp_megatron.planning.lines import changed
from mtp_megatron.planning.tensors import CATEGORIES, largest_category, largest_tensors
from mtp_megatron.training.recipe import Recipe


@dataclass(frozen=True)
class Found:
    """A candidate with its simulated step."""

    candidate: Candidate
    plan: Estimate


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: the fastest that fit, the fastest first; at least one.
        at_the_end: the best's own cut with all heads on the last stage, balanced as well as that allows; None: the best
            is one, or there is no such layout. It need not fit.
        too_big: the candidate that does not fit and might be the fastest; None: none might beat the best.
        tried, fitting, simulated: how many candidates there were, fit, and were simulated.
    """

    best: tuple[Found, ...]
    at_the_end: Found | None
    too_big: Candidate | None
    tried: int
    fitting: int
    simulated: int


class NothingFitsError(ConfigError):
    """No candidate fits. ``nearest`` is the one that takes least memory."""

    def __init__(self, nearest: Candidate, tried: int, world_size: int, hardware: Hardware) -> None:
        self.nearest = nearest
        cost = rank_costs(nearest.recipe, world_size)[nearest.stage]
        category = largest_category(cost)
        beside = f" beside --reserve {hardware.reserve:g}" if hardware.reserve else ""
        super().__init__(
            "--memory",
            hardware.memory,
            f"none of {tried} layouts fits; the smallest ({describe(nearest.recipe)}) takes {nearest.memory / 1e9:.1f} "
            f"GB on stage {nearest.stage}{beside}, most of it {CATEGORIES[category]}: "
            f"{largest_tensors(nearest.recipe, cost, world_size, category)}",
            "Take more GPUs, optimizer.distributed=true, a smaller train.micro_batch_size or a smaller model.",
        )


def search(
    recipe: Recipe,
    world_size: int,
    hardware: Hardware,
    *,
    fixed: Sequence[str] = (),
    count: int = 5,
    progress: bool = False,
) -> Search:
    """Find the fastest layouts.

    Args:
        recipe: with its vocabulary; what it says of :data:`SEARCHED` counts where ``fixed`` names it.
        fixed: dotted keys that stay as they are.
        count: how many layouts to return.
        progress: show a bar, if standard error is a terminal.

    Raises:
        NothingFitsError: every candidate takes more memory than there is.
        ConfigError: no candidate passes the recipe's checks, or the cost model does not know the recipe.
    """
    check_known(recipe)
    survey = _Survey(hardware.room)
    cuts = list(choices(recipe, world_size, fixed, hardware.gpus_per_node))
    for cut in tqdm(cuts, desc="cuts", unit="cut", leave=False, disable=None if progress else True):
        survey.take(recipe, cut, world_size, hardware, fixed)
    if survey.smallest is None:
        raise survey.refusal or ConfigError("--gpus", world_size, "no cut of the model", "Give another number.")
    if not survey.fitting:
        raise NothingFitsError(survey.smallest, survey.tried, world_size, hardware)
    best, simulated = _simulated(survey.fitting, world_size, hardware, count, progress)
    too_big = survey.too_big
    return Search(
        best=tuple(best),
        at_the_end=_heads_at_the_end(best[0], world_size, hardware),
        too_big=too_big if too_big is not None and too_big.seconds < best[0].plan.step_seconds else None,
        tried=survey.tried,
        fitting=len(survey.fitting),
        simulated=simulated,
    )


class _Survey:
    """Candidates sorted by whether they fit."""

    def __init__(self, room: float) -> None:
        self.room = room
        self.tried = 0
        self.fitting: list[Candidate] = []
        self.smallest: Candidate | None = None
        self.too_big: Candidate | None = None
        self.refusal: ConfigError | None = None
        self._settled: set[tuple[Any, ...]] = set()  # cuts that fit with less recomputation

    def take(
        self, recipe: Recipe, cut: dict[str, Any], world_size: int, hardware: Hardware, fixed: Sequence[str]
    ) -> None:
        """Cost every layout of one cut."""
        try:
            places = layouts(changed(recipe, cut), world_size, hardware, fixed)
        except ConfigError as error:  # the recipe's own checks: no such cut of this model
            self.refusal = self.refusal or error
            return
        for place, layout in places:
            key = (*(value for name, value in cut.items() if name != "train.recompute"), place)
            if key in self._settled:
                continue
            try:
                one = candidate(changed(recipe, {**cut, "parallel.layout": layout}), world_size, hardware)
            except ConfigError as error:
                self.refusal = self.refusal or error
                continue
            self._sort(one, key)

    def _sort(self, one: Candidate, key: tuple[Any, ...]) -> None:
        self.tried += 1
        if self.smallest is None or one.memory < self.smallest.memory:
            self.smallest = one
        if one.memory <= self.room:
            self._settled.add(key)
            self.fitting.append(one)
        elif self.too_big is None or one.seconds < self.too_big.seconds:
            self.too_big = one


def _simulated(
    candidates: list[Candidate], world_size: int, hardware: Hardware, count: int, progress: bool
) -> tuple[list[Found], int]:
    """The ``count`` fastest, the fastest first, and how many had to be simulated for them."""
    best: list[Found] = []
    ordered = sorted(candidates, key=lambda one: one.seconds)
    simulated = 0
    for one in tqdm(ordered, desc="simulated", unit="layout", leave=False, disable=None if progress else True):
        if len(best) == count and one.seconds >= best[-1].plan.step_seconds:
            break
        found = Found(one, estimate(one.recipe, world_size, hardware))
        simulated += 1
        best = heapq.nsmallest(count, [*best, found], key=lambda item: item.plan.step_seconds)
    return best, simulated


def _heads_at_the_end(best: Found, world_size: int, hardware: Hardware) -> Found | None:
    recipe = best.candidate.recipe
    if not best.candidate.spread:
        return None
    for place, layout in layouts(recipe, world_size, hardware, ()):
        if place == AT_THE_END:
            other = candidate(changed(recipe, {"parallel.layout": layout}), world_size, hardware)
            return Found(other, estimate(other.recipe, world_size, hardware))
    return None
