"""Reads the model tensors of a Megatron distributed checkpoint: no model, no process group, no pickle is run.

Memory is bounded by the tensor asked for plus one chunk of it, whatever the checkpoint's size and the TP x PP it was
saved at.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtp_megatron.checkpoint.torch_dist import METADATA, StoredChunk, StoredTensor, read_index
from mtp_megatron.compat.checkpoints import NORM_BEFORE_EXPERTS
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import find_checkpoint, problem_of

# Trunk layers are stacked along a leading axis: `decoder.layers.<rest>` [layers, ...] is `decoder.layers.{k}.<rest>`.
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
# So are experts, behind that axis: `<layer>.mlp.experts.experts.<rest>` [experts, ...] is
# `<layer>.mlp.experts.experts.{e}.<rest>`.
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(?!\d+\.)(.+)")
# Tensors that belong to training, not to the model.
_TRAINING_STATE = re.compile(r"(optimizer|chained_\d+)\.")


@dataclass(frozen=True)
class _Source:
    """A model tensor: a stored one, or of a stacked one what lies at ``index`` of its first axes (layer, expert).

    ``chunks`` are those that hold a part of it.
    """

    stored: StoredTensor
    index: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[len(self.index) :]


class MegatronCheckpoint:
    """The model tensors of one ``iter_*`` folder by key.

    Trunk layers are named ``decoder.layers.{k}.*``, their experts ``decoder.layers.{k}.mlp.experts.experts.{e}.*``.

    Attributes:
        folder: the checkpoint's folder.
        fingerprint: identity of this save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sources = dict(_model_tensors(read_index(folder)))
        # torch.distributed.checkpoint puts a fresh identifier into the metadata of every save.
        self.fingerprint = hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()

    def keys(self) -> list[str]:
        """Keys of the model's tensors; the optimizer's are left out."""
        return list(self._sources)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values: shape and dtype on the meta device."""
        source = self._sources[key]
        return torch.empty(source.shape, dtype=source.stored.dtype, device="meta")

    def read(self, key: str) -> Tensor:
        """The whole tensor, put together from its chunks, on the CPU.

        Raises:
            CheckpointError: a chunk is damaged, or the chunks do not make up the tensor.
        """
        source = self._sources[key]
        result = torch.empty(source.shape, dtype=source.stored.dtype)
        filled = 0
        boxes: list[tuple[slice, ...]] = []
        for chunk in source.chunks:
            within = [at - start for at, start in zip(source.index, chunk.offsets, strict=False)]
            values = _load(chunk, source.stored.dtype)[tuple(within)]
            offsets, sizes = chunk.offsets[len(within) :], chunk.sizes[len(within) :]
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            if any(part.start < 0 or part.stop > extent for part, extent in zip(box, source.shape, strict=True)):
                raise CheckpointError(
                    f"{chunk.file}: a chunk of {key} lies outside the tensor's shape {list(source.shape)}. {_REMEDY}"
                )
            if any(_overlap(box, other) for other in boxes):  # the count below would not show what is left out
                raise CheckpointError(f"{self.folder / METADATA}: chunks of {key} overlap. {_REMEDY}")
            result[box] = values
            filled += values.numel()
            boxes.append(box)
        if filled != math.prod(source.shape):
            raise CheckpointError(
                f"{self.folder / METADATA}: the chunks of {key} hold {filled} of {math.prod(source.shape)} values. "
                f"{_REMEDY}"
            )
        return result


def open_checkpoint(path: str | Path) -> MegatronCheckpoint:
    """Open a checkpoint given by its ``iter_*`` folder, its ``checkpoints`` folder or its run folder.

    In a run the newest complete checkpoint is taken.

    Raises:
        CheckpointError: there is none, or it is incomplete, damaged or in another format.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. Give a run folder or a checkpoint folder (iter_*).")
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file. Give the folder of a run or of a checkpoint (iter_*).")
    if not (path / METADATA).exists():
        return MegatronCheckpoint(find_checkpoint(path))
    problem = problem_of(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}. {_REMEDY}")
    return MegatronCheckpoint(path)


_REMEDY = "Copy the checkpoint again or give another one."


def _model_tensors(index: dict[str, StoredTensor]) -> Iterator[tuple[str, _Source]]:
    for key, stored in index.items():
        if _TRAINING_STATE.match(key):
            continue
        stacked = _STACKED.fullmatch(key)
        if stacked is None or not stored.shape:
            yield key, _Source(stored, (), stored.chunks)
            continue
        # As megatron-core's own modules name it, and Transformer Engine's everywhere but before experts.
        usual, own = NORM_BEFORE_EXPERTS
        name = usual if stacked[1] == own else stacked[1]
        experts = _EXPERTS.fullmatch(name) if len(stored.shape) > 1 else None
        for source in _unstacked(stored, 1 if experts is None else 2):
            if experts is not None:
                name = f"mlp.experts.experts.{source.index[1]}.{experts[1]}"
            yield f"decoder.layers.{source.index[0]}.{name}", source


def _unstacked(stored: StoredTensor, axes: int) -> Iterator[_Source]:
    """What a tensor holds at each index of its first ``axes`` axes."""
    chunks: dict[tuple[int, ...], list[StoredChunk]] = {
        index: [] for index in itertools.product(*map(range, stored.shape[:axes]))
    }
    for chunk in stored.chunks:
        boxes = zip(chunk.offsets, chunk.sizes, stored.shape[:axes], strict=False)
        for index in itertools.product(*(range(start, min(start + size, end)) for start, size, end in boxes)):
            if index in chunks:  # a damaged index may name others
                chunks[index].append(chunk)
    for index, parts in chunks.items():
        yield _Source(stored, index, tuple(parts))


def _overlap(one: tuple[slice, ...], other: tuple[slice, ...]) -> bool:
    """Whether two boxes have a value in common."""
    return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(one, other, strict=True))


def _load(chunk: StoredChunk, dtype: torch.dtype) -> Tensor:
    """One chunk's values. torch.load does not look at the stored checksums, so they are checked here."""
    try:
        with chunk.file.open("rb") as file:
            file.seek(chunk.start)
            content = io.BytesIO(file.read(chunk.length))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{chunk.file}: deleted meanwhile, as a training with run.keep_last deletes older checkpoints. Convert the "
            "run's latest one now, or one that stays (run.keep_every)."
        ) from error
    try:
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{chunk.file}: damaged, the checksum of {damaged} does not match. {_REMEDY}")
        content.seek(0)
        values = torch.load(content, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{chunk.file}: damaged ({error}). {_REMEDY}") from error
    if not isinstance(values, Tensor) or tuple(values.shape) != chunk.sizes or values.dtype != dtype:
        raise CheckpointError(f"{chunk.file}: does not hold the {dtype} {list(chunk.sizes)} that it should. {_REMEDY}")
    return values.detach()
