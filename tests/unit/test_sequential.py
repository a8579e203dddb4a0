"""Deferred sequential heads on a toy in plain torch: exact, in order, once each; values only when they exist."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_megatron.config import HeadsConfig
from mtp_megatron.sequential import HeadReport, run_heads
from tests.toy import ToyModel, ToyPass, batch, deferred, distance, gradients, joint

ARRANGEMENTS = ["parallel", "causal", "anticausal"]


def toy(n: int = 4, **settings: Any) -> ToyModel:
    sizes = {name: settings.pop(name) for name in ("size", "vocab", "dtype", "width") if name in settings}
    return ToyModel(HeadsConfig(n=n, **settings), **sizes)


def plain_step(model: ToyModel, scale: float = 1.0, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, losses, _ = joint(model, *batch(model, seed=seed))
    (loss * scale).backward()
    return losses, gradients(model)


def deferred_step(
    model: ToyModel, scale: float = 1.0, heads: ToyPass | None = None
) -> tuple[HeadReport, dict[str, torch.Tensor]]:
    loss, report = deferred(model, *batch(model), heads=heads)
    (loss * scale).backward()
    return report, gradients(model)


# Exact ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 0.5, 2.0), (1.0, 0.0, 0.5, 0.0), (0.0, 0.0, 1.0, 0.0)], ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_gradients_equal_plain_autograd(arrangement: str, weights: tuple[float, ...] | None, z_loss: float) -> None:
    model = toy(arrangement=arrangement, loss_weights=weights, z_loss=z_loss)
    losses, want = plain_step(model, 0.37)
    report, got = deferred_step(model, 0.37)
    assert distance(got, want) <= 1e-12
    active = torch.tensor(model.config.base_weights()) != 0
    torch.testing.assert_close(report.loss_sum[active], losses[active], rtol=1e-12, atol=0)
    assert report.loss_sum[~active].isnan().all()
    assert report.tokens.tolist() == [11, 9, 7, 6]
    assert int(report.normalizer) == 11
    right = (torch.tensor(model.config.base_weights(), dtype=losses.dtype) * losses).sum()
    torch.testing.assert_close(report.total, right, rtol=1e-12, atol=0)  # without the z-losses
    assert (report.log_z_squared is None) == (z_loss == 0)
    if report.log_z_squared is not None:
        assert torch.equal(report.log_z_squared.isnan(), ~active)
        report.clear()
        assert report.log_z_squared.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    arrangement=st.sampled_from(ARRANGEMENTS),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=5).filter(any),
    length=st.integers(3, 9),
    rows=st.integers(1, 3),
    vocab=st.integers(2, 12),
    seed=st.integers(0, 1000),
    detached=st.booleans(),
)
def test_random_shapes(
    arrangement: str, weights: list[float], length: int, rows: int, vocab: int, seed: int, detached: bool
) -> None:
    """Also more heads than positions, and heads that have no target or no weight."""
    model = toy(len(weights), arrangement=arrangement, loss_weights=tuple(weights), vocab=vocab)
    x, targets = batch(model, length, rows, seed)
    loss, losses, _ = joint(model, x, targets, detach_trunk=detached)
    loss.backward()
    want = gradients(model)
    deferred_loss, report = deferred(model, x, targets, detach_trunk=detached)
    deferred_loss.backward()
    assert distance(gradients(model), want) <= 1e-12
    active = torch.tensor(weights) != 0
    torch.testing.assert_close(report.loss_sum[active], losses[active], rtol=1e-12, atol=0)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_control_a_head_whose_gradient_is_lost_is_caught(arrangement: str) -> None:
    model = toy(arrangement=arrangement)

    class Lossy(ToyPass):
        def head_loss(self, head: int, *args: Any) -> Any:
            sums, gradient = super().head_loss(head, *args)
            return sums, gradient * 0 if head == 1 else gradient

    _, want = plain_step(model)
    _, got = deferred_step(model, heads=Lossy(model, batch(model)[1]))
    assert distance(got, want) > 1e-2


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-16])
def test_scale_arrives_exactly_and_the_report_is_unscaled(scale: float) -> None:
    model = toy(dtype=torch.float32)
    report, unscaled = deferred_step(model)
    scaled_report, scaled = deferred_step(model, scale)
    assert torch.equal(scaled_report.loss_sum, report.loss_sum)
    for name, right in unscaled.items():
        assert torch.equal(scaled[name], right * scale), name  # a power of two: bit for bit


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["in turn", "out of turn"])
def test_microbatches_accumulate(order: tuple[int, ...]) -> None:
    """As pipeline schedules do it: all forward passes first, then the backward passes, each with its own scale."""
    model = toy(arrangement="causal")
    total, losses = torch.zeros(()), []
    for seed in range(3):
        loss, by_head, _ = joint(model, *batch(model, seed=seed))
        total = total + loss * (seed + 1)
        losses.append(by_head)
    total.backward()
    want = gradients(model)
    waiting = [deferred(model, *batch(model, seed=seed)) for seed in range(3)]
    for seed in order:
        (waiting[seed][0] * (seed + 1)).backward()
    assert distance(gradients(model), want) <= 1e-12
    for (_, report), right in zip(waiting, losses, strict=True):
        torch.testing.assert_close(report.loss_sum, right, rtol=1e-12, atol=0)


def test_trunk_gradient_is_summed_in_fp32() -> None:
    """Sixteen heads in bf16: the sum must lose one rounding, not fifteen."""
    n = 16
    model = toy(n=n, dtype=torch.bfloat16)
    x, targets = batch(model, length=40)

    def z_gradient(weights: tuple[float, ...]) -> torch.Tensor:
        z = model.trunk(x).detach().requires_grad_()
        report = HeadReport.empty(targets, weights, torch.float32)
        run_heads(z, ToyPass(model, targets), report).backward()
        return z.grad

    each = [z_gradient(tuple(float(i == head) for i in range(n))) for head in range(n)]
    exact = torch.stack(each).double().sum(0)
    in_bf16 = functools.reduce(torch.add, each)
    error, control = ((value.double() - exact).norm() for value in (z_gradient((1.0,) * n), in_bf16))
    assert error <= (exact.bfloat16().double() - exact).norm() * 1.01  # that of one rounding
    assert control > 2 * error


# In order, once each --------------------------------------------------------------------------------------------------


def test_forward_runs_no_head_and_backward_runs_each_once() -> None:
    model = toy(n=3)
    x, targets = batch(model)
    heads = ToyPass(model, targets)
    loss, _ = deferred(model, x, targets, heads)
    assert heads.events == []
    loss.backward()
    assert heads.events == ["forward 1", "loss 1", "forward 2", "loss 2", "forward 3", "loss 3"]


@pytest.mark.parametrize(
    ("arrangement", "weights", "events"),
    [
        ("causal", (1, 1, 1), "forward 1, forward 2, forward 3, loss 3, loss 2, loss 1"),
        ("anticausal", (1, 1, 1), "forward 3, forward 2, forward 1, loss 1, loss 2, loss 3"),
        ("parallel", (1, 0, 1), "forward 1, loss 1, skip 2 with its layer, forward 3, loss 3"),
        ("causal", (1, 1, 0), "skip 3 with its layer, forward 1, forward 2, loss 2, loss 1"),
        ("causal", (0, 1, 1), "forward 1, forward 2, forward 3, loss 3, loss 2, skip 1"),
    ],
)
def test_order_and_what_a_weight_of_zero_leaves_out(arrangement: str, weights: tuple, events: str) -> None:
    model = toy(n=3, arrangement=arrangement, loss_weights=weights)
    x, targets = batch(model)
    heads = ToyPass(model, targets)
    deferred(model, x, targets, heads)[0].backward()
    assert ", ".join(heads.events) == events
    assert all(parameter.grad is not None for parameter in model.parameters())  # engines count the arrivals


def test_hooks_of_shared_and_own_parameters_fire_in_backward_once() -> None:
    """DDP and ZeRO hang on these hooks; the unembedding's must see the sum over heads."""
    model = toy(n=3)
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    loss, _ = deferred(model, *batch(model))
    assert fired == []
    loss.backward()
    own = [name for name, _ in model.named_parameters() if name != "norm"]
    assert sorted(name for name in fired if name != "norm") == sorted(own)
    assert fired.count("norm") == 3  # once for each head: facts/deepspeed_te_apex.md


