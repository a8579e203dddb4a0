"""The layout of the paper's release, Meta's: ``consolidated*.pth``, ``params.json``, ``tokenizer.model``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_megatron.checkpoint.description import ModelDescription, describe_foreign, tokenizer_of
from mtp_megatron.checkpoint.hf_reader import PRECISIONS, read_json
from mtp_megatron.checkpoint.pth import PthFile, write_pth
from mtp_megatron.checkpoint.source import Progress, Remapped, TensorSource, fingerprint, read_finite, total_bytes
from mtp_megatron.checkpoint.tables import META, check_complete, expand
from mtp_megatron.data.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer
from mtp_megatron.data.tokenizer_store import entry_of, write_tokenizer
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import CONFIG

PARAMS = "params.json"
WEIGHTS = "consolidated*.pth"
_CONTEXT = 4096  # the paper's models; params.json does not say
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "n_future_tokens"),
    *("multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size"),
}
# Axis along which Meta's tensor parallel shards are cut, by the end of the key; norms are the same in all.
_SHARD_AXES = {
    **dict.fromkeys(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight"), 0),
    **dict.fromkeys(("wo.weight", "w2.weight"), 1),
}
_EMBEDDING = "tok_embeddings.weight"


class MetaFolder:
    """All tensors of a release by key, whole, whatever number of shards it comes in.

    Args:
        folder: where ``consolidated*.pth`` lie.
        hidden_size: tells along which axis the embedding is cut: Llama 1 and 2 cut the channels, later ones the rows.

    Raises:
        CheckpointError: files that are damaged or hold more than tensors, or shards that do not belong together.
    """

    def __init__(self, folder: Path, hidden_size: int) -> None:
        self.folder, self._hidden_size = folder, hidden_size
        files = sorted(folder.glob(WEIGHTS))
        if not files:
            raise CheckpointError(f"{folder}: no {WEIGHTS} in it. Give the whole folder of the release.")
        self.fingerprint = fingerprint([*files, folder / PARAMS])
        self._shards = [PthFile(file) for file in files]
        for shard in self._shards[1:]:
            if odd := sorted(set(shard.keys()) ^ set(self._shards[0].keys())):
                raise CheckpointError(
                    f"{shard.folder}: not of the same model as {files[0].name} ({', '.join(odd[:3])} in one only). "
                    "Give the shards of one release, and no other .pth files."
                )

    def keys(self) -> list[str]:
        """Keys of the release's tensors."""
        return self._shards[0].keys()

    def meta(self, key: str) -> Tensor:
        """The whole tensor without its values."""
        return self._join(key, [shard.meta(key) for shard in self._shards])

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        if self._axis(key) is None:
            return self._shards[0].read(key)
        return self._join(key, [shard.read(key) for shard in self._shards])

    def _axis(self, key: str) -> int | None:
        if len(self._shards) == 1:
            return None
        if key == _EMBEDDING:
            return 0 if self._shards[0].meta(key).shape[-1] == self._hidden_size else 1
        return next((axis for suffix, axis in _SHARD_AXES.items() if key.endswith(suffix)), None)

    def _join(self, key: str, parts: Sequence[Tensor]) -> Tensor:
        axis = self._axis(key)
        if axis is None:
            return parts[0]
        try:
            return torch.cat(list(parts), dim=axis)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise CheckpointError(
                f"{self.folder}: the shards of {key} do not fit together ({shapes}). Give the shards of one release."
            ) from error


