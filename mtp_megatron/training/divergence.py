"""A run that diverged: what is left of it for people (``diverged.json``), and no restart into the same numbers. Imports
neither torch nor megatron."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_megatron.errors import ConfigError, MTPError
from mtp_megatron.training.checkpoint_files import latest_complete, step_of, write_atomically
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_folder import RunFolder, without_nan

logger = logging.getLogger(__name__)


class DivergenceFile:
    """The run's ``diverged.json``, written by rank 0 when a step's loss or gradient norm is no number, and removed when
    that step has been trained, or passed over, after all. On other ranks every method does nothing."""

    def __init__(self, folder: RunFolder, recipe: Recipe, resumed: Path | None, *, enabled: bool) -> None:
        """For an attempt that goes on from the checkpoint ``resumed``; None: from the beginning."""
        self._path, self._recipe, self._resumed, self._enabled = folder.diverged, recipe, resumed, enabled
        former = _read(folder.diverged) if enabled else None
        self._awaited: int | None = former["step"] if former else None
        if former and not _restarts():
            # Started by hand, so to be tried: a restart of this attempt, after a node's death say, is not refused.
            self._write({**former, "recipe": None})

    def write(self, step: int, figures: Mapping[str, Any], message: str) -> None:
        """Record the step that diverged, with what is known of it."""
        if self._enabled:
            self._write(
                {
                    "step": step,
                    "message": message,
                    **figures,
                    "resumed_from": _name(self._resumed),
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "recipe": _fingerprint(self._recipe),
                }
            )

    def passed(self, step: int) -> None:
        """Called when ``step`` is over."""
        if self._awaited is not None and step >= self._awaited:
            self._path.unlink(missing_ok=True)
            self._awaited = None

    def _write(self, record: dict[str, Any]) -> None:
        try:
            write_atomically(self._path, json.dumps(without_nan(record), indent=1) + "\n")
        except OSError as error:  # why the run ends is the news
            logger.warning("%s cannot be written: %s", self._path, error)


def refuse_repetition(folder: RunFolder, recipe: Recipe, resumed: Path | None) -> None:
    """Keep a restart by torchrun (``--max-restarts``) from training the same steps to the same NaN.

    Args:
        recipe: resolved.
        resumed: the checkpoint that this attempt would go on from.

    Raises:
        ConfigError: an attempt from that checkpoint with this recipe has diverged. Never for a job started by hand.
    """
    former = _read(folder.diverged) if _restarts() else None
    if former is None:
        return
    if (former.get("resumed_from"), former.get("recipe")) != (_name(resumed), _fingerprint(recipe)):
        return
    raise ConfigError(
        "run.path",
        str(folder.path),
        f"the attempt before this restart, from {resumed or 'the beginning'} with the same recipe, diverged at step "
        f"{former['step']} (figures in {folder.diverged}), and this one would again",
        way_back(folder, former["step"]) + " A job started by hand is not refused.",
    )


def way_back(folder: RunFolder, step: int) -> str:
    """What can be done about a run that diverged at ``step``."""
    try:
        good = latest_complete(folder.checkpoints, warn=False)
    except MTPError as error:  # all damaged
        return str(error)
    if good is None:
        return (
            "No checkpoint was saved yet: start again with a lower optimizer.lr or a longer optimizer.warmup_steps "
            "(run.accept_changes=true), or without this data (train.skip_steps)."
        )
    return (
        f"The last good checkpoint is {good}, and the same command would train from there to the same numbers. Pass "
        f"over the data in between (train.skip_steps='[[{step_of(good) + 1}, {step}]]'), or go on with a lower "
        f"optimizer.lr (run.accept_changes=true), or go further back first: mtp-megatron rollback {folder.path} STEP. "
        f"Another run from it (run.load={good} and a new run.path) takes the weights alone: Adam and the data begin "
        "anew."
    )


def _restarts() -> int:
    """How often torchrun has started this rank again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def _name(checkpoint: Path | None) -> str | None:
    return None if checkpoint is None else checkpoint.name


def _fingerprint(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """The record; None where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record["step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
