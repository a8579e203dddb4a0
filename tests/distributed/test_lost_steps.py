"""A step whose gradients overflowed: a loss scaler loses it as a matter of course, without one it ends the training.

fp16 trains under DeepSpeed on a GPU alone, so the step runs here with a stand-in for the engine.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness import parallel, run_world


class Engine:
    """A DeepSpeed engine whose last step was lost to an overflow, or applied with a gradient norm."""

    def __init__(self, fp16: bool, applied: bool, norm: float) -> None:
        self._fp16, self._applied, self._norm = fp16, applied, norm

    def fp16_enabled(self) -> bool:
        return self._fp16

    def bfloat16_enabled(self) -> bool:
        return not self._fp16

    def step(self) -> None: ...

    def was_step_applied(self) -> bool:
        return self._applied

    def get_global_grad_norm(self) -> float:
        return self._norm


def one_step(rank: int, world_size: int, fp16: bool, applied: bool, loss: float = 8.0) -> Any:
    """For ``run_world``: the gradient norm of a step and the schedule's count, or what the training died of."""
    from mtp_megatron.deepspeed.trainer import DeepSpeedTrainer
    from mtp_megatron.training.recipe import Recipe
    from mtp_megatron.training.step import TrainingDiverged, train_step

    recipe = Recipe.model_validate({"heads": {"n": 2}, "model": {"vocab_size": 64}, "data": {"path": "none"}})
    scheduler = SimpleNamespace(num_steps=4, get_lr=lambda group: 1e-3)
    scheduler.step = lambda increment: setattr(scheduler, "num_steps", scheduler.num_steps + increment)
    report = SimpleNamespace(
        loss_sum=torch.tensor([loss, 9.0]),
        log_z_squared=None,
        correct=torch.tensor([1.0, 0.0]),
        tokens=torch.tensor([4.0, 3.0]),
        normalizer=torch.tensor(4.0),
    )

    class Trainer(DeepSpeedTrainer):
        def backward(self, *args: Any) -> list[Any]:
            return [report]

    model: Any = SimpleNamespace(owned_heads=())
    engine: Any = Engine(fp16, applied, norm=0.5)
    trainer = Trainer(model, engine, scheduler, {"zero_optimization": {"stage": 1}})
    with parallel():
        try:
            figures = train_step(recipe, trainer, [None], 1, stop_requested=False)
        except TrainingDiverged as error:
            return str(error)
        return figures.grad_norm, figures.head_loss, scheduler.num_steps


def test_a_step_lost_by_a_loss_scaler_is_counted_and_training_goes_on() -> None:
    assert run_world(one_step, 1, True, False) == [(math.inf, [2.0, 3.0], 5)]
    assert run_world(one_step, 1, True, True) == [(0.5, [2.0, 3.0], 5)], "control: an applied step has its norm"


def test_without_a_scaler_a_lost_step_ends_the_training() -> None:
    assert run_world(one_step, 1, False, False) == ["step 5: the gradient norm is inf"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it_with_a_scaler_too(loss: float) -> None:
    (said,) = run_world(one_step, 1, True, False, loss)
    assert said == f"step 5: the loss of head 1 is {loss}"
