"""Megatron-LM's own loop with ``--moe-grouped-gemm``: a rank's experts multiplied together, in fp32 and in FP8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.test_megatron_lm_experts import EXPERTS, SHARED
from tests.fp8_runs import Seen
from tests.harness import run_world
from tests.megatron_lm import CASE, flags, needs_megatron_lm, scalars
from tests.parity import make_parameters
from tests.transformer_engine.loops import train_megatron_lm
from tests.transformer_engine.test_megatron_lm import HEADS, HYBRID, MICROBATCHES, STEPS, TRUNK

pytestmark = [needs_megatron_lm, pytest.mark.timeout(900)]

GROUPED = "--moe-grouped-gemm"
EP2 = (*SHARED, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
PARAMETERS = make_parameters(replace(CASE, experts=4, top_k=2, heads={"n": HEADS}))
SAVED = 2


def train(folder: Path, world: int, *more: object) -> tuple[list[Seen], dict[str, dict[int, float]]]:
    """What the ranks saw, and what was logged: name -> step -> value. Of what is given twice the last holds."""
    common = ("--mtp-heads", HEADS, "--train-iters", STEPS, "--tensorboard-dir", folder)
    experts = (*EXPERTS, "--num-experts", 4, "--moe-router-topk", 2, "--moe-router-dtype", "fp32")
    argv = flags(*common, *experts, "--transformer-impl", "transformer_engine", *more)
    ranks = run_world(train_megatron_lm, world, argv, PARAMETERS, fresh=True, timeout=300)
    logged = scalars(folder)
    return ranks, {name: logged[name] for name in ("lm loss", "head 2 loss", "head 3 loss", "load_balancing_loss")}


def test_in_fp32_they_train_as_megatrons_own(tmp_path: Path) -> None:
    """Which tests/distributed holds to upstream's GPT, and the recipe's loop to the oracle."""
    (local,), own = train(tmp_path / "local", 1, "--transformer-impl", "local")
    assert not local.trunk + local.heads, "control: no layer of Transformer Engine"
    ranks, losses = train(tmp_path / "engine", 2, GROUPED, *EP2)
    for name, expected in own.items():
        assert losses[name] == pytest.approx(expected, abs=1e-5), name
    # Two matrices of attention and two of experts.
    assert [(len(seen.trunk), len(seen.heads), seen.regions) for seen in ranks] == [(4 * TRUNK, 4 * HEADS, 0)] * 2


def test_in_fp8_they_train_as_one_after_the_other(tmp_path: Path) -> None:
    (seen,), together = train(tmp_path / "together", 1, "--bf16", *HYBRID, GROUPED)
    (one,), apart = train(tmp_path / "apart", 1, "--bf16", *HYBRID)
    assert seen.trunk == [True] * 4 * TRUNK
    assert one.trunk == [True] * (2 + 2 * 4) * TRUNK, "control: each expert has matrices of its own"
    for run in (seen, one):
        assert run.heads == [False] * 4 * HEADS
        assert run.regions == STEPS * MICROBATCHES, "one region a microbatch: no head opens one"
        assert run.updates == {True: STEPS * MICROBATCHES, False: STEPS * MICROBATCHES}
    assert together == apart


def test_scales_of_experts_go_on_where_they_were_and_nowhere_else(tmp_path: Path) -> None:
    """At another size megatron-core would give experts others'."""
    folder, fp8 = tmp_path / "checkpoints", ("--bf16", *HYBRID, GROUPED)
    ranks, whole = train(tmp_path / "whole", 2, *fp8, *EP2, "--save", folder, "--save-interval", SAVED)
    load = ("--load", folder, "--ckpt-step", SAVED)
    again, rest = train(tmp_path / "rest", 2, *fp8, *EP2, *load)
    for name, values in whole.items():
        assert rest[name] == {step: value for step, value in values.items() if step > SAVED}, name
    for one, other in zip(ranks, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.scales, other.scales, strict=True))
        assert any((scale != 1).any() for scale in other.scales), "control: some have been computed"
    with pytest.raises(
        RuntimeError, match=r"--expert-model-parallel-size=1: .*4 of the experts in a layer.*saved with 2"
    ):
        train(tmp_path / "refused", 1, *fp8, *load)
