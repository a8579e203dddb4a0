"""The process group and megatron's model parallel state of one rank, and this rank's seeds."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from mtp_megatron import compat
from mtp_megatron.compat.devices import gpus_left_out, require_usable_gpu, take_own_gpu
from mtp_megatron.training.head_stages import embedding_ranks
from mtp_megatron.training.recipe import Recipe

logger = logging.getLogger(__name__)


def launched_world_size() -> int:
    """Ranks of this job, as its launcher or an existing process group says; 1 without either."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def model_parallel_world(recipe: Recipe, store: Store | None = None) -> Iterator[None]:
    """Join the job: process group, model parallel groups, seeds; leave it again at the end.

    The process group comes from the environment that torchrun sets, or is this process alone; one that exists already
    is used and left as it is. So is one of NCCL after an error (:func:`waits_for_others`).

    Args:
        recipe: resolved.
        store: the launcher's, if the ranks have met there already (:func:`.agreement.job_store`).

    Raises:
        ConfigError: the ranks of this node and its GPUs do not fit (:func:`.devices.take_own_gpu`).
        EnvironmentUnsupported: torch cannot use this node's GPUs.
    """
    require_usable_gpu()
    left_out = gpus_left_out()
    if left_out is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("%s", left_out)
    take_own_gpu()
    compat.prepare()
    from megatron.core import parallel_state

    timeout = timedelta(minutes=recipe.train.timeout_minutes)
    owns_group = not dist.is_initialized()
    if owns_group and store is not None:
        rank, size = int(os.environ["RANK"]), launched_world_size()
        dist.init_process_group(compat.backend(), store=store, rank=rank, world_size=size, timeout=timeout)
    elif owns_group and "RANK" in os.environ:
        dist.init_process_group(compat.backend(), timeout=timeout)
    elif owns_group:
        dist.init_process_group(compat.backend(), store=HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel = recipe.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        get_embedding_ranks=embedding_ranks(recipe.stages, tied=recipe.model.tied_embeddings),
        distributed_timeout_minutes=recipe.train.timeout_minutes,
    )
    try:
        _seed(recipe.train.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        yield
    except BaseException:
        if not (owns_group and waits_for_others()):
            _leave(owns_group)
        raise
    _leave(owns_group)


def waits_for_others() -> bool:
    """Whether leaving the job waits for the other ranks: NCCL's communicators are destroyed by all together.

    After an error here they may be in a collective that this rank will never join. Then nothing is destroyed, and the
    process has to end without that (``os._exit``), or its error would be seen after the others' timeout. Nor are the
    buffers of ``parallel.tp_comm_overlap`` given back.
    """
    return dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL and dist.get_world_size() > 1


def _leave(owns_group: bool) -> None:
    from megatron.core import parallel_state, tensor_parallel

    tensor_parallel.get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    if owns_group:
        dist.destroy_process_group()


def _seed(seed: int) -> None:
    """Seed every generator of this rank; stages draw different numbers, as in Megatron-LM."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - megatron-core's data sets draw from numpy's global state
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
