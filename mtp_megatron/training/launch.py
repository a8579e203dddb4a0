"""Starting one process per rank on this machine with torchrun, and passing requests to stop on to them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from mtp_megatron.signals import STACKS_SIGNAL, caught_signals, end_with_parent

WORKER_MODULE = "mtp_megatron.train"


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``python -m mtp_megatron.train ARGUMENTS`` under torchrun in ``processes`` processes; returns its exit
    status.

    A first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is passed on to the ranks, which save and end with status 0; a second one
    kills them. Where there are no ranks yet the first one ends torchrun. Ranks do not get the terminal's Ctrl-C
    themselves: torchrun would end them before they have saved. SIGUSR2 has each write its stacks (:mod:`.hang_watch`).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    job = subprocess.Popen(
        [*command, "-m", WORKER_MODULE, *arguments],
        env=environment,
        start_new_session=True,
        preexec_fn=_prepare_torchrun,
    )
    requests = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal requests
        requests += 1
        ranks = _ranks(job.pid)
        for rank in ranks:  # each has a session of its own, and would outlive torchrun
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number if requests == 1 else signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            if requests > 1:
                os.killpg(job.pid, signal.SIGKILL)
            elif not ranks:  # torchrun has not started them yet, and shall not
                os.killpg(job.pid, signal.SIGTERM)

    def ask_where(number: int, frame: FrameType | None) -> None:
        for rank in _ranks(job.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in caught_signals()}
    former[STACKS_SIGNAL] = signal.signal(STACKS_SIGNAL, ask_where)
    try:
        return job.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _ranks(agent: int) -> list[psutil.Process]:
    """The processes that torchrun started for the ranks."""
    try:
        children = psutil.Process(agent).children()
        return [child for child in children if WORKER_MODULE in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def _prepare_torchrun() -> None:
    """In the child before exec: ask the kernel for SIGTERM when the launcher dies, so that no job is left without one;
    and have torchrun live on when SLURM sends SIGUSR1 or SIGUSR2 to every process, of which it knows nothing."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    end_with_parent(os.getppid(), signal.SIGTERM)
