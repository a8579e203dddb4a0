"""One index of samples for all ranks that see it, and one more for each host that does not.

Rank 0 writes it first. Hosts may have the data on disks of their own: where rank 0's index is not seen, the lowest rank
of that host writes it there. An index may take longer than a collective may (``train.timeout_minutes``), so the ranks
wait in many short ones, in which a rank that died is noticed, too, and one that was asked to stop.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.data.sample_index import EXIT_EXPLAINED, SampleIndex
from mtp_megatron.errors import DataError, MTPError
from mtp_megatron.signals import Stopped, StopRequest, stop_signals_blocked

# Seconds that a host waits to see another's index before it writes its own, and not longer than writing that one took:
# network file systems show other hosts' writes late, but on a disk of its own a host would wait in vain.
SEEN_WITHIN = 30.0
_FIRST_PAUSE, _PAUSE = 0.02, 2.0  # seconds between two collectives, doubled from the one to the other
_REPORT = 60.0


def open_together(index: SampleIndex, stop: StopRequest | None = None) -> tuple[Any, Any]:
    """Training and held-out samples, after their index was written wherever it was missing; collective.

    Raises:
        DataError: on every rank, if one of them cannot write or read an index; names that rank and its host.
        Stopped: on every rank, if ``stop`` says so on any of them while others wait for an index.
    """
    mine = _rank() == 0
    while True:
        started = time.monotonic()
        error = _write(index, mine and not index.there(), stop)
        seen, splits = _seen(index, min(SEEN_WITHIN, time.monotonic() - started), stop), None
        if error is None and seen:
            try:
                splits = index.open()
            except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
                error = caught
        elif error is None and mine:
            error = DataError(f"{index.folder}: was written, and is not there. Set data.cache to another folder.")
        told = _told(platform.node(), seen, _text(error))
        _raise_any(told, error)
        blind = [rank for rank, (_, saw, _) in enumerate(told) if not saw]
        if not blind:
            assert splits is not None
            return splits
        lowest = {told[rank][0]: rank for rank in reversed(blind)}  # on each host
        mine = _rank() in lowest.values()


def _write(index: SampleIndex, mine: bool, stop: StopRequest | None) -> Exception | None:
    """Write it where ``mine``, and return when all that do are done: this rank's error."""
    error: Exception | None = None
    child: _Child | None = None
    with ExitStack() as stack:
        try:
            if mine and index.small and _rank() == 0:
                index.write(stack.enter_context(index.room()))
            elif mine:
                child = stack.enter_context(_child(index))
        except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
            error = caught
        _wait(lambda: child is not None and child.process.poll() is None, stop, _report if _rank() == 0 else None)
        return error if child is None else child.error()


def _seen(index: SampleIndex, within: float, stop: StopRequest | None) -> bool:
    """Whether it is there, on this rank, after so many seconds at most."""
    deadline = time.monotonic() + within
    _wait(lambda: not index.there() and time.monotonic() < deadline, stop)
    return index.there()


@dataclass(frozen=True)
class _Child:
    index: SampleIndex
    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def error(self) -> DataError | None:
        """Why it wrote nothing, when it has ended."""
        status = self.process.returncode
        if status == 0:
            return None
        if status < 0:
            name = signal.Signals(-status).name + (", perhaps for want of memory" if status == -signal.SIGKILL else "")
            return DataError(f"{self.index.cache}: the process that writes the index of samples was ended by {name}.")
        self.said.seek(0)
        said = self.said.read().decode(errors="replace").strip()
        last = said.rpartition("\n")[2]
        if status == EXIT_EXPLAINED:
            return DataError(last)
        sys.stderr.write(f"{said}\n")
        return DataError(f"{self.index.cache}: the process that writes the index of samples failed: {last}")


@contextmanager
def _child(index: SampleIndex) -> Iterator[_Child]:
    """A process that writes the index; it is killed if this rank leaves early.

    Here megatron-core would write on rank 0 alone. And its compiled part holds the interpreter's lock, for minutes
    where there are 1e9 documents: this rank could join no collective, in whatever thread it wrote. The child dies
    with its rank, whose restart starts another, and does not get requests to stop, which reach all processes of a rank:
    the ranks agree on them first.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the same packages as here
    with index.room() as room, tempfile.TemporaryFile() as said:
        with stop_signals_blocked():
            process = subprocess.Popen(
                index.command(room),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
            )
        try:
            yield _Child(index, process, said)
        finally:
            process.kill()
            process.wait()


def _wait(
    busy: Callable[[], bool], stop: StopRequest | None, report: Callable[[int, float], None] | None = None
) -> None:
    """Return when ``busy()`` is false on every rank; collective.

    Args:
        busy: asked again and again.
        stop: of this rank.
        report: told each minute how many ranks are busy, and for how many seconds so far.

    Raises:
        Stopped: a rank is busy, and one was asked to stop.
    """
    started, pause = time.monotonic(), _FIRST_PAUSE
    due = started + _REPORT
    while True:
        count, asked = _sums(busy(), bool(stop))
        if not count:
            return
        if asked:
            raise Stopped
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE)
        if report is not None and time.monotonic() >= due:
            report(count, time.monotonic() - started)
            due += _REPORT


def _report(count: int, seconds: float) -> None:
    where = f" on {count} hosts" if count > 1 else ""
    with suppress(OSError):  # of a log on a full disk
        sys.stderr.write(f"building the index of samples{where}: {seconds / 60:.0f} minutes so far\n")
        sys.stderr.flush()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _sums(*flags: bool) -> list[int]:
    """How many ranks say yes to each."""
    if not dist.is_initialized():
        return [int(flag) for flag in flags]
    counts = torch.tensor(flags, dtype=torch.int64, device=compat.device())
    dist.all_reduce(counts)
    said: list[int] = counts.tolist()
    return said


def _told(*mine: Any) -> list[Any]:
    if not dist.is_initialized():
        return [mine]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def _text(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error) if isinstance(error, MTPError) else f"{type(error).__name__}: {error}"


def _raise_any(told: list[Any], own: Exception | None) -> None:
    failed = [(rank, host, problem) for rank, (host, _, problem) in enumerate(told) if problem]
    if not failed:
        return
    rank, host, problem = failed[0]
    where = f"rank {rank} on {host}: " if len(told) > 1 else ""
    more = f" ({len(failed)} of {len(told)} ranks have errors)" if len(failed) > 1 else ""
    raise DataError(f"{where}{problem}{more}") from own
