"""A checkpoint written by one process's modules and Adam, and read by another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adam:
    """What the optimizers of one rank hold: the step, and the moments of each parameter."""

    step: int
    moments: list[Tensor]


def adam_of(trainable: Any) -> Adam:
    steps, moments = set(), []
    for optimizer in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer]):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.optimizer.state[parameter]
                steps.add(int(state["step"] if "step" in state else group["step"]))
                moments += [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
    (step,) = steps
    return Adam(step, moments)


def trained(recipe: Any, folder: Path, save: bool) -> tuple[dict[str, Tensor], Adam]:
    """Build, then save to the folder or load from it: the weights by name, and Adam a step later."""
    from mtp_megatron.data.manifest import load_manifest
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
            save_checkpoint(recipe, load_manifest(folder / "data"), trainable, folder / "checkpoints", 3)
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
