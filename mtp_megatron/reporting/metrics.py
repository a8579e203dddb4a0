"""Reads what training and decoding left in a run's folder: ``metrics.jsonl`` and ``speculative.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_megatron.errors import DataError

METRICS_FILE = "metrics.jsonl"
SPECULATIVE_FILE = "speculative.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class RunMetrics:
    """The records of one run, by step; of a step that was trained twice (after a crash) the later record.

    Attributes:
        train: for every log ``step``, ``loss``, ``head_loss`` [n], ``head_accuracy`` [n], ``tokens_per_second``,
            ``tflops_per_gpu``, and with a z-loss ``head_z_loss`` [n].
        valid: for every evaluation the same without speed, and ``tokens_per_forward``; of a blend also ``folders``,
            by name.
    """

    train: list[Record] = field(default_factory=list)
    valid: list[Record] = field(default_factory=list)

    @property
    def num_heads(self) -> int:
        return len((self.valid or self.train)[-1]["head_loss"])


def read_metrics(run: Path) -> RunMetrics:
    """Read ``run/metrics.jsonl``.

    Raises:
        DataError: the folder holds no metrics, or a line of them cannot be read. An unfinished last line (the job
            was killed while it wrote) is left out.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the folder of a run that `mtp-megatron train` has started.")
    by_kind: dict[str, dict[int, Record]] = {"train": {}, "valid": {}}
    # Bytes of a damaged disk need not be text.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            records, step = by_kind.get(record["kind"]), int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: not a metrics record ({error}). Remove the line, or the file."
            ) from error
        if records is not None:
            records[step] = record
    metrics = RunMetrics(*([records[step] for step in sorted(records)] for records in by_kind.values()))
    if not metrics.train and not metrics.valid:
        raise DataError(f"{path}: holds no step yet. Train for at least one logging interval first.")
    return metrics


def read_speculative(path: Path) -> Record | None:
    """Read the table that ``mtp-megatron generate --json`` wrote; None where there is none."""
    if not path.is_file():
        return None
    try:
        table: Record = json.loads(path.read_text(encoding="utf-8"))
        for key in ("prompts", "heads_used", "tokens_per_forward", "speedup", "identical", "by_heads"):
            table[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a decoding table ({error}). Write it again with `mtp-megatron generate --json {path}`."
        ) from error
    return table
