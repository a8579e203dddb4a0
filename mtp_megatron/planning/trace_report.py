"""A trace in words and as JSON."""

from __future__ import annotations

from typing import Any

from mtp_megatron.planning.live_memory import Allocation
from mtp_megatron.planning.makers import Maker
from mtp_megatron.planning.trace import Trace

_GIB = 2**30
_NO_OVERLAP = (
    "traced with parallel.tp_comm_overlap=false: the 12 buffers of [tokens, h] that Transformer Engine makes outside "
    "torch's allocator are not in it; the plan without --trace counts them"
)


def describe_maker(maker: Maker) -> str:
    """Such as ``decoder.layers.3.mlp.linear_fc1, backward`` or ``head 2, heads.1.mlp``."""
    place = ", ".join(part for part in (maker.head, maker.module) if part) or maker.phase
    return f"{place}, backward" if maker.backward and maker.module else place


def top_tensors(alive: list[Allocation], count: int) -> list[dict[str, Any]]:
    """The largest tensors, equal ones of one category together, with the first one's maker."""
    groups: dict[tuple[Any, ...], list[Allocation]] = {}
    for item in alive:
        kind = (item.category, item.shape, item.dtype, item.operation, item.maker.backward)
        groups.setdefault(kind, []).append(item)
    largest = sorted(groups.values(), key=lambda group: -sum(item.nbytes for item in group))[:count]
    return [
        {
            "bytes": sum(item.nbytes for item in group),
            "count": len(group),
            "shape": list(group[0].shape),
            "dtype": str(group[0].dtype).removeprefix("torch."),
            "category": group[0].category,
            "made_by": describe_maker(group[0].maker),
        }
        for group in largest
    ]


def as_json(trace: Trace, top: int) -> dict[str, Any]:
    """Everything that :func:`table` shows, in bytes."""
    memory = trace.memory
    return {
        "rank": trace.rank,
        "world_size": trace.world_size,
        "coordinates": trace.coordinates,
        "parameters": trace.parameters,
        "tp_comm_overlap_left_out": trace.overlap_left_out,
        "kernels": "fused" if trace.fused_kernels else "own",
        "num_microbatches": trace.num_microbatches,
        "traced_microbatches": trace.traced_microbatches,
        "peak": memory.peak,
        "peak_made_by": describe_maker(memory.maker),
        "peaks": memory.peaks,
        "between_steps": memory.standing,
        "categories": memory.categories,
        "top": top_tensors(list(memory.alive), top),
        "seconds": round(trace.seconds, 2),
    }


def table(trace: Trace, top: int) -> str:
    """What a person wants to know of a trace."""
    memory = trace.memory
    place = " ".join(f"{kind}{index}" for kind, index in trace.coordinates.items())
    kernels = "a GPU's fused kernels" if trace.fused_kernels else "megatron-core's own kernels"
    phases = ", ".join(f"{name} {_gib(peak)}" for name, peak in memory.peaks.items())
    lines = [
        f"rank {trace.rank} of {trace.world_size} ({place}), {trace.parameters:,} parameters, {kernels}",
        f"peak {_gib(memory.peak)} ({phases}; between steps {_gib(memory.standing)})",
        f"reached in {describe_maker(memory.maker)}",
        *([_NO_OVERLAP] if trace.overlap_left_out else ()),
        "",
        *(
            f"  {name:<22}{_gib(size):>14}{size / memory.peak:>8.1%}"
            for name, size in memory.categories.items()
            if size
        ),
        "",
        f"largest tensors at the peak, of {len(memory.alive)} (count x shape):",
    ]
    for row in top_tensors(list(memory.alive), top):
        shape = f"{row['count']} x {row['shape']} {row['dtype']}"
        lines.append(f"  {_gib(row['bytes']):>12}  {shape:<34} {row['category']:<18} {row['made_by']}")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / _GIB:.3f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:.3f} MiB"
