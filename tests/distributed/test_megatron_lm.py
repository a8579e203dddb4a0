"""Megatron-LM's training loop with heads: equal to upstream's own GPT for one head, and to the oracle for several."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.reference import reference_loss
from mtp_megatron.targets import document_ends_from_tokens, future_targets
from tests.harness import run_world
from tests.megatron_lm import (
    CASE,
    EOD,
    Samples,
    flags,
    masked_provider,
    needs_megatron_lm,
    scalars,
    scarce_provider,
    train_filled,
    train_upstream,
)
from tests.parity import documents_alone, make_parameters

pytestmark = needs_megatron_lm

STEPS = 20


def of_upstream(folder: Path, parameters: dict[str, torch.Tensor], *more: object) -> dict[int, float]:
    argv = flags("--num-layers", 5, "--train-iters", STEPS, "--tensorboard-dir", folder, *more)
    run_world(train_upstream, 1, argv, parameters)
    return scalars(folder)["lm loss"]


def of_ours(folder: Path, parameters: dict[str, torch.Tensor], *more: object, world: int = 1) -> dict[str, Any]:
    argv = flags("--tensorboard-dir", folder, *more)
    run_world(train_filled, world, argv, parameters)
    return scalars(folder)


@pytest.mark.parametrize("per_token", [False, True], ids=["per_microbatch", "per_token"])
def test_one_head_trains_as_upstreams_gpt(tmp_path: Path, per_token: bool) -> None:
    more = ["--calculate-per-token-loss"] if per_token else []
    parameters = make_parameters(replace(CASE, heads={"n": 1}))
    theirs = of_upstream(tmp_path / "upstream", parameters, *more)
    ours = of_ours(tmp_path / "ours", parameters, "--mtp-heads", 1, "--train-iters", STEPS, *more)
    assert list(theirs) == list(range(1, STEPS + 1))
    assert ours["lm loss"] == pytest.approx(theirs, abs=1e-5)
    if per_token:  # control: a loss that is normalised in another way trains to other losses
        other = of_ours(tmp_path / "control", parameters, "--mtp-heads", 1, "--train-iters", STEPS)
        assert abs(other["lm loss"][STEPS] - theirs[STEPS]) > 1e-4


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, ["--context-parallel-size", 2]),
        (4, ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]),
    ],
    ids=["cp2", "tp2_pp2"],
)
@pytest.mark.parametrize("documents", ["separate", "ignore"])
def test_logged_losses_are_those_of_the_oracle(
    tmp_path: Path, world: int, layout: list[object], documents: str
) -> None:
    case = replace(CASE, heads={"n": 3})
    parameters = make_parameters(case)
    more = ["--mtp-heads", 3, "--train-iters", 1, "--eval-iters", 1, "--eval-interval", 1, *layout]
    more += ["--eod-mask-loss", "--mtp-z-loss", 0.05] if documents == "separate" else []
    found = of_ours(tmp_path, parameters, *more, world=world)
    batch = {name: torch.stack([Samples()[i][name] for i in range(4)]) for name in ("tokens", "labels", "loss_mask")}
    ends = document_ends_from_tokens(batch["tokens"], EOD) if documents == "separate" else None
    targets = future_targets(batch["labels"], 3, loss_mask=batch["loss_mask"], document_ends=ends)
    with torch.no_grad():
        wanted, others_wanted = (
            reference_loss(parameters, case.reference_config(), batch["tokens"], made)
            for made in (targets, targets.roll(1, 0))
        )
    for head, name in enumerate(["lm loss", "head 2 loss", "head 3 loss"]):
        loss, others = found[name][1], float(others_wanted.loss_sum[head] / others_wanted.tokens[head])
        assert loss == pytest.approx(float(wanted.loss_sum[head] / wanted.tokens[head]), rel=1e-5)
        assert loss != pytest.approx(others, rel=1e-4), "control: each head with the targets of another"
        assert f"{name} validation" in found, "evaluation reports every head"
        beside = f"head {head + 1} z loss"
        if documents == "separate":  # no part of the head's loss above
            z_loss = float(wanted.log_z_squared[head] / wanted.tokens[head])
            assert found[beside][1] == pytest.approx(z_loss, rel=1e-5)
            assert f"{beside} validation" in found
        else:
            assert beside not in found


def test_documents_attend_to_themselves_alone(tmp_path: Path) -> None:
    """``--reset-attention-mask``: the mask reaches the layers of both stages and the heads, and they obey it."""
    case = replace(CASE, heads={"n": 3})
    parameters = make_parameters(case)
    layout = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    argv = flags("--tensorboard-dir", tmp_path, "--mtp-heads", 3, "--train-iters", 1, "--eod-mask-loss")
    run_world(train_filled, 4, [*argv, "--reset-attention-mask", *map(str, layout)], parameters, masked_provider)
    found = scalars(tmp_path)
    batch = {name: torch.stack([Samples()[i][name] for i in range(4)]) for name in ("tokens", "labels", "loss_mask")}
    ends = document_ends_from_tokens(batch["tokens"], EOD)
    targets = future_targets(batch["labels"], 3, loss_mask=batch["loss_mask"], document_ends=ends)
    whole = [(batch["tokens"], targets)]
    with torch.no_grad():
        wanted, control = (
            [reference_loss(parameters, case.reference_config(), *piece) for piece in pieces]
            for pieces in (documents_alone(whole, EOD), whole)
        )
    for head, name in enumerate(["lm loss", "head 2 loss", "head 3 loss"]):
        alone, together = (
            float(sum(r.loss_sum[head] for r in results) / sum(r.tokens[head] for r in results))
            for results in (wanted, control)
        )
        assert found[name][1] == pytest.approx(alone, rel=1e-5)
        assert found[name][1] != pytest.approx(together, rel=1e-4), "control: documents that see one another"


def test_heads_without_a_target_in_a_global_batch_do_not_end_the_run(tmp_path: Path) -> None:
    """As in Megatron-LM itself a mean over no token is logged as NaN, and the gradients are zero, not NaN."""
    parameters = make_parameters(replace(CASE, heads={"n": 3}))
    argv = flags("--tensorboard-dir", tmp_path, "--mtp-heads", 3, "--train-iters", 3, "--eod-mask-loss")
    run_world(train_filled, 1, argv, parameters, scarce_provider)
    found = scalars(tmp_path)
    assert [math.isnan(found["lm loss"][step]) for step in (1, 2, 3)] == [True, False, False]
    assert [math.isnan(found["head 2 loss"][step]) for step in (1, 2, 3)] == [True] * 3
    assert [found["grad-norm"][step] > 0 for step in (1, 2, 3)] == [False, True, True]
