"""A profile of some steps of some ranks: a trace for Perfetto or chrome://tracing, and what took most as text."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from mtp_megatron import compat
from mtp_megatron.labels import PREFIX
from mtp_megatron.ranks import ranges
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_folder import RunFolder, unused_file
from mtp_megatron.training.world import waits_for_others

ROWS = 40  # operations in the text
logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps of ``train.profile_steps`` on the ranks of ``train.profile_ranks``, and writes
    ``RUN/profile/rank0-steps5-7.json.gz`` and ``.txt``. What lies between the steps, evaluation say, is recorded, too.
    Where data is passed over between them, it ends before that.

    On other ranks, and beside these steps, every method does nothing.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self._folder, self._wanted = folder.profile, range(0)
        if recipe.train.profile_steps and dist.get_rank() in recipe.train.profile_ranks:
            first, last = recipe.train.profile_steps
            self._wanted = range(first, last + 1)
        self._profile: Any = None
        self._first = self._last = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error in a job of NCCL's, recording stops when kernels have ended that wait for a rank forever.
        if kind is None or not waits_for_others():
            self.write()

    @staticmethod
    def announcement(folder: RunFolder, recipe: Recipe, step: int) -> str | None:
        """A line for a run that goes on after ``step``; None where no further step is to be recorded."""
        if recipe.train.profile_steps is None or recipe.train.profile_steps[1] <= step:
            return None
        first, last = recipe.train.profile_steps
        ranks = sorted(recipe.train.profile_ranks)
        who = f"rank {ranks[0]} records" if len(ranks) == 1 else f"ranks {ranges(ranks)} record"
        return f"{who} steps {max(first, step + 1)} to {last} into {folder.profile}"

    def begin(self, step: int) -> None:
        """Called before ``step`` is trained."""
        if step not in self._wanted or self._profile is not None:
            return
        cuda = [ProfilerActivity.CUDA] if compat.device().type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
        self._profile.start()
        self._first = self._last = step

    @property
    def records(self) -> bool:
        return self._profile is not None

    def passed(self, step: int) -> bool:
        """Called after ``step``; whether the profile ends with it and :meth:`write` is due."""
        if self._profile is None:
            return False
        self._last = step
        return step + 1 not in self._wanted

    def write(self) -> None:
        """Write what was recorded. A run does not end for want of that: a warning says what went wrong."""
        if self._profile is None:
            return
        recorded, self._profile, self._wanted = self._profile, None, range(0)
        name = f"rank{dist.get_rank()}-steps{self._first}-{self._last}"
        unfinished = self._folder / f".{name}.json.gz"  # torch packs what is named .gz
        try:
            recorded.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = unused_file(self._folder, name, ".json.gz")
            recorded.export_chrome_trace(str(unfinished))
            os.replace(unfinished, trace)
            text = trace.with_name(trace.name.replace(".json.gz", ".txt"))
            text.write_text(_text(recorded.key_averages(), self._first, self._last), encoding="utf-8")
        except Exception as error:  # noqa: BLE001 - the step that failed is the news, or the run goes on
            what = f"{type(error).__name__}: {error}"
            logger.warning("the profile of steps %d to %d was not written: %s", self._first, self._last, what)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def _text(events: Any, first: int, last: int) -> str:
    """Time of the labelled parts per step, then of the operations."""
    steps, on_gpu = last - first + 1, compat.device().type == "cuda"
    where = f"torch {torch.__version__} on {torch.cuda.get_device_name() if on_gpu else 'the CPU'}"
    lines = [
        f"steps {first} to {last} of rank {dist.get_rank()}, {where}; ms per step, parts within a part included",
        "",
        *_parts(events, steps, on_gpu),
        "",
        events.table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=ROWS,
            max_name_column_width=60,
        ),
    ]
    return "\n".join(lines) + "\n"


def _parts(events: Iterable[Any], steps: int, on_gpu: bool) -> list[str]:
    rows = [event for event in events if event.key.startswith(PREFIX)]
    width = max((len(row.key) for row in rows), default=0)
    lines = [f"{'part':<{width}}  {'times':>6}  {'CPU':>10}" + (f"  {'GPU':>10}" if on_gpu else "")]
    for row in sorted(rows, key=lambda row: row.cpu_time_total, reverse=True):
        gpu = f"  {row.device_time_total / 1e3 / steps:>10.3f}" if on_gpu else ""
        lines.append(f"{row.key:<{width}}  {row.count / steps:>6.4g}  {row.cpu_time_total / 1e3 / steps:>10.3f}{gpu}")
    return lines
