"""Megatron-LM's own loop with ``--fp8-format hybrid``: the trunk in FP8, the heads not, on one rank and on several.

Needs a megatron-core whose wheel has that loop; tools/te_lane.sh runs these tests with one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fp8_runs import Seen
from tests.harness import run_world
from tests.megatron_lm import CASE, flags, needs_megatron_lm, scalars
from tests.parity import make_parameters
from tests.transformer_engine.loops import train_megatron_lm

pytestmark = [needs_megatron_lm, pytest.mark.timeout(900)]

STEPS, MICROBATCHES, TRUNK, HEADS = 4, 2, 4, 3
PARAMETERS = make_parameters(replace(CASE, heads={"n": HEADS}))
NAMES = ("lm loss", "head 2 loss", "head 3 loss")
HYBRID = ("--fp8-format", "hybrid")  # delayed scaling, as Megatron-LM's default is
TENSORWISE = (*HYBRID, "--fp8-recipe", "tensorwise")

Losses = dict[tuple[str, int], float]


def train(folder: Path, world: int, *more: object) -> tuple[list[Seen], Losses]:
    common = ("--mtp-heads", HEADS, "--train-iters", STEPS, "--tensorboard-dir", folder)
    argv = flags(*common, "--bf16", "--transformer-impl", "transformer_engine", *more)
    seen = run_world(train_megatron_lm, world, argv, PARAMETERS, fresh=True, timeout=300)
    logged = scalars(folder)
    return seen, {(name, step): logged[name][step] for name in NAMES for step in range(1, STEPS + 1)}


def furthest(one: Losses, other: Losses) -> float:
    return max(abs(one[key] - other[key]) for key in one)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    (seen,), losses = train(tmp_path_factory.mktemp("bf16"), 1)
    assert len(seen.trunk) == 4 * TRUNK
    assert not any(seen.trunk + seen.heads)
    assert seen.regions == 0
    return losses


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Seen], Losses]:
    return train(tmp_path_factory.mktemp("hybrid"), 1, *HYBRID)


def test_the_trunk_runs_in_fp8_and_the_heads_do_not(hybrid: tuple[list[Seen], Losses], bf16: Losses) -> None:
    (seen,), losses = hybrid
    assert seen.trunk == [True] * 4 * TRUNK
    assert seen.heads == [False] * 4 * HEADS
    assert seen.regions == STEPS * MICROBATCHES, "one region a microbatch: no head opens one"
    assert seen.updates == {True: STEPS * MICROBATCHES, False: STEPS * MICROBATCHES}
    assert 1e-3 < furthest(losses, bf16) < 0.05, "FP8 takes part, and costs little"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("--tensor-model-parallel-size 2 --sequence-parallel", id="tp2-sp"),
        pytest.param("--pipeline-model-parallel-size 2", id="pp2"),
        pytest.param("--use-distributed-optimizer", id="dp2"),
    ],
)
def test_layouts_learn_alike(hybrid: tuple[list[Seen], Losses], bf16: Losses, tmp_path: Path, layout: str) -> None:
    _, one = hybrid
    ranks, losses = train(tmp_path, 2, *HYBRID, *layout.split())
    assert [seen.trunk for seen in ranks] == [[True] * 4 * (TRUNK // 2 if "pipeline" in layout else TRUNK)] * 2
    assert not any(flag for seen in ranks for flag in seen.heads)
    assert sum(len(seen.heads) for seen in ranks) == 4 * HEADS * (1 if "pipeline" in layout else 2)
    # Partial sums are rounded apart; a stage computes what it would anywhere.
    assert furthest(losses, one) <= (0 if "pipeline" in layout else 2 * furthest(one, bf16))
    if "pipeline" not in layout:  # each made of the largest value on any rank
        first, second = (torch.cat(seen.scales) for seen in ranks)
        assert torch.equal(first, second)
        assert (first != 1).any(), "control: some have been computed"


def test_tensorwise_and_heads_in_fp8(bf16: Losses, tmp_path: Path) -> None:
    (seen,), tensorwise = train(tmp_path / "bf16 heads", 1, *TENSORWISE)
    assert (seen.trunk, seen.heads) == ([True] * 4 * TRUNK, [False] * 4 * HEADS)
    (seen,), heads_too = train(tmp_path / "fp8 heads", 1, *TENSORWISE, "--mtp-fp8-heads")
    assert (seen.trunk, seen.heads) == ([True] * 4 * TRUNK, [True] * 4 * HEADS)
    assert seen.regions == STEPS * MICROBATCHES * (TRUNK + HEADS), "this recipe enters one a layer"
    assert 1e-3 < furthest(tensorwise, bf16) < 0.05
    assert furthest(heads_too, tensorwise) > 1e-3, "control: heads in FP8 are seen"
