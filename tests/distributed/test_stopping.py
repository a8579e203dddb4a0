"""Requests to stop: when they are seen, and what is still done then.

Not covered here: GPUs, and what a launcher passes on (tests/e2e/test_stop_signals.py, test_train_robustness.py).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mtp_megatron.data import shared_index
from tests.distributed.test_training import says_on_the_way, says_until_stopped
from tests.harness import run_world
from tests.training_runs import interrupted_copy, metrics, tiny_tree, train_body


def saved(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").glob("iter_*"))


def signalled_in(rank: int, world_size: int, tree: dict[str, Any], method: str) -> tuple[int, list[str]]:
    """Train; the last rank alone gets a signal in that method, when it is called first."""
    from mtp_megatron.training.loop import _Session
    from mtp_megatron.training.saves import Saves

    owner: type = Saves if method == "save" else _Session
    whole, calls = getattr(owner, method), itertools.count(1)

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1 and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *args, **kwargs)

    with mock.patch.object(owner, method, interrupted):
        return says_on_the_way(rank, world_size, tree)


@pytest.mark.parametrize(("method", "step"), [("save", 4), ("_evaluate", 3)])
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

    def signalled(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
        *others, asked = args
        asked = asked or trainable.scheduler.num_steps == stop_in - 1
        return train_step(recipe, trainable, *others, asked, **kwargs)

    with mock.patch.object(loop, "train_step", signalled):
        return loop.train(parse_recipe(tree))


def test_an_outcome_has_the_evaluation_of_its_own_step_alone(data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", train__eval_interval=2)
    (stopped,) = run_world(outcome_of, 1, tree, 3)
    assert (stopped.step, stopped.finished, stopped.evaluation) == (3, False, None)
    (finished,) = run_world(outcome_of, 1, tree, 99)
    assert (finished.step, finished.finished) == (8, True)
    assert finished.evaluation.head_loss == metrics(tmp_path / "run", "valid")[8]["head_loss"]


def test_an_evaluation_that_a_request_left_out_is_made_up_for(data: Path, tmp_path: Path) -> None:
    """Where the run goes on, before its next step, and of the weights that it had then; once."""
    settings = {"train__eval_interval": 2, "optimizer__distributed": True, "train__precision": "bf16"}
    settings |= {"optimizer__overlap_grad_reduce": True, "optimizer__overlap_param_gather": True}
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_world(train_body, 2, tiny_tree(data, whole, **settings))
    tree = tiny_tree(data, run, **settings)
    stopped, _ = run_world(outcome_of, 2, tree, 6)
    assert (stopped.step, stopped.evaluation) == (6, None)
    assert list(metrics(run, "valid")) == [2, 4]
    assert run_world(train_body, 2, tree) == [8, 8]
    assert metrics(run, "valid") == metrics(whole, "valid")
    assert metrics(run) == metrics(whole)
    lines = (run / "metrics.jsonl").read_text()
    (again, _) = run_world(outcome_of, 2, tree, 99)
    assert again.evaluation is None
    assert (run / "metrics.jsonl").read_text() == lines


def stopped_early(rank: int, world_size: int, tree: dict[str, Any], where: str) -> tuple[Any, float, bool]:
    """Train; the last rank alone gets a signal, while the index is written or when the model is about to be built. The
    outcome, how long it took after the signal, and whether a process that writes an index is left."""
    from mtp_megatron.data.sample_index import SampleIndex
    from mtp_megatron.training import loop
    from mtp_megatron.training.recipe_io import parse_recipe

    mine, signalled = rank == world_size - 1, []
    started: list[subprocess.Popen[bytes]] = []
    sums, popen, host_of = shared_index._sums, subprocess.Popen, loop.host_of

    def ask() -> None:
        if mine and not signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        signalled.append(time.monotonic())

    def asked_in_the_third(*flags: bool) -> list[int]:
        waits.append(flags)
        if len(waits) == 3:
            ask()
        return sums(*flags)

    def noted(*args: Any, **kwargs: Any) -> Any:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def asked_before_it(recipe: Any) -> Any:
        ask()
        return host_of(recipe)

    waits: list[Any] = []
    patches = {
        "index": [
            mock.patch.object(SampleIndex, "small", False),
            mock.patch.object(SampleIndex, "command", return_value=["sleep", "600"]),
            mock.patch.object(shared_index, "_sums", asked_in_the_third),
            mock.patch.object(shared_index.subprocess, "Popen", noted),
        ],
        # As where the request is the end of a terminal, which is then no more to be written to.
        "model": [
            mock.patch.object(loop, "host_of", asked_before_it),
            mock.patch.object(sys, "stderr", mock.Mock(write=mock.Mock(side_effect=OSError(errno.EIO, "gone")))),
        ],
    }
    with contextlib.ExitStack() as stack:
        for patch in patches[where]:
            stack.enter_context(patch)
        outcome = loop.train(parse_recipe(tree))
    return outcome, time.monotonic() - signalled[0], any(process.poll() is None for process in started)


@pytest.mark.parametrize("where", ["index", "model"])
def test_a_request_before_the_first_step_ends_the_job_and_leaves_nothing(
    where: str, data: Path, tmp_path: Path
) -> None:
    """An index of 1e9 documents takes up to hours, a model of 1e11 parameters minutes to load."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    tree = tiny_tree(data, run, parallel__pipeline=2)
    tree["data"]["cache"] = str(cache)
    for outcome, seconds, left in run_world(stopped_early, 2, tree, where, timeout=100):
        assert (outcome.step, outcome.finished, outcome.evaluation) == (0, False, None)
        assert seconds < 60
        assert not left
    assert [entry.name for entry in run.iterdir()] == [".lock"]
    if where == "index":
        assert not list(cache.iterdir())
    assert run_world(train_body, 2, tree) == [8, 8]


def test_a_request_before_a_resumed_run_trains_leaves_it_as_it_was(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny_tree(data, run)
    run_world(train_body, 1, tree)
    interrupted_copy(run, tmp_path / "again", 4)
    tree["run"]["path"] = str(tmp_path / "again")
    ((outcome, _, _),) = run_world(stopped_early, 1, tree, "model")
    assert (outcome.step, outcome.finished) == (4, False)
    assert saved(tmp_path / "again") == ["iter_0000004"]
    assert max(metrics(tmp_path / "again")) == 8, "it has not begun"
    ((outcome, _, _),) = run_world(stopped_early, 1, {**tree, "run": {**tree["run"], "path": str(run)}}, "model")
    assert (outcome.step, outcome.finished) == (8, True)
