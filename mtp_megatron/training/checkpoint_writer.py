"""Writing a distributed checkpoint from inside the training process, a tensor at a time: at once, or from copies in
host memory while the training goes on."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's ``torch_dist`` format, written by torch's own writer.

    Upstream's synchronous save starts a manager process on every rank. It outlives a rank that is killed, holding its
    output pipes open, and forks again for each save. The files are the same; only who writes them differs.

    Args:
        copies: where the shards are copied to in place of being written; None: they are written at once.
    """

    def __init__(self, copies: HostCopies | None = None) -> None:
        super().__init__("torch_dist", 1)
        self._copies = copies

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards, and on rank 0 the index; collective over all ranks, returns when all have
        written, or copied."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=self._copies or TensorByTensor(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class TensorByTensor(FileSystemWriter):
    """Torch's writer, with one tensor of this rank's in host memory at a time.

    Torch's (2.11, 2.13) keeps the copy of every tensor that it has written until the file is closed, as another format
    than this one needs them: on a GPU as much host memory as the rank's share of the checkpoint.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what is planned for this rank into one file; none if there is nothing."""
        data = ((item, planner.resolve_data(item)) for item in plan.items)
        return _done(_write(_file(self, plan), data) if plan.items else [])


class HostCopies(TensorByTensor):
    """What a rank saves, copied to host memory when torch would have it written: training may go on and change its
    tensors while :meth:`write` writes the same file as :class:`TensorByTensor`.

    Attributes:
        size: bytes that are copied.
        written: how many copies are in the file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.size = self.written = 0
        self._copies: deque[tuple[WriteItem, BytesIO | torch.Tensor]] = deque()
        self._target: Path | None = None
        self._metadata: Metadata | None = None
        self._dropped = threading.Event()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy what is planned for this rank. Where it lies in the file is known later (:meth:`write`)."""
        self._target = _file(self, plan) if plan.items else None
        for item in plan.items:
            value = planner.resolve_data(item)
            if isinstance(value, torch.Tensor):
                value = _copied(value)
                self.size += value.nbytes
            else:
                self.size += value.getbuffer().nbytes
            self._copies.append((item, value))
        return _done([])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keep the index, which rank 0 writes last (:meth:`write_index`)."""
        self._metadata = metadata

    def write(self) -> list[WriteResult]:
        """Write the copies, and free each; no collective, and from any one thread.

        Raises:
            OSError, RuntimeError: the disk is full, or away.
            Dropped: after :meth:`drop`.
        """
        return [] if self._target is None else _write(self._target, self._taken())

    def write_index(self, results: Sequence[list[WriteResult]]) -> None:
        """Write the index: on rank 0, with what :meth:`write` returned on each rank."""
        if self._metadata is None:
            raise RuntimeError("the index of a checkpoint is rank 0's, after all ranks have copied what they save")
        super().finish(self._metadata, list(results))

    def drop(self) -> None:
        """Have :meth:`write` end after the tensor that it is at."""
        self._dropped.set()

    def _taken(self) -> Iterator[tuple[WriteItem, BytesIO | torch.Tensor]]:
        while not self._dropped.is_set():  # asked after the last one, too: what is given up is not put on the disk
            if not self._copies:
                return
            yield self._copies.popleft()
            self.written += 1
        raise Dropped


class Dropped(Exception):
    """The checkpoint is not written to its end, on request."""


def _file(writer: FileSystemWriter, plan: SavePlan) -> Path:
    return Path(writer.path) / f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"


def _write(file: Path, data: Iterable[tuple[WriteItem, BytesIO | torch.Tensor]]) -> list[WriteResult]:
    """Write one item after the other, and the whole to the disk; where each lies."""
    results = []
    with file.open("wb") as stream:
        for item, value in data:
            begin = stream.tell()
            if item.type == WriteItemType.BYTE_IO:
                stream.write(value.getbuffer())  # type: ignore[union-attr]  # as the type says
            else:
                torch.save(_alone(value), stream)  # type: ignore[arg-type]  # likewise
            length = stream.tell() - begin
            results.append(WriteResult(item.index, length, _StorageInfo(file.name, begin, length)))
        stream.flush()
        os.fsync(stream.fileno())
    return results


def _done(results: list[WriteResult]) -> Future[list[WriteResult]]:
    future: Future[list[WriteResult]] = Future()
    future.set_result(results)
    return future


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, in no larger storage than its own, which would be written whole."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory of its own."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else _alone(tensor)
