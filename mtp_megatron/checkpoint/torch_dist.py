"""What a torch_dist checkpoint holds and where, read from its ``.metadata`` without running anything that is in it.

``.metadata`` is a pickle of ``torch.distributed.checkpoint.metadata.Metadata``. It is read with an unpickler that knows
the names below and no others, and turns each of them into an inert record: no class of torch or megatron is
instantiated, no function called, so a hostile file can at worst describe tensors that are not there.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch

from mtp_megatron.errors import CheckpointError

METADATA = ".metadata"


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor (``offsets``, ``sizes``) and its bytes: ``length`` bytes from ``start`` in ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor as the checkpoint holds it: cut into chunks, whatever TP x PP wrote them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


class _Record:
    """Stands for any class of the pickle: keeps what it was made of."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.arguments = tuple(state)


class _TensorRecord(_Record):
    """TensorStorageMetadata"""

    properties: _Record
    size: tuple[int, ...]
    chunks: list[Any]


class _ChunkRecord(_Record):
    """ChunkStorageMetadata"""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


_WHOLE = _ChunkRecord()  # the box of an object that is no tensor
_WHOLE.offsets = _WHOLE.sizes = ()


class _StorageRecord(_Record):
    """_StorageInfo"""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None


class _IndexRecord(_Record):
    """MetadataIndex, a key of the storage table"""

    fqn: str
    offset: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _IndexRecord) and (self.fqn, self.offset) == (other.fqn, other.offset)


class _MetadataUnpickler(pickle.Unpickler):
    _DCP = "torch.distributed.checkpoint"
    _MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
    _NAMES: ClassVar[dict[tuple[str, str], Any]] = {
        (f"{_DCP}.metadata", "TensorStorageMetadata"): _TensorRecord,
        (f"{_DCP}.metadata", "ChunkStorageMetadata"): _ChunkRecord,
        (f"{_DCP}.metadata", "MetadataIndex"): _IndexRecord,
        (f"{_DCP}.filesystem", "_StorageInfo"): _StorageRecord,
        ("torch", "Size"): tuple,
        **{
            (module, name): _Record
            for module, names in {
                f"{_DCP}.metadata": (
                    *("Metadata", "TensorProperties", "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
                ),
                f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
                _MEGATRON: ("MCoreMetadata", "MCoreSavePlan"),
                "torch.serialization": ("_get_layout",),
                "pathlib": ("Path", "PosixPath", "PurePosixPath"),
                "collections": ("OrderedDict",),
            }.items()
            for name in names
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            return self._NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's metadata needs") from None


# pickle's documentation: a damaged pickle may raise these besides UnpicklingError.
_DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a torch_dist checkpoint by key; objects that are not tensors are left out.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged or asks for names it has no business with, or a data file is
            missing or shorter than it says.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        index = _tensors(metadata, folder)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing, so this is no finished torch_dist checkpoint. Give an iter_* folder that a Megatron "
            "training wrote with the torch_dist format."
        ) from error
    except (*_DAMAGED, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint's metadata ({error}). Copy the checkpoint again or give another one."
        ) from error
    _check_files(index)
    return index


def read_object(folder: Path, key: str) -> bytes | None:
    """What was stored under ``key`` and is no tensor, as the bytes that ``torch.save`` made; None if there is none.

    Raises:
        CheckpointError: ``.metadata`` or the data file is missing or damaged.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            storage = _MetadataUnpickler(file).load().storage_data
        where = next((index for index in storage if index.fqn == key), None)
        if where is None:
            return None
        chunk = _stored(_WHOLE, storage[where], folder)
        with chunk.file.open("rb") as file:
            file.seek(chunk.start)
            content = file.read(chunk.length)
    except (*_DAMAGED, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged, {key} cannot be read ({error}). Copy the checkpoint again or give another one."
        ) from error
    if len(content) != chunk.length:
        raise CheckpointError(f"{chunk.file}: truncated. Copy the checkpoint again or give another one.")
    return content


def _tensors(metadata: Any, folder: Path) -> dict[str, StoredTensor]:
    storage = metadata.storage_data
    tensors = {}
    for key, record in metadata.state_dict_metadata.items():
        if not isinstance(record, _TensorRecord):
            continue
        chunks = []
        for chunk in record.chunks:
            where = _IndexRecord()
            where.fqn, where.offset = key, tuple(chunk.offsets)
            chunks.append(_stored(chunk, storage[where], folder))
        dtype = record.properties.arguments[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} has no data type")
        tensors[key] = StoredTensor(tuple(record.size), dtype, tuple(chunks))
    return tensors


def _stored(chunk: _ChunkRecord, info: _StorageRecord, folder: Path) -> StoredChunk:
    name = info.relative_path
    if PurePath(name).name != name:
        raise ValueError(f"it points to {name!r}, outside the checkpoint")
    if info.transform_descriptors:
        raise ValueError(f"{name} is stored with {info.transform_descriptors}, which this reader does not know")
    return StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), folder / name, int(info.offset), int(info.length))


def _check_files(index: dict[str, StoredTensor]) -> None:
    ends: dict[Path, int] = {}
    for tensor in index.values():
        for chunk in tensor.chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    for file, end in ends.items():
        if not file.is_file():
            raise CheckpointError(f"{file}: missing. Copy the checkpoint again or give another one.")
        if file.stat().st_size < end:
            raise CheckpointError(
                f"{file}: truncated, it has {file.stat().st_size} bytes and should have at least {end}. Copy the "
                "checkpoint again or give another one."
            )
