"""A search in words and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from mtp_megatron.planning.candidates import Candidate, describe
from mtp_megatron.planning.estimate import Hardware, Terms
from mtp_megatron.planning.lines import recipe_lines, recipe_tree
from mtp_megatron.planning.report import largest_step
from mtp_megatron.planning.search import Found, Search
from mtp_megatron.training.validate import data_parallel_size

_TERMS = {
    "arithmetic": "arithmetic",
    "exchange": "exchange of activations",
    "slowest_stage": "slowest stage",
    "bubble": "bubble",
    "reduction": "gradients and parameters",
}
_HEAD = (
    "      TP  CP  PP  VPP   DP  recompute  stages with heads  slowest/mean  fullest GB  bubble    MFU  step s  lost by"
)


def as_json(search: Search, world_size: int, hardware: Hardware) -> dict[str, Any]:
    """Everything that :func:`table` shows; bytes and seconds."""
    best = search.best[0]
    return {
        "world_size": world_size,
        "hardware": dataclasses.asdict(hardware),
        "tried": search.tried,
        "fitting": search.fitting,
        "simulated": search.simulated,
        "best": [{**_row(found, world_size, hardware), "lost_by": lost_by(found, best)} for found in search.best],
        "heads_at_the_end": _row(search.at_the_end, world_size, hardware) if search.at_the_end else None,
        "too_big": _too_big(search.too_big) if search.too_big else None,
        "remarks": largest_step(best.candidate.recipe),
        "recipe": recipe_tree(best.candidate.recipe),
    }


def table(search: Search, world_size: int, hardware: Hardware) -> str:
    """The best layouts, why each lost to the first, and the first one's recipe."""
    best = search.best[0]
    lines = [
        f"{world_size} GPUs of {hardware.room_in_words()}: {search.tried} layouts, {search.fitting} fit, "
        f"{search.simulated} simulated",
        "",
        _HEAD,
    ]
    for place, found in enumerate(search.best, 1):
        lines.append(_line(f"{place}", found, world_size, reason(found, best)))
    if search.at_the_end is not None:
        fits = search.at_the_end.candidate.memory <= hardware.room
        why = reason(search.at_the_end, best) + ("" if fits else "; does not fit")
        lines += [
            _line("-", search.at_the_end, world_size, why),
            "(-: the first one's cut, all heads on the last stage)",
        ]
    lines += [f"({remark})" for remark in largest_step(best.candidate.recipe)]
    lines.append("")
    if len(search.best) > 1:
        lines.append(f"1 against 2: {_comparison(search.best[1], best)}")
    if search.too_big is not None:
        big = search.too_big
        lines.append(
            f"lost by memory: {describe(big.recipe)} might take {big.seconds:.2f} s, "
            f"and needs {big.memory / 1e9:.1f} GB on stage {big.stage}"
        )
    return "\n".join([*lines, "", "recipe of 1:", "", recipe_lines(best.candidate.recipe)]).rstrip()


def lost_by(found: Found, best: Found) -> dict[str, float]:
    """Seconds that each term of the step is longer than the best's; empty for the best itself."""
    if found is best:
        return {}
    return {
        field.name: getattr(found.plan.terms, field.name) - getattr(best.plan.terms, field.name)
        for field in dataclasses.fields(Terms)
    }


def reason(found: Found, best: Found) -> str:
    """The term that makes the most of the difference to the best."""
    differences = lost_by(found, best)
    if not differences:
        return ""
    name = max(differences, key=lambda term: differences[term])
    return f"{_TERMS[name]}, +{differences[name]:.2f} s"


def _comparison(other: Found, best: Found) -> str:
    differences = lost_by(other, best)
    parts = [f"{name.replace('_', ' ')} {seconds:+.3f}" for name, seconds in differences.items() if abs(seconds) > 5e-4]
    what = describe(other.candidate.recipe)
    if what == describe(best.candidate.recipe):
        what += f", layout {other.candidate.recipe.parallel.layout},"
    total = other.plan.step_seconds - best.plan.step_seconds
    return f"{what} takes {total:.3f} s more ({', '.join(parts) or 'equal terms'})"


def _line(place: str, found: Found, world_size: int, why: str) -> str:
    recipe, plan = found.candidate.recipe, found.plan
    parallel = recipe.parallel
    heads = sum(bool(stage.heads) for stage in recipe.stages)
    return (
        f"{place:>3}  {parallel.tensor:>3} {parallel.context:>3} {parallel.pipeline:>3}  "
        f"{parallel.virtual_pipeline or 1:>3}  {data_parallel_size(recipe, world_size):>3}  "
        f"{recipe.train.recompute or 'none':<9}  {heads:>17}  "
        f"{plan.imbalance:>12.2f}  {plan.fullest.memory / 1e9:>10.1f}  {plan.schedule.bubble:>6.1%}  "
        f"{plan.mfu:>5.1%}  {plan.step_seconds:>6.2f}  {why}"
    ).rstrip()


def _row(found: Found, world_size: int, hardware: Hardware) -> dict[str, Any]:
    recipe, plan = found.candidate.recipe, found.plan
    parallel = recipe.parallel
    return {
        "tensor": parallel.tensor,
        "context": parallel.context,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "data": data_parallel_size(recipe, world_size),
        "sequence_parallel": parallel.sequence_parallel,
        "layout": parallel.layout,
        "recompute": recipe.train.recompute,
        "heads": [rank.heads for rank in plan.ranks],
        "layers": [rank.layers for rank in plan.ranks],
        "imbalance": plan.imbalance,
        "memory": [rank.memory for rank in plan.ranks],
        "fits": found.candidate.memory <= hardware.room,
        "bubble": plan.schedule.bubble,
        "mfu": plan.mfu,
        "step_seconds": plan.step_seconds,
        "terms": dataclasses.asdict(plan.terms),
    }


def _too_big(candidate: Candidate) -> dict[str, Any]:
    return {
        "cut": describe(candidate.recipe),
        "layout": candidate.recipe.parallel.layout,
        "memory": candidate.memory,
        "stage": candidate.stage,
        "step_seconds_at_least": candidate.seconds,
    }
