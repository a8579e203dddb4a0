"""Requests to stop: when they are seen, and what is still done then.

Not covered here: GPUs, and what a launcher passes on (tests/e2e/test_stop_signals.py, test_train_robustness.py).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.distributed.test_training import says_on_the_way, says_until_stopped
from tests.harness import run_world
from tests.training_runs import metrics, tiny_tree, train_body


def saved(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").glob("iter_*"))


def signalled_in(rank: int, world_size: int, tree: dict[str, Any], method: str) -> tuple[int, list[str]]:
    """Train; the last rank alone gets a signal in that method of the loop's, when it is called first."""
    from mtp_megatron.training.loop import _Session

    whole, called = getattr(_Session, method), []

    def interrupted(self: Any, *args: Any) -> Any:
        called.append(self.step)
        if len(called) == 1 and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *args)

    with mock.patch.object(_Session, method, interrupted):
        return says_on_the_way(rank, world_size, tree)


@pytest.mark.parametrize(("method", "step"), [("_save", 4), ("_evaluate", 3)])
def test_a_request_during_a_save_or_an_evaluation_costs_no_further_step(
    method: str, step: int, data: Path, tmp_path: Path
) -> None:
    """Nor a second save."""
    tree = tiny_tree(data, tmp_path / "run", train__eval_interval=3, train__save_interval=4, parallel__pipeline=2)
    results = run_world(signalled_in, 2, tree, method)
    assert [reached for reached, _ in results] == [step] * 2
    assert saved(tmp_path / "run") == [f"iter_000000{step}"]
    assert results[0][1][-1] == f"asked to stop: saved step {step} of 8. The same command continues from it."
    assert run_world(train_body, 2, tree) == [8, 8]
    assert list(metrics(tmp_path / "run")) == list(range(1, 9))


def test_a_request_in_the_last_step_saves_before_it_evaluates(data: Path, tmp_path: Path) -> None:
    """Who asks gives little time, and what is saved is not lost."""
    ((step, said),) = run_world(says_until_stopped, 1, tiny_tree(data, tmp_path / "run", train__save_interval=0), 8)
    assert step == 8
    (save,) = (number for number, line in enumerate(said) if line.startswith("saved checkpoints/iter_0000008"))
    (evaluation,) = (number for number, line in enumerate(said) if line.startswith("step 8  validation"))
    assert save < evaluation
    assert not any("asked to stop" in line for line in said), "it is finished"


def outcome_of(rank: int, world_size: int, tree: dict[str, Any], stop_in: int) -> Any:
    from mtp_megatron.training import loop
    from mtp_megatron.training.recipe_io import parse_recipe

    train_step = loop.train_step

    def signalled(recipe: Any, trainable: Any, *args: Any) -> Any:
        *others, asked = args
        return train_step(recipe, trainable, *others, asked or trainable.scheduler.num_steps == stop_in - 1)

    with mock.patch.object(loop, "train_step", signalled):
        return loop.train(parse_recipe(tree))


def test_an_outcome_has_the_evaluation_of_its_own_step_alone(data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", train__eval_interval=2)
    (stopped,) = run_world(outcome_of, 1, tree, 3)
    assert (stopped.step, stopped.finished, stopped.evaluation) == (3, False, None)
    (finished,) = run_world(outcome_of, 1, tree, 99)
    assert (finished.step, finished.finished) == (8, True)
    assert finished.evaluation.head_loss == metrics(tmp_path / "run", "valid")[8]["head_loss"]
