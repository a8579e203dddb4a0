"""examples/torchrun/slurm.sbatch without SLURM: its commands are stand-ins that do on this machine what SLURM's do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.training_runs import make_data, metrics, tiny_tree

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "torchrun"
LIMIT = 200.0  # seconds that any wait may take; a busy machine needs many times what an idle one does
STEPS = 40

SRUN = """#!/usr/bin/env bash
# One task on this machine: its process number is what scancel signals.
while [[ "$1" == --* ]]; do shift; done
echo $$ > "$STEP"
exec "$@"
"""
SCANCEL = f"""#!{sys.executable}
# As scancel does: the signal reaches every process of the step, and not the batch shell.
import os, psutil, signal, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
step = psutil.Process(int(open(os.environ["STEP"]).read()))
for process in [step, *step.children(recursive=True)]:
    process.send_signal(signal.SIGTERM)
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1 $2" == "show hostnames" ]]; then echo localhost; else echo "$@" >> "$QUEUE"; fi
"""


def job(folder: Path, recipe: Path, restarts: int) -> subprocess.Popen[str]:
    """The batch script as SLURM starts it for the given time."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "STEP": str(folder / "step"),
        "QUEUE": str(folder / "queue"),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SAVE_SECONDS": "60",
        "NPROC": "1",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "slurm.sbatch"), str(recipe)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=LIMIT)
    return process.returncode, output


def test_the_job_saves_before_its_time_limit_and_is_queued_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny_tree(make_data(tmp_path / "files"), run, train__steps=STEPS, train__save_interval=0, data__workers=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    processes = []
    try:
        processes.append(job(tmp_path, recipe, restarts=0))
        deadline = time.monotonic() + LIMIT
        while not ((run / "metrics.jsonl").is_file() and len(metrics(run)) >= 3):
            assert processes[0].poll() is None, finished(processes[0])
            assert time.monotonic() < deadline, "no step in time"
            time.sleep(0.02)
        processes[0].send_signal(signal.SIGUSR1)  # --signal=B:USR1@900
        status, said = finished(processes[0])
        assert status == 0, said
        assert "asked to stop: saved step" in said
        assert (tmp_path / "queue").read_text() == "requeue 4711\n"
        stopped = max(metrics(run))
        assert stopped < STEPS
        assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(stopped)
        processes.append(job(tmp_path, recipe, restarts=1))
        status, said = finished(processes[1])
    finally:
        for process in processes:
            if process.poll() is None:
                for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                    member.kill()
    assert status == 0, said
    assert "continuing from" in said
    assert max(metrics(run)) == STEPS
    assert (tmp_path / "queue").read_text() == "requeue 4711\n", "a finished job is not queued again"


def test_the_step_gets_the_jobs_cores_and_the_container_the_folders(tmp_path: Path) -> None:
    for name, text in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo localhost"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "64", "IMAGE": "mtp.sqsh", "MOUNTS": "/shared:/shared,/data:/data:ro",
    }  # fmt: skip
    command = ["bash", str(SCRIPTS / "slurm.sbatch"), "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    words = done.stdout.splitlines()
    assert "--cpus-per-task=64" in words, done.stderr
    assert f"--container-mounts={ROOT}:{ROOT},/shared:/shared,/data:/data:ro" in words
    assert "--container-image=mtp.sqsh" in words


@pytest.mark.parametrize(
    ("script", "words", "env", "says"),
    [
        ("node.sh", [], {}, "usage: "),
        ("node.sh", ["recipe.yaml"], {"NNODES": "2"}, "error: NNODES=2 needs HEAD=host:port"),
        ("ssh.sh", ["node0,node1"], {}, "usage: "),
        ("slurm.sbatch", [], {"SLURM_SUBMIT_DIR": str(ROOT)}, "usage: "),
        ("slurm.sbatch", ["recipe.yaml"], {}, "submit this script with sbatch"),
    ],
)
def test_the_scripts_say_what_they_need(script: str, words: list[str], env: dict[str, str], says: str) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *words],
        capture_output=True, text=True, timeout=120, env={"PATH": os.environ["PATH"], **env},
    )  # fmt: skip
    assert done.returncode != 0
    assert says in done.stderr


def test_an_interpreter_without_torch_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -I -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    command = ["bash", str(SCRIPTS / "node.sh"), "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: PYTHON={python} has no torch; name the interpreter of the environment with mtp_megatron\n"
    )
