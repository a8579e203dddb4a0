"""Saving and loading a run: megatron-core's distributed checkpoints, at any TP x PP x DP (files:
:mod:`.checkpoint_files`)."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.compat.checkpoints import (
    add_step,
    cast_parameters_again,
    fit_adam,
    follow_saved_names,
    keep_empty_masters_local,
    load_strategies,
    merge_in_place,
    set_learning_rates,
    take_unsaved_states,
)
from mtp_megatron.compat.optimizer_state import state_stays_on_its_ranks
from mtp_megatron.data.blend import Blend
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training import checkpoint_files as files
from mtp_megatron.training.architecture import check_architecture, model_description
from mtp_megatron.training.build import Trainable
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.rng import restore_rng_state, sharded_rng_state
from mtp_megatron.training.step import Trainer

if TYPE_CHECKING:
    from mtp_megatron.model import MTPGPTModel
    from mtp_megatron.training.background_save import BackgroundSave
    from mtp_megatron.training.checkpoint_writer import InProcessSave

# The only optimizer format that megatron-core loads exactly at another TP x PP and another DP.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
logger = logging.getLogger(__name__)


def save_checkpoint(recipe: Recipe, data: Blend, trainable: Trainable, checkpoints: Path, step: int) -> Path:
    """Write model, optimizer, schedule and generators after the run's ``step``; collective over all ranks.

    Everything goes to a temporary folder that is renamed when it is whole; a crash at any moment leaves the previous
    checkpoint as it was.
    """
    from mtp_megatron.training.checkpoint_writer import InProcessSave

    temporary = _new_folder(checkpoints, step)
    _save(_state_to_save(recipe, trainable, step), temporary, InProcessSave())
    if dist.get_rank() == 0:
        _publish(recipe, data, checkpoints, step)
    dist.barrier()  # nobody goes on, and perhaps fails, before the checkpoint is the latest
    return files.iteration_folder(checkpoints, step)


def begin_save(recipe: Recipe, data: Blend, trainable: Trainable, checkpoints: Path, step: int) -> BackgroundSave:
    """Copy to host memory what :func:`save_checkpoint` would write, and begin to write it; collective over all ranks.

    Training may go on as soon as this returns. The checkpoint is the latest after :meth:`.BackgroundSave.publish`, and
    holds the same.
    """
    from mtp_megatron.training.background_save import BackgroundSave
    from mtp_megatron.training.checkpoint_writer import HostCopies, InProcessSave

    temporary = _new_folder(checkpoints, step)
    copies = HostCopies(temporary)
    _save(_state_to_save(recipe, trainable, step), temporary, InProcessSave(copies))
    return BackgroundSave(
        step,
        files.iteration_folder(checkpoints, step),
        copies,
        partial(_publish, recipe, data, checkpoints, step),
    )


def _new_folder(checkpoints: Path, step: int) -> Path:
    """The empty folder that all ranks write to; collective."""
    if dist.get_rank() == 0:
        files.prepare_temporary(checkpoints, step)
    dist.barrier()
    return files.temporary_folder(checkpoints, step)


def _state_to_save(recipe: Recipe, trainable: Trainable, step: int) -> dict[str, Any]:
    """Everything of a checkpoint but what it is; collective."""
    with trainable.gathered_parameters():
        state = model_state(trainable.models)
        state["optimizer"] = _optimizer_state(recipe, trainable, state)
    if not recipe.optimizer.distributed:
        add_step(state["optimizer"])
    return state | {
        "opt_param_scheduler": trainable.scheduler.state_dict(),
        "rng_state": sharded_rng_state(),
        "iteration": step,
        "consumed_train_samples": recipe.train.batch_sizes.samples(step),
        "checkpoint_version": 3.0,
    }


def _save(state: dict[str, Any], folder: Path, strategy: InProcessSave) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=dict(_SHARDING))


def _publish(recipe: Recipe, data: Blend, checkpoints: Path, step: int) -> None:
    """On rank 0, when every rank has written: say what the checkpoint is, and make it the latest."""
    temporary = files.temporary_folder(checkpoints, step)
    (temporary / files.CONFIG).write_text(json.dumps(model_description(recipe, data, step), indent=2))
    data.first.copy_tokenizer(temporary)
    files.publish(checkpoints, step)
    files.prune(checkpoints, recipe.run.keep_last, step, recipe.run.keep_every)


def load_checkpoint(recipe: Recipe, trainable: Trainable, folder: Path) -> int:
    """Restore everything that :func:`save_checkpoint` wrote, at this layout; returns the step. Collective.

    At another TP x PP than the save's, the generators keep their fresh seeds: their states belong to the old grid. That
    shows in dropout alone.

    Raises:
        CheckpointError: another architecture, expert parallel on one side only (in delayed scaling: of another size),
            or files that cannot be read.
    """
    check_architecture(folder, recipe)
    saved = files.read_mtp_config(folder).get("parallel", {})
    check_expert_parallel(recipe, folder, saved.get("expert", 1))
    same_grid = all(saved.get(key) == getattr(recipe.parallel, key) for key in ("tensor", "pipeline"))
    state = model_state(trainable.models)
    state["optimizer"] = _optimizer_state(recipe, trainable, state, is_loading=True)
    if same_grid:
        state["rng_state"] = sharded_rng_state()
    loaded = read_state(state, folder)
    put_models(trainable.models, loaded)
    fit_adam(trainable.optimizer, loaded["optimizer"])
    set_learning_rates(loaded["optimizer"], recipe.optimizer.lr, recipe.optimizer.min_lr)
    with state_stays_on_its_ranks(timedelta(minutes=recipe.train.timeout_minutes)):
        trainable.optimizer.load_state_dict(loaded["optimizer"])
    if recipe.train.fp8_param:
        cast_parameters_again(trainable)
    trainable.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_grid:
        restore_rng_state(loaded["rng_state"])
    elif dist.get_rank() == 0 and max(recipe.model.hidden_dropout, recipe.model.attention_dropout) > 0:
        logger.warning("resuming at another TP x PP: dropout draws other numbers than the original layout would have")
    return int(loaded["iteration"])


def check_expert_parallel(recipe: Recipe, folder: Path, there: int) -> None:
    """Refuse to resume a checkpoint of another ``parallel.expert``, where that cannot go on as it was.

    Raises:
        CheckpointError: expert parallel on one side only; in delayed scaling, of another size.
    """
    here = recipe.parallel.expert
    if (there == 1) != (here == 1):
        raise CheckpointError(
            f"{folder}: saved with parallel.expert={there}, which cannot be resumed with {here}: shared experts have "
            "an optimizer of their own. Resume with parallel.expert "
            + ("= 1" if there == 1 else "> 1")
            + ", or start another run from the weights (run.load)."
        )
    if there != here and recipe.train.fp8 and recipe.train.fp8_recipe == "delayed":
        raise CheckpointError(
            f"{folder}: saved with parallel.expert={there}, which cannot be resumed with {here} in delayed scaling: "
            "megatron-core would give experts one another's scales (compat.checkpoints.leave_experts_scales). Resume "
            f"with parallel.expert={there}, or start another run from the weights (run.load)."
        )


def _optimizer_state(
    recipe: Recipe, trainable: Trainable, model: dict[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """The optimizer's sharded state beside the model's (:func:`model_state`)."""
    with state_stays_on_its_ranks(timedelta(minutes=recipe.train.timeout_minutes)):
        state: dict[str, Any] = trainable.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=metadata()
        )
    keep_empty_masters_local(state)
    return state


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint to resume from, decided by rank 0 for all."""
    latest = files.latest_complete(checkpoints) if dist.get_rank() == 0 else None
    if latest is not None:
        files.warn_of_older_tracker(checkpoints, latest)
    choice: list[Any] = [latest]
    dist.broadcast_object_list(choice, src=0, device=compat.device())
    folder: Path | None = choice[0]
    return folder


def metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {**_SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def chunk_keys(models: Sequence[MTPGPTModel]) -> list[str]:
    """Names of the chunks' entries, as in Megatron-LM: the tensors' own keys do not depend on them."""
    return ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]


def model_state(models: Sequence[MTPGPTModel]) -> dict[str, Any]:
    named = zip(chunk_keys(models), models, strict=True)
    return {key: model.sharded_state_dict(metadata=metadata()) for key, model in named}


def put_models(models: Sequence[MTPGPTModel], loaded: dict[str, Any]) -> None:
    for key, model in zip(chunk_keys(models), models, strict=True):
        model.load_state_dict(loaded[key])


def read_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        unsaved = take_unsaved_states(state, folder)
        follow_saved_names(state, folder)
        merge_in_place(state)
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), **load_strategies())
    except (CheckpointingException, CheckpointException, OSError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({error}). Name or restore another checkpoint of the run."
        ) from error
    for key, name in unsaved:
        loaded[key][name] = None
    return loaded


def count_parameters(trainable: Trainer) -> int:
    """Parameters of the whole model, embeddings included; collective."""
    from megatron.core import parallel_state, tensor_parallel

    dense = experts = 0
    for model in trainable.models:
        for parameter in model.parameters():
            numel = getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's ZeRO 3 leaves a piece of each
            if not getattr(parameter, "allreduce", True):
                experts += numel
            elif tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter) and not getattr(
                parameter, "shared", False
            ):
                dense += numel
    total = torch.tensor([dense, experts], dtype=torch.int64, device=compat.device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    # A stage's experts lie on EP ranks, and each of its tensor parallel ranks has counted those that it holds.
    shares = parallel_state.get_expert_model_parallel_world_size()
    return int(total[0] + total[1] * shares // parallel_state.get_tensor_model_parallel_world_size())
