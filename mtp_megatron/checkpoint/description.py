"""What a model is: the content of ``mtp_config.json``, read, checked, and made for models from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from mtp_megatron import __version__
from mtp_megatron.checkpoint.source import TensorSource, check_shapes
from mtp_megatron.checkpoint.transforms import ModelShape
from mtp_megatron.config import HeadsConfig
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.data.tokenizer_store import entry_of, stored_tokenizer
from mtp_megatron.errors import CheckpointError
from mtp_megatron.rope import RopeScaling
from mtp_megatron.training.checkpoint_files import CONFIG, read_mtp_config
from mtp_megatron.training.recipe import ModelSection

# Heads that read the trunk side by side, with one unembedding: what the other layouts can express.
_EXPORTABLE_HEADS = {"arrangement": "parallel", "unembedding": "shared"}


@dataclass(frozen=True)
class ModelDescription:
    """A model, enough to write its configuration and to load its tokenizer.

    Attributes:
        shape: sizes of its tensors.
        context: positions it was trained on.
        rotary_base: base of the rotary frequencies.
        norm_epsilon: added to the mean square inside RMSNorm.
        step: of the run that it comes from, passed-over steps included; 0 for a model from elsewhere.
        tokenizer: what made its ids.
        raw: content of ``mtp_config.json``.
        rope_scaling: how the rotary frequencies are lowered, None where they are not.
        moe_top_k: experts that each token goes through; None: the trunk has none.
    """

    shape: ModelShape
    context: int
    rotary_base: float
    norm_epsilon: float
    step: int
    tokenizer: Tokenizer
    raw: dict[str, Any]
    rope_scaling: RopeScaling | None = None
    moe_top_k: int | None = None


def describe(checkpoint: TensorSource) -> ModelDescription:
    """Read and check the description of a checkpoint.

    Raises:
        CheckpointError: missing or inconsistent description, heads that no other layout can hold, another tokenizer.
        DataError: the tokenizer's file cannot be read.
    """
    path = checkpoint.folder / CONFIG
    raw = read_mtp_config(checkpoint.folder)
    try:
        tokenizer = tokenizer_of(checkpoint.folder, raw)
        description = from_raw(raw, tokenizer)
        different = _not_exportable(raw["heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: incomplete or of another version ({error!r}). Give a checkpoint that `mtp-megatron` wrote."
        ) from error
    _refuse(different, path)
    if description.shape.vocab_size < tokenizer.vocab_size:
        raise CheckpointError(
            f"{path}: vocab_size={description.shape.vocab_size} is below its tokenizer's {tokenizer.vocab_size}. "
            "Give the tokenizer and description that were saved with the checkpoint."
        )
    check_shapes(checkpoint, description.shape, CONFIG)
    return description


def _not_exportable(heads: dict[str, Any]) -> list[str]:
    return [f"heads.{key}={heads[key]}" for key, value in _EXPORTABLE_HEADS.items() if heads[key] != value]


def _refuse(different: list[str], path: Path) -> None:
    if different:
        raise CheckpointError(
            f"{path}: {', '.join(different)} cannot be written in another layout. Train with "
            f"{', '.join(f'heads.{key}={value}' for key, value in _EXPORTABLE_HEADS.items())} to convert."
        )


def from_raw(raw: dict[str, Any], tokenizer: Tokenizer) -> ModelDescription:
    """The description in the content of an ``mtp_config.json``; settings younger than the file have their defaults."""
    model = raw["model"]
    return ModelDescription(
        shape=shape_of(model, raw["heads"], int(raw["vocab_size"]), int(raw["padded_vocab_size"])),
        context=int(model["seq_length"]),
        rotary_base=float(model["rotary_base"]),
        norm_epsilon=float(model["norm_epsilon"]),
        step=int(raw["step"]),
        tokenizer=tokenizer,
        raw=raw,
        rope_scaling=rope_scaling_of(model),
        moe_top_k=moe_top_k_of(model),
    )


def shape_of(model: dict[str, Any], heads: dict[str, Any], vocab_size: int, padded_vocab_size: int) -> ModelShape:
    """Sizes from a recipe's sections ``model`` and ``heads``; settings younger than the file have their defaults."""
    model = {**_optional_settings(), **model}
    head_size, experts, width = (model[name] for name in ("head_size", "num_experts", "moe_ffn_hidden_size"))
    return ModelShape(
        num_trunk_layers=int(model["num_trunk_layers"]),
        num_heads=int(heads["n"]),
        hidden_size=int(model["hidden_size"]),
        ffn_hidden_size=int(model["ffn_hidden_size"]),
        num_attention_heads=int(model["num_attention_heads"]),
        num_query_groups=int(model["num_query_groups"]),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        tied_embeddings=bool(model["tied_embeddings"]),
        head_size=None if head_size is None else int(head_size),
        qkv_bias=bool(model["qkv_bias"]),
        qk_norm=bool(model["qk_norm"]),
        num_experts=None if experts is None else int(experts),
        moe_ffn_hidden_size=None if experts is None or width is None else int(width),
        head_kind=str(heads.get("kind", "transformer")),
    )


