"""Distributed tests in plain functions: `run_world` runs one function on every rank and returns what each returned.

    def body(rank, world_size, x):
        with parallel(tp=2, pp=2):
            ...
        return value                      # picklable

    def test_it():
        values = run_world(body, 4, x)    # list of four

Importing torch and megatron takes seconds, so worker processes are kept and reused by later calls (`fresh=True` asks
for new ones). Every call has its own torch.distributed world over a file in a temporary directory. What a body must not
leave behind is cleaned up after it: process groups, Megatron's parallel state, RNG trackers, environment variables.
When a rank hangs or dies, all are killed and the next call starts new processes.

With a CUDA device for every rank they use NCCL; otherwise gloo on the CPU, with CUDA hidden from the workers.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.harness_worker import Outcome, Task, Worker

GRACE = 3.0  # seconds that the other ranks get, after a first error, to report theirs
STACKS = 5.0  # seconds for hung ranks to write where they are
THREADS = 1000  # of one worker between two worlds, above which the workers are replaced
STARTING = 180.0  # seconds that workers may take to import torch, which is not the body's time
CLEANING = 60.0  # seconds to clean up after a body; only a rank stuck in destroying its process groups needs longer

_pools: dict[str, list[Worker]] = {}
_directory: tempfile.TemporaryDirectory[str] | None = None
_worlds = 0


def run_world(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 240,
    env: dict[str, str] | None = None,
    fresh: bool = False,
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on every rank and return the ranks' results in order.

    Args:
        fn: a module-level function (workers import it by name).
        args: picklable arguments, the same for every rank.
        timeout: seconds after which the ranks that have not finished are killed; their stacks are in the error.
        env: environment variables for the body; restored afterwards.
        fresh: use new processes and end them afterwards, for bodies that kill themselves or change global state.

    Raises:
        AssertionError: the first error on any rank was an AssertionError.
        RuntimeError: it was another error, or a rank died or hung: the message names it and holds its traceback. Or new
            processes did not start.
    """
    global _worlds
    _worlds += 1
    kind = "cuda" if _cuda_devices() >= world_size else "cpu"
    call = _pickled(fn, args)
    workers = _started(kind, f"fresh{_worlds}", world_size) if fresh else _pool(kind, world_size)
    task = Task(
        call=call,
        world_size=world_size,
        rendezvous=str(_home() / f"world{_worlds}"),
        timeout=timeout,
        env=dict(env or {}),
    )
    reusable = False
    try:
        outcomes = _run(workers, task, timeout)
        reusable = not fresh and not any(outcome.lost for outcome in outcomes) and _cleaned(workers)
        # Caches of megatron-core keep process groups alive, each with threads of gloo.
        reusable = reusable and all(w.threads() <= THREADS for w in workers)
    finally:
        if not reusable:  # also when this process was interrupted
            _kill(workers if fresh else _pools.pop(kind))
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if not outcome.ok]
    if failed:
        _raise(failed, world_size)
    return [outcome.value for outcome in outcomes]


@contextlib.contextmanager
def parallel(
    tp: int = 1, pp: int = 1, vp: int | None = None, cp: int = 1, ep: int = 1, seed: int = 1234, **settings: Any
) -> Iterator[None]:
    """Initialise Megatron's model parallel groups and its RNG states on this rank, and destroy both at the end.

    Args:
        tp, pp, cp: sizes of tensor, pipeline and context parallelism; data parallelism takes the rest of the world.
        vp: virtual pipeline stages per rank.
        ep: size of expert parallelism, among the ranks of a pipeline stage.
        settings: of ``initialize_model_parallel`` besides.
        seed: of the default RNG state, which is the same on all ranks; the model parallel state differs by TP rank.
    """
    import torch

    from mtp_megatron import compat

    compat.prepare()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        **settings,
    )
    try:
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        tensor_parallel.get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()


def close() -> None:
    """End all worker processes and remove their files; a later `run_world` starts new ones."""
    global _directory
    workers = [worker for pool in _pools.values() for worker in pool]
    _pools.clear()
    for worker in workers:
        worker.connection.close()  # a waiting worker ends by itself
    wait([worker.process.sentinel for worker in workers], timeout=1)
    _kill(workers)
    if _directory is not None:
        _directory.cleanup()
        _directory = None


atexit.register(close)


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _home() -> Path:
    global _directory
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="mtp-worlds-")
    return Path(_directory.name)


