"""A job whose ranks disagree, or of which some cannot start: every rank is told why, before anything is allocated."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
from torch.distributed import HashStore

from mtp_megatron.errors import ConfigError, PathError
from mtp_megatron.training.agreement import JobError, Statement, compare, preflight_together, through_store
from mtp_megatron.training.recipe_io import parse_recipe
from tests.harness import run_world
from tests.training_runs import tiny_tree, train_body


def start_body(rank: int, world_size: int, trees: list[dict[str, Any]]) -> tuple[str, str, bool]:
    """For ``run_world``: start to train with this rank's own recipe; returns the error, and whether a model was
    built."""
    from mtp_megatron.errors import MTPError
    from mtp_megatron.training import agreement, loop
    from mtp_megatron.training import build as building
    from mtp_megatron.training.recipe_io import parse_recipe

    built = []

    def build(recipe: Any) -> None:
        built.append(recipe)
        raise MTPError("built")

    former, building.build_trainable = building.build_trainable, build  # what takes memory
    patience, agreement.SEEN_WITHIN = agreement.SEEN_WITHIN, 1.0
    try:
        loop.train(parse_recipe(trees[rank]))
    except MTPError as error:
        return type(error).__name__, str(error), bool(built)
    finally:
        building.build_trainable, agreement.SEEN_WITHIN = former, patience
    raise AssertionError("nothing was raised")


def start_where_locking_fails(
    rank: int, world_size: int, tree: dict[str, Any], code: int
) -> tuple[tuple[str, str, bool], list[str]]:
    """For ``run_world``: :func:`start_body`, and the warnings of this rank."""
    from mtp_megatron import file_lock
    from mtp_megatron.training import run_lock

    failing = mock.patch.object(file_lock.fcntl, "flock", side_effect=OSError(code, os.strerror(code)))
    with failing, mock.patch.object(run_lock.logger, "warning") as warning:
        outcome = start_body(rank, world_size, [tree] * world_size)
    return outcome, [call.args[0] % call.args[1:] for call in warning.call_args_list]


def start_and_fork(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    """For ``run_world``: when a run has ended whose process was forked, and that one lives on, its folder is free."""
    from mtp_megatron.errors import MTPError
    from mtp_megatron.training import loop

    children = []

    def fork(*arguments: Any) -> None:
        children.append(os.fork())
        if children == [0]:
            time.sleep(600)
            os._exit(0)
        raise MTPError("built")

    try:
        with mock.patch.object(loop, "_Session", fork), pytest.raises(MTPError, match="built"):
            train_body(rank, world_size, tree)
        with (Path(tree["run"]["path"]) / ".lock").open("a") as lock:
            assert within_a_minute(lambda: not held(lock))  # the child may not have run yet
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def held(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def within_a_minute(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def started(*trees: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return run_world(start_body, len(trees), list(trees))


def test_a_job_whose_ranks_agree_builds_its_model(data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2)
    assert started(tree, tree) == [("MTPError", "built", True)] * 2


def test_data_missing_on_one_rank_ends_them_all(data: Path, tmp_path: Path) -> None:
    good = tiny_tree(data, tmp_path / "run", parallel__pipeline=2)
    bad = tiny_tree(tmp_path / "absent", tmp_path / "run", parallel__pipeline=2)
    (kind, said, built), (own_kind, own_said, own_built) = started(good, bad)
    assert (kind, own_kind) == ("JobError", "DataError")
    assert said.startswith("rank 1 on ")
    assert own_said in said
    assert not built
    assert not own_built


def test_an_index_that_one_rank_cannot_write_ends_them_all(data: Path, tmp_path: Path) -> None:
    """Also that hosts may have caches of their own, and that a model is not built in vain."""
    (tmp_path / "file").write_text("")
    caches = (tmp_path / "cache", tmp_path / "file" / "cache")
    trees = [tiny_tree(data, tmp_path / "run", parallel__pipeline=2, data__cache=str(cache)) for cache in caches]
    for kind, said, built in started(*trees):
        assert kind == "DataError"
        assert said.startswith(f"rank 1 on {os.uname().nodename}: {caches[1]}: ")
        assert "Set data.cache to a folder that can be written" in said
        assert not built


def start_and_listen(
    rank: int, world_size: int, trees: list[dict[str, Any]]
) -> tuple[tuple[str, str, bool], list[str]]:
    """For ``run_world``: :func:`start_body`, and this rank's warnings of checkpoints."""
    from mtp_megatron.training import checkpoint_files

    with mock.patch.object(checkpoint_files.logger, "warning") as warning:
        outcome = start_body(rank, world_size, trees)
    return outcome, [call.args[0] % call.args[1:] for call in warning.call_args_list]


