"""The commands of examples/deepspeed/README.md: the deepspeed launcher with a hostfile, torchrun, then an export."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_megatron.cli import main
from tests.deepspeed_runs import TIMEOUT
from tests.documents import blocks
from tests.harness import run_world
from tests.training_runs import make_data, metrics

ROOT = Path(__file__).parents[2]
README = blocks((ROOT / "examples" / "deepspeed" / "README.md").read_text(encoding="utf-8"))
SMALL = (
    "model.num_trunk_layers=1 model.hidden_size=32 model.num_attention_heads=4 model.seq_length=32 heads.n=2 "
    "train.micro_batch_size=1 train.global_batch_size=4 train.eval_batches=1 optimizer.warmup_steps=0 "
    "optimizer.decay_steps=4 train.log_interval=1 run.tensorboard=false"
)


def command(rank: int, world_size: int, arguments: list[str]) -> int:
    """``mtp-megatron ARGUMENTS`` in the checkout, by a process that no launcher started."""
    os.chdir(ROOT)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
    return main(arguments)


def test_the_installation_is_that_of_the_setup() -> None:
    assert "--no-build-isolation" in (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")


@pytest.mark.deepspeed
@pytest.mark.timeout(1200)
def test_the_launchers_train_and_continue_one_run(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(code: str) -> None:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, f"{code}\n{result.stdout[-4000:]}\n{result.stderr[-6000:]}"

    commands = [block.code.strip() for block in README if block.directive == "run"]
    assert [re.search(r"^(deepspeed|torchrun) ", code, re.MULTILINE)[1] for code in commands] == [
        "deepspeed",
        "torchrun",
    ]
    for steps, code in zip((2, 4), commands, strict=True):
        run(f"{code.replace('data/mine', str(data))} {SMALL} train.steps={steps}")
        assert max(metrics(tmp_path / "runs/zero2")) == steps
    assert sorted(metrics(tmp_path / "runs/zero2")) == [1, 2, 3, 4]
    # What they trained is exported, and one process without a launcher trains too. The commands' own processes are
    # started elsewhere (tests/e2e/test_quickstart.py).
    assert main(["convert", str(tmp_path / "runs/zero2"), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "config.json").is_file()
    alone = tmp_path / "runs/alone"
    overrides = [f"data.path={data}", f"run.path={alone}", *SMALL.split(), "train.steps=2"]
    assert run_world(command, 1, ["train", "examples/deepspeed/small.yaml", *overrides], timeout=TIMEOUT) == [0]
    assert max(metrics(alone)) == 2
