"""The state of every random generator of a rank, as megatron-core's checkpoints hold it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def sharded_rng_state() -> Any:
    """This rank's generators as one cell of a ``[pp, tp]`` grid; data parallel ranks draw alike, so one copy is
    enough. (That of the experts' initial weights differs, and is not drawn from later.)"""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 - the state that megatron-core's data sets draw from
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    grid = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    cell = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", [state], grid, cell, replica_id=replica)


def restore_rng_state(loaded: list[dict[str, Any]]) -> None:
    """Put back what :func:`sharded_rng_state` recorded."""
    from megatron.core import tensor_parallel

    state = loaded[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])  # noqa: NPY002
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
