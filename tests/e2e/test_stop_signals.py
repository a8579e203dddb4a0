"""Requests to stop a job of examples/torchrun/node.sh whose ranks have processes that read data: all of them get it."""

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
    ("number", "to_all"),
    [(signal.SIGTERM, False)],
    ids=["SIGTERM to torchrun"],
)
def test_a_run_with_readers_saves_before_it_ends(
    number: signal.Signals, to_all: bool, data: Path, tmp_path: Path
) -> None:
    """What torchrun gets it passes on to all processes of each rank. SLURM (``--signal=USR1@900``) sends to all."""
    run, log, recipe = tmp_path / "run", tmp_path / "log", tmp_path / "recipe.yaml"
    endless = {"train__steps": 100_000, "train__save_interval": 0, "train__eval_batches": 0}
    recipe.write_text(yaml.safe_dump(tiny_tree(data, run, parallel__pipeline=2, data__workers=2, **endless)))
    env = {**os.environ, "PYTHON": sys.executable, "NPROC": "2", "SAVE_SECONDS": "120", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as out:
        torchrun = psutil.Popen(["bash", str(SCRIPT), str(recipe)], stdout=out, stderr=subprocess.STDOUT, env=env)
    family = [torchrun]
    try:
        deadline = time.monotonic() + LIMIT
        while steps_in(run) < 3:
            assert torchrun.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        family += torchrun.children(recursive=True)
        assert len(family) >= 1 + 2 + 2 * 2, "torchrun, two ranks, two readers of each"
        signal_all(family if to_all else [torchrun], number)
        assert torchrun.wait(LIMIT) == 1, log.read_text()  # its own status after any signal
        _, left = psutil.wait_procs(family, timeout=60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += torchrun.children(recursive=True)
        signal_all(family, signal.SIGKILL)
    said = log.read_text()
    assert "asked to stop: saved step" in said, said
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(max(metrics(run)))
    assert not left
