"""The harness itself: what it returns, what it says when a rank fails, dies or hangs, reuse of its processes."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from mtp_megatron import compat
from tests.harness import parallel, run_world

only_gloo = pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="about connections and interfaces of gloo")


def _sum(rank: int, world_size: int, start: float) -> tuple[float, int]:
    value = torch.tensor(start + rank, device=compat.device())
    dist.all_reduce(value)
    return float(value), os.getpid()


def _layout(rank: int, world_size: int, tp: int, pp: int) -> tuple[int, int, int]:
    with parallel(tp=tp, pp=pp):
        from megatron.core import parallel_state as ps

        return (
            ps.get_tensor_model_parallel_rank(),
            ps.get_pipeline_model_parallel_rank(),
            ps.get_data_parallel_rank(),
        )


def _rank_one_fails(rank: int, world_size: int, message: str) -> None:
    if rank == 1:
        print("printed by the failing rank")
        raise AssertionError(message)
    dist.barrier()


def _one_fails_while_others_sleep(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("missing")
    _nap()


def _all_fail(rank: int, world_size: int) -> None:
    dist.barrier()
    raise ValueError(f"rank {rank} refuses")


def _rank_two_dies(rank: int, world_size: int) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _rank_zero_hangs(rank: int, world_size: int) -> None:
    if rank == 0:
        _nap()


def _nap() -> None:
    time.sleep(60)


def _skips(rank: int, world_size: int) -> None:
    pytest.skip("not on this kind of machine")


def _dirty(rank: int, world_size: int) -> str:
    from megatron.core import parallel_state as ps

    ps.initialize_model_parallel(2, 1)
    torch.set_default_dtype(torch.float64)
    os.environ["LEFT_BEHIND"] = "1"
    return os.environ["FROM_CALLER"]


def _found(rank: int, world_size: int) -> tuple[bool, torch.dtype, str | None, str | None]:
    from megatron.core import parallel_state as ps

    environment = os.environ.get("LEFT_BEHIND"), os.environ.get("FROM_CALLER")
    return ps.model_parallel_is_initialized(), torch.get_default_dtype(), *environment


def _rank_zero_returns_first(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(1)
        dist.isend(torch.ones(1), dst=0)  # fails when rank 0 has closed its connections


def test_results_come_in_rank_order_and_processes_are_reused() -> None:
    first = run_world(_sum, 4, 1.0)
    assert [value for value, _ in first] == [10.0] * 4
    pids = [pid for _, pid in first]
    assert len({*pids, os.getpid()}) == 5
    assert [pid for _, pid in run_world(_sum, 4, 2.0)] == pids
    assert run_world(_sum, 2, 0.0) == [(1.0, pid) for pid in pids[:2]]  # a smaller world uses the first workers


def test_fresh_processes_are_not_the_pool() -> None:
    pooled = {pid for _, pid in run_world(_sum, 2, 0.0)}
    fresh = {pid for _, pid in run_world(_sum, 2, 0.0, fresh=True)}
    assert not pooled & fresh
    assert {pid for _, pid in run_world(_sum, 2, 0.0)} == pooled
    for pid in fresh:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_parallel_lays_out_ranks_as_megatron_does() -> None:
    assert run_world(_layout, 4, 2, 2) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert run_world(_layout, 4, 2, 1) == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]


def test_first_error_is_surfaced_with_rank_traceback_and_output() -> None:
    with pytest.raises(AssertionError, match="rank 1 of 4 failed first") as error:
        run_world(_rank_one_fails, 4, "the losses differ")
    message = str(error.value)
    assert "the losses differ" in message
    assert "_rank_one_fails" in message  # its traceback
    assert "printed by the failing rank" in message
    assert run_world(_sum, 2, 1.0)[0][0] == 3.0


def test_ranks_that_go_on_after_an_error_are_killed() -> None:
    pids = [pid for _, pid in run_world(_sum, 3, 0.0)]
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"rank 1 of 3 failed first:(.|\n)*KeyError: 'missing'(.|\n)*rank 2 was killed"
    ):
        run_world(_one_fails_while_others_sleep, 3)
    assert time.monotonic() - start < 30
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert run_world(_sum, 3, 0.0)[0][0] == 3.0  # new processes serve the next call


def test_processes_survive_an_error_that_every_rank_reports() -> None:
    pids = [pid for _, pid in run_world(_sum, 2, 0.0)]
    with pytest.raises(RuntimeError, match=r"ValueError: rank \d refuses"):
        run_world(_all_fail, 2)
    assert [pid for _, pid in run_world(_sum, 2, 0.0)] == pids


def test_death_of_a_rank_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="rank 2 of 3 failed first:\ndied with exit code -9"):
        run_world(_rank_two_dies, 3)


def test_hang_names_the_rank_and_shows_where() -> None:
    run_world(_sum, 2, 0.0)  # processes are up, so the time below is the body's
    with pytest.raises(RuntimeError, match=r"of 2 ranks these hung: no result within 6 s: 0\n") as error:
        run_world(_rank_zero_hangs, 2, timeout=6)
    assert "in _nap" in str(error.value)


def test_skip_in_a_body_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="not on this kind of machine"):
        run_world(_skips, 2)


def test_nothing_is_left_behind_for_the_next_body() -> None:
    run_world(_layout, 2, 2, 1)
    assert run_world(_dirty, 2, env={"FROM_CALLER": "yes"}) == ["yes", "yes"]
    assert run_world(_found, 2) == [(False, torch.float32, None, None)] * 2


@only_gloo
def test_no_rank_leaves_its_world_before_all_are_done() -> None:
    run_world(_sum, 2, 0.0)  # processes are up, and connect within the second
    run_world(_rank_zero_returns_first, 2)


@only_gloo
def test_a_world_that_could_not_be_made_does_not_confuse_the_next() -> None:
    run_world(_sum, 2, 0.0)
    with pytest.raises(RuntimeError, match="no_such_interface"):
        run_world(_sum, 2, 0.0, env={"GLOO_SOCKET_IFNAME": "no_such_interface"})
    assert run_world(_sum, 3, 0.0)[0][0] == 3.0


def test_bodies_must_be_importable() -> None:
    with pytest.raises(TypeError, match="module-level function"):
        run_world(lambda rank, world_size: None, 2)
