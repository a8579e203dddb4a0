"""A trunk with experts under dense heads in Megatron-LM's loop, by its own arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness import run_world
from tests.megatron_lm import CASE, flags, needs_megatron_lm, scalars, train_filled, train_upstream
from tests.parity import EXPERT_WIDTH, make_parameters

pytestmark = needs_megatron_lm

STEPS = 20
TRUNK = replace(CASE, experts=2, top_k=1)
EXPERTS = f"""--num-experts 2 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size {EXPERT_WIDTH}
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 --moe-token-dispatcher-type alltoall""".split()
SHARED = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
LOSSES = ("lm loss", "head 2 loss", "head 3 loss", "load_balancing_loss")


def losses(folder: Path, world: int, heads: int, *more: str) -> dict[str, dict[int, float]]:
    parameters = make_parameters(replace(TRUNK, heads={"n": heads}))
    argv = flags("--mtp-heads", heads, *EXPERTS, "--tensorboard-dir", folder, *more)
    run_world(train_filled, world, argv, parameters)
    return scalars(folder)


def test_one_head_over_shared_experts_trains_as_upstreams_gpt(tmp_path: Path) -> None:
    """Upstream's GPT has a dense last layer: head 1."""
    parameters = make_parameters(replace(TRUNK, heads={"n": 1}))
    frequency = "--moe-layer-freq", "[1]*4+[0]*1"
    argv = flags("--num-layers", 5, *frequency, *EXPERTS, "--train-iters", STEPS, "--tensorboard-dir", tmp_path / "up")
    run_world(train_upstream, 1, argv, parameters)
    theirs = scalars(tmp_path / "up")
    ours = losses(tmp_path / "ours", 2, 1, "--train-iters", str(STEPS), *SHARED)
    assert list(theirs["lm loss"]) == list(range(1, STEPS + 1))
    for name in ("lm loss", "load_balancing_loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    other = losses(tmp_path / "control", 1, 1, "--train-iters", "8", "--moe-aux-loss-coeff", "0.5")
    assert abs(other["lm loss"][8] - theirs["lm loss"][8]) > 5e-5, "control: the routers' loss takes part"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """Losses of three heads on one rank."""
    return losses(tmp_path_factory.mktemp("base"), 1, 3, "--train-iters", "4")


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (4, [*SHARED, "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]),
        (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    ],
    ids=["ep2_pp2", "tp2_cuts_experts"],
)
def test_three_heads_train_as_on_one_rank(
    base: dict[str, dict[int, float]], tmp_path: Path, world: int, layout: list[str]
) -> None:
    found = losses(tmp_path, world, 3, "--train-iters", "4", *layout)
    for name in LOSSES:
        assert found[name] == pytest.approx(base[name], abs=1e-5)