def test_a_damaged_checkpoint_to_start_from_is_named_once(data: Path, tmp_path: Path) -> None:
    run_world(train_body, 1, tiny_tree(data, tmp_path / "first"))  # saves at 4 and 8
    (tmp_path / "first" / "checkpoints" / "iter_0000008" / ".metadata").unlink()
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2, run__load=str(tmp_path / "first"))
    (outcome, said), (other, nothing) = run_world(start_and_listen, 2, [tree, tree])
    assert outcome == other == ("MTPError", "built", True)
    assert len(said) == 1
    assert ".metadata is missing is passed over; continuing from iter_0000004" in said[0]
    assert nothing == []


def with_another_view_on_rank_1(rank: int, world_size: int, trees: list[dict[str, Any]]) -> tuple[str, str, bool]:
    """For ``run_world``: as ``start_body``; rank 1 does not see that step 8 is whole, as a network file system may."""
    from mtp_megatron.training import checkpoint_files

    whole = checkpoint_files.problem_of

    def late(folder: Path) -> str | None:
        return "it is not there yet" if rank == 1 and folder.name == "iter_0000008" else whole(folder)

    with mock.patch.object(checkpoint_files, "problem_of", late):
        return start_body(rank, world_size, trees)


def test_hosts_that_would_start_from_different_checkpoints_are_told(data: Path, tmp_path: Path) -> None:
    run_world(train_body, 1, tiny_tree(data, tmp_path / "first"))
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2, run__load=str(tmp_path / "first"))
    for kind, said, built in run_world(with_another_view_on_rank_1, 2, [tree, tree]):
        assert kind == "ConfigError"
        assert said.startswith("checkpoint of run.load='iter_0000008': rank 1 on ")
        assert "'iter_0000004' here" in said
        assert not built


def with_an_old_driver_on_rank_1(rank: int, world_size: int, trees: list[dict[str, Any]]) -> tuple[str, str, bool]:
    """For ``run_world``: as ``start_body``."""
    from mtp_megatron.compat import devices

    former = devices.why_no_gpu
    devices.why_no_gpu = lambda: "The NVIDIA driver is too old" if rank == 1 else None
    try:
        return start_body(rank, world_size, trees)
    finally:
        devices.why_no_gpu = former


def test_an_old_driver_on_one_host_ends_them_all(data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2)
    (kind, said, built), (own_kind, own_said, own_built) = run_world(with_an_old_driver_on_rank_1, 2, [tree] * 2)
    assert (kind, own_kind) == ("JobError", "UnusableGPUs")
    assert said.startswith("rank 1 on ")
    assert "driver is too old" in own_said
    assert own_said in said
    assert not built
    assert not own_built
    assert not (tmp_path / "run").exists()


def with_a_gpu_less_on_rank_1(rank: int, world_size: int, trees: list[dict[str, Any]]) -> tuple[str, str, bool]:
    """For ``run_world``: as ``start_body``, where the second host has one GPU less than ranks."""
    from mtp_megatron.compat import devices
    from mtp_megatron.training import agreement

    def too_few() -> None:
        with mock.patch.object(devices.torch.cuda, "device_count", return_value=7):
            devices._check_local_rank()

    os.environ["LOCAL_WORLD_SIZE"] = "8"
    with mock.patch.object(agreement, "take_own_gpu", too_few if rank == 1 else lambda: None):
        return start_body(rank, world_size, trees)


def test_a_gpu_that_one_host_lacks_ends_them_all(data: Path, tmp_path: Path) -> None:
    """The others would wait for that host until their first collective times out."""
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2)
    (kind, said, built), (own_kind, own_said, own_built) = run_world(with_a_gpu_less_on_rank_1, 2, [tree] * 2)
    assert (kind, own_kind) == ("JobError", "ConfigError")
    assert said.startswith("rank 1 on ")
    assert own_said.startswith("processes per node=8: this node has 7 CUDA devices")
    assert own_said in said
    assert not built
    assert not own_built


