"""Requests to stop that reach every process of a job, those that read data for its ranks too."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
import yaml

from mtp_megatron.reporting.stacks import read_report
from tests.training_runs import metrics, tiny_tree

SCRIPT = Path(__file__).parents[2] / "examples/torchrun/node.sh"
LIMIT = 200.0  # seconds that any wait may take; a busy machine needs many times what an idle one does


def steps_in(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.is_file() else 0


def stacks_in(run: Path) -> list[int]:
    """The ranks that have written where they are."""
    report = read_report(run)
    return sorted(rank for group in report.groups for rank in group.ranks) if report else []


def signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@pytest.mark.parametrize(
    ("command", "number", "to_all", "status"),  # torchrun has a status of its own after any signal
    [
        (["bash", str(SCRIPT)], signal.SIGTERM, False, 1),
        (["bash", str(SCRIPT)], signal.SIGUSR1, True, 1),
        ([sys.executable, "-m", "mtp_megatron", "train"], signal.SIGUSR1, True, 0),
    ],
    ids=["node.sh, SIGTERM to torchrun", "node.sh, SIGUSR1 to all", "mtp-megatron train, SIGUSR1 to all"],
)
def test_a_run_with_readers_saves_before_it_ends(
    command: list[str], number: signal.Signals, to_all: bool, status: int, data: Path, tmp_path: Path
) -> None:
    """What torchrun gets it passes on to all processes of each rank. SLURM (``--signal=USR1@900``) sends to all.

    So it does SIGUSR2 (``scancel --signal=USR2``), of which ranks write their stacks and nothing ends."""
    run, log, recipe = tmp_path / "run", tmp_path / "log", tmp_path / "recipe.yaml"
    endless = {"train__steps": 100_000, "train__save_interval": 0, "train__eval_batches": 0}
    recipe.write_text(yaml.safe_dump(tiny_tree(data, run, parallel__pipeline=2, data__workers=2, **endless)))
    env = {**os.environ, "PYTHON": sys.executable, "NPROC": "2", "SAVE_SECONDS": "120", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as out:
        job = psutil.Popen([*command, str(recipe)], stdout=out, stderr=subprocess.STDOUT, env=env)
    family = [job]
    try:
        deadline = time.monotonic() + LIMIT
        while steps_in(run) < 3:
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        family += job.children(recursive=True)
        assert len(family) >= 1 + 2 + 2 * 2, "what starts them, two ranks, two readers of each"
        if to_all:
            trained = steps_in(run)
            signal_all(family, signal.SIGUSR2)
            while stacks_in(run) != [0, 1] or steps_in(run) < trained + 3:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            assert all(process.status() != psutil.STATUS_ZOMBIE for process in family)
        signal_all(family if to_all else [job], number)
        assert job.wait(LIMIT) == status, log.read_text()
        _, left = psutil.wait_procs(family, timeout=60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += job.children(recursive=True)
        signal_all(family, signal.SIGKILL)
    said = log.read_text()
    assert "asked to stop: saved step" in said, said
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(max(metrics(run)))
    assert not left


@pytest.mark.parametrize("lines", [0, 24], ids=["plain lines", "a progress bar"])
@pytest.mark.usefixtures("without_nohup")
def test_a_run_whose_terminal_is_closed_saves_before_it_ends(lines: int, data: Path, tmp_path: Path) -> None:
    """It gets SIGHUP, and whatever it then says to the terminal is an error."""
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    endless = {"train__steps": 100_000, "train__save_interval": 0, "train__eval_batches": 0}
    recipe.write_text(yaml.safe_dump(tiny_tree(data, run, **endless)))
    watched, terminal = os.openpty()
    termios.tcsetwinsize(watched, (lines, 80))
    job = subprocess.Popen(
        [sys.executable, "-m", "mtp_megatron", "train", str(recipe)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # this terminal is the new session's
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    try:
        os.set_blocking(watched, False)
        deadline = time.monotonic() + LIMIT
        while steps_in(run) < 3:
            with contextlib.suppress(BlockingIOError):
                os.read(watched, 65536)
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.close(watched)
        assert job.wait(LIMIT) == 0
    finally:
        job.kill()
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(max(metrics(run)))


def test_a_request_before_there_are_ranks_is_not_lost(data: Path, tmp_path: Path) -> None:
    """The launcher has nobody yet to pass it on to."""
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_tree(data, run, parallel__pipeline=2, train__steps=100_000)))
    job = psutil.Popen(
        [sys.executable, "-m", "mtp_megatron", "train", str(recipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + LIMIT
        while not family:
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
            family = [child for child in job.children() if "torch.distributed.run" in child.cmdline()]
        assert not job.children(recursive=True)[1:], "torchrun imports torch first"
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=60)
    finally:
        family += job.children(recursive=True) if job.is_running() else []
        signal_all([*family, job], signal.SIGKILL)
    assert job.returncode == 1
    assert b"No checkpoint was saved yet" in said
    assert not any(process.is_running() for process in family)
    assert not run.exists()


SLOW_INDEX = """
from mtp_megatron.data.sample_index import SampleIndex
from mtp_megatron.train import end, main

SampleIndex.small = False
SampleIndex.command = lambda index, room: ["sleep", "600"]
end(main)
"""


def test_a_job_that_still_writes_its_index_ends_cleanly_at_once(data: Path, tmp_path: Path) -> None:
    """SIGTERM reaches every process of the ranks. What writes the index is a stand-in that takes long."""
    run, log, recipe, script = (tmp_path / name for name in ("run", "log", "recipe.yaml", "slow_index.py"))
    tree = tiny_tree(data, run, parallel__pipeline=2)
    tree["data"]["cache"] = str(tmp_path / "cache")
    recipe.write_text(yaml.safe_dump(tree))
    script.write_text(SLOW_INDEX)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as out:
        job = psutil.Popen(
            [*torchrun, str(script), str(recipe)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + LIMIT
        while not any("sleep" in process.cmdline() for process in family):
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
            family = job.children(recursive=True)
        asked = time.monotonic()
        signal_all(family, signal.SIGTERM)
        assert job.wait(LIMIT) == 0, log.read_text()
        assert time.monotonic() - asked < 60
        _, left = psutil.wait_procs(family, timeout=60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += job.children(recursive=True)
        signal_all([*family, job], signal.SIGKILL)
    assert log.read_text().count("asked to stop before the first step") == 1, log.read_text()
    assert not left
    assert [entry.name for entry in run.iterdir()] == [".lock"]
    assert not list((tmp_path / "cache").iterdir())
