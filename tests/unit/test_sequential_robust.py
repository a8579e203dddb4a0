"""Deferred sequential heads on a toy in plain torch: memory flat in n, no wait for the device, clean errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mtp_megatron.config import HeadsConfig
from mtp_megatron.sequential import HeadReport, run_heads
from mtp_megatron.targets import IGNORE_INDEX
from tests.toy import ToyModel, ToyPass, batch, deferred, gradients, joint
from tools.bench.memory import live_peak


def toy(n: int = 3, arrangement: str = "parallel", **sizes: Any) -> ToyModel:
    return ToyModel(HeadsConfig(n=n, arrangement=arrangement), **sizes)


# Memory ---------------------------------------------------------------------------------------------------------------


def peak(n: int, run: Callable = deferred, arrangement: str = "parallel", autocast: bool = False) -> int:
    """Bytes of live tensors that one forward and backward pass makes; parameters and gradients exist before."""
    model = toy(n, arrangement, size=64, vocab=1000, width=256, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, targets = batch(model, length=64)

    def step() -> None:
        with torch.autocast("cpu", enabled=autocast):
            loss = run(model, x, targets)[0]
        loss.backward()

    return live_peak(step)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_memory_is_flat_in_the_number_of_heads(autocast: bool) -> None:
    """Under autocast, torch caches the casts of weights: those of a finished head must not stay."""
    assert peak(8, autocast=autocast) <= 1.05 * peak(1, autocast=autocast)


def test_control_joint_memory_grows() -> None:
    assert peak(8, joint) > 4 * peak(1, joint)


@pytest.mark.parametrize("arrangement", ["causal", "anticausal"])
def test_a_chain_keeps_its_layers_but_never_its_logits(arrangement: str) -> None:
    model = toy(8, arrangement, size=64, vocab=1000, width=256)
    tokens = 128
    a_layer = tokens * 4 * (64 * 3 + 256 * 2)  # input, output, sum, and what tanh and the second matrix keep
    grown = peak(8, arrangement=arrangement) - peak(1, arrangement=arrangement)
    assert grown <= 7 * a_layer
    assert a_layer < tokens * model.unembedding.shape[0] * 4  # so that logits kept would show


def test_nothing_is_kept_after_backward() -> None:
    model = toy()
    x, targets = batch(model)
    heads = ToyPass(model, targets)
    loss, _ = deferred(model, x, targets, heads)
    loss.backward()
    assert heads._gradient is None
    assert loss.grad_fn.heads is None  # what holds on to the loss does not hold on to the heads' work


# No wait for the device -----------------------------------------------------------------------------------------------


class Reads(ToyPass):
    """A control: reads a number in every head, as a loss that is logged inside the loop does."""

    def __init__(self, model: ToyModel, targets: torch.Tensor, how: str) -> None:
        super().__init__(model, targets)
        self.how = how

    def forward_head(self, head: int, inputs: torch.Tensor) -> torch.Tensor:
        getattr(inputs.detach().sum(), self.how)()
        return super().forward_head(head, inputs)


def run_without_values(arrangement: str, heads_class: Callable = ToyPass) -> None:
    """One step on tensors that have shapes but no values; whoever asks for a value raises.

    On a GPU such a question stops the launch of kernels until all before it have run.
    """
    with FakeTensorMode():
        model = toy(3, arrangement, dtype=torch.float32)
        x, targets = batch(model)
        loss, report = deferred(model, x, targets, heads_class(model, targets))
        loss.backward()
        assert report.total.shape == ()
        with torch.no_grad():
            deferred(model, x, targets, predictions=True)


@pytest.mark.parametrize("arrangement", ["parallel", "causal", "anticausal"])
def test_no_value_is_read_in_the_loop(arrangement: str) -> None:
    run_without_values(arrangement)


@pytest.mark.parametrize("how", ["item", "tolist", "__bool__"])
def test_control_a_value_read_in_the_loop_is_caught(how: str) -> None:
    with pytest.raises((DataDependentOutputException, RuntimeError), match=r"_local_scalar_dense|tolist|is_nonzero"):
        run_without_values("parallel", lambda model, targets: Reads(model, targets, how))


# Autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_the_forward_pass_holds_in_backward(enabled: bool) -> None:
    model = toy(dtype=torch.float32)
    x, targets = batch(model)
    seen = []

    class Watching(ToyPass):
        def forward_head(self, head: int, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(self.model.heads[head](inputs).dtype)
            return super().forward_head(head, inputs)

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss, _ = deferred(model, x, targets, Watching(model, targets))
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):  # what holds here is of no interest
        loss.backward()
    assert seen == [torch.bfloat16 if enabled else torch.float32] * 3
    assert not torch.is_autocast_enabled("cpu")


# Errors ---------------------------------------------------------------------------------------------------------------


class HeadBroke(Exception):
    pass


def broken(model: ToyModel, targets: torch.Tensor, phase: str) -> ToyPass:
    """Head 2 raises in its layer's forward or backward pass or in its loss."""

    def fail(*_: Any) -> None:
        raise HeadBroke("boom")

    class Broken(ToyPass):
        def forward_head(self, head: int, inputs: torch.Tensor) -> torch.Tensor:
            if head == 1 and phase == "forward":
                fail()
            outputs = super().forward_head(head, inputs)
            if head == 1 and phase == "backward":
                outputs.register_hook(fail)
            return outputs

        def head_loss(self, head: int, *args: Any) -> Any:
            if head == 1 and phase == "loss":
                fail()
            return super().head_loss(head, *args)

    return Broken(model, targets)


