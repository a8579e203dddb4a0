"""Writing a distributed checkpoint from inside the training process, a tensor at a time."""

from __future__ import annotations

import os
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
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's ``torch_dist`` format, written by torch's own writer.

    Upstream's synchronous save starts a manager process on every rank. It outlives a rank that is killed, holding its
    output pipes open, and forks again for each save. The files are the same; only who writes them differs.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards, and on rank 0 the index; collective over all ranks, returns when all have
        written."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=TensorByTensor(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class TensorByTensor(FileSystemWriter):
    """Torch's writer, with one tensor of this rank's in host memory at a time.

    Torch's (2.11, 2.13) keeps the copy of every tensor that it has written until the file is closed, as another format
    than this one needs them: on a GPU as much host memory as the rank's share of the checkpoint.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what is planned for this rank into one file; none if there is nothing."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        if plan.items:
            with (Path(self.path) / name).open("wb") as stream:
                for item in plan.items:
                    data, begin = planner.resolve_data(item), stream.tell()
                    if item.type == WriteItemType.BYTE_IO:
                        stream.write(data.getbuffer())  # type: ignore[union-attr]  # as the type says
                    else:
                        torch.save(_alone(data), stream)  # type: ignore[arg-type]  # likewise
                    length = stream.tell() - begin
                    results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
                stream.flush()
                os.fsync(stream.fileno())
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, in no larger storage than its own, which would be written whole."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
