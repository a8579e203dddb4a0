"""Stopping on request: SIGTERM, SIGINT, SIGHUP (a terminal that closes) or SIGUSR1 (SLURM's ``--signal``, some time
before a limit) let the step finish, save and exit with status 0. SIGUSR2 asks a rank where it is (:mod:`.hang_watch`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STACKS_SIGNAL = signal.SIGUSR2


def caught_signals() -> list[signal.Signals]:
    """:data:`STOP_SIGNALS`, without SIGHUP where it is ignored already: nohup wants the end of a terminal to go
    unnoticed."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


class Stopped(Exception):
    """The job was asked to stop before its first step: there is nothing to save."""


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record the signals instead of dying of them; the former handlers return at the end."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)

    former = {number: signal.signal(number, note) for number in caught_signals()}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def unwind_on_signal() -> Iterator[None]:
    """Let the signals end the process through ``finally`` blocks, as Ctrl-C does, not past them: SIGTERM and its like
    raise ``SystemExit(128 + number)``. In a thread other than the main one, which Python gives no signals, nothing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling({number: stop for number in caught_signals() if number != signal.SIGINT}):
        yield


@contextmanager
def die_on_signal() -> Iterator[None]:
    """Let the signals end the process at once: for a long call of C++ that Python's handlers would have to wait for,
    where nothing is left to do at the end."""
    with _handling(dict.fromkeys(caught_signals(), signal.SIG_DFL)):
        yield


@contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def children_leave_stopping_to_parent() -> Iterator[None]:
    """Processes that are started inside begin with the signals blocked, all their threads, until
    :func:`leave_stopping_to_parent` waits for them there."""
    if sys.platform != "linux":
        yield
        return
    with stop_signals_blocked():
        yield


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Inside, this thread gets none of the signals until the end; processes that are started inside inherit that. Nor
    :data:`STACKS_SIGNAL`, of which such a process would die: SLURM sends it to all of a job step."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, STACKS_SIGNAL))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send ``number`` to this process when the one that started it, ``parent``, dies; Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has died already
        os.kill(os.getpid(), number)


def leave_stopping_to_parent(worker: int) -> None:
    """A DataLoader's ``worker_init_fn``: a process that reads or tokenizes data goes on when it is asked to stop, until
    its parent ends it.

    torchrun signals all processes of a rank and SLURM all of a job step, and a rank whose readers died of that fails
    before it has saved. The parent's own SIGTERM still ends them: an interpreter that exits sends it and then waits.
    """
    if sys.platform != "linux":  # no sigwaitinfo on macOS, and no cluster either
        return
    parent = multiprocessing.parent_process()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a handler would not be told who sends
    number = os.getppid() if parent is None or parent.pid is None else parent.pid
    threading.Thread(target=_end_with, args=(number,), daemon=True).start()


def _end_with(parent: int) -> None:
    while True:
        request = signal.sigwaitinfo(STOP_SIGNALS)
        if request.si_signo == signal.SIGTERM and request.si_pid == parent:
            os._exit(0)
