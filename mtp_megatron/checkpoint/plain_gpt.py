"""Plain GPT checkpoints of megatron-core and Megatron-LM (``torch_dist``): their last layer becomes head 1.

Such a checkpoint says what model it holds in the arguments that Megatron-LM pickles into ``common.pt``. They are read
with an unpickler that makes an inert record of every object, so nothing in the file is run. A checkpoint without them
is described by a recipe.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_megatron.checkpoint.carried_tokenizer import CarriedTokenizer
from mtp_megatron.checkpoint.description import ModelDescription, describe_foreign
from mtp_megatron.checkpoint.hf_reader import PRECISIONS
from mtp_megatron.checkpoint.megatron_reader import MegatronCheckpoint
from mtp_megatron.checkpoint.source import TensorSource, check_shapes
from mtp_megatron.checkpoint.torch_dist import METADATA
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import CONFIG, SIZES, TRACKER, iteration_folder

COMMON = "common.pt"
_EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Arguments of Megatron-LM under which a model is another one: the values that mean nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0, None),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "num_experts": (None,),
    "multi_latent_attention": (False, None),
    "mtp_num_layers": (None, 0),
    "window_size": (None,),
    "apply_layernorm_1p": (False, None),
}
_SAME_NAME = ("hidden_size", "num_attention_heads", "ffn_hidden_size", "rotary_base", "norm_epsilon", "init_method_std")


def plain_folder(path: Path) -> Path | None:
    """The ``iter_*`` folder of a checkpoint that this package did not write, None where there is none."""
    folder = path
    if not (path / METADATA).exists():
        try:
            folder = iteration_folder(path, int((path / TRACKER).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
    ours = (folder / CONFIG).exists() or (folder / SIZES).exists()
    return folder if (folder / METADATA).exists() and not ours else None


class PlainGPT:
    """A plain GPT's tensors under this package's keys: the last layer is ``heads.0``."""

    def __init__(self, checkpoint: MegatronCheckpoint) -> None:
        self.folder, self.fingerprint = checkpoint.folder, checkpoint.fingerprint
        self._checkpoint = checkpoint
        numbers = [int(match[1]) for key in checkpoint.keys() if (match := _LAYER.fullmatch(key))]  # noqa: SIM118
        self.num_layers = max(numbers, default=-1) + 1
        self._origins = {self._renamed(key): key for key in checkpoint.keys()}  # noqa: SIM118

    def _renamed(self, key: str) -> str:
        match = _LAYER.fullmatch(key)
        if match and int(match[1]) == self.num_layers - 1:
            return f"heads.0.{match[2]}"
        return "final_norm.weight" if key == "decoder.final_layernorm.weight" else key

    def keys(self) -> list[str]:
        """Keys of the model's tensors."""
        return list(self._origins)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values."""
        return self._checkpoint.meta(self._origins[key])

    def read(self, key: str) -> Tensor:
        """The values."""
        return self._checkpoint.read(self._origins[key])


def open_plain(folder: Path, model_recipe: str | Path | None) -> tuple[TensorSource, ModelDescription]:
    """The model of a plain GPT checkpoint with head 1 alone.

    Args:
        folder: from :func:`plain_folder`.
        model_recipe: a recipe whose section ``model`` describes it; ``num_trunk_layers`` is one less than its layers.

    Raises:
        CheckpointError: no description, another one than the tensors', or a model that this package has not.
        ConfigError: the recipe cannot be read.
    """
    source = PlainGPT(MegatronCheckpoint(folder))
    if _EMBEDDING not in source.keys() or source.num_layers < 2:  # noqa: SIM118
        raise CheckpointError(
            f"{folder}: no {_EMBEDDING}, or fewer than two layers: no GPT of Megatron whose last layer could become "
            "head 1. Give a GPT's distributed checkpoint."
        )
    embedding = source.meta(_EMBEDDING)
    rows = embedding.shape[0]
    model = _from_recipe(model_recipe, rows) if model_recipe is not None else _from_arguments(folder, rows)
    if model["num_trunk_layers"] != source.num_layers - 1:
        raise CheckpointError(
            f"{folder}: has {source.num_layers} layers, and its description num_trunk_layers="
            f"{model['num_trunk_layers']} and head 1. Describe it with num_trunk_layers={source.num_layers - 1}."
        )
    padding = model.get("vocab_padding", 128)
    if -(-model["vocab_size"] // padding) * padding != rows:
        model["vocab_padding"] = rows
    description = describe_foreign(
        "megatron-gpt",
        model,
        tokenizer=CarriedTokenizer({}, vocab_size=model["vocab_size"], eod=-1, bos=None, name=str(folder)),
        precision=PRECISIONS.get(embedding.dtype, "fp32"),
        heads={"n": 1},
        where=folder / COMMON,
    )
    check_shapes(source, description.shape, "its description")
    return source, description


def _from_recipe(path: str | Path, rows: int) -> dict[str, Any]:
    from mtp_megatron.training.recipe_io import load_recipe

    model: dict[str, Any] = load_recipe(path).resolved(vocab_size=rows).model.model_dump(mode="json")
    return model


def _from_arguments(folder: Path, rows: int) -> dict[str, Any]:
    """The recipe's section ``model`` from Megatron-LM's arguments."""
    path = folder / COMMON
    arguments = vars(_read_arguments(path))
    remedy = "Give --model RECIPE.yaml, a recipe whose section `model` describes it"
    for key, inert in _INERT.items():
        if key in arguments and arguments[key] not in inert:
            raise CheckpointError(f"{path}: {key}={arguments[key]!r} is not supported. Give a model of the Llama kind.")
    try:
        heads = arguments["num_attention_heads"]
        model = {key: arguments[key] for key in _SAME_NAME} | {
            "num_trunk_layers": arguments["num_layers"] - 1,
            "num_query_groups": arguments["num_query_groups"] if arguments["group_query_attention"] else heads,
            "seq_length": arguments["max_position_embeddings"],
            "vocab_size": min(arguments.get("vocab_size") or rows, rows),
            "tied_embeddings": not arguments["untie_embeddings_and_output_weights"],
            "head_size": arguments.get("kv_channels"),
            "qkv_bias": bool(arguments.get("add_qkv_bias")),
            "qk_norm": bool(arguments.get("qk_layernorm")),
        }
        if arguments.get("use_rope_scaling"):
            model |= {"rope_scaling": "llama3", "rope_scaling_factor": arguments["rope_scaling_factor"]}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: holds no complete arguments of Megatron-LM ({error}). {remedy}.") from error
    return model


class _Inert:
    """Stands for any object of the pickle."""

    def __init__(self, *arguments: Any, **settings: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def __call__(self, *arguments: Any) -> _Inert:
        return self


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return None


def _read_arguments(path: Path) -> Any:
    """Megatron-LM's ``args``; an object without attributes where there are none.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = _InertUnpickler(io.BytesIO(archive.read(name))).load()
        return content.get("args") or _Inert()
    except (
        *(OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError),
        *(EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError),
    ) as error:
        raise CheckpointError(
            f"{path}: missing or damaged ({error}). Copy the checkpoint again, or describe it with --model RECIPE.yaml."
        ) from error
