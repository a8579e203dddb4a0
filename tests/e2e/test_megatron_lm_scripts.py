"""Upstream's own pretrain_gpt.py of a checkout: unmodified it trains as ours with one head; patched it has heads.

No wheel has the script. MTP_MEGATRON_LM_0_16 and MTP_MEGATRON_LM_0_19 name checkouts of core_v0.16.1 and core_v0.19.0;
each is tested where that release's wheel is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.megatron_lm import CASE, checkout, flags, scalars
from tests.parity import make_parameters

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "examples" / "megatron_lm" / "pretrain_mtp.py"
STEPS = 20
TREE, REASON = checkout()

pytestmark = pytest.mark.skipif(TREE is None, reason=REASON)


def run(tree: Path, ranks: int, script: Path, folder: Path, *more: object, weights: str | None = None) -> dict:
    """What a script logged that was started by torchrun with a checkout on the path.

    ``weights`` is for scripts of upstream's, which import Megatron-LM before anything makes a machine without a GPU
    ready for it (tests/megatron_lm_script.py).
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    runner = [] if weights is None else [str(ROOT / "tests" / "megatron_lm_script.py"), weights]
    path = os.pathsep.join(filter(None, [str(ROOT), str(tree), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*launcher, *runner, str(script), *flags("--mock-data", "--tensorboard-dir", folder, *more)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return scalars(folder)


@pytest.mark.parametrize("per_token", [False, True], ids=["per_microbatch", "per_token"])
def test_one_head_trains_as_upstreams_script(tmp_path: Path, per_token: bool) -> None:
    assert TREE is not None
    weights = tmp_path / "weights.pt"
    torch.save(make_parameters(replace(CASE, heads={"n": 1})), weights)
    more = ["--train-iters", STEPS, *(["--calculate-per-token-loss"] if per_token else [])]
    upstream = TREE / "pretrain_gpt.py"
    theirs = run(TREE, 1, upstream, tmp_path / "upstream", "--num-layers", 5, *more, weights=str(weights))
    ours = run(TREE, 1, OURS, tmp_path / "ours", "--mtp-heads", 1, *more, weights=str(weights))
    assert list(theirs["lm loss"]) == list(range(1, STEPS + 1))
    assert ours["lm loss"] == pytest.approx(theirs["lm loss"], abs=1e-5)
    assert theirs["lm loss"][1] - theirs["lm loss"][STEPS] > 0.01, "control: the losses move"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the patches that tools/apply_patches.py applied."""
    assert TREE is not None
    tree = tmp_path_factory.mktemp("patched") / "Megatron-LM"
    quiet = ["-c", "advice.detachedHead=false"]
    subprocess.run(["git", *quiet, "clone", "--quiet", "--shared", str(TREE), str(tree)], check=True)
    command = [sys.executable, str(ROOT / "tools" / "apply_patches.py"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ": applied: 0001-heads-in-pretrain_gpt.patch, 0002-heads-in-throughput.patch" in done.stdout
    return tree


def test_the_patched_script_trains_heads_as_the_example_does(patched: Path, tmp_path: Path) -> None:
    more = ["--mtp-heads", 3, "--train-iters", 4, "--tensor-model-parallel-size", 2, "--log-throughput"]
    more += ["--eval-interval", 2, "--eval-iters", 1]
    theirs = run(patched, 2, patched / "pretrain_gpt.py", tmp_path / "patched", *more, weights="drawn")
    ours = run(patched, 2, OURS, tmp_path / "example", *more)
    for name in ("lm loss", "head 2 loss", "head 3 loss", "grad-norm"):
        assert list(theirs[name]) == [1, 2, 3, 4]
        assert theirs[name] == ours[name]
    for name in ("lm loss validation", "head 3 loss validation"):
        assert theirs[name][2] == ours[name][2]  # the last step's has the test set's value too, under the same name


def test_without_heads_the_patched_script_is_upstreams(patched: Path, tmp_path: Path) -> None:
    assert TREE is not None
    upstream = run(TREE, 1, TREE / "pretrain_gpt.py", tmp_path / "upstream", "--train-iters", 2, weights="drawn")
    found = run(patched, 1, patched / "pretrain_gpt.py", tmp_path / "patched", "--train-iters", 2, weights="drawn")
    assert found["lm loss"] == upstream["lm loss"]
    assert "head 2 loss" not in found
