"""An estimate in words and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from mtp_megatron.planning.estimate import Estimate, Hardware
from mtp_megatron.training.recipe import Recipe

_GIB = 2**30
_COLUMNS = (
    ("weights", "weights"),
    ("gradients", "main_gradients"),
    ("masters", "master_weights"),
    ("moments", "moments"),
    ("activations", "activations"),
    ("peak", "memory"),
)


def as_json(recipe: Recipe, world_size: int, hardware: Hardware, plan: Estimate) -> dict[str, Any]:
    """Everything that :func:`table` shows; bytes, seconds and operations."""
    return {
        "world_size": world_size,
        "hardware": dataclasses.asdict(hardware),
        "layout": recipe.parallel.layout,
        "ranks": [{**dataclasses.asdict(rank), "memory": rank.memory} for rank in plan.ranks],
        "fits": all(rank.memory <= hardware.memory * 1e9 for rank in plan.ranks),
        "step_seconds": plan.step_seconds,
        "reduction_seconds": plan.reduction_seconds,
        "bubble": plan.schedule.bubble,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
    }


def table(recipe: Recipe, world_size: int, hardware: Hardware, plan: Estimate) -> str:
    """What a person wants to know of an estimate; GiB for each GPU."""
    parallel = recipe.parallel
    copies = world_size // recipe.model_parallel_size
    virtual = f" x {parallel.virtual_pipeline} chunks" if parallel.virtual_pipeline else ""
    total = parallel.tensor * sum(rank.parameters for rank in plan.ranks)
    lines = [
        f"{world_size} GPUs: TP{parallel.tensor} x PP{parallel.pipeline}{virtual} x DP{copies}, "
        f"{total:,} parameters (replicated ones counted on every GPU)",
    ]
    if parallel.layout:
        lines.append(f"parallel.layout={parallel.layout}")
    lines += ["", "stage  layers  heads  " + "".join(f"{name:>12}" for name, _ in _COLUMNS) + "  TFLOP/microbatch"]
    for rank in plan.ranks:
        work = (sum(rank.forward_flops) + sum(rank.backward_flops)) / 1e12
        sizes = "".join(f"{getattr(rank, field) / _GIB:>12.2f}" for _, field in _COLUMNS)
        lines.append(f"{rank.rank:>5}  {rank.layers:>6}  {rank.heads:>5}  {sizes}  {work:>16.1f}")
    fullest = max(plan.ranks, key=lambda rank: rank.memory)
    room = hardware.memory * 1e9
    verdict = "fits" if fullest.memory <= room else "does NOT fit"
    lines += [
        "(GiB on each GPU)",
        "",
        f"stage {fullest.rank} is the fullest: {verdict} {hardware.memory:g} GB, {_largest(fullest)}",
        f"step {plan.step_seconds:.2f} s, bubble {plan.schedule.bubble:.1%}, MFU {plan.mfu:.1%}, "
        f"{plan.tokens_per_second:,.0f} tokens/s, at {hardware.efficiency:.0%} of {hardware.tflops:g} TFLOP/s",
    ]
    return "\n".join(lines)


def _largest(rank: Any) -> str:
    name, field = max(_COLUMNS[:-1], key=lambda column: getattr(rank, column[1]))
    return f"of which {name} take {getattr(rank, field) / 1e9:.1f} GB"
