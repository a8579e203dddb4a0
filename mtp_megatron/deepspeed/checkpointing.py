"""Saving and resuming a run under DeepSpeed: the engine's own files in the run's own folders.

``checkpoints/iter_0000100/`` holds what ``DeepSpeedEngine.save_checkpoint`` writes under that tag, beside the files
that every checkpoint of a run has (:mod:`mtp_megatron.training.checkpoint_files`). At another TP or DP the checkpoint
goes through DeepSpeed's universal format, in a folder beside it that is removed afterwards.
"""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mtp_megatron.data.blend import Blend
from mtp_megatron.deepspeed import universal
from mtp_megatron.deepspeed.generators import generators, restore_generators
from mtp_megatron.deepspeed.trainer import DeepSpeedTrainer
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training import checkpoint_files as files
from mtp_megatron.training.architecture import check_architecture, model_description
from mtp_megatron.training.recipe import Recipe

logger = logging.getLogger(__name__)


def save_checkpoint(recipe: Recipe, data: Blend, trainer: DeepSpeedTrainer, checkpoints: Path, step: int) -> Path:
    """Write the engine's checkpoint after the run's ``step``; collective over all ranks.

    Everything goes to a temporary folder that is renamed when it is whole; a crash at any moment leaves the previous
    checkpoint as it was.
    """
    rank = dist.get_rank()
    if rank == 0:
        files.prepare_temporary(checkpoints, step)
    dist.barrier()
    temporary = files.temporary_folder(checkpoints, step)
    state = {
        "iteration": step,
        "consumed_train_samples": recipe.train.batch_sizes.samples(step),
        "opt_param_scheduler": trainer.scheduler.state_dict(),
        "generators": generators(),
        universal.INFO: universal.information(trainer.model),
    }
    trainer.engine.save_checkpoint(str(checkpoints), tag=temporary.name, client_state=state, save_latest=False)
    dist.barrier()
    if rank == 0:
        description = model_description(recipe, data, step) | {"engine": _engine(trainer)}
        (temporary / files.CONFIG).write_text(json.dumps(description, indent=2))
        data.first.copy_tokenizer(temporary)
        final = files.publish(checkpoints, step)
        files.write_atomically(checkpoints / files.DEEPSPEED_LATEST, final.name)
        files.prune(checkpoints, recipe.run.keep_last, step, recipe.run.keep_every)
    dist.barrier()  # nobody goes on, and perhaps fails, before the checkpoint is the latest
    return files.iteration_folder(checkpoints, step)


def load_checkpoint(recipe: Recipe, trainer: DeepSpeedTrainer, folder: Path) -> int:
    """Restore everything that :func:`save_checkpoint` wrote, at this TP x DP; returns the step. Collective.

    DeepSpeed unpickles what it finds: resume your own runs only. At another TP the generators keep their fresh seeds,
    which shows in dropout alone.

    Raises:
        CheckpointError: another architecture, another engine or stage, or files that cannot be read.
    """
    check_architecture(folder, recipe)
    saved, here = files.read_mtp_config(folder)["engine"], _engine(trainer)
    _check_stage(folder, saved, here)
    layout = ("tensor", "data")
    if all(saved[key] == here[key] for key in layout):
        state = _load(trainer, folder)
    else:
        _check_universal(recipe, folder, saved, here)
        with universal.converted(folder) as converted, universal.loading(trainer.engine):
            state = _load(trainer, converted)
    trainer.scheduler.load_state_dict(state["opt_param_scheduler"])
    if hasattr(trainer.engine.optimizer, "clip_grad"):  # the checkpoint's, which the engine puts in place of its own
        trainer.engine.optimizer.clip_grad = recipe.optimizer.clip_grad
    if saved["tensor"] == here["tensor"]:
        restore_generators(state["generators"])
    elif dist.get_rank() == 0 and max(recipe.model.hidden_dropout, recipe.model.attention_dropout) > 0:
        logger.warning("resuming at another TP: dropout draws other numbers than the original layout would have")
    return int(state["iteration"])


def _engine(trainer: DeepSpeedTrainer) -> dict[str, Any]:
    """What of the engine decides which files it writes."""
    import deepspeed

    engine = trainer.engine
    return {
        "name": "deepspeed",
        "version": deepspeed.__version__,
        "zero_stage": trainer.stage,
        "tensor": engine.mp_world_size,
        "data": engine.dp_world_size,
    }


def _load(trainer: DeepSpeedTrainer, folder: Path) -> dict[str, Any]:
    try:
        path, state = trainer.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({error}). Name or restore another checkpoint of the run."
        ) from error
    if path is None or state is None:
        raise CheckpointError(f"{folder}: DeepSpeed finds no checkpoint in it. Name or restore another one of the run.")
    found: dict[str, Any] = state
    return found


def _check_stage(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    there, now = saved["zero_stage"], here["zero_stage"]
    if there != now and {there, now} != {1, 2}:
        raise CheckpointError(
            f"{folder}: saved with zero_optimization.stage={there}, and it is {now} here. Set it back (1 and 2 read "
            "each other's checkpoints), or start another run from these weights with run.load."
        )


def _check_universal(recipe: Recipe, folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    if saved["zero_stage"] == 0:
        problem = "hold what ZeRO shards, and this run is without ZeRO"
    elif recipe.heads.trainable != "all":
        problem = f"hold no frozen parameters, and heads.trainable={recipe.heads.trainable}"
    else:
        return
    raise CheckpointError(
        f"{folder}: saved at TP {saved['tensor']} x DP {saved['data']}, and this job is TP {here['tensor']} x DP "
        f"{here['data']}: DeepSpeed's universal checkpoints {problem}. Resume at the old layout, or start another run "
        "from these weights with run.load."
    )
