"""Arguments of Megatron-LM that must change nothing about the losses with heads, and those that steer a run."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.reference import reference_loss
from mtp_megatron.targets import future_targets
from tests.harness import run_world
from tests.megatron_lm import CASE, RELEASE, Samples, flags, needs_megatron_lm, scalars, train, train_filled
from tests.parity import make_parameters

pytestmark = needs_megatron_lm

LOSSES = ("lm loss", "head 2 loss", "head 3 loss")
COMMON = ("--mtp-heads", 3, "--global-batch-size", 8, "--train-iters", 3, "--calculate-per-token-loss")
PARAMETERS = make_parameters(replace(CASE, heads={"n": 3}))

VARIANTS = {
    "virtual pipeline": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "layout": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|tL"),
    "heads on a stage of their own": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etttt|L"),
    "sequence parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "context parallel": (2, "--context-parallel-size 2"),
    "full recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective recompute": (1, "--recompute-granularity selective"),
    "distributed optimizer": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "spiky loss check": (1, "--check-for-spiky-loss"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """Losses of the first steps on one rank."""
    return losses(tmp_path_factory.mktemp("base"), 1)


def losses(folder: Path, world: int, *more: object) -> dict[str, dict[int, float]]:
    run_world(train_filled, world, flags(*COMMON, "--tensorboard-dir", folder, *more), PARAMETERS)
    found = scalars(folder)
    return {name: found[name] for name in LOSSES}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_losses_stay_the_same(base: dict[str, dict[int, float]], tmp_path: Path, variant: str) -> None:
    world, argv = VARIANTS[variant]
    found = losses(tmp_path, world, *argv.split())
    for name in LOSSES:
        assert found[name] == pytest.approx(base[name], abs=1e-5)


def test_other_weights_would_be_noticed(base: dict[str, dict[int, float]], tmp_path: Path) -> None:
    """Control, and the loss weights at work: the first step's losses are the same, then head 2 learns less."""
    found = losses(tmp_path, 1, "--mtp-loss-decay", 0.1)
    assert found["head 2 loss"][1] == pytest.approx(base["head 2 loss"][1], abs=1e-5)
    assert abs(found["head 2 loss"][3] - base["head 2 loss"][3]) > 1e-3


def test_tied_embeddings_on_two_stages(tmp_path: Path) -> None:
    parameters = make_parameters(replace(CASE, heads={"n": 3}, tied=True))
    found = []
    for stages in (1, 2):
        folder = tmp_path / str(stages)
        argv = flags(*COMMON, "--tensorboard-dir", folder, "--pipeline-model-parallel-size", stages)
        argv.remove("--untie-embeddings-and-output-weights")
        run_world(train_filled, stages, argv, parameters)
        found.append(scalars(folder))
    for name in LOSSES:
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5)


def test_curriculum_and_growing_batches(tmp_path: Path) -> None:
    """Heads join by Megatron-LM's iteration; each step's losses are means over the targets of a batch of its own size.

    Nothing is learned, so that the oracle knows every step's weights.
    """
    sizes = [4, 4, 4, 8, 8]
    argv = flags("--mtp-heads", 3, "--mtp-curriculum-steps", 3, "--lr", 0, "--weight-decay", 0)
    argv += ["--tensorboard-dir", str(tmp_path)]
    if RELEASE < (0, 18):  # whose rampup wants the length in samples, too
        argv += ["--rampup-batch-size", "4", "4", "12", "--global-batch-size", "8", "--train-samples", str(sum(sizes))]
    else:  # these refuse a rampup and know a schedule by tokens: 12 samples of 32
        argv += ["--train-iters", str(len(sizes))]
        given = argv.index("--global-batch-size")
        argv[given : given + 2] = ["--step-batch-size-schedule", "0:4 384:8"]
    run_world(train_filled, 1, argv, PARAMETERS)
    found = scalars(tmp_path)
    assert list(found["batch-size"].values()) == sizes
    assert [min(found[name]) for name in LOSSES] == [1, 2, 3]
    config = replace(CASE, heads={"n": 3}).reference_config()
    for step, size in enumerate(sizes, start=1):
        samples = [Samples()[sum(sizes[: step - 1]) + i] for i in range(size)]
        tokens, labels, mask = (torch.stack([s[name] for s in samples]) for name in ("tokens", "labels", "loss_mask"))
        with torch.no_grad():
            wanted = reference_loss(PARAMETERS, config, tokens, future_targets(labels, 3, loss_mask=mask))
        means = (wanted.loss_sum / wanted.tokens).tolist()
        assert [found[name][step] for name in LOSSES[:step]] == pytest.approx(means[:step], rel=1e-5)


@pytest.mark.skipif(RELEASE < (0, 18), reason="earlier releases honour --rampup-batch-size")
def test_a_rampup_that_would_be_ignored_stops_the_job(tmp_path: Path) -> None:
    argv = flags("--mtp-heads", 2, "--train-iters", 1, "--mock-data", "--rampup-batch-size", 2, 2, 8)
    assert run_world(train, 1, argv) == [2]


def interrupted(rank: int, world_size: int, argv: Sequence[str]) -> Any:
    """For ``run_world`` in fresh processes: train, and ask for an end while the second step is computed."""
    from mtp_megatron.compat import megatron_lm

    megatron_lm.prepare()
    from mtp_megatron.megatron_lm import step

    original, calls = step.forward_step, []

    def forward_step(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:  # two microbatches to a step
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    step.forward_step = forward_step
    try:
        return train(rank, world_size, argv)
    except SystemExit as end:
        return end.code


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    argv = flags("--mtp-heads", 2, "--train-iters", 50, "--mock-data", "--exit-signal-handler", "--save", tmp_path)
    (code,) = run_world(interrupted, 1, [*argv, "--save-interval", "1000"], fresh=True)
    assert not code
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


@pytest.mark.parametrize(
    "bad",
    ["--mtp-num-layers 1", "--fp8-format hybrid", "--transformer-impl transformer_engine --fp8-format e4m3"],
)
def test_bad_combinations_stop_the_job(bad: str) -> None:
    said = run_world(said_at_the_end, 1, flags("--mtp-heads", 2, "--train-iters", 1, "--mock-data", *bad.split()))
    name, value = bad.split()[-2:]
    assert said[0].startswith(f"error: {name}={int(value) if value.isdigit() else value!r}: "), said


def said_at_the_end(rank: int, world_size: int, argv: Sequence[str]) -> str:
    """For ``run_world``: the message of a job that was refused."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert train(rank, world_size, argv) == 2
    return next(line for line in said.getvalue().splitlines() if line.startswith("error: "))
