"""Megatron-LM's loop in the types that users train in: ``--bf16`` and ``--fp16``, with fp32 masters and a loss scaler.

The yardstick is what the type itself costs: upstream's own GPT (or one rank) in that type beside the same in fp32.
Not covered here: Transformer Engine's layers, and kernels of Apex, which need GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness import run_world
from tests.megatron_lm import CASE, flags, needs_megatron_lm, scalars, train_filled, train_upstream
from tests.parity import make_parameters

pytestmark = [needs_megatron_lm, pytest.mark.timeout(900)]

STEPS = 6
TIMEOUT = 300.0  # seconds of one world: four processes import Megatron-LM's loop at once
PARAMETERS = {heads: make_parameters(replace(CASE, heads={"n": heads})) for heads in (1, 3)}
HEADS = ("lm loss", "head 2 loss", "head 3 loss")
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
# An overflow in the first steps for sure; each halves the scale, until the steps are taken.
FP16 = ["--fp16", "--initial-loss-scale", 2**20, "--hysteresis", 1]

Logged = dict[str, dict[int, float]]


def of_upstream(folder: Path, *more: object) -> Logged:
    argv = flags("--num-layers", 5, "--train-iters", STEPS, "--tensorboard-dir", folder, *more)
    run_world(train_upstream, 1, argv, PARAMETERS[1], timeout=TIMEOUT)
    return scalars(folder)


def of_ours(folder: Path, heads: int, world: int, *more: object) -> Logged:
    argv = flags("--mtp-heads", heads, "--train-iters", STEPS, "--tensorboard-dir", folder, *more)
    run_world(train_filled, world, argv, PARAMETERS[heads], timeout=TIMEOUT)
    return scalars(folder)


def furthest(one: Logged, other: Logged, names: tuple[str, ...] = HEADS[:1]) -> float:
    """Largest difference of any two losses."""
    return max(abs(one[name][step] - other[name][step]) for name in names for step in range(1, STEPS + 1))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Upstream's GPT in fp32."""
    return of_upstream(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Upstream's GPT in bf16."""
    return of_upstream(tmp_path_factory.mktemp("bf16"), "--bf16")


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, ""), (2, "--use-distributed-optimizer"), (4, f"{TP2_PP2} --use-distributed-optimizer")],
    ids=["one", "dp2-distributed", "tp2-pp2-distributed"],
)
def test_one_head_in_bf16_trains_as_upstreams_gpt(
    exact: Logged, bf16: Logged, tmp_path: Path, world: int, layout: str
) -> None:
    ours = of_ours(tmp_path, 1, world, "--bf16", *layout.split())
    cost = furthest(bf16, exact)
    assert cost > 3e-4, "control: bf16 took part"
    if "tensor" in layout:  # partial sums are rounded apart, as in any tensor parallel bf16
        assert furthest(ours, exact) <= 2 * cost
    else:  # nothing is rounded otherwise; a run in fp32 would be `cost` away
        assert furthest(ours, bf16) <= 0.1 * cost


def test_three_heads_in_bf16_lose_no_more_on_four_ranks_than_on_one(tmp_path: Path) -> None:
    single = of_ours(tmp_path / "fp32", 3, 1)
    one = of_ours(tmp_path / "one", 3, 1, "--bf16")
    four = of_ours(tmp_path / "four", 3, 4, "--bf16", "--use-distributed-optimizer", *TP2_PP2.split())
    cost = furthest(one, single, HEADS)
    assert cost > 3e-4, "control: bf16 took part"
    assert furthest(four, single, HEADS) <= 2 * cost
    other = of_ours(tmp_path / "other", 3, 1, "--bf16", "--mtp-loss-decay", 0.1)
    assert furthest(other, single, HEADS) > 2 * cost, "control: heads that learn less would be noticed"


def test_steps_lost_to_an_overflow_in_fp16_are_upstreams(exact: Logged, tmp_path: Path) -> None:
    """The dynamic loss scaler: gradients overflow in the first steps, these are skipped, and the scale is halved."""
    theirs = of_upstream(tmp_path / "upstream", *FP16)
    ours = of_ours(tmp_path / "ours", 1, 1, *FP16)
    taken = sorted(theirs["grad-norm"])  # not logged for a step that is skipped
    assert taken
    assert taken[0] > 1, "control: the first step overflowed"
    assert sorted(ours["grad-norm"]) == taken
    assert ours["loss-scale"] == theirs["loss-scale"]
    assert ours["loss-scale"][1] == 2**19
    assert ours["lm loss"][1] == pytest.approx(theirs["lm loss"][1], abs=1e-5), "the loss itself is finite"
    # Steps later than in the fp32 run, so that one is no measure of the cost; fp16's mantissa is 8 times bf16's.
    assert furthest(ours, theirs) <= 2e-4
    assert furthest(theirs, exact) > 1e-3, "control: steps that are not skipped would be noticed"


def test_an_overflow_on_one_rank_is_skipped_on_all(tmp_path: Path) -> None:
    one = of_ours(tmp_path / "one", 3, 1, *FP16)
    four = of_ours(tmp_path / "four", 3, 4, *FP16, *TP2_PP2.split())
    assert min(one["grad-norm"]) > 1, "control: the first step overflowed"
    assert four["loss-scale"] == one["loss-scale"]
    assert furthest(four, one, HEADS) <= 5e-4
