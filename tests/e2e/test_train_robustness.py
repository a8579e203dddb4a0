"""Jobs of four processes under torchrun: killed, stopped, hung; and the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.harness import run_world
from tests.training_runs import metrics, tiny_tree, train_body

STEPS = 30
LIMIT = 200.0  # seconds that any wait may take; a busy machine needs many times what an idle one does


def settings(data: Path, run: Path, **overrides: Any) -> dict[str, Any]:
    return tiny_tree(data, run, parallel__tensor=2, parallel__pipeline=2, train__steps=STEPS, **overrides)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_world(train_body, 4, settings(data, run, train__save_interval=0))
    return run


@contextmanager
def job(tree: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """`mtp-megatron train` on a recipe file; whatever of it is left is killed at the end."""
    recipe = Path(tree["run"]["path"]).parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_megatron", "train", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.kill()
        process.wait()


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=LIMIT)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)
    raise AssertionError("nothing happened in time")


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    file = run / "metrics.jsonl"
    wait_for(lambda: file.is_file() and file.read_text().count('"kind": "train"') >= step, process)


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The job's training processes by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "mtp_megatron.train" in child.cmdline() and "torch.distributed.run" not in child.cmdline():
            found[int(child.environ()["RANK"])] = child
    assert sorted(found) == [0, 1, 2, 3]
    return found


def test_kill_9_in_the_middle_of_a_step_then_the_same_command(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    tree = settings(data, tmp_path / "run")
    run = tmp_path / "run"
    with job(tree) as process:
        wait_for_step(run, 6, process)
        members = ranks(process)
        members[2].suspend()  # the others get into a step and wait there for rank 2
        time.sleep(0.5)
        members[2].send_signal(signal.SIGKILL)
        start = time.monotonic()
        status, output = finished(process)
        assert time.monotonic() - start < 60
    assert status == 1, output
    assert "SIGKILL" in output  # torchrun's summary names the rank and the signal
    assert "error: training failed" in output
    assert "The same command continues from" in output
    assert not any(member.is_running() for member in members.values())
    reached = max(metrics(run))
    assert reached < STEPS
    with job(tree) as process:
        status, output = finished(process)
    assert status == 0, output
    assert "continuing from" in output
    assert metrics(run) == metrics(undisturbed)
    assert metrics(run, "valid") == metrics(undisturbed, "valid")


def test_sigterm_saves_and_exits_cleanly(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = settings(data, run, train__save_interval=0)
    with job(tree) as process:
        wait_for_step(run, 3, process)
        process.send_signal(signal.SIGTERM)
        status, output = finished(process)
    assert status == 0, output
    assert "asked to stop: saved step" in output
    stopped_at = max(metrics(run))
    assert stopped_at < STEPS
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(stopped_at)
    with job(tree) as process:
        status, output = finished(process)
    assert status == 0, output
    assert metrics(run) == metrics(undisturbed)


def test_a_second_request_ends_every_rank_at_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(settings(data, run)) as process:
        wait_for_step(run, 3, process)
        members = ranks(process)
        members[1].suspend()  # the first request to stop cannot be met
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        status, _ = finished(process)
        assert status != 0
        _, alive = psutil.wait_procs(members.values(), timeout=30)
        assert not alive


def test_a_rank_that_hangs_ends_the_job(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(settings(data, run, train__timeout_minutes=0.5)) as process:
        wait_for_step(run, 5, process)
        ranks(process)[1].suspend()
        status, output = finished(process)
    assert status == 1, output
    assert "error: training failed" in output


def test_a_second_job_may_not_write_to_the_same_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = settings(data, run)
    with job(tree) as process:
        wait_for_step(run, 1, process)
        process.send_signal(signal.SIGSTOP)  # only the launcher: the ranks go on
        for member in ranks(process).values():
            member.suspend()
        lone = {**tree, "parallel": {}}
        with job(lone) as second:
            status, output = finished(second)
    assert status == 2, output
    assert "another job is writing to it" in output
