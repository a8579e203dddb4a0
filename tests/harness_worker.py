"""The worker process of `tests.harness`: runs each task in a world of its own and cleans up after it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

CLEAN = "clean"  # what a worker is told when every rank has an outcome, or one has failed
READY = "ready"  # what a worker sends when it has started, and when it has cleaned up after a task
_PR_SET_PDEATHSIG = 1
_TAIL = 4000  # bytes of a worker's own output that an error shows


@dataclass(frozen=True)
class Task:
    """What every rank of one world is told: pickled (function, arguments), world and environment."""

    call: bytes
    world_size: int
    rendezvous: str
    timeout: float
    env: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended. `lost`: its process cannot be used again; `time` is monotonic, comparable between ranks."""

    ok: bool
    value: Any = None
    kind: str = ""
    text: str = ""
    summary: str = ""
    time: float = 0.0
    lost: bool = False


@dataclass
class Worker:
    """The parent's handle of one worker process."""

    process: SpawnProcess
    connection: Connection
    directory: Path
    told: bool = True  # to clean up after its task

    @classmethod
    def start(cls, directory: Path, hide_cuda: bool) -> Worker:
        """Start a process whose output goes to `directory`; not daemonic, as checkpointing starts children itself."""
        directory.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        if hide_cuda:
            env["CUDA_VISIBLE_DEVICES"] = ""
        process = context.Process(target=main, args=(theirs, str(directory)), daemon=False)
        with _environment(env):
            process.start()
        theirs.close()
        return cls(process, ours, directory)

    def send(self, rank: int, task: Task) -> None:
        self.told = False
        self.connection.send((rank, task, list(sys.path), os.getcwd()))

    def poll(self) -> Outcome | None:
        """The outcome if there is one; a process that ended without one counts as failed."""
        alive = self.process.is_alive()  # asked first: what a process sent before its end can still be read
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll():
                outcome: Outcome = self.connection.recv()
                return outcome
        if alive:
            return None
        self.process.join()
        died = f"died with exit code {self.process.exitcode}"
        return Outcome(ok=False, lost=True, kind="Died", text=died, summary=died, time=-math.inf)  # always a cause

    def clean(self) -> None:
        """Let the worker clean up after its task, once; ask `ready` for the end of it."""
        if not self.told:
            self.told = True
            with contextlib.suppress(OSError):
                self.connection.send(CLEAN)

    def ready(self, deadline: float) -> bool:
        """Wait until the worker has started, or has cleaned up after its task; at most until `deadline` (monotonic)."""
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll(max(0.0, deadline - time.monotonic())):
                return bool(self.connection.recv() == READY)
        return False

    def threads(self) -> int:
        """Threads of the process; 0 where the system does not tell."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/task"))
        except OSError:
            return 0

    def signal(self, number: int) -> None:
        if self.process.pid is not None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()  # where it had no group of its own yet

    def stacks(self) -> str:
        return _read(self.directory / "stacks")

    def output_tail(self) -> str:
        """The end of what the worker printed during its last task."""
        tail = _read(self.directory / "output")[-_TAIL:].strip()
        return f"\nits output ends with:\n{tail}" if tail else ""


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(connection: Connection, directory: str) -> None:
    """Serve tasks until the parent closes its end."""
    if sys.platform == "linux":  # never outlive a parent that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()  # Ctrl-C is the parent's to handle, and children can be killed together with this process
    output = os.open(os.path.join(directory, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with open(os.path.join(directory, "stacks"), "w") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        from mtp_megatron.imports import imports_that_stay

        with imports_that_stay():
            import torch

        torch.set_num_threads(1)
        connection.send(READY)
        while True:
            rank, task, path, cwd = _received(connection)
            os.ftruncate(output, 0)
            sys.path[:] = path
            os.chdir(cwd)
            connection.send(_outcome(rank, task))  # before cleaning up, which may hang after an error
            # Not before all ranks are done: gloo fails to connect to a rank that has left its groups already.
            _received(connection)
            _clean()
            connection.send(READY)


def _received(connection: Connection) -> Any:
    """What the parent sends; this process ends when it has closed its end."""
    try:
        return connection.recv()
    except EOFError:
        os._exit(0)  # nothing left to flush; torch's own teardown takes a second


def _outcome(rank: int, task: Task) -> Outcome:
    try:
        with _environment({**_rank_environment(rank, task.world_size), **task.env}):
            value = _run(rank, task)
            pickle.dumps(value)  # here, so that an unpicklable result is an error of this rank
            return Outcome(ok=True, value=value, time=time.monotonic())
    except BaseException as error:  # noqa: BLE001 - whatever ended the body is reported to the parent
        now = time.monotonic()
        return Outcome(
            ok=False,
            kind=type(error).__name__,
            text=traceback.format_exc(),
            summary=str(error) if type(error).__name__ == "Skipped" else f"{type(error).__name__}: {error}",
            time=now,
            # torch has counted a default group that failed, and the names of the next would not be the other ranks'.
            lost=not sys.modules["torch"].distributed.is_initialized(),
        )


def _rank_environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _run(rank: int, task: Task) -> Any:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    torch.manual_seed(0)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{task.rendezvous}",
        rank=rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=task.timeout + 60),  # the parent's timeout comes first, as it can say who hangs where
    )
    fn, args = pickle.loads(task.call)
    return fn(rank, task.world_size, *args)


_clean_modules = [0]


def _clean() -> None:
    """Undo what a body may leave behind in this process."""
    import torch
    import torch.distributed as dist

    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    random.seed(0)
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import num_microbatches_calculator, parallel_state
        from megatron.core.tensor_parallel import random as megatron_random

        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.unset_num_microbatches_calculator()
        if megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED:
            megatron_random.get_cuda_rng_tracker().reset()
    if "deepspeed" in sys.modules:
        _forget_deepspeed()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    if len(sys.modules) != _clean_modules[0]:
        # What the imports left is not garbage: without it the next collection takes milliseconds instead of 0.3 s.
        _clean_modules[0] = len(sys.modules)
        gc.freeze()


def _forget_deepspeed() -> None:
    """Take from DeepSpeed what it remembers of a world that is gone, and its numbers of modules and parameters.

    Those must be the same on every rank, and the next world may have ranks that have seen fewer engines.
    """
    from deepspeed import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    comm.comm.cdb = None
    groups._WORLD_GROUP = groups.mpu = None
    parameter_offload.FWD_MODULE_STACK.clear()
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    partition_parameters.Init.param_id = 0