def open_meta(folder: Path) -> tuple[TensorSource, ModelDescription]:
    """The model of a release: the last of ``layers`` is head 1, ``extra_heads`` are heads 2 to n.

    Raises:
        CheckpointError: settings or tensors that this package's model has not, damaged or hostile files.
        DataError: no tokenizer, or a damaged one.
    """
    path = folder / PARAMS
    params = read_json(path)
    if unknown := sorted(key for key in params if key not in _KNOWN and params[key] not in (None, False)):
        raise CheckpointError(
            f"{path}: {unknown[0]}={params[unknown[0]]!r} is not supported: it may make another model. Give a plain "
            "Llama, or the paper's release."
        )
    try:
        width, heads, layers = int(params["dim"]), int(params["n_heads"]), int(params["n_layers"])
        n = int(params.get("n_future_tokens") or 1)
        settings = {
            "num_trunk_layers": layers - n,
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_query_groups": int(params.get("n_kv_heads") or heads),
            "norm_epsilon": float(params["norm_eps"]),
            "rotary_base": int(params.get("rope_theta") or 10000),
            "seq_length": int(params.get("max_seq_len") or _CONTEXT),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: incomplete ({error!r}). Give the params.json of the release.") from error
    tensors = MetaFolder(folder, width)
    present = set(tensors.keys())
    shapes = {key: tensors.meta(key).shape for key in (_EMBEDDING, "layers.0.feed_forward.w1.weight") if key in present}
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise CheckpointError(f"{folder}: no {_EMBEDDING} or no layers.0. Give the whole release of a Llama.")
    (vocab_size, _), (ffn, _) = shapes.values()
    tokenizer = _tokenizer(folder)
    if tokenizer.vocab_size > vocab_size or params.get("vocab_size") not in (None, -1, vocab_size):
        raise CheckpointError(
            f"{folder}: {_EMBEDDING} has {vocab_size} rows, {PARAMS} says vocab_size={params.get('vocab_size')}, "
            f"{tokenizer.name} has {tokenizer.vocab_size} ids. Give files of one release."
        )
    description = describe_foreign(
        "meta",
        settings | {"vocab_size": vocab_size, "ffn_hidden_size": ffn},
        tokenizer=tokenizer,
        precision=PRECISIONS.get(tensors.meta(_EMBEDDING).dtype, "fp32"),
        heads={"n": n},
        where=path,
    )
    return Remapped(tensors, expand(META, description.shape), description.shape), description


def _tokenizer(folder: Path) -> Tokenizer:
    """The release's tokenizer, which may lie beside its models; of what was written here, as that says."""
    path = folder / CONFIG
    if path.is_file():
        try:
            return tokenizer_of(folder, read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: incomplete ({error!r}). Convert the model again.") from error
    for place in (folder, folder.parent):
        if (place / MODEL_FILE).is_file():
            return load_tokenizer(place / MODEL_FILE)
    raise CheckpointError(f"{folder}: no {MODEL_FILE}, here or one folder up. Put the release's tokenizer there.")


def write_meta(
    source: TensorSource, description: ModelDescription, folder: Path, *, dtype: torch.dtype | None, progress: Progress
) -> list[str]:
    """Write the model in the release's layout, one shard, into an existing empty folder; returns notices.

    Memory is bounded by one tensor.

    Raises:
        CheckpointError: a model that the layout cannot express, tensors missing, unknown, damaged or not finite.
    """
    shape = description.shape
    for applies, what in (
        (not shape.heads_are_layers, f"heads.kind={shape.head_kind}"),
        (shape.num_experts is not None, f"model.num_experts={shape.num_experts}"),
        (shape.tied_embeddings, "model.tied_embeddings=true"),
        (shape.qkv_bias, "model.qkv_bias=true"),
        (shape.qk_norm, "model.qk_norm=true"),
        (shape.head_dim * shape.num_attention_heads != shape.hidden_size, f"model.head_size={shape.head_dim}"),
        (description.rope_scaling is not None, "model.rope_scaling"),
    ):
        if applies:
            raise CheckpointError(f"{source.folder}: {what} has no place in Meta's layout. Convert with --to hf.")
    mappings = expand(META, shape)
    wanted = [mapping.megatron for mapping in mappings]
    check_complete(
        wanted, source.keys(), str(source.folder), remedy="Give the checkpoint with the mtp_config.json saved with it."
    )
    metas = [
        (part, meta)
        for mapping in mappings
        for part, meta in mapping.split(source.meta(mapping.megatron).to(dtype=dtype), shape).items()
    ]
    whole = {part: mapping for mapping in mappings for part in mapping.parts}
    total = total_bytes(source, dtype)
    kept: tuple[str, dict[str, Tensor]] = ("", {})  # the parts of one Megatron tensor come one after another

    def read(part: str) -> Tensor:
        nonlocal kept
        mapping = whole[part]
        if kept[0] != mapping.megatron:
            kept = ("", {})
            weight = read_finite(source, mapping.megatron, dtype)
            kept = (mapping.megatron, mapping.split(weight, shape))
            progress(weight.nbytes, total)
        return kept[1][part]

    write_pth(folder / "consolidated.00.pth", metas, read)
    tokenizer, remarks = description.tokenizer.files(), []
    if MODEL_FILE in tokenizer:
        (folder / MODEL_FILE).write_bytes(tokenizer[MODEL_FILE])
    else:  # the layout has no place for another one: beside it, for this package
        write_tokenizer(description.tokenizer, folder)
        record = {"tokenizer": entry_of(description.tokenizer), "vocab_size": shape.vocab_size}
        (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        remarks.append(
            f"no {MODEL_FILE}, which Meta's code looks for: the model's tokenizer is no sentencepiece model. {CONFIG} "
            "says which it is, for this package"
        )
    # Last, because no reader takes a folder without it for a model.
    (folder / PARAMS).write_text(json.dumps(_params(description), indent=2) + "\n", encoding="utf-8")
    return remarks


def _params(description: ModelDescription) -> dict[str, Any]:
    """``params.json``. ``n_layers`` counts every layer, ``extra_heads`` included."""
    shape = description.shape
    base = int(2 * 4 * shape.hidden_size / 3)
    # Meta's model takes 8/3 of dim, times a factor, rounded up to a multiple: the width itself gives the width.
    feed_forward: dict[str, Any] = {"multiple_of": 256}
    if -(-base // 256) * 256 != shape.ffn_hidden_size:
        feed_forward = {"multiple_of": shape.ffn_hidden_size}
        if base > shape.ffn_hidden_size:
            feed_forward["ffn_dim_multiplier"] = shape.ffn_hidden_size / base
    return {
        "dim": shape.hidden_size,
        "n_layers": shape.num_trunk_layers + shape.num_heads,
        "n_heads": shape.num_attention_heads,
        "n_kv_heads": shape.num_query_groups,
        "n_future_tokens": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "norm_eps": description.norm_epsilon,
        "rope_theta": description.rotary_base,
        "max_seq_len": description.context,
        **feed_forward,
    }
