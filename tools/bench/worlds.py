"""Megatron worlds for benchmarks: this process alone, or spawned processes that meet over a file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


@contextlib.contextmanager
def world(rank: int, size: int, rendezvous: Path, threads: int | None = None) -> Iterator[torch.device]:
    """Megatron's parallel state with tensor parallelism over all ``size`` ranks; yields this rank's device."""
    from mtp_megatron import compat

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # what Megatron asks for with tensor parallelism
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("LOCAL_RANK", str(rank))
        torch.cuda.set_device(rank)
    compat.prepare()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group(compat.backend(), init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        torch.manual_seed(1234)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield compat.device()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def alone(threads: int | None = None) -> Iterator[torch.device]:
    """A world of this process only."""
    with tempfile.TemporaryDirectory() as folder, world(0, 1, Path(folder) / "world", threads) as device:
        yield device


def spawn(body: Callable[..., Any], size: int, threads: int | None, *args: Any) -> list[Any]:
    """Run ``body(rank, size, device, *args)`` on ``size`` processes; what each returned, through JSON, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, args=(size, folder, threads, body, args), nprocs=size, start_method="spawn")
        return [json.loads((Path(folder) / f"result{rank}").read_text(encoding="utf-8")) for rank in range(size)]


def _rank(
    rank: int, size: int, folder: str, threads: int | None, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with world(rank, size, Path(folder) / "world", threads) as device:
        result = body(rank, size, device, *args)
    (Path(folder) / f"result{rank}").write_text(json.dumps(result), encoding="utf-8")
