"""Writes a model as a Hugging Face folder: trunk + head 1 for every reader, the further heads beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mtp_megatron import __version__
from mtp_megatron.checkpoint.description import ModelDescription
from mtp_megatron.checkpoint.hf_config import generation_config, llama_config
from mtp_megatron.checkpoint.hf_tokenizer import tokenizer_files
from mtp_megatron.checkpoint.sharded import ShardedWriter, read_sharded
from mtp_megatron.checkpoint.source import Progress, TensorSource, read_finite, total_bytes
from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, Mapping, check_complete, expand
from mtp_megatron.data.tokenizer_store import entry_of
from mtp_megatron.errors import CheckpointError

MODEL_STEM = "model"
HEADS_STEM = "mtp_heads"
EXPORT_CONFIG = "mtp_config.json"
EXPORT_FORMAT = "mtp_megatron export"
GENERATION_CONFIG = "generation_config.json"


def write_folder(
    source: TensorSource,
    description: ModelDescription,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Progress,
) -> list[str]:
    """Write all files of the export into an existing empty folder and check what was written.

    Args:
        source: the model's tensors; memory is bounded by one shard and one tensor.
        description: what they are.
        folder: where to write.
        dtype: of the tensors written; None keeps each as it is stored.
        max_shard_bytes: size at which a new safetensors file is begun.
        progress: told about every tensor.

    Returns:
        Notices for the user.

    Raises:
        CheckpointError: tensors are missing, unknown, damaged, or hold NaN or infinity.
    """
    plan = {
        stem: expand(table, description.shape) for stem, table in ((MODEL_STEM, LLAMA), (HEADS_STEM, FURTHER_HEADS))
    }
    wanted = [mapping.megatron for mappings in plan.values() for mapping in mappings]
    check_complete(
        wanted, source.keys(), str(source.folder), remedy="Give the checkpoint with the mtp_config.json saved with it."
    )
    expected = {stem: _layout(mappings, source, description, dtype) for stem, mappings in plan.items()}
    stored = next(iter(expected[MODEL_STEM].values())).dtype
    config = llama_config(description, stored)
    total = total_bytes(source, dtype)
    for stem, mappings in plan.items():
        writer = ShardedWriter(folder, stem, max_shard_bytes)
        for mapping in mappings:
            weight = read_finite(source, mapping.megatron, dtype)
            for key, tensor in mapping.split(weight, description.shape).items():
                writer.add(key, tensor)
            progress(weight.nbytes, total)
        writer.close()
    tokenizer, notice = tokenizer_files(description.tokenizer, description.context)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    if GENERATION_CONFIG not in tokenizer:
        _write_json(folder / GENERATION_CONFIG, generation_config(description))
    _write_json(folder / EXPORT_CONFIG, _export_config(source, description, stored))
    for stem, tensors in expected.items():
        _verify(folder, stem, tensors)
    # Last, because no reader takes a folder without it for a model.
    _write_json(folder / "config.json", config)
    return [notice] if notice else []


def _layout(
    mappings: list[Mapping], source: TensorSource, description: ModelDescription, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The tensors to be written, on the meta device."""
    tensors: dict[str, torch.Tensor] = {}
    for mapping in mappings:
        tensors |= mapping.split(source.meta(mapping.megatron).to(dtype=dtype), description.shape)
    return tensors


def _verify(folder: Path, stem: str, expected: dict[str, torch.Tensor]) -> None:
    """Read back what was written: every tensor there, with its shape and type."""
    found = set()
    for key, tensor in read_sharded(folder, stem):
        wanted = expected.get(key)
        if wanted is None or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise CheckpointError(f"{folder}: {key} was not written as it should be. Check the disk and convert again.")
        found.add(key)
    if missing := sorted(set(expected) - found):
        raise CheckpointError(f"{folder}: {missing[0]} was not written. Check the disk and convert again.")


def _export_config(source: TensorSource, description: ModelDescription, dtype: torch.dtype) -> dict[str, Any]:
    """``mtp_config.json``: what the further heads are, and where the model comes from."""
    shape = description.shape
    return {
        "format": EXPORT_FORMAT,
        "version": 1,
        "num_heads": shape.num_heads,
        "num_trunk_layers": shape.num_trunk_layers,
        "heads": description.raw["heads"],
        "head_tensors": "mtp_heads.{i}.<names of a layer of the model>, i = 2..num_heads, reading the output of layer "
        "num_trunk_layers - 1; norm and unembedding are the model's",
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": entry_of(description.tokenizer),
        "source": {
            "checkpoint": source.folder.name,
            "fingerprint": source.fingerprint,
            "step": description.step,
            "mtp_megatron": description.raw.get("mtp_megatron"),
            "megatron_core": description.raw.get("megatron_core"),
        },
        "mtp_megatron": __version__,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
