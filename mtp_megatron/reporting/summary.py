"""The report of a run as data and as text."""

from __future__ import annotations

import platform
import statistics
from pathlib import Path
from typing import Any

from mtp_megatron import __version__
from mtp_megatron.compat.versions import installed_version
from mtp_megatron.reporting.metrics import Record, RunMetrics

_PACKAGES = ("torch", "megatron-core", "numpy")


def summarise(run: Path, metrics: RunMetrics, speculative: Record | None) -> dict[str, Any]:
    """The content of ``report.json``.

    Returns:
        ``heads``: each head's last validation loss (nats per token) and accuracy (0 to 1), None before any evaluation;
        ``folders``: of a blend, each folder's last validation loss, and by head loss, accuracy and targets;
        ``tokens_per_forward``: what validation expects of greedy self-speculative decoding; ``speculative``: what
        decoding measured; ``training``: the last logged step, the tokens up to it (those that were passed over
        included), medians of tokens per second and of the model's TFLOP/s per GPU; ``versions``: what it ran with.
    """
    valid = metrics.valid[-1] if metrics.valid else None
    train = metrics.train[-1] if metrics.train else None
    return {
        "run": str(run),
        "heads": [
            {
                "head": head + 1,
                "validation_loss": valid["head_loss"][head] if valid else None,
                "validation_accuracy": valid["head_accuracy"][head] if valid else None,
                "training_loss": train["head_loss"][head] if train else None,
                "training_accuracy": train["head_accuracy"][head] if train else None,
            }
            for head in range(metrics.num_heads)
        ],
        "validation_step": valid["step"] if valid else None,
        "folders": {
            name: {
                "validation_loss": found["loss"],
                "heads": [
                    {"head": head + 1, "validation_loss": loss, "validation_accuracy": accuracy, "targets": targets}
                    for head, (loss, accuracy, targets) in enumerate(
                        zip(found["head_loss"], found["head_accuracy"], found["head_tokens"], strict=True)
                    )
                ],
            }
            for name, found in ((valid or {}).get("folders") or {}).items()
        },
        "tokens_per_forward": valid.get("tokens_per_forward") if valid else None,
        "speculative": speculative,
        "training": {
            "steps": train["step"] if train else 0,
            "tokens": train.get("tokens") if train else 0,
            "tokens_per_second": _median([record.get("tokens_per_second") for record in metrics.train]),
            "tflops_per_gpu": _median([record.get("tflops_per_gpu") for record in metrics.train]),
        },
        "versions": {
            "mtp_megatron": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal: a row for each head, of each folder of a blend too, then what decoding gains."""
    lines = [
        f"{'head':>4}  {'validation loss':>15}  {'validation accuracy':>19}",
        f"{'-' * 4}  {'-' * 15}  {'-' * 19}",
    ]
    lines += [_row(row) for row in report["heads"]]
    for name, found in report["folders"].items():
        lines += ["", f"{name}:", *map(_row, found["heads"])]
    speculative = report["speculative"]
    if speculative is not None:
        verdict = "output identical to plain greedy" if speculative["identical"] else "OUTPUT DIFFERS FROM PLAIN GREEDY"
        lines += [
            "",
            f"self-speculative decoding of {speculative['prompts']} held-out prompts with {speculative['heads_used']} "
            f"heads: {speculative['tokens_per_forward']:.2f} tokens per forward, speedup {speculative['speedup']:.2f}x "
            f"({verdict})",
        ]
    return "\n".join(lines)


def _row(head: dict[str, Any]) -> str:
    loss, accuracy = head["validation_loss"], head["validation_accuracy"]
    shown_loss = "-" if loss is None else f"{loss:.4f}"
    shown_accuracy = "-" if accuracy is None else f"{100 * accuracy:.2f} %"
    return f"{head['head']:>4}  {shown_loss:>15}  {shown_accuracy:>19}"


def _version(package: str) -> str | None:
    version = installed_version(package)
    return None if version is None else str(version)  # None: of a checkout on PYTHONPATH, as Megatron-LM's


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
