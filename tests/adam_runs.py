"""A checkpoint written by one process's modules and Adam, and read by another's; a stand-in for a fused Adam."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.compat import fallbacks
from mtp_megatron.compat.checkpoints import chained
from tests.training_runs import train_body
from tests.transformer_engine.kernels import multi_tensor_adam


@dataclass(frozen=True)
class Adam:
    """What the optimizers of one rank hold: the step, and the moments of each parameter."""

    step: int
    moments: list[Tensor]


def adam_of(trainable: Any) -> Adam:
    steps, moments = set(), []
    for optimizer in chained(trainable.optimizer):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.optimizer.state[parameter]
                steps.add(int(state["step"] if "step" in state else group["step"]))
                moments += [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
    (step,) = steps
    return Adam(step, moments)


def trained(recipe: Any, folder: Path, save: bool) -> tuple[dict[str, Tensor], Adam]:
    """Build, then save to the folder or load from it: the weights by name, and Adam a step later."""
    from mtp_megatron.data.blend import load_blend
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
    from mtp_megatron.training.world import model_parallel_world

    def step() -> None:
        for parameter in model.parameters():
            parameter.main_grad.fill_(1e-3)
        trainable.update()

    with model_parallel_world(recipe):
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        if save:
            step()  # so that there are moments to be saved
            save_checkpoint(recipe, load_blend([(None, str(folder / "data"))]), trainable, folder / "checkpoints", 3)
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
            checkpoint = latest_checkpoint(folder / "checkpoints")
            assert checkpoint is not None
            assert load_checkpoint(recipe, trainable, checkpoint) == 3
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step()
        return weights, adam_of(trainable)


class FusedAdam(torch.optim.Optimizer):
    """Its step and a setting that torch's lacks are in the groups, and no other state than moments is taken back."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,  # given from 0.19 on
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})
        assert adam_w_mode
        assert not capturable

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        unknown = {name for state in state_dict["state"].values() for name in state} - {"exp_avg", "exp_avg_sq"}
        if unknown:
            raise KeyError(unknown.pop())
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            parameters, moments = group["params"], [self._moments(parameter) for parameter in group["params"]]
            lists = [[parameter.grad for parameter in parameters], parameters, *map(list, zip(*moments, strict=True))]
            settings = (group["lr"], *group["betas"], group["eps"], group["step"], 1, int(group["bias_correction"]))
            multi_tensor_adam(0, torch.zeros(1), lists, *settings, group["weight_decay"])

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self.state[parameter]
        return [state.setdefault(name, torch.zeros_like(parameter)) for name in ("exp_avg", "exp_avg_sq")]


@contextmanager
def fused_adam() -> Iterator[None]:
    """As where Transformer Engine or Apex is: Megatron's Adam is theirs, and torch's needs no repairs."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        for module in (optimizer, distrib_optimizer):
            patch.setattr(module, "Adam", FusedAdam)
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        fallbacks.uninstall()
        compat.prepare()
        try:
            yield
        finally:
            fallbacks.uninstall()


def train_with_fused_adam(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """For ``run_world``: :func:`tests.training_runs.train_body` with the stand-in."""
    compat.prepare()
    with fused_adam():
        return train_body(rank, world_size, tree)
