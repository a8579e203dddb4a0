"""Requests to stop that reach every process of a job, those that read data for its ranks too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.training_runs import metrics, tiny_tree

SCRIPT = Path(__file__).parents[2] / "examples/torchrun/node.sh"
LIMIT = 200.0  # seconds that any wait may take; a busy machine needs many times what an idle one does


def steps_in(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.is_file() else 0


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
    """What torchrun gets it passes on to all processes of each rank. SLURM (``--signal=USR1@900``) sends to all."""
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
