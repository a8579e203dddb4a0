"""The picture of a pipeline: stages against time, the heads' share coloured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_megatron.errors import ConfigError
from mtp_megatron.install import EXPLANATION, install_command
from mtp_megatron.planning.simulate import Schedule

_FORWARD = ("#80bdeb", "#a9d2f2", "#c9e3f7", "#e1f0fb")  # by chunk, the first one the darkest
_BACKWARD = ("#1f63a8", "#4a83bd", "#75a3cf", "#9dbfde")
_HEADS = "#d9722b"
_INK = "#1f2933"
_SHOWN = 64
"""Passes of a rank at the beginning, and as many at the end, that are drawn where a step has many."""


def save_picture(
    path: Path, schedule: Schedule, title: str, *, head_seconds: Sequence[float] = (), unit: float = 1.0
) -> None:
    """Draw a schedule as PNG, SVG or PDF, as the path's suffix says: its beginning and its end, if it is long.

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
        remedy = f"Install it with `{install_command('report')}` ({EXPLANATION})."
        raise ConfigError("--picture", str(path), "it needs matplotlib, which is not installed", remedy) from error
    figure = Figure(figsize=(10, 1.6 + 0.45 * schedule.ranks), layout="constrained")
    windows = _windows(schedule)
    for axes, (first, last) in zip(
        figure.subplots(1, len(windows), sharey=True, squeeze=False)[0], windows, strict=True
    ):
        for (rank, colour), bars in _bars(schedule, head_seconds, first, last).items():
            scaled = [(start / unit, length / unit) for start, length in bars]
            axes.broken_barh(scaled, (rank - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
        axes.set_yticks(range(schedule.ranks), [f"stage {rank}" for rank in range(schedule.ranks)])
        axes.set_ylim(schedule.ranks - 0.5, -0.5)
        axes.set_xlim(first / unit, last / unit)
        axes.set_xlabel({1.0: "seconds", 1e-3: "milliseconds"}.get(unit, f"units of {unit:g} s"))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    part = f", the first and last {_SHOWN} passes of stage 0" if len(windows) > 1 else ""
    figure.suptitle(f"{title}: bubble {schedule.bubble:.1%}{part}", x=0.01, ha="left", color=_INK, fontsize=11)
    legend = [Patch(color=_FORWARD[0], label="forward"), Patch(color=_BACKWARD[0], label="backward")]
    if any(head_seconds):
        legend.append(Patch(color=_HEADS, label="heads, forward and backward"))
    figure.legend(handles=legend, loc="outside lower right", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _windows(schedule: Schedule) -> list[tuple[float, float]]:
    """Spans of time to draw: all of it, or beginning and end, as long as each other."""
    passes = [work for work in schedule.passes if work.rank == 0]
    if len(passes) <= 2 * _SHOWN:
        return [(0.0, schedule.seconds)]
    length = max(passes[_SHOWN - 1].end, schedule.seconds - passes[-_SHOWN].start)
    return [(0.0, length), (schedule.seconds - length, schedule.seconds)]


def _bars(
    schedule: Schedule, head_seconds: Sequence[float], first: float, last: float
) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Start and length of what is drawn between two times, by rank and colour."""
    spans: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for work in schedule.passes:
        if work.end < first or work.start > last:
            continue
        heads = 0.0
        if work.backward and head_seconds:
            heads = head_seconds[work.chunk * schedule.ranks + work.rank]
        colour = (_BACKWARD if work.backward else _FORWARD)[min(work.chunk, len(_FORWARD) - 1)]
        # Heads run first in the backward pass: the trunk's part waits for their gradient.
        for start, length, shade in (
            (work.start, heads, _HEADS),
            (work.start + heads, work.end - work.start - heads, colour),
        ):
            if length > 0:
                spans.setdefault((work.rank, shade), []).append((start, length))
    return spans
