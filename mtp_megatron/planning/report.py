"""An estimate in words and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from mtp_megatron.planning.advice import Advice
from mtp_megatron.planning.checkpoint_memory import checkpoint_host_memory, host_copies
from mtp_megatron.planning.estimate import Estimate, Hardware
from mtp_megatron.planning.lines import recipe_tree, settings
from mtp_megatron.planning.tensors import CATEGORIES, largest_category
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


def as_json(
    recipe: Recipe, world_size: int, hardware: Hardware, plan: Estimate, advice: Advice | None
) -> dict[str, Any]:
    """Everything that :func:`table` shows; bytes, seconds and operations."""
    return {
        "world_size": world_size,
        "hardware": dataclasses.asdict(hardware),
        "layout": recipe.parallel.layout,
        "ranks": [
            {
                **dataclasses.asdict(rank),
                "memory": rank.memory,
                "checkpoint_host_memory": checkpoint_host_memory(recipe, rank, world_size),
            }
            for rank in plan.ranks
        ],
        "fits": advice is None,
        "advice": None if advice is None else {**dataclasses.asdict(advice), "settings": settings(advice.changes)},
        "remarks": _remarks(recipe, hardware),
        "step_seconds": plan.step_seconds,
        "terms": dataclasses.asdict(plan.terms),
        "imbalance": plan.imbalance,
        "bubble": plan.schedule.bubble,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "recipe": recipe_tree(recipe),
    }


def table(recipe: Recipe, world_size: int, hardware: Hardware, plan: Estimate, advice: Advice | None) -> str:
    """What a person wants to know of an estimate; GiB for each GPU."""
    parallel = recipe.parallel
    copies = world_size // recipe.model_parallel_size
    virtual = f" x {parallel.virtual_pipeline} chunks" if parallel.virtual_pipeline else ""
    context = f" x CP{parallel.context}" if parallel.context > 1 else ""
    total = parallel.tensor * sum(rank.parameters for rank in plan.ranks)
    lines = [
        f"{world_size} GPUs: TP{parallel.tensor}{context} x PP{parallel.pipeline}{virtual} x DP{copies}, "
        f"{total:,} parameters (replicated ones counted on every GPU)",
    ]
    if parallel.layout:
        lines.append(f"parallel.layout={parallel.layout}")
    lines += ["", "stage  layers  heads  " + "".join(f"{name:>12}" for name, _ in _COLUMNS) + "  TFLOP/microbatch"]
    for rank in plan.ranks:
        work = (sum(rank.forward_flops) + sum(rank.backward_flops)) / 1e12
        sizes = "".join(f"{getattr(rank, field) / _GIB:>12.2f}" for _, field in _COLUMNS)
        lines.append(f"{rank.rank:>5}  {rank.layers:>6}  {rank.heads:>5}  {sizes}  {work:>16.1f}")
    fullest, terms = plan.fullest, plan.terms
    category = largest_category(fullest)
    verdict = "fits" if advice is None else "does NOT fit"
    lines += [
        "(GiB on each GPU)",
        "",
        f"stage {fullest.rank} is the fullest: {fullest.memory / 1e9:.1f} GB, {verdict} {hardware.room_in_words()}; "
        f"{CATEGORIES[category]} take {getattr(fullest, category) / 1e9:.1f} GB",
        *(_words(advice) if advice else ()),
        f"step {plan.step_seconds:.2f} s, bubble {plan.schedule.bubble:.1%}, MFU {plan.mfu:.1%}, "
        f"{plan.tokens_per_second:,.0f} tokens/s, at {hardware.efficiency:.0%} of {hardware.tflops:g} TFLOP/s",
        *_remarks(recipe, hardware),
        _host(recipe, world_size, hardware, plan),
        f"of the step: arithmetic {terms.arithmetic:.2f} s, tensor parallel exchange {terms.exchange:.2f} s, slowest "
        f"stage {terms.slowest_stage:.2f} s ({plan.imbalance:.2f} of the mean), waiting {terms.bubble:.2f} s, "
        f"gradients and parameters {terms.reduction:.2f} s",
    ]
    return "\n".join(lines)


def _host(recipe: Recipe, world_size: int, hardware: Hardware, plan: Estimate) -> str:
    most = max(checkpoint_host_memory(recipe, rank, world_size) for rank in plan.ranks)
    here = min(hardware.gpus_per_node, world_size)
    copies = max(host_copies(recipe, rank, world_size) for rank in plan.ranks)
    held = (
        f"; train.async_save holds up to {here * copies / 1e9:.1f} GB of it besides until a checkpoint is written"
        if recipe.train.async_save
        else ""
    )
    return (
        f"saving or resuming takes no memory of a GPU and up to {here * most / 1e9:.1f} GB of a node's own, for "
        f"{here} {'GPUs' if here > 1 else 'GPU'}, beyond what the processes hold{held}"
    )


def _remarks(recipe: Recipe, hardware: Hardware) -> list[str]:
    """What the figures above take for granted and a reader may not."""
    remarks = [
        f"sequences of {recipe.train_seq_length} tokens (train.seq_length=... trains on shorter ones)",
        *largest_step(recipe),
    ]
    if recipe.train.precision == "fp32":
        return [
            *remarks,
            f"warning: --tflops {hardware.tflops:g} should be the GPU's in fp32, as train.precision is; the default is "
            "an H100's in bf16",
        ]
    return remarks


def largest_step(recipe: Recipe) -> list[str]:
    """Which of the steps of train.batch_size_schedule a plan is of; empty without one."""
    if recipe.train.batch_size_schedule is None:
        return []
    return [f"steps of {recipe.train.batch_sizes.largest} sequences, the largest of train.batch_size_schedule"]


def _words(advice: Advice) -> list[str]:
    lines = [f"  {advice.excess / 1e9:.1f} GB too much; most of its {CATEGORIES[advice.category]}: {advice.tensors}"]
    if not advice.changes:
        return [*lines, "  nothing that was tried takes less"]
    found = "nearest change that fits" if advice.fits else "nothing that was tried fits; the best that was found"
    return [*lines, f"  {found} ({advice.memory / 1e9:.1f} GB):", f"    {' '.join(settings(advice.changes))}"]
