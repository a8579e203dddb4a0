"""Distributed checkpoints across versions: megatron-core 0.19 reads older ones, here older ones read those of 0.19."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch


def load_strategies() -> dict[str, Any]:
    """Keyword arguments of ``dist_checkpointing.load`` with which this version reads what any other one saved.

    Until 0.18 the unsharded part of a checkpoint is a file, ``common.pt``. Later versions save it as one more object of
    the sharded part and read both.
    """
    strategy = _common_strategy()
    return {} if strategy is None else {"common_strategy": strategy()}


@functools.cache
def _common_strategy() -> type[Any] | None:
    try:
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    except ImportError:  # 0.19: there is one way left, and it reads both
        return None
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    class CommonStateOfAnyVersion(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            if (Path(checkpoint_dir) / "common.pt").exists():
                return super().load_common(checkpoint_dir)
            key = ShardedObject("common_state", None, (1,), (0,)).unique_key
            state: dict[str, Any] = {key: io.BytesIO()}
            reader = torch.distributed.checkpoint.FileSystemReader(checkpoint_dir)
            torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
            loaded = state[key]
            if isinstance(loaded, io.BytesIO):
                loaded.seek(0)
                loaded = torch.load(loaded, weights_only=True)
            return loaded[0]

    return CommonStateOfAnyVersion
