"""Which layout a folder is in, told by its files."""

from __future__ import annotations

from pathlib import Path

from mtp_megatron.checkpoint.deepspeed_reader import DeepSpeedCheckpoint, deepspeed_folder
from mtp_megatron.checkpoint.description import ModelDescription, describe
from mtp_megatron.checkpoint.hf_reader import CONFIG, open_hf
from mtp_megatron.checkpoint.layouts import SOURCES
from mtp_megatron.checkpoint.megatron_reader import open_checkpoint
from mtp_megatron.checkpoint.meta import PARAMS, WEIGHTS, open_meta
from mtp_megatron.checkpoint.plain_gpt import open_plain, plain_folder
from mtp_megatron.checkpoint.source import TensorSource
from mtp_megatron.checkpoint.torch_dist import METADATA
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import TRACKER, list_iterations

KINDS = tuple(SOURCES)
_LOOKED_FOR = {
    "hf": f"{CONFIG} with *.safetensors or pytorch_model*.bin",
    "meta": f"{PARAMS} with {WEIGHTS}",
    "megatron": f"iter_*, {METADATA}, or a run's checkpoints",
    "deepspeed": "mp_rank_*_model_states.pt, or a run's checkpoints",
}


def open_source(
    path: str | Path, kind: str = "auto", *, model_recipe: str | Path | None = None
) -> tuple[TensorSource, ModelDescription]:
    """The model in a folder, by Megatron's keys, and what it is.

    Args:
        path: a Hugging Face folder, a release in Meta's layout, or a run, checkpoints folder or ``iter_*`` of Megatron
            or DeepSpeed.
        kind: one of :data:`KINDS`, or ``"auto"``.
        model_recipe: recipe that describes a Megatron checkpoint which does not describe itself.

    Raises:
        CheckpointError: no layout or more than one, or what the layout's reader refuses.
        ConfigError: ``model_recipe`` cannot be read.
        DataError: the tokenizer cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. Give a folder that holds a model.")
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file. Give the folder that holds the model.")
    if kind == "auto":
        kind = detect(path)
    if kind == "hf":
        return open_hf(path)
    if kind == "meta":
        return open_meta(path)
    if kind == "deepspeed":
        pieces = DeepSpeedCheckpoint(deepspeed_folder(path) or path)
        return pieces, describe(pieces)
    plain = plain_folder(path)
    if plain is not None:
        return open_plain(plain, model_recipe)
    checkpoint = open_checkpoint(path)
    return checkpoint, describe(checkpoint)


def detect(folder: Path) -> str:
    """The layout of ``folder``: one of :data:`KINDS`.

    Raises:
        CheckpointError: none, or more than one.
    """
    has_tensors = any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "pytorch_model*.bin*"))
    deepspeed = deepspeed_folder(folder) is not None
    signs = {
        "deepspeed": deepspeed,
        "hf": (folder / CONFIG).is_file() and has_tensors,
        "meta": (folder / PARAMS).is_file() and any(folder.glob(WEIGHTS)),
        "megatron": (folder / METADATA).exists() or (not deepspeed and _is_run(folder)),
    }
    found = [kind for kind, sign in signs.items() if sign]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: ambiguous, it looks like {' and '.join(found)} at once. Say which with --from "
            f"{' or '.join(found)}."
        )
    looked = "; ".join(f"{kind}: {what}" for kind, what in _LOOKED_FOR.items())
    raise CheckpointError(f"{folder}: no model in it. Looked for {looked}.")


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run, its checkpoints folder or one checkpoint, by its names."""
    if (folder / TRACKER).exists() or folder.name.startswith("iter_"):
        return True
    return any(list_iterations(place) for place in (folder, folder / "checkpoints"))