def _started(kind: str, name: str, count: int) -> list[Worker]:
    """New workers, ready for a task."""
    workers: list[Worker] = []
    try:
        for index in range(count):
            workers.append(Worker.start(_home() / f"{kind}-{name}-{index}", hide_cuda=kind == "cpu"))
        until = time.monotonic() + STARTING
        if not all(worker.ready(until) for worker in workers):
            said = "".join(worker.output_tail() for worker in workers)
            raise RuntimeError(f"{count} worker processes did not start, or not within {STARTING:g} s{said}")
    except BaseException:  # also when this process was interrupted: its exit would wait for them
        _kill(workers)
        raise
    return workers


def _pool(kind: str, size: int) -> list[Worker]:
    """The first `size` workers of the pool, started or replaced where needed."""
    workers = _pools.setdefault(kind, [])
    if not all(worker.process.is_alive() for worker in workers):
        _kill(workers)
        workers.clear()
    if len(workers) < size:
        workers += _started(kind, f"{_worlds}", size - len(workers))
    return workers[:size]


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"run_world needs a module-level function and picklable arguments: {error}") from error


def _run(workers: Sequence[Worker], task: Task, timeout: float) -> list[Outcome]:
    """Send the task to every worker and collect one outcome for each, at the latest after timeout + GRACE + STACKS.

    After a failure ranks clean up as they report it: others that wait for them in a collective then fail too, and
    report what they were doing.
    """
    for rank, worker in enumerate(workers):
        worker.send(rank, task)
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + timeout
    failing = False
    while len(outcomes) < len(workers):
        pending = [rank for rank in range(len(workers)) if rank not in outcomes]
        handles = {workers[rank].connection: rank for rank in pending}
        ready = wait(
            [*handles, *(workers[rank].process.sentinel for rank in pending)],
            timeout=max(0.0, deadline - time.monotonic()),
        )
        if not ready:
            break
        for rank in pending:
            outcome = workers[rank].poll()
            if outcome is not None:
                outcomes[rank] = outcome
                if not outcome.ok and not failing:
                    failing, deadline = True, min(deadline, time.monotonic() + GRACE)
        if failing:
            for rank, outcome in outcomes.items():
                if not outcome.lost:
                    workers[rank].clean()
    pending = [rank for rank in range(len(workers)) if rank not in outcomes]
    _dump_stacks([workers[rank] for rank in pending])
    problem = "was killed after another rank failed" if failing else f"hung: no result within {timeout:g} s"
    for rank in pending:
        outcomes[rank] = Outcome(
            ok=False,
            lost=True,
            kind="Hung",
            text=f"{problem}\n{workers[rank].stacks()}",
            summary=problem,
            time=math.inf,
        )
    return [
        outcome if outcome.ok else replace(outcome, text=outcome.text + workers[rank].output_tail())
        for rank, outcome in sorted(outcomes.items())
    ]


def _cleaned(workers: Sequence[Worker]) -> bool:
    """Have all workers clean up after their task, which they do together; False if one does not come to its end."""
    for worker in workers:
        worker.clean()
    until = time.monotonic() + CLEANING
    return all(worker.ready(until) for worker in workers)


def _dump_stacks(workers: Sequence[Worker]) -> None:
    """Have each worker write the Python stacks of its threads to its file; works from inside C code too."""
    for worker in workers:
        worker.signal(signal.SIGUSR2)
    until, before, written = time.monotonic() + STACKS, [""], [""] * len(workers)
    while workers and time.monotonic() < until and not (before == written and all(written)):
        time.sleep(0.1)
        before, written = written, [worker.stacks() for worker in workers]


def _kill(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.process.join(5)
        worker.connection.close()


def _raise(failed: Sequence[tuple[int, Outcome]], world_size: int) -> None:
    """Raise for the rank that failed first; errors of the others are usually its consequence and get one line each."""
    rank, first = min(failed, key=lambda item: item[1].time)
    if first.kind == "Skipped":
        import pytest

        pytest.skip(first.summary)
    if first.kind == "Hung":
        ranks = ", ".join(str(other) for other, _ in failed)
        stacks = "\n".join(f"--- rank {other} {outcome.text}" for other, outcome in failed)
        raise RuntimeError(f"of {world_size} ranks these {first.summary}: {ranks}\n{stacks}")
    rest = [f"\nrank {other} {outcome.summary}" for other, outcome in failed if other != rank]
    message = f"rank {rank} of {world_size} failed first:\n{first.text}{''.join(rest)}"
    raise (AssertionError if first.kind == "AssertionError" else RuntimeError)(message)
