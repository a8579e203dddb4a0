"""PyTorch's ``.pth`` files: read tensor by tensor without running what is pickled in them, and written so.

``torch.load(weights_only=True)`` onto the meta device gives every tensor's shape and place, and refuses any pickle that
asks for more than tensors. The values are then read from the archive member by member, which checks their checksums.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_megatron.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<26xHH")  # a zip member's local header: lengths of its name and of its extra field
_BLOCK = 1 << 24
_ALIGNMENT = 64  # torch's: tensors that are mapped into memory start at multiples of it
_REMEDY = "Copy the file again or give another one."
# What torch.load raises for archives and pickles that are damaged, beside its own UnpicklingError.
_DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, struct.error)


def _all_of_it(state: Any) -> Any:
    return state


class PthFile:
    """The tensors of one ``.pth`` file by key.

    Args:
        pick: takes the tensors by key out of the file's content (on the meta device); default: they are all of it.
        stand_ins: ``(class, "module.name")``: harmless classes that are made where the pickle asks for others.

    Raises:
        CheckpointError: unreadable, damaged, in torch's format before 1.6, or a pickle that holds more than tensors.
    """

    def __init__(
        self,
        path: Path,
        pick: Callable[[Any], Any] = _all_of_it,
        stand_ins: Sequence[tuple[type, str]] = (),
    ) -> None:
        self.folder = path
        try:
            if not zipfile.is_zipfile(path):
                raise CheckpointError(
                    f"{path}: truncated, or not a file of torch.save (format of torch 1.6 or later). {_REMEDY}"
                )
            with torch.serialization.safe_globals(list(stand_ins)):
                state = pick(torch.load(path, map_location="meta", weights_only=True))
            self._members = _members(path)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: refused: its pickle is damaged or asks for more than tensors, which could run a stranger's "
                f"code ({_first_line(error)}). Give a file of plain tensors."
            ) from error
        except (*_DAMAGED, OSError, TypeError, AttributeError) as error:  # the last two: pick finds other things there
            raise CheckpointError(f"{path}: missing, truncated or damaged ({_first_line(error)}). {_REMEDY}") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path}: not a dictionary of tensors. Give a model's state dictionary.")
        self._tensors: dict[str, Tensor] = {str(key): value for key, value in state.items()}
        self._checked: set[str] = set()

    def keys(self) -> list[str]:
        """Keys of the state dictionary."""
        return list(self._tensors)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values."""
        return self._tensors[key]

    def read_part(self, key: str, start: int, count: int) -> Tensor:
        """``count`` values of a flat tensor from ``start`` on, and no more in memory than these.

        The first part asked for has the whole tensor read, block by block, for its checksum.

        Raises:
            CheckpointError: the tensor is damaged, compressed or ends before.
        """
        meta = self._tensors[key]
        if meta.dim() != 1 or meta.stride() != (1,) or start + count > meta.numel():
            raise CheckpointError(f"{self.folder}: {key} is no flat tensor of {start + count} values. {_REMEDY}")
        member = self._members.get(self._begin(key))
        if member is not None and member.compress_type != zipfile.ZIP_STORED:  # the whole can be read, but no part
            raise CheckpointError(f"{self.folder}: compressed, which torch.save does not do. {_REMEDY}")
        if key not in self._checked:
            self._check_length(key, sum(len(block) for block in self._blocks(key)))
            self._checked.add(key)
        begin = self._begin(key) + (int(meta.storage_offset()) + start) * meta.element_size()
        with self.folder.open("rb") as file:
            file.seek(begin)
            content = bytearray(file.read(count * meta.element_size()))
        if len(content) != count * meta.element_size():
            raise CheckpointError(f"{self.folder}: truncated inside {key}. {_REMEDY}")
        return torch.frombuffer(content, dtype=meta.dtype) if count else torch.empty(0, dtype=meta.dtype)

    def read(self, key: str) -> Tensor:
        """The values, checked against the archive's checksum.

        Raises:
            CheckpointError: they are damaged.
        """
        meta = self._tensors[key]
        values = torch.empty(meta.untyped_storage().nbytes(), dtype=torch.uint8)
        view, filled = memoryview(values.numpy().data), 0
        for block in self._blocks(key):
            if filled + len(block) <= len(view):
                view[filled : filled + len(block)] = block
            filled += len(block)
        self._check_length(key, filled)
        return values.view(meta.dtype).as_strided(meta.shape, meta.stride(), meta.storage_offset())

    def _begin(self, key: str) -> int:
        """Where a tensor's storage begins in the file, as torch.load on the meta device says (torch's notes on
        serialization)."""
        return int(self._tensors[key].untyped_storage()._checkpoint_offset or 0)

    def _blocks(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor's storage; where they end, zipfile compares their checksum."""
        begin = self._begin(key)
        try:
            with self.folder.open("rb") as archive:  # ZipFile would read the whole archive's directory again
                archive.seek(begin)
                file = zipfile.ZipExtFile(archive, "r", self._members[begin])
                while block := file.read(_BLOCK):
                    yield block
        except (*_DAMAGED, OSError) as error:
            raise CheckpointError(f"{self.folder}: {key} is damaged ({_first_line(error)}). {_REMEDY}") from error

    def _check_length(self, key: str, found: int) -> None:
        expected = self._tensors[key].untyped_storage().nbytes()
        if found != expected:
            raise CheckpointError(f"{self.folder}: {key} has {found} of {expected} bytes. {_REMEDY}")


def _members(path: Path) -> dict[int, zipfile.ZipInfo]:
    """The archive's members by where their bytes begin."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset)
            name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            found[info.header_offset + _LOCAL_HEADER.size + name + extra] = info
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


class _Storage:
    """A storage that is not there yet, for the pickle."""

    def __init__(self, key: str, meta: Tensor) -> None:
        self.key, self.meta = key, meta


class _Tensor:
    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


class _Pickler(pickle.Pickler):
    """Pickles tensors as ``torch.save`` does, their storages by reference to archive members."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[obj.meta.dtype]
        return ("storage", getattr(torch, kind), obj.key, "cpu", obj.meta.numel())

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        meta = obj.storage.meta
        size, stride = tuple(meta.shape), torch.empty(meta.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, size, stride, False, OrderedDict())


def write_pth(path: Path, tensors: Iterable[tuple[str, Tensor]], read: Callable[[str], Tensor]) -> None:
    """Write a state dictionary as ``torch.save`` would, with one tensor in memory at a time.

    ``torch.save`` takes the whole dictionary; its ``skip_data`` would leave wrong checksums behind.

    Args:
        tensors: key and meta tensor of each, in the order to be written.
        read: gives the values of a key.
    """
    storages = {key: _Storage(str(number), meta) for number, (key, meta) in enumerate(tensors)}
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{root}/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump({key: _Tensor(storage) for key, storage in storages.items()})
        archive.writestr(f"{root}/byteorder", "little")
        for key, storage in storages.items():
            values = read(key).contiguous()
            if values.shape != storage.meta.shape or values.dtype != storage.meta.dtype:
                raise ValueError(f"{key}: {values.dtype} {list(values.shape)} was not announced")
            info = zipfile.ZipInfo(f"{root}/data/{storage.key}")
            info.file_size = values.nbytes
            info.extra = _padding(archive, info)
            with archive.open(info, "w") as file:
                view = memoryview(values.flatten().view(torch.uint8).numpy().data)
                for start in range(0, len(view), _BLOCK):
                    file.write(view[start : start + _BLOCK])
        archive.writestr(f"{root}/version", "3\n")


def _padding(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """An extra field (torch's "FB") after which the member's bytes are aligned."""
    zip64 = 20 if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0
    fixed = _LOCAL_HEADER.size + len(info.filename.encode()) + zip64 + 4
    assert archive.fp is not None
    length = -(archive.fp.tell() + fixed) % _ALIGNMENT
    return b"FB" + length.to_bytes(2, "little") + b"Z" * length
