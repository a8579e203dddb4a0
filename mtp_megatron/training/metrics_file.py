"""``metrics.jsonl``: one record a line, each step once, however often the run was interrupted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mtp_megatron.training.checkpoint_files import write_atomically
from mtp_megatron.training.run_folder import without_nan

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends records. Where the disk is full, or away, they wait for it in memory and the run goes on: only a save
    that fails ends it."""

    def __init__(self, path: Path, step: int) -> None:
        """For a run that continues after ``step``: later records are dropped.

        Raises:
            OSError: it cannot be written.
        """
        drop_later_lines(path, step)
        self._path, self._waiting = path, b""

    def add(self, **record: Any) -> None:
        late = bool(self._waiting)
        self._waiting += json.dumps(without_nan(record)).encode() + b"\n"
        self._write(late)

    def close(self) -> None:
        """Try once more to write what waits."""
        if self._waiting:
            self._write(late=True)
        if self._waiting:
            logger.warning("%s lacks its last %d lines", self._path, self._waiting.count(b"\n"))

    def _write(self, late: bool) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                while self._waiting:  # a disk that gets full may take a part of a line
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not late:
                logger.warning("%s cannot be written (%s): lines wait in memory, training goes on", self._path, error)
            return
        if late:
            logger.warning("%s is complete again", self._path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order; what is no record is left out, with a warning unless it is the last
    line, which a crash may have cut short."""
    records = []
    # Bytes of a damaged disk need not be text.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number != len(lines):
                logger.warning("%s, line %d is no record and is left out (%s)", path, number, error)
            continue
        records.append(record)
    return records


def has_record(path: Path, kind: str, step: int) -> bool:
    """Whether a metrics.jsonl has one of that kind and step."""
    return any(record["step"] == step and record.get("kind") == kind for record in read_metrics(path))


def drop_later_lines(path: Path, step: int) -> None:
    """Keep only records up to ``step``, so that a resumed run has each step once."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
