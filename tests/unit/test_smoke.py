"""`python -m mtp_megatron.compat --smoke`: one real step, and a status that says when it was none."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from mtp_megatron.training import smoke, step


def test_the_command_prints_the_report_and_a_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mtp_megatron.compat", "--smoke"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "RANK": "3", "WORLD_SIZE": "8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "megatron-core" in done.stdout
    assert "one step of 2 heads on" in done.stdout


def stepped_by(**changes: Any) -> Any:
    """``train_step`` as it is, its figures changed."""
    real = step.train_step

    def train_step(*args: Any) -> step.StepFigures:
        return step.StepFigures(**{**vars(real(*args)), **changes})

    return train_step


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"head_loss": [6.2, 0.1]}, "head losses 6.200, 0.100"), ({"grad_norm": 0.0}, "the gradient norm is 0.0")],
)
def test_a_step_that_is_none_fails(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str) -> None:
    monkeypatch.setattr(step, "train_step", stepped_by(**changes))
    with pytest.raises(smoke.SmokeTestFailed, match=says):
        smoke.smoke()


def test_weights_that_do_not_move_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = smoke.smoke_recipe()
    frozen = real.model_copy(update={"heads": real.heads.model_copy(update={"trainable": "heads"})})
    monkeypatch.setattr(smoke, "smoke_recipe", lambda: frozen)
    with pytest.raises(smoke.SmokeTestFailed, match="parameters did not move"):
        smoke.smoke()