@pytest.mark.parametrize("phase", ["forward", "backward", "loss"])
@pytest.mark.parametrize("arrangement", ["parallel", "causal", "anticausal"])
def test_error_names_the_head_and_leaves_no_half_report(arrangement: str, phase: str) -> None:
    model = toy(3, arrangement)
    x, targets = batch(model)
    heads = broken(model, targets, phase)
    loss, report = deferred(model, x, targets, heads)
    with pytest.raises(HeadBroke, match="boom") as error:
        loss.backward()
    where = "forward" if phase == "forward" else "backward"
    assert error.value.__notes__ == [f"in the {where} of head 2 of 3 (deferred sequential heads)"]
    if not (arrangement != "parallel" and phase == "forward"):
        assert any(event.startswith("loss") for event in heads.events)  # another head had been recorded
    assert report.loss_sum.isnan().all()
    assert report.correct.isnan().all()
    assert report.total.isnan()


@pytest.mark.parametrize("phase", ["forward", "loss"])
def test_error_in_evaluation_leaves_no_half_report(phase: str) -> None:
    model = toy(3)
    x, targets = batch(model)
    z = model.trunk(x).detach()
    report = HeadReport.empty(targets, (1.0,) * 3, torch.float64, predictions=True)
    with pytest.raises(HeadBroke) as error, torch.no_grad():
        run_heads(z, broken(model, targets, phase), report)
    assert error.value.__notes__ == ["in the evaluation of head 2 of 3 (deferred sequential heads)"]
    assert report.loss_sum.isnan().all()
    assert report.correct.isnan().all()
    assert (report.predictions == IGNORE_INDEX).all()


def test_training_goes_on_after_an_error() -> None:
    model = toy()
    x, targets = batch(model)
    with pytest.raises(HeadBroke):
        deferred(model, x, targets, broken(model, targets, "backward"))[0].backward()
    gradients(model)  # an optimizer's zero_grad
    joint(model, x, targets)[0].backward()
    want = gradients(model)
    deferred(model, x, targets)[0].backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-12, atol=1e-12)


def test_second_backward_is_refused() -> None:
    model = toy()
    loss, _ = deferred(model, *batch(model))
    loss.backward(retain_graph=True)
    before = {name: gradient.clone() for name, gradient in gradients(model).items()}
    with pytest.raises(RuntimeError, match="second time: their gradients were delivered"):
        loss.backward()
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert any(gradient.any() for gradient in before.values())


def test_gradient_of_the_gradient_is_refused() -> None:
    """The heads' own second derivatives do not exist; without them the result would be silently wrong."""
    model = toy()
    x, targets = batch(model)
    z = model.trunk(x).detach().requires_grad_()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = run_heads(z, ToyPass(model, targets), HeadReport.empty(targets, (1.0,) * 3, torch.float64))
    (gradient,) = torch.autograd.grad(loss * factor, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
