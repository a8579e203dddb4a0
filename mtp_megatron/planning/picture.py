"""The picture of a pipeline: stages against time, the heads' share coloured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.simulate import Schedule

_FORWARD = ("#80bdeb", "#a9d2f2", "#c9e3f7", "#e1f0fb")  # by chunk, the first one the darkest
_BACKWARD = ("#1f63a8", "#4a83bd", "#75a3cf", "#9dbfde")
_HEADS = "#d9722b"
_INK = "#1f2933"


def save_picture(
    path: Path, schedule: Schedule, title: str, *, head_seconds: Sequence[float] = (), unit: float = 1.0
) -> None:
    """Draw a schedule as PNG, SVG or PDF, as the path's suffix says.

    Args:
        head_seconds: of each global stage's backward pass, the part that runs heads; empty: none do.
        unit: seconds of one unit of the time axis: 1e-3 for milliseconds.

    Raises:
        ConfigError: matplotlib is not installed, or cannot write such a file.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError("--picture", str(path), "not the name of a picture", "End it in .png, .svg or .pdf.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        remedy = "Install it with `pip install 'mtp-megatron[report]'`."
        raise ConfigError("--picture", str(path), "it needs matplotlib, which is not installed", remedy) from error
    figure = Figure(figsize=(10, 1.6 + 0.45 * schedule.ranks), layout="constrained")
    axes = figure.subplots()
    spans: dict[tuple[int, str], list[tuple[float, float]]] = {}  # of one rank and colour: drawn at once
    for work in schedule.passes:
        heads = 0.0
        if work.backward and head_seconds:
            heads = head_seconds[work.chunk * schedule.ranks + work.rank]
        colour = (_BACKWARD if work.backward else _FORWARD)[min(work.chunk, len(_FORWARD) - 1)]
        # Heads run first in the backward pass: the trunk's part waits for their gradient.
        for start, length, shade in (
            (work.start, heads, _HEADS),
            (work.start + heads, work.end - work.start - heads, colour),
        ):
            if length:
                spans.setdefault((work.rank, shade), []).append((start / unit, length / unit))
    for (rank, colour), bars in spans.items():
        axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(schedule.ranks), [f"stage {rank}" for rank in range(schedule.ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, schedule.seconds / unit)
    axes.set_xlabel({1.0: "seconds", 1e-3: "milliseconds"}.get(unit, f"units of {unit:g} s"))
    axes.set_title(f"{title}: bubble {schedule.bubble:.1%}", loc="left", color=_INK, fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    legend = [Patch(color=_FORWARD[0], label="forward"), Patch(color=_BACKWARD[0], label="backward")]
    if any(head_seconds):
        legend.append(Patch(color=_HEADS, label="heads, forward and backward"))
    figure.legend(handles=legend, loc="outside lower right", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
