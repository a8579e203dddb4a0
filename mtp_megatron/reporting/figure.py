"""The figure of a run: loss and accuracy of every head while training, and what the heads gain when decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_megatron.errors import ConfigError
from mtp_megatron.install import EXPLANATION, install_command
from mtp_megatron.reporting.metrics import Record, RunMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1f2933"
_QUIET = "#7b8794"
_GRID = "#e4e7eb"
# One hue from dark (head 1) to light (head n): the order survives every kind of colour blindness and a grey print.
_RAMP = ("#0b2f5b", "#1f63a8", "#4595d6", "#80bdeb")
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def save_figure(path: Path, metrics: RunMetrics, speculative: Record | None, title: str) -> None:
    """Draw the figure and write it as PNG to ``path``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        remedy = f"Install it with `{install_command('report')}` ({EXPLANATION})"
        raise ConfigError("output", str(path), "the figure needs matplotlib, which is not installed", remedy) from error
    with matplotlib.rc_context(_STYLE):
        panels = 2 if speculative is None else 3
        figure = Figure(figsize=(4.6 * panels, 4.1), layout=ConstrainedLayoutEngine(wspace=0.05))
        axes = figure.subplots(1, panels, width_ratios=[1.15, 1.15, 1.0][:panels])
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
        colours = head_colours(metrics.num_heads)
        _draw_curves(axes[0], metrics, "head_loss", 1.0, colours)
        axes[0].set_title("Loss of each head")
        axes[0].set_ylabel("cross entropy [nats per token]")
        _draw_curves(axes[1], metrics, "head_accuracy", 100.0, colours)
        axes[1].set_title("Accuracy of each head")
        axes[1].set_ylabel("top-1 accuracy [%]")
        axes[1].set_ylim(bottom=0)
        if speculative is not None:
            _draw_decoding(axes[2], speculative)
        _write(figure, path)


def head_colours(n: int) -> list[tuple[float, float, float]]:
    """``n`` colours of one hue, head 1 the darkest."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    ramp = LinearSegmentedColormap.from_list("heads", _RAMP)
    return [to_rgb(ramp(position)) for position in np.linspace(0.0, 1.0, n)]


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Centred mean over up to ``span`` points each side, fewer (still centred) near the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(span, np.minimum(index, len(values) - 1 - index))
    return np.asarray((total[index + reach + 1] - total[index - reach]) / (2 * reach + 1))


def _draw_curves(
    ax: Axes, metrics: RunMetrics, key: str, scale: float, colours: list[tuple[float, float, float]]
) -> None:
    """Training as smoothed lines, validation as ringed points; the head's number stands at its line's end."""
    from matplotlib.ticker import MaxNLocator

    ends: list[float] = []
    for head, colour in enumerate(colours):
        train_steps, train = _series(metrics.train, key, head, scale)
        valid_steps, valid = _series(metrics.valid, key, head, scale)
        if len(train):
            ax.plot(train_steps, smooth(train, max(1, len(train) // 20)), color=colour, linewidth=1.8, zorder=2)
        if len(valid):
            ax.plot(
                valid_steps,
                valid,
                "o",
                color=colour,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=1.0,
                zorder=3,
            )
        ends.append(float(valid[-1] if len(valid) else train[-1]) if len(valid) or len(train) else float("nan"))
    _set_limits(ax, metrics, key, scale)
    _label_ends(ax, ends, colours)
    ax.set_xlabel("training step")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    corner = {"head_loss": (0.97, 0.97, "top"), "head_accuracy": (0.03, 0.97, "top")}[key]
    ax.text(
        *corner[:2],
        "line: training\npoint: validation",
        transform=ax.transAxes,
        fontsize=8.5,
        color=_QUIET,
        ha="right" if corner[0] > 0.5 else "left",
        va="top",
    )


def _set_limits(ax: Axes, metrics: RunMetrics, key: str, scale: float) -> None:
    """Limits from the data, with room above the curves for the explanation in the corner."""
    values = [
        value * scale for record in [*metrics.train, *metrics.valid] for value in record[key] if np.isfinite(value)
    ]
    if not values:
        return
    low, high = min(values), max(values)
    margin = 0.06 * (high - low or 1.0)
    ax.set_ylim(low - margin, high + (2.5 * margin if key == "head_accuracy" else margin))


def _label_ends(ax: Axes, ends: list[float], colours: list[tuple[float, float, float]]) -> None:
    """Write `head i` beside each line's end, pushed apart where lines end close together."""
    finite = [(value, head) for head, value in enumerate(ends) if np.isfinite(value)]
    low, high = ax.get_ylim()
    gap = 0.062 * (high - low)
    placed = low - gap
    for value, head in sorted(finite):
        placed = max(value, placed + gap)
        ax.annotate(
            f"head {head + 1}",
            (1.0, placed),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colours[head],
            fontsize=9,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _draw_decoding(ax: Axes, speculative: Record) -> None:
    """Tokens per forward by the number of heads used, the measured speedup written under each value."""
    rows = sorted(speculative["by_heads"], key=lambda row: row["heads"])
    heads = [row["heads"] for row in rows]
    gains = [row["tokens_per_forward"] for row in rows]
    ax.bar(range(len(rows)), gains, width=0.66, color=_RAMP[1])
    for position, row in enumerate(rows):
        ax.annotate(
            f"{row['tokens_per_forward']:.2f}",
            (position, row["tokens_per_forward"]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=_INK,
            fontweight="bold",
        )
        ax.annotate(
            f"{row['speedup']:.2f}x" + ("\nspeed" if len(rows) <= 5 else " speed"),
            (position, 0),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color="white",
            fontsize=8.5,
            rotation=0 if len(rows) <= 5 else 90,
        )
    ax.set_xticks(range(len(rows)), [str(count) for count in heads])
    ax.set_xlabel("heads used")
    ax.set_ylabel("tokens per forward pass")
    ax.set_ylim(0, 1.15 * max(gains))
    ax.set_title("Speculative decoding")
    ax.tick_params(axis="x", length=0)


def _series(records: list[Record], key: str, head: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[key][head] * scale) for record in records if np.isfinite(record[key][head])]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _write(figure: Figure, path: Path) -> None:
    # A reader never sees half a picture: written beside, then renamed.
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)
