"""Safetensors in shards with an index, as Hugging Face folders have them; memory is bounded by one shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_megatron.errors import CheckpointError


class ShardedWriter:
    """Writes tensors in the order given as ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors``, with an index.

    The index is written for a single file too: engines that load every ``*.safetensors`` of a folder then leave alone
    what it does not name.

    Args:
        folder: where to write.
        stem: ``"model"`` or ``"mtp_heads"``.
        max_bytes: a shard is closed before it would exceed this; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, stem: str, max_bytes: int) -> None:
        self._folder, self._stem, self._max_bytes = folder, stem, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take one tensor; it is written now or with a later one."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        # A contiguous copy where the tensor is a view: otherwise its whole storage would be written or kept.
        self._pending[key] = tensor.clone() if tensor._is_view() else tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is left, give the files their names and write the index."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, keys in enumerate(self._shards, start=1):
            name = (
                f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{number:05d}-of-{count:05d}.safetensors"
            )
            self._part(number).rename(self._folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        index_path(self._folder, self._stem).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        part = self._part(len(self._shards))
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes files that their owner alone can read
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"{self._stem}.part{number}"


def index_path(folder: Path, stem: str) -> Path:
    """The index file of the tensors written under ``stem``."""
    return folder / f"{stem}.safetensors.index.json"


def checked_weight_map(path: Path, weight_map: Any, remedy: str) -> dict[str, str]:
    """File by key, as the index in ``path`` has it. An index may be a stranger's: no file lies outside its folder.

    Raises:
        CheckpointError: it is none, or names another place; ``remedy`` ends the message.
    """
    if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
        raise CheckpointError(f"{path}: damaged, no weight_map of files in this folder. {remedy}")
    return weight_map


def read_sharded(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under ``stem`` by key, one at a time, file by file.

    Raises:
        CheckpointError: the index or a file is missing or damaged, or they disagree.
    """
    path = index_path(folder, stem)
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing. Give a folder that `mtp-megatron convert` wrote.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}). Convert the checkpoint again.") from error
    files: dict[str, list[str]] = {}
    for key, name in checked_weight_map(path, named, "Convert the checkpoint again.").items():
        files.setdefault(name, []).append(key)
    for name, keys in files.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                held = set(file.keys())
                if held != set(keys):
                    odd = ", ".join(sorted(held ^ set(keys))[:3])
                    raise CheckpointError(f"{folder / name}: it and {path.name} disagree ({odd}). Convert again.")
                for key in keys:
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / name}: missing, truncated or damaged ({error}). Convert the checkpoint again."
            ) from error


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; piece by piece, without a copy the size of the tensor."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(1 << 22))