# Values before, at and after ------------------------------------------------------------------------------------------


def test_nothing_can_be_read_before_backward() -> None:
    model = toy()
    loss, report = deferred(model, *batch(model))
    assert loss.isnan()
    assert report.loss_sum.isnan().all()
    assert report.correct.isnan().all()
    assert report.total.isnan()
    loss.backward()
    assert report.total.isfinite()
    assert report.correct.isfinite().all()
    _, later = deferred(model, *batch(model))
    assert later.total.isnan()  # never the last microbatch's number


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_evaluation_has_its_values_at_once(arrangement: str, off: Any) -> None:
    model = toy(arrangement=arrangement, loss_weights=(1.0, 0.0, 0.5, 0.0))
    x, targets = batch(model)
    with off():
        loss, report = deferred(model, x, targets, predictions=True)
        right, losses, logits = joint(model, x, targets)
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
    torch.testing.assert_close(report.loss_sum, losses, rtol=1e-12, atol=0)  # of heads without weight, too
    assert torch.equal(report.predictions, logits.argmax(-1))
    assert report.correct.tolist() == ((logits.argmax(-1) == targets) & (targets >= 0)).sum((1, 2)).tolist()


# Frozen parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["trunk", "unembedding", "trunk unembedding", "heads", "trunk heads", "norm"])
@pytest.mark.parametrize("arrangement", ["parallel", "causal"])
def test_frozen_parts_stay_and_the_rest_learns(arrangement: str, frozen: str) -> None:
    model = toy(arrangement=arrangement)
    _, want = plain_step(model)
    for part in frozen.split():
        getattr(model, part).requires_grad_(False)
    loss, report = deferred(model, *batch(model))
    loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    got = gradients(model)
    assert distance({name: got[name] for name in learned}, {name: want[name] for name in learned}) <= 1e-12
    assert report.total.isfinite()


def test_detached_trunk_gets_a_zero_gradient_and_heads_learn() -> None:
    model = toy(arrangement="causal")
    joint(model, *batch(model), detach_trunk=True)[0].backward()
    want = gradients(model)
    deferred(model, *batch(model), detach_trunk=True)[0].backward()
    assert model.trunk.weight.grad is not None
    got = gradients(model)
    assert not got["trunk.weight"].any()
    assert distance(got, want) <= 1e-12
    assert want["heads.0.0.weight"].any()