def test_ranks_with_other_settings_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    one = tiny_tree(data, tmp_path / "run", parallel__pipeline=2)
    other = tiny_tree(data, tmp_path / "run", parallel__pipeline=2, train__steps=9)
    for kind, said, built in started(one, other):
        assert kind == "ConfigError"
        assert "rank 1 on " in said
        assert "train.steps is 8 there and 9 here" in said
        assert not built


def test_a_run_folder_that_is_not_shared_is_refused_with_the_hosts_name(data: Path, tmp_path: Path) -> None:
    """Two folders of one relative name, as on two hosts without a shared mount: see also the tests of two hosts."""
    trees = [tiny_tree(data, tmp_path / f"run{rank}", parallel__pipeline=2) for rank in range(2)]
    for kind, said, built in started(*trees):
        assert kind == "ConfigError"
        assert "it is not one shared folder" in said
        assert os.uname().nodename in said
        assert not built


def test_a_wrong_world_size_is_refused_by_every_rank(data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=4)
    for kind, said, built in started(tree, tree):
        assert kind == "ConfigError"
        assert said.startswith("world size=2: ")
        assert "Start a multiple of 4 ranks" in said
        assert not built


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_file_system_without_locks_holds_a_run_and_that_is_said(code: int, data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2)
    (own, said), (other, nothing) = run_world(start_where_locking_fails, 2, tree, code)
    assert own == other == ("MTPError", "built", True)
    (warning,) = said
    assert warning.startswith(f"run.path={str(tmp_path / 'run')!r}: its file system has no locks ([Errno {code}]")
    assert nothing == []


@pytest.mark.parametrize("where", ["flock", "mkdir"])
def test_a_run_folder_that_cannot_be_held_is_named_by_every_rank(where: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "run" if where == "flock" else tmp_path / "file" / "run"
    tree = tiny_tree(data, run, parallel__pipeline=2)
    if where == "flock":
        own, other = (outcome for outcome, _ in run_world(start_where_locking_fails, 2, tree, errno.EIO))
    else:
        own, other = started(tree, tree)
    problem = f"run.path={str(run)!r}: it cannot be written ([Errno "
    assert (own[0], other[0]) == ("ConfigError", "JobError")
    assert own[1].startswith(problem)
    assert other[1].startswith(f"rank 0 cannot start: {problem}")


def test_a_process_that_outlives_its_rank_does_not_hold_the_folder(data: Path, tmp_path: Path) -> None:
    """One that reads data does for some seconds, when its rank is killed."""
    run_world(start_and_fork, 1, tiny_tree(data, tmp_path / "run"))


# --- the exchange through the launcher's store, without processes ---


def test_through_a_store_each_rank_gets_every_text_in_order() -> None:
    store, told = HashStore(), {}

    def rank(number: int) -> None:
        told[number] = through_store(store, "x", number, 3, f"text {number}", timedelta(seconds=20))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert told == {number: ["text 0", "text 1", "text 2"] for number in range(3)}


def test_ranks_that_do_not_report_are_named() -> None:
    store = HashStore()
    store.set("mtp_megatron/x/3", "here")
    with pytest.raises(JobError, match=r"^4 of 6 ranks did not report within 0\.2 s: 1-2, 4-5\."):
        through_store(store, "x", 0, 6, "here", timedelta(seconds=0.2))


def test_a_path_that_one_rank_may_not_use_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even to ask whether it is there fails, as it does below a folder that may not be entered."""
    monkeypatch.setenv("RANK", "1")
    store, path = HashStore(), "x" * 300
    store.set("mtp_megatron/preflight/0", json.dumps(asdict(Statement(0, "host0", "", {}))))
    with pytest.raises(PathError, match=r"^x{300}.*: File name too long\. Choose a shorter") as caught:
        preflight_together(parse_recipe(tiny_tree(Path(path), Path("run"))), 2, store)
    assert json.loads(store.get("mtp_megatron/preflight/1"))["error"] == str(caught.value)


def test_other_versions_are_refused_by_name() -> None:
    same = [Statement(rank, f"host{rank}", "", {"torch version": "2.13.0"}) for rank in range(3)]
    compare(same)
    with pytest.raises(ConfigError, match="rank 3 on host3 has another one than rank 0 on host0") as caught:
        compare([*same, Statement(3, "host3", "", {"torch version": "2.13.1"})])
    assert caught.value.field == "torch version"
