"""An exported folder: its configuration, tokenizer and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_megatron.checkpoint.description import rope_scaling_of
from mtp_megatron.checkpoint.hf import EXPORT_CONFIG, EXPORT_FORMAT, HEADS_STEM, MODEL_STEM
from mtp_megatron.checkpoint.hf_config import FAMILIES, rope_settings
from mtp_megatron.checkpoint.sharded import read_sharded
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.data.tokenizer_store import stored_tokenizer
from mtp_megatron.errors import CheckpointError
from mtp_megatron.rope import RopeScaling


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of an exported model.

    Attributes:
        num_trunk_layers: layers shared by all heads.
        num_heads: future-token heads n, head 1 included.
        hidden_size, num_attention_heads, num_key_value_heads, head_dim, vocab_size: as in a Llama configuration.
        context: positions that the model was trained on.
        rope_theta: base of the rotary frequencies.
        norm_epsilon: added to the mean square inside RMSNorm.
        tied: the unembedding is the embedding.
        rope_scaling: how the rotary frequencies are lowered; None where they are not.
        qkv_bias: queries, keys and values have a bias (Qwen2).
        qk_norm: each query and key is normalised (Qwen3).
        num_experts: of each trunk layer; None: its MLP is dense, as a head's is in any case.
        moe_top_k: experts that each token goes through.
        head_kind: ``heads.kind`` of the training.
    """

    num_trunk_layers: int
    num_heads: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context: int
    rope_theta: float
    norm_epsilon: float
    tied: bool
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int | None = None
    moe_top_k: int = 0
    head_kind: str = "transformer"

    @property
    def heads_are_layers(self) -> bool:
        """Each head is a layer, head 1 the last one of the plain model; otherwise heads are maps of its output."""
        return self.head_kind == "transformer"


@dataclass(frozen=True)
class Export:
    """A folder that ``mtp-megatron convert`` wrote."""

    folder: Path
    config: DecoderConfig
    tokenizer: Tokenizer

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its Hugging Face key, one at a time."""
        yield from read_sharded(self.folder, MODEL_STEM)
        yield from read_sharded(self.folder, HEADS_STEM)


def open_export(folder: str | Path) -> Export:
    """Read an export's configuration and tokenizer; tensors stay on the disk.

    Raises:
        CheckpointError: not an export, or a damaged one.
        DataError: its tokenizer cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Make an export with `mtp-megatron convert`.")
    llama, heads = _read(folder / "config.json"), _read(folder / EXPORT_CONFIG)
    if heads.get("format") != EXPORT_FORMAT:
        raise CheckpointError(
            f"{folder / EXPORT_CONFIG}: not an export's (a training checkpoint's?). Give a folder that `mtp-megatron "
            "convert` wrote."
        )
    try:
        family = FAMILIES[llama["model_type"]]
        config = DecoderConfig(
            num_trunk_layers=heads["num_trunk_layers"],
            num_heads=heads["num_heads"],
            hidden_size=llama["hidden_size"],
            num_attention_heads=llama["num_attention_heads"],
            num_key_value_heads=llama["num_key_value_heads"],
            head_dim=llama["head_dim"],
            vocab_size=llama["vocab_size"],
            context=llama["max_position_embeddings"],
            rope_theta=llama["rope_parameters"]["rope_theta"],
            norm_epsilon=llama["rms_norm_eps"],
            tied=llama["tie_word_embeddings"],
            rope_scaling=rope_scaling_of(rope_settings(llama, folder / "config.json")),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            num_experts=llama["num_experts"] if family.experts else None,
            moe_top_k=llama["num_experts_per_tok"] if family.experts else 0,
            head_kind=heads["heads"]["kind"],
        )
        layers, entry, sha256 = llama["num_hidden_layers"], heads["tokenizer"], heads["tokenizer"]["sha256"]
        tokenizer = stored_tokenizer(folder, entry, config.vocab_size, flat=True)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: config.json or {EXPORT_CONFIG} lacks {error}. Convert the checkpoint again."
        ) from error
    if layers != config.num_trunk_layers + config.heads_are_layers:
        raise CheckpointError(
            f"{folder}: config.json has {layers} layers, {EXPORT_CONFIG} {config.num_trunk_layers} in the trunk"
            f"{' and head 1' if config.heads_are_layers else ''}: they belong to different exports. Convert the "
            "checkpoint again."
        )
    if not tokenizer.is_of(sha256):
        raise CheckpointError(f"{folder}: its tokenizer is not the model's. Convert the checkpoint again.")
    return Export(folder, config, tokenizer)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing. Give a folder that `mtp-megatron convert` wrote.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}). Convert the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged (no settings in it). Convert the checkpoint again.")
    return content