def moe_top_k_of(model: dict[str, Any]) -> int | None:
    """Experts that each token goes through in a model that a recipe's section ``model`` describes; None: no experts."""
    model = {**_optional_settings(), **model}
    return None if model["num_experts"] is None else int(model["moe_top_k"])


def moe_aux_loss_of(model: dict[str, Any]) -> float:
    """Weight of the load-balancing loss in a model that a recipe's section ``model`` describes."""
    return float({**_optional_settings(), **model}["moe_aux_loss"])


def rope_scaling_of(model: dict[str, Any]) -> RopeScaling | None:
    """How a recipe's section ``model`` lowers the rotary frequencies; settings that are absent have their defaults."""
    model = {**_optional_settings(), **model}
    if model["rope_scaling"] is None:
        return None
    return RopeScaling(
        model["rope_scaling"],
        float(model["rope_scaling_factor"]),
        float(model["rope_low_freq_factor"]),
        float(model["rope_high_freq_factor"]),
        int(model["rope_original_context"]),
    )


def describe_foreign(
    source: str,
    model: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    precision: str,
    heads: dict[str, Any],
    where: Path,
    step: int = 0,
) -> ModelDescription:
    """The description of a model from elsewhere.

    Args:
        source: the layout it comes in.
        model: settings of the recipe's section ``model`` that describe it, ``vocab_size`` among them.
        tokenizer: its tokenizer.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: the type of its tensors.
        heads: settings of the recipe's section ``heads``.
        where: the file that the settings come from, for messages.
        step: of the run that it comes from; 0: not known.

    Raises:
        CheckpointError: settings that describe no model of this package, or heads that no other layout can hold.
    """
    try:
        section = ModelSection.model_validate(model)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{where}: {'.'.join(map(str, first['loc']))}={first['input']!r} describes no model ({first['msg']}). Give "
            "the configuration that belongs to the model."
        ) from error
    if section.vocab_size is None:
        raise ValueError("model.vocab_size is not known")
    padded = -(-section.vocab_size // section.vocab_padding) * section.vocab_padding
    described = HeadsConfig.parse(heads).model_dump(mode="json")
    _refuse(_not_exportable(described), where)
    raw = {
        "format": 1,
        "step": step,
        "model": section.model_dump(mode="json"),
        "heads": described,
        "vocab_size": section.vocab_size,
        "padded_vocab_size": padded,
        "tokenizer": entry_of(tokenizer),
        "data_fingerprint": None,
        "precision": precision,
        "parallel": {},
        "mtp_megatron": __version__,
        "source": {"layout": source, "folder": where.parent.name},
    }
    return from_raw(raw, tokenizer)


def _optional_settings() -> dict[str, Any]:
    names = ("head_size", "qkv_bias", "qk_norm", "num_experts")
    families = (name for name in ModelSection.model_fields if name.startswith(("rope_", "moe_")))
    return {name: ModelSection.model_fields[name].default for name in (*names, *families)}


def tokenizer_of(folder: Path, raw: dict[str, Any]) -> Tokenizer:
    """The tokenizer that lies in a folder with an ``mtp_config.json``, whose content ``raw`` is.

    Raises:
        CheckpointError: it is not the one that the content means.
        DataError: its files are missing or cannot be read.
        KeyError, TypeError, ValueError: the content lacks something.
    """
    entry = raw["tokenizer"]
    tokenizer = stored_tokenizer(folder, entry, int(raw["vocab_size"]))
    if not tokenizer.is_of(entry["sha256"]):
        raise CheckpointError(
            f"{tokenizer.name}: not the tokenizer that the checkpoint was trained with (sha256 "
            f"{tokenizer.sha256[:12]}, expected {str(entry['sha256'])[:12]}). Put the original files back."
        )
    return tokenizer
