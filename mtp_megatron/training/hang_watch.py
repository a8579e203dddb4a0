"""Where a rank is when it hangs: the stacks of all its threads, on SIGUSR2 and before a collective's timeout ends it.

:mod:`faulthandler` writes them from C without the interpreter's lock, so also while a rank waits in a collective or in
a compiled function. Each has a file in ``RUN/stacks``, and ``mtp-megatron stacks RUN`` says which ranks are where.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.signals import STACKS_SIGNAL
from mtp_megatron.stack_files import Header, read_header, stack_file, thread_name

LATE = 0.9  # of train.timeout_minutes: what is left is for ranks that write later, before the first collective fails
_REARM = 0.01  # of it: arming takes a new thread, 60 to 90 us, and a step may take 10 ms
_LEAST = 0.1  # of it: what is left after a fork, as the rest is repeated, too
_LOOK = 0.02  # of it: how often the log's thread looks for new stacks
_STATUS = Path("/proc/self/status")
logger = logging.getLogger(__name__)


class HangWatch:
    """Has this process write its stacks whenever the part of the run that :meth:`begin` named is not over after
    :data:`LATE` of the timeout, again and again, and whenever it gets SIGUSR2.

    Until :meth:`write_to` has opened a file they go to stderr. A handler that SIGUSR2 has already stays.

    Args:
        minutes: ``train.timeout_minutes``.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes, self._after = minutes, LATE * 60 * minutes
        self._what, self._began = "the start", time.monotonic()
        self._armed = -self._after
        self._timed = True
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self._header: Header | None = None
        self._seen = 0  # bytes of the file that are known, headers or told
        self._late_from = 0  # bytes of it when the present part of the run began
        self._registered = False
        self._ended = threading.Event()
        self._teller: threading.Thread | None = None

    def __enter__(self) -> Self:
        _mind_forks()
        _watching.append(self)
        self._register(_stderr())
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _watching.remove(self)
        faulthandler.cancel_dump_traceback_later()
        if self._registered:
            faulthandler.unregister(STACKS_SIGNAL)
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
        if value is not None and self._path is not None and self._size() > self._late_from:
            value.add_note(
                f"before that it wrote the stacks of its threads to {self._path}, as ranks do when something takes "
                f"{LATE:g} of train.timeout_minutes: {self._command()} says which ranks were where"
            )
        self._close()

    def write_to(self, folder: Path) -> None:
        """From now on write to this rank's file in ``folder``; collective, the process group must be up.

        Where no file can be opened a warning says so, and stderr gets the stacks.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        started = torch.tensor(time.time_ns() // 1000, dtype=torch.int64, device=compat.device())
        dist.broadcast(started, 0)
        self._header = Header(
            asked=self._registered or _is_free(),
            attempt=datetime.fromtimestamp(int(started) / 1e6, UTC).isoformat(timespec="microseconds"),
            rank=rank,
            size=size,
            host=platform.node(),
            process=os.getpid(),
            main=thread_name(threading.main_thread().ident or 0),
        )
        self._path = stack_file(folder, rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Appended to: what the attempt before a restart wrote is what the restart is asked about. Without a buffer:
            # what a full disk does not take is not tried again later.
            file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - _close
            file.write(self._header.line().encode())
            self._file = file
        except OSError as error:
            logger.warning("%s cannot be written (%s): stacks of hung ranks go to stderr", self._path, error)
            self._path = None
            return
        self._seen = self._late_from = self._size()
        self._register(self._file)
        self._arm()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self._teller = threading.Thread(target=self._tell, name="hang_watch", daemon=True)
            self._teller.start()

    @property
    def what(self) -> str:
        """The present part of the run."""
        return self._what

    def begin(self, what: str, *, timed: bool = True) -> None:
        """What the process does next, for example ``step 12``: what came before is over, and took no longer.

        Where no timeout ends it (not ``timed``), only SIGUSR2 has its stacks written: it may well take hours, and
        faulthandler reads those of threads that run.
        """
        self._what, self._began = what, time.monotonic()
        changed, self._timed = timed != self._timed, timed
        if changed or self._began - self._armed > _REARM * self._after:
            self._late_from = self._size()
            self._arm()

    def _arm(self, passed: float = 0.0) -> None:
        """Begin to count, from ``passed`` seconds ago."""
        target = self._file or _stderr()
        if target is None:
            return
        if not self._timed:
            faulthandler.cancel_dump_traceback_later()
            return
        self._armed = time.monotonic() - passed
        # Repeated: a part of the run may take long, and hang later.
        faulthandler.dump_traceback_later(max(self._after - passed, _LEAST * self._after), repeat=True, file=target)

    def _register(self, target: IO[bytes] | IO[str] | None) -> None:
        if target is None or not (self._registered or _is_free()):
            return
        faulthandler.register(STACKS_SIGNAL, file=target, all_threads=True)
        self._registered = True

    def _size(self) -> int:
        if self._file is None:
            return 0
        try:
            return os.fstat(self._file.fileno()).st_size
        except OSError:  # a network file system that is gone
            return self._seen

    def _tell(self) -> None:
        """Say in the log of this node where stacks are. NCCL ends a process without a word from Python."""
        while not self._ended.wait(_LOOK * self._after):
            size = self._size()
            if size <= self._seen:
                continue
            self._seen = size
            with suppress(AttributeError, OSError, ValueError):  # nobody reads it
                sys.stderr.write(
                    f"stacks of all threads were written to {self._path}: {self._what} has taken "
                    f"{time.monotonic() - self._began:.0f} s so far, and a collective that waits longer than "
                    f"train.timeout_minutes={self._minutes:g} ends the job. {self._command()} says which ranks are "
                    "where.\n"
                )
                sys.stderr.flush()

    def _command(self) -> str:
        return f"'mtp-megatron stacks {self._path.parent.parent if self._path else 'RUN'}'"

    def _close(self) -> None:
        """And leave nothing behind where nothing was written but headers."""
        if self._file is None or self._path is None or self._header is None:
            return
        with suppress(OSError, ValueError):
            self._file.close()
            text = self._path.read_text(encoding="utf-8", errors="replace")
            # The last header is another job's where one has begun already: the lock of the folder is free by now.
            if all(read_header(line) for line in text.splitlines()) and text.endswith(self._header.line()):
                self._path.unlink()
                with suppress(OSError):  # other ranks' files are in it
                    self._path.parent.rmdir()


def _is_free() -> bool:
    """Whether SIGUSR2 has no handler. Python does not know of those that were installed from C; Linux tells."""
    try:
        status = _STATUS.read_text(encoding="utf-8")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("SigCgt:"):
            return not int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1
    # macOS, or a sandbox that leaves the line out: google/gvisor#14500.
    return signal.getsignal(STACKS_SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN)


def _stderr() -> IO[str] | None:
    """None where it is no open file: a notebook's, one that was closed."""
    try:
        os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    return sys.stderr


# Python keeps for good what is registered for forks, so the watch is looked up here.
_watching: list[HangWatch] = []


@cache
def _mind_forks() -> None:
    """A child of fork that ends as processes do would wait forever for faulthandler's thread, which it does not have;
    and SIGUSR2, which ``pkill`` and SLURM send to all, would have it write into its parent's file."""
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


def _before_fork() -> None:
    if _watching:
        faulthandler.cancel_dump_traceback_later()


def _in_parent() -> None:
    for watch in _watching:  # what it watches goes on, and so does its time
        watch._arm((time.monotonic() - watch._began) % watch._after)


def _in_child() -> None:
    if any(watch._registered for watch in _watching):
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    _watching.clear()
