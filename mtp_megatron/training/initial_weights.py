"""Initial weights from another run's checkpoint, which may have more or fewer heads than this one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_megatron.checkpoint.deepspeed_reader import DeepSpeedCheckpoint, is_deepspeed, megatron_key
from mtp_megatron.checkpoint.tensor_parallel import split
from mtp_megatron.compat.checkpoints import cast_parameters_again, leave_experts_scales
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training import checkpoint_files as files
from mtp_megatron.training.architecture import check_architecture
from mtp_megatron.training.build import Trainable
from mtp_megatron.training.checkpointing import chunk_keys, model_state, put_models, read_state
from mtp_megatron.training.recipe import Recipe

if TYPE_CHECKING:
    from mtp_megatron.model import MTPGPTModel

_HEAD = re.compile(r"^(heads|unembedding_heads)\.(\d+)\.")


def load_weights(recipe: Recipe, trainable: Trainable, folder: Path) -> None:
    """Take the weights of a checkpoint, and nothing else, as initial weights. Collective.

    Raises:
        CheckpointError: another architecture, or files that cannot be read.
    """
    loaded = load_initial(recipe, trainable.models, folder)
    if not recipe.train.fp8_param:
        trainable.optimizer.reload_model_params()  # the fp32 masters follow the model
        return
    # A model in FP8 has rounded what was loaded: its masters follow the checkpoint.
    trainable.optimizer.reload_model_params(state_dict=loaded)
    cast_parameters_again(trainable)


def load_initial(recipe: Recipe, models: Sequence[MTPGPTModel], folder: Path) -> dict[str, Any]:
    """Put a checkpoint's weights into this rank's model chunks. Collective.

    Heads that the checkpoint lacks keep their fresh values or, with ``heads.new_heads=copy``, become copies of its head
    1, the last layer of the plain next-token model (and of its unembedding, where each head has its own). Heads that
    this model lacks are left behind.

    Returns:
        What was put in, a state dict by chunk (:func:`.checkpointing.chunk_keys`).

    Raises:
        CheckpointError: another architecture, or files that cannot be read.
    """
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    check_architecture(folder, recipe, initial=True)
    description = files.read_mtp_config(folder)
    known = int(description["heads"]["n"])
    state = model_state(models)
    if description.get("parallel", {}).get("expert", 1) != recipe.parallel.expert:
        leave_experts_scales(state)
    for chunk in state.values():
        for name in [name for name in chunk if is_new(name, known)]:
            del chunk[name]
    # As numbers in bf16, or a parameter in FP8 would be rounded before the optimizer sees it (0.19 loads in place).
    force_all_tensors_to_non_fp8(state)
    if is_deepspeed(folder):
        loaded = {"model": _shards(folder, models, known)}
    else:
        loaded = read_state(state, folder)
    for key, model in zip(chunk_keys(models), models, strict=True):
        whole: dict[str, Any] = {**model.state_dict(), **loaded[key]}
        if recipe.heads.new_heads == "copy":
            for name in [name for name in whole if is_new(name, known)]:
                if (source := source_of(name, whole)) is not None:
                    whole[name] = whole[source]
        loaded[key] = whole
    put_models(models, loaded)
    return loaded


def _shards(folder: Path, models: Sequence[MTPGPTModel], known: int) -> dict[str, Any]:
    """This rank's part of a DeepSpeed checkpoint, for the parameters that the checkpoint has."""
    from megatron.core import parallel_state

    if len(models) > 1 or parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise CheckpointError(
            f"{folder}: saved by a DeepSpeed engine, and this run has pipeline stages. Convert it first: mtp-megatron "
            f"convert {folder} --to megatron --output FOLDER, and give FOLDER."
        )
    checkpoint = DeepSpeedCheckpoint(folder)
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    names = [name for name, _ in models[0].named_parameters() if not is_new(name, known)]
    return {name: split(name, checkpoint.read(megatron_key(name)), size)[rank] for name in names}


def is_new(name: str, known: int) -> bool:
    """Whether parameter ``name`` belongs to a head past the first ``known`` ones."""
    match = _HEAD.match(name)
    if match is None:
        return False
    # unembedding_heads[0] belongs to head 2: head 1 uses the output layer.
    head = int(match[2]) + (1 if match[1] == "unembedding_heads" else 0)
    return head >= known


def source_of(name: str, state: dict[str, Any]) -> str | None:
    """The parameter that a new head's parameter is copied from.

    None for linear and Medusa heads: head 1 has no such parameter, and a fresh one already predicts what head 1 does.
    """
    room, _, rest = name.split(".", 2)
    candidates = (
        ("output_layer." + rest, "embedding.word_embeddings." + rest)
        if room == "unembedding_heads"
        else ("heads.0." + rest,)
    )
    return next((candidate for candidate in candidates if state.get(candidate) is not None), None)
