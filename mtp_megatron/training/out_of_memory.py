"""A GPU that runs out of memory: which rank and stage, in which part of the run, how much, and what to change."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mtp_megatron.errors import ConfigError, MTPError
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_folder import RunFolder, unused_file

_ENTRIES = 100_000  # allocations and frees that a snapshot holds, the latest ones; a few KB each
_GIB = 2**30
logger = logging.getLogger(__name__)


class OutOfMemory(MTPError):
    """This rank's GPU is full; the message says what may help."""


def check_memory_snapshot(recipe: Recipe) -> None:
    """Refuse to record what is not there.

    Raises:
        ConfigError: ``train.memory_snapshot`` without a GPU.
    """
    if recipe.train.memory_snapshot and not torch.cuda.is_available():
        raise ConfigError(
            "train.memory_snapshot",
            True,
            "torch records the allocations of GPUs, and there is none",
            "Set it to false.",
        )


@contextmanager
def explained(recipe: Recipe, folder: RunFolder, world_size: int, what: Callable[[], str]) -> Iterator[None]:
    """Turn torch's error into one that can be acted upon; with ``train.memory_snapshot`` keep what led there.

    The other ranks wait for this one in a collective: it has to end without waiting for them
    (:func:`.world.waits_for_others`), and the launcher ends them.

    Args:
        recipe: resolved.
        what: the present part of the run, for example ``step 12``; asked when memory runs out.

    Raises:
        OutOfMemory: in place of torch's.
    """
    if recipe.train.memory_snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError as error:
        part = what()
        snapshot = _write_snapshot(folder, part) if recipe.train.memory_snapshot else None
        said = "; ".join([*str(error).splitlines(), *getattr(error, "__notes__", ())])  # notes: in which head
        raise OutOfMemory(_message(recipe, folder, world_size, part, said, snapshot)) from error
    finally:
        if recipe.train.memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)


def remedies(recipe: Recipe) -> list[str]:
    """Settings that take less memory, nearest first: as ``mtp-megatron plan`` tries them (``planning.advice``)."""
    parallel, train, heads = recipe.parallel, recipe.train, recipe.heads
    found = ["heads.execution=deferred"] if heads.execution == "joint" else []
    if recipe.run.deepspeed is not None:
        found.append(f"a higher ZeRO stage in {recipe.run.deepspeed}")
    elif not recipe.optimizer.distributed:
        found.append("optimizer.distributed=true")
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        found.append("parallel.sequence_parallel=true")
    found.append(f"a smaller heads.loss_chunk_tokens ({heads.loss_chunk_tokens or 'null, chosen by the package'} now)")
    if train.micro_batch_size > 1:
        smaller = next(size for size in range(train.micro_batch_size - 1, 0, -1) if train.micro_batch_size % size == 0)
        found.append(f"train.micro_batch_size={smaller}")
    if parallel.pipeline > 1:
        found.append("fewer layers or heads on this stage (parallel.layout)")
    if train.recompute is None:
        found.append("train.recompute=selective")
    if train.recompute != "full":
        found.append("train.recompute=full")
    found.append(f"parallel.tensor={2 * parallel.tensor}")
    if recipe.run.deepspeed is None:
        found.append(f"parallel.pipeline={2 * parallel.pipeline}")
    return found


def _message(recipe: Recipe, folder: RunFolder, world_size: int, part: str, said: str, snapshot: Path | None) -> str:
    from megatron.core import parallel_state

    stage = ""
    if parallel_state.model_parallel_is_initialized():
        here = parallel_state.get_pipeline_model_parallel_rank() + 1
        stage = f", stage {here} of {recipe.parallel.pipeline}"
    room = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    used = ", ".join(
        f"{size / _GIB:.2f} GiB {name}"
        for name, size in (
            ("allocated", torch.cuda.memory_allocated()),
            ("reserved", torch.cuda.memory_reserved()),
            ("allocated at the peak", torch.cuda.max_memory_allocated()),
        )
    )
    file = folder.recipe if folder.recipe.is_file() else "RECIPE"
    kept = "" if snapshot is None else f" {snapshot} shows what was allocated where, on https://pytorch.org/memory_viz."
    return (
        f"rank {dist.get_rank()} on {platform.node()}{stage}: out of GPU memory in {part} ({used} of "
        f"{room / _GIB:.2f} GiB; {said}). What takes less, nearest first: "
        f"{'; '.join(remedies(recipe))}. 'mtp-megatron plan {file} --gpus {world_size} --memory {room / 1e9:.0f}' "
        f"says what every stage takes and which of these fit, or which setting it does not know.{kept}"
    )


def _write_snapshot(folder: RunFolder, part: str) -> Path | None:
    name = f"rank{dist.get_rank()}-{part.replace(' ', '-')}"
    try:
        folder.memory.mkdir(parents=True, exist_ok=True)
        path = unused_file(folder.memory, name, ".pickle")
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # noqa: BLE001 - that memory ran out is the news
        logger.warning("%s/%s.pickle was not written: %s: %s", folder.memory, name, type(error).__name__, error)
        return None
    return path
