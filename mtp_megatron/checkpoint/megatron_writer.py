"""Writes a model as a Megatron distributed checkpoint: tensor by tensor, without a model and without megatron.

Loadable at any TP x PP. The files are those of torch.distributed.checkpoint's own writer, which asks for one tensor at
a time.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from mtp_megatron.checkpoint.description import ModelDescription
from mtp_megatron.checkpoint.source import Progress, TensorSource, read_finite, total_bytes
from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, check_complete, expand
from mtp_megatron.data.tokenizer_store import write_tokenizer
from mtp_megatron.training import checkpoint_files as files

_TRUNK_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.experts)\.(\d+)\.(.+)")
_LINEAR = re.compile(r"(.+\.linear_(?:qkv|proj|fc1|fc2))\.weight")
# dist_checkpointing's metadata.json: which reader to take.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Piece:
    """One chunk of a stored tensor: a whole tensor, or a trunk layer's slice of the stacked one (or its expert's).

    ``stacked`` counts the axes that the stored tensor has before the piece's own.
    """

    key: str
    stored: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    stacked: int = 0


def write_megatron(
    source: TensorSource, description: ModelDescription, folder: Path, *, dtype: torch.dtype | None, progress: Progress
) -> list[str]:
    """Write ``iter_*`` with its description and tokenizer, and the tracker, into an existing empty folder.

    Memory is bounded by one tensor. Returns notices (none).

    Raises:
        CheckpointError: tensors missing, unknown, damaged or not finite.
    """
    mappings = expand((*LLAMA, *FURTHER_HEADS), description.shape)
    wanted = [mapping.megatron for mapping in mappings]
    check_complete(
        wanted, source.keys(), str(source.folder), remedy="Give the checkpoint with the mtp_config.json saved with it."
    )
    target = files.prepare_temporary(folder, description.step)
    planner = _LazyPlanner(source, list(_pieces(wanted, source, description, dtype)), dtype, progress)
    try:
        save({}, storage_writer=FileSystemWriter(target), planner=planner, no_dist=True)
    except CheckpointException as error:  # torch's wrapper of whatever a rank raised; there is one rank
        (cause, _), *_ = error.failures.values()
        raise cause from error
    (target / "metadata.json").write_text(json.dumps(_BACKENDS), encoding="utf-8")
    torch.save({"iteration": description.step, "checkpoint_version": 3.0}, target / "common.pt")
    raw = description.raw
    if dtype is not None:
        raw = raw | {"precision": {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]}
    (target / files.CONFIG).write_text(json.dumps(raw, indent=2), encoding="utf-8")
    write_tokenizer(description.tokenizer, target)
    files.publish(folder, description.step)
    return []


def _pieces(
    keys: Iterable[str], source: TensorSource, description: ModelDescription, dtype: torch.dtype | None
) -> Iterable[_Piece]:
    shape = description.shape
    for key in keys:
        meta = source.meta(key).to(dtype=dtype)
        sizes, match = tuple(meta.shape), _TRUNK_LAYER.fullmatch(key)
        if match is None:
            yield _Piece(key, key, sizes, (0,) * len(sizes), sizes, meta.dtype)
        else:
            name, at, extent = match[2], [int(match[1])], [shape.num_trunk_layers]
            if expert := _EXPERT.fullmatch(name):
                name = f"{expert[1]}.{expert[3]}"
                at, extent = [*at, int(expert[2])], [*extent, shape.num_experts or 0]
            stored, offsets = f"decoder.layers.{name}", (*at, *(0 for _ in sizes))
            box = (*(1 for _ in at), *sizes)
            yield _Piece(key, stored, (*extent, *sizes), offsets, box, meta.dtype, stacked=len(at))


def _extra_states(pieces: Iterable[_Piece]) -> Iterable[str]:
    """Keys of the empty objects that Megatron's linear layers store beside their weights, and miss where absent."""
    for piece in pieces:
        if match := _LINEAR.fullmatch(piece.stored):
            at, extent = piece.offsets[: piece.stacked] or (0,), piece.size[: piece.stacked] or (1,)
            yield f"{match[1]}._extra_state/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, extent))}"


class _LazyPlanner(SavePlanner):
    """A plan of chunks whose values are read when they are about to be written."""

    def __init__(
        self, source: TensorSource, pieces: list[_Piece], dtype: torch.dtype | None, progress: Progress
    ) -> None:
        self._source, self._dtype, self._progress = source, dtype, progress
        self._pieces = {MetadataIndex(piece.stored, torch.Size(piece.offsets)): piece for piece in pieces}
        self._extra = list(_extra_states(pieces))
        self._total = total_bytes(source, dtype)

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the plan is known."""

    def create_local_plan(self) -> SavePlan:
        """Every chunk and every extra state."""
        tensors = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.size),
                ),
            )
            for index, piece in self._pieces.items()
        ]
        objects = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._extra]
        return SavePlan(tensors + objects)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The index that becomes ``.metadata``."""
        plans, metadata = create_default_global_save_plan(all_plans)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan, unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The values of one chunk."""
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)
            return content
        piece = self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        weight = read_finite(self._source, piece.key, self._dtype)
        self._progress(weight.nbytes, self._total)
        return weight.reshape(piece.sizes).contiguous()
