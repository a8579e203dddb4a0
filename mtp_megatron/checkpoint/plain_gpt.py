"""Checkpoints of megatron-core and Megatron-LM (``torch_dist``) that are not of this package's own training.

A plain GPT's last layer becomes head 1; what :mod:`mtp_megatron.megatron_lm` trained has its heads already. Such a
checkpoint says what model it holds in the arguments that Megatron-LM stores (:mod:`.megatron_args`); one without
them is described by a recipe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_megatron.checkpoint.description import ModelDescription, describe_foreign
from mtp_megatron.checkpoint.hf_reader import PRECISIONS
from mtp_megatron.checkpoint.megatron_args import StoredArguments, read_arguments
from mtp_megatron.checkpoint.megatron_reader import MegatronCheckpoint
from mtp_megatron.checkpoint.source import TensorSource, check_shapes
from mtp_megatron.checkpoint.torch_dist import METADATA
from mtp_megatron.data.huggingface import HuggingFaceTokenizer
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import CONFIG, SIZES, TRACKER, iteration_folder

_EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HEAD = re.compile(r"heads\.(\d+)\.")
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
    # Without a tensor of their own, by which they would be noticed:
    "qk_l2_norm": (False, None),
    "no_rope_freq": (None,),
    "softmax_type": ("vanilla", None),
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": (None,),
    "use_mup": (False, None),
}
_SAME_NAME = ("hidden_size", "num_attention_heads", "ffn_hidden_size", "rotary_base", "init_method_std")


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
    """A GPT's tensors under this package's keys: the last layer is ``heads.0``, unless it has heads of its own.

    Attributes:
        num_layers: layers of the GPT, or of the trunk where there are heads.
        num_heads: heads of its own.
    """

    def __init__(self, checkpoint: MegatronCheckpoint) -> None:
        self.folder, self.fingerprint = checkpoint.folder, checkpoint.fingerprint
        self._checkpoint = checkpoint
        numbers = [int(match[1]) for key in checkpoint.keys() if (match := _LAYER.fullmatch(key))]  # noqa: SIM118
        self.num_layers = max(numbers, default=-1) + 1
        self.num_heads = len({match[1] for key in checkpoint.keys() if (match := _HEAD.match(key))})  # noqa: SIM118
        self._origins = {self._renamed(key): key for key in checkpoint.keys()}  # noqa: SIM118

    def _renamed(self, key: str) -> str:
        match = _LAYER.fullmatch(key)
        if match and int(match[1]) == self.num_layers - 1 and not self.num_heads:
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
    """The model of a plain GPT checkpoint with head 1 alone, or of one that Megatron-LM trained with heads.

    Args:
        folder: from :func:`plain_folder`.
        model_recipe: a recipe whose section ``model`` describes it; ``num_trunk_layers`` is one less than the layers of
            a plain GPT.

    Raises:
        CheckpointError: no description, another one than the tensors', or a model that this package has not.
        ConfigError: the recipe cannot be read.
    """
    source = PlainGPT(MegatronCheckpoint(folder))
    trunk = source.num_layers if source.num_heads else source.num_layers - 1
    if _EMBEDDING not in source.keys() or trunk < 1:  # noqa: SIM118
        raise CheckpointError(
            f"{folder}: no {_EMBEDDING}, or fewer than two layers: no GPT of Megatron whose last layer could become "
            "head 1. Give a GPT's distributed checkpoint."
        )
    embedding = source.meta(_EMBEDDING)
    rows = embedding.shape[0]
    heads: dict[str, Any] = {"n": max(source.num_heads, 1)}
    step, where = 0, folder
    if model_recipe is not None:
        model = _from_recipe(model_recipe, rows)
        if model["num_experts"] is not None:
            raise CheckpointError(
                f"{model_recipe}: model.num_experts={model['num_experts']} is not supported in a checkpoint of another "
                "training: its routers may have settings that a recipe cannot say. Train experts with this package."
            )
    else:
        arguments = read_arguments(folder)
        step, where = arguments.step, arguments.path
        model = _from_arguments(arguments, rows, trunk - source.num_layers)
        heads |= _heads_from_arguments(arguments)
    if model["num_trunk_layers"] != trunk or heads["n"] != max(source.num_heads, 1):
        raise CheckpointError(
            f"{folder}: has {source.num_layers} layers and {source.num_heads} heads, and its description "
            f"num_trunk_layers={model['num_trunk_layers']} and {heads['n']} heads. Describe it with "
            f"num_trunk_layers={trunk}."
        )
    padding = model.get("vocab_padding", 128)
    if -(-model["vocab_size"] // padding) * padding != rows:
        model["vocab_padding"] = rows
    description = describe_foreign(
        "megatron-gpt",
        model,
        tokenizer=HuggingFaceTokenizer({}, vocab_size=model["vocab_size"], eod=-1, bos=None, name=str(folder)),
        precision=PRECISIONS.get(embedding.dtype, "fp32"),
        heads=heads,
        where=where,
        step=step,
    )
    check_shapes(source, description.shape, "its description")
    return source, description


def _from_recipe(path: str | Path, rows: int) -> dict[str, Any]:
    from mtp_megatron.training.recipe_io import load_recipe

    model: dict[str, Any] = load_recipe(path).resolved(vocab_size=rows).model.model_dump(mode="json")
    return model


def _heads_from_arguments(arguments: StoredArguments) -> dict[str, Any]:
    """The recipe's section ``heads``: what the model is, not how it was trained."""
    names = {"n": "mtp_heads", "kind": "mtp_head_kind", "arrangement": "mtp_head_arrangement"}
    names["unembedding"] = "mtp_unembedding"
    given = {field: arguments.values.get(name) for field, name in names.items()}
    return {field: value for field, value in given.items() if value is not None}


def _from_arguments(stored: StoredArguments, rows: int, further_layers: int) -> dict[str, Any]:
    """The recipe's section ``model`` from Megatron-LM's arguments; ``further_layers`` is added to its layers."""
    path, arguments = stored.path, stored.values
    remedy = "Give --model RECIPE.yaml, a recipe whose section `model` describes it"
    for key, inert in _INERT.items():
        if key in arguments and arguments[key] not in inert:
            raise CheckpointError(f"{path}: {key}={arguments[key]!r} is not supported. Give a model of the Llama kind.")
    try:
        heads = arguments["num_attention_heads"]
        model = {key: arguments[key] for key in _SAME_NAME} | {
            "norm_epsilon": arguments.get("norm_epsilon") or arguments["layernorm_epsilon"],  # renamed in 0.16
            "num_trunk_layers": arguments["num_layers"] + further_layers,
            "num_query_groups": arguments["num_query_groups"] if arguments["group_query_attention"] else heads,
            "seq_length": arguments["max_position_embeddings"],
            "vocab_size": min(arguments.get("mtp_vocab_size") or arguments.get("vocab_size") or rows, rows),
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
