"""Synthetic Megatron checkpoints without megatron: random tensors of any shape, cut into chunks as TP x PP would."""

from __future__ import annotations

import itertools
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mtp_megatron.checkpoint.source import expected_shape, model_shapes
from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, expand
from mtp_megatron.checkpoint.transforms import ModelShape
from mtp_megatron.data.tokenizer import ByteTokenizer, Tokenizer

# transformers builds models under `torch.device("meta")`, which works if torch has listed its constructors before the
# CPU stand-ins for megatron replace some: otherwise rotary frequencies stay uninitialised, without a word.
torch.utils._device._device_constructors()

SHAPE = ModelShape(
    num_trunk_layers=3,
    num_heads=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=257,
    padded_vocab_size=264,
    tied_embeddings=False,
)

# What Megatron-LM says about SHAPE's trunk and head 1 as a plain GPT.
MEGATRON_LM_ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
    "rotary_base": 10000,
    "norm_epsilon": 1e-5,
    "init_method_std": 0.02,
    "untie_embeddings_and_output_weights": True,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "params_dtype": torch.float32,
    "vocab_size": 257,
}


def random_tensors(
    shape: ModelShape = SHAPE, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Every tensor of a model by Megatron key, trunk layers one by one; scaled so that logits are of order one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model_shapes(shape)
    tensors = {}
    for mapping in expand((*LLAMA, *FURTHER_HEADS), shape):
        size = expected_shape(mapping.megatron, sizes)
        values = torch.randn(size, generator=generator)
        tensors[mapping.megatron] = (1 + values / 10 if len(size) == 1 else values * size[-1] ** -0.5).to(dtype)
    return tensors


def stack_trunk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trunk layers stacked along a new first axis, their experts behind that along another, as Megatron stores them."""
    stacked: dict[str, list[Tensor]] = {}
    experts: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+\.experts\.experts\.)\d+\.(.+)", key):
            experts.setdefault(match[1] + match[2], []).append(tensor)
    tensors = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    tensors |= {key: torch.stack(parts) for key, parts in experts.items()}
    result = {}
    for key, tensor in tensors.items():
        if key.startswith("decoder.layers."):
            stacked.setdefault("decoder.layers." + key.split(".", 3)[3], []).append(tensor)
        else:
            result[key] = tensor
    return result | {key: torch.stack(layers) for key, layers in stacked.items()}


def tensor_parallel_cuts(key: str, tensor: Tensor) -> Sequence[int]:
    """In how many pieces each axis is cut under TP2 with every trunk layer apart, and every expert, which is whole but
    for the two halves of its first matrix."""
    lead = [tensor.shape[0]] if "decoder.layers." in key else []
    if ".experts." in key:
        return [*lead, tensor.shape[1], 2 if "linear_fc1" in key else 1, 1]
    if ".router." in key:
        return [*lead, 1, 1]
    if "norm" in key:
        return [*lead, 1]
    if ".linear." in key:  # a head that every rank holds whole
        return [1] * tensor.dim()
    return [*lead, 1, 2] if "linear_proj" in key or "linear_fc2" in key else [*lead, 2, 1]


def write_torch_dist(
    folder: Path,
    tensors: dict[str, Tensor],
    cuts: Callable[[str, Tensor], Sequence[int]] = tensor_parallel_cuts,
    objects: dict[str, Any] | None = None,
) -> None:
    """Write the tensors as torch.distributed.checkpoint would, in two data files, with objects that are no tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"decoder.layers.mlp.linear_fc1._extra_state/shard_0_1": BytesStorageMetadata()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(2)]
    for key, tensor in tensors.items():
        edges = [
            [size * i // pieces for i in range(pieces + 1)]
            for size, pieces in zip(tensor.shape, cuts(key, tensor), strict=True)
        ]
        chunks = []
        for number, box in enumerate(itertools.product(*(itertools.pairwise(axis) for axis in edges))):
            offsets, sizes = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
            file = files[number % 2]
            start = file.tell()
            torch.save(tensor[tuple(slice(a, b) for a, b in box)].clone(), file)
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            storage[MetadataIndex(key, offsets)] = _StorageInfo(Path(file.name).name, start, file.tell() - start)
        described[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    for key, value in (objects or {}).items():
        start = files[0].tell()
        torch.save(value, files[0])
        described[key] = BytesStorageMetadata()
        info = _StorageInfo(Path(files[0].name).name, start, files[0].tell() - start)
        storage[MetadataIndex(key)] = info
    for file in files:
        file.close()
    metadata = Metadata(described, storage_data=storage, storage_meta=StorageMeta(folder, save_id=str(folder)))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def description(shape: ModelShape = SHAPE, tokenizer: Tokenizer | None = None, context: int = 128) -> dict[str, Any]:
    """``mtp_config.json`` as training writes it."""
    tokenizer = tokenizer or ByteTokenizer()
    return {
        "format": 1,
        "step": 7,
        "model": {
            "num_trunk_layers": shape.num_trunk_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "seq_length": context,
            "vocab_size": shape.vocab_size,
            "rotary_base": 10000,
            "norm_epsilon": 1e-5,
            "tied_embeddings": shape.tied_embeddings,
            "qk_norm": shape.qk_norm,
            "num_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "init_method_std": 0.02,
        },
        "heads": {
            "n": shape.num_heads,
            "kind": shape.head_kind,
            "arrangement": "parallel",
            "unembedding": "shared",
        },
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": shape.padded_vocab_size,
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "eod": tokenizer.eod,
            "file": "tokenizer.model" if tokenizer.files() else None,
        },
        "megatron_core": "0.16.1",
        "mtp_megatron": "0.1.0",
    }


def write_checkpoint(
    run: Path,
    shape: ModelShape = SHAPE,
    *,
    tensors: dict[str, Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    context: int = 128,
    **overrides: Any,
) -> Path:
    """A whole checkpoint at step 7 in a run folder; returns its ``iter_*`` folder.

    Args:
        tensors: by Megatron key; random ones when None.
        overrides: entries of ``mtp_config.json``.
    """
    folder = run / "checkpoints" / "iter_0000007"
    write_torch_dist(folder, stack_trunk(tensors or random_tensors(shape)))
    for name, content in (tokenizer.files() if tokenizer else {}).items():
        (folder / name).write_bytes(content)
    (folder / "mtp_config.json").write_text(json.dumps(description(shape, tokenizer, context) | overrides))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write ``files.json`` and the tracker, as training does last."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "files.json"}
    (folder / "files.json").write_text(json.dumps(sizes))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
