"""Which engine trains a run: megatron-core alone, or DeepSpeed; the loop is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.step import Trainer

if TYPE_CHECKING:
    from mtp_megatron.training.background_save import BackgroundSave


@dataclass(frozen=True)
class Host:
    """Building, saving and loading what trains. Each function is collective over all ranks.

    Attributes:
        build: ``(recipe, initial)`` -> a :class:`.step.Trainer` with the weights of the checkpoint ``initial``, or with
            fresh ones.
        save: ``(recipe, data, trainer, checkpoints, step)`` -> the checkpoint's folder.
        load: ``(recipe, trainer, folder)`` -> the step at which that checkpoint was saved.
        begin_save: as ``save`` -> a :class:`.background_save.BackgroundSave` (``train.async_save``); None under
            DeepSpeed, where the setting is refused.
    """

    build: Callable[[Recipe, Path | None], Trainer]
    save: Callable[..., Path]
    load: Callable[..., int]
    begin_save: Callable[..., BackgroundSave] | None = None


def host_of(recipe: Recipe) -> Host:
    """The host that ``run.deepspeed`` chooses; only that one is imported."""
    if recipe.run.deepspeed is not None:
        from mtp_megatron.deepspeed import checkpointing as deepspeed
        from mtp_megatron.deepspeed.trainer import build_trainer

        return Host(build_trainer, deepspeed.save_checkpoint, deepspeed.load_checkpoint)
    from mtp_megatron.training import checkpointing

    return Host(
        _build_on_megatron, checkpointing.save_checkpoint, checkpointing.load_checkpoint, checkpointing.begin_save
    )


def _build_on_megatron(recipe: Recipe, initial: Path | None) -> Trainer:
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.initial_weights import load_weights

    trainable = build_trainable(recipe)
    if initial is not None:
        load_weights(recipe, trainable, initial)
    return trainable
