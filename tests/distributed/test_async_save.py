"""Checkpoints that are written while the training goes on (``train.async_save``): the same ones, complete or absent.

Writing is made slow by a stand-in that waits for steps to pass. Not covered here: copies from a GPU, NCCL.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.distributed.test_training import diverges, says_on_the_way
from tests.harness import run_world
from tests.training_runs import metrics, tiny_tree, train_body

ASYNC: dict[str, Any] = {"train__async_save": True, "train__eval_batches": 0}


class SlowDisk:
    """Has the threads of one rank wait before they write, until ``open_in`` steps after their save have begun, or the
    training waits for them. Context manager.

    Attributes:
        seen: checkpoints that were there when each write began to wait.
    """

    def __init__(self, slow: bool, tree: dict[str, Any], open_in: int = 2) -> None:
        self._slow, self._open_in = slow, open_in
        self._checkpoints = Path(tree["run"]["path"]) / "checkpoints"
        self._began, self._waits = threading.Condition(), False
        self._step = 0
        self.seen: list[list[str]] = []

    def __enter__(self) -> SlowDisk:
        from mtp_megatron import compat

        compat.prepare()
        from mtp_megatron.training import background_save, checkpoint_writer, loop

        write, step, wait = checkpoint_writer._write, loop.train_step, background_save.BackgroundSave.wait

        def slowly(file: Path, data: Any) -> Any:
            if self._slow and threading.current_thread() is not threading.main_thread():
                saved = int(file.parent.name.removeprefix("iter_").removesuffix(".tmp"))
                self.seen.append(sorted(entry.name for entry in self._checkpoints.glob("iter_*")))
                with self._began:
                    assert self._began.wait_for(lambda: self._waits or self._step >= saved + self._open_in, 100)
            return write(file, data)

        def stepped(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
            self._tell(trainable.scheduler.num_steps + 1, False)
            return step(recipe, trainable, *args, **kwargs)

        def waited(save: Any, *args: Any) -> None:
            self._tell(self._step, True)
            wait(save, *args)

        self._patches: list[Any] = [
            mock.patch.object(checkpoint_writer, "_write", slowly),
            mock.patch.object(loop, "train_step", stepped),
            mock.patch.object(background_save.BackgroundSave, "wait", waited),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._tell(10**6, True)
        for patch in reversed(self._patches):
            patch.stop()

    def _tell(self, step: int, waits: bool) -> None:
        with self._began:
            self._step, self._waits = step, waits
            self._began.notify_all()


def saved_both_ways(
    rank: int, world_size: int, tree: dict[str, Any], twins: str, slow: int
) -> tuple[list[str], list[list[str]]]:
    """Train on a disk that is slow for one rank; whatever is saved in the background is saved at once as well, into
    ``twins``. What the run told, and what a slow write has seen."""
    with SlowDisk(rank == slow, tree) as disk:
        from mtp_megatron.training import checkpointing

        begin = checkpointing.begin_save

        def both(recipe: Any, data: Any, trainable: Any, checkpoints: Path, step: int) -> Any:
            checkpointing.save_checkpoint(recipe, data, trainable, Path(twins), step)
            return begin(recipe, data, trainable, checkpoints, step)

        with mock.patch.object(checkpointing, "begin_save", both):
            _, said = says_on_the_way(rank, world_size, tree)
        return said, disk.seen


def index_of(folder: Path) -> dict[str, Any]:
    index = vars(pickle.loads((folder / ".metadata").read_bytes()))
    del index["storage_meta"]  # where and by which call it was saved
    return index


# Of the second copy's ranks only those of the distributed optimizer have anything to write.
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2xDP2, bf16, distributed optimizer": {
        "parallel__tensor": 2,
        "train__precision": "bf16",
        "optimizer__distributed": True,
        "optimizer__overlap_grad_reduce": True,
        "optimizer__overlap_param_gather": True,
        "model__hidden_dropout": 0.1,
    },
    "TP2xPP2, bf16": {"parallel__tensor": 2, "parallel__pipeline": 2, "train__precision": "bf16"},
    "PP2xDP2, fp32": {"parallel__pipeline": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_checkpoint_of_its_step_though_steps_went_on(layout: str, data: Path, tmp_path: Path) -> None:
    """To the last byte; and the one before it is deleted only when it is there."""
    run, twins = tmp_path / "run", tmp_path / "twins"
    tree = tiny_tree(data, run, train__save_interval=3, run__keep_last=2, **ASYNC, **LAYOUTS[layout])
    slow = 2 if layout.startswith("PP2xDP2") else 3
    results = run_world(saved_both_ways, 4, tree, str(twins), slow)
    said = [line.split(" ")[:2] for line in results[0][0] if line.startswith(("step ", "saved "))]
    lines = [" ".join(words).removesuffix(",") for words in said]
    assert lines.index("step 5/8") < lines.index("saved checkpoints/iter_0000003") < lines.index("step 8/8")
    assert lines.index("step 8/8") < lines.index("saved checkpoints/iter_0000006")
    assert any(line.startswith("the save of step 8 waited ") for line in results[0][0])
    assert lines[-1] == "saved checkpoints/iter_0000008"
    assert results[slow][1] == [["iter_0000003.tmp"], ["iter_0000003", "iter_0000006.tmp"]]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("iter_0000006", "iter_0000008", "latest_checkpointed_iteration.txt")
    ]
    saved, twin = run / "checkpoints" / "iter_0000006", twins / "iter_0000006"
    names = sorted(path.name for path in saved.iterdir())
    assert names == sorted(path.name for path in twin.iterdir())
    assert len([name for name in names if name.endswith(".distcp")]) >= 2
    for name in names:
        if name not in (".metadata", "files.json"):  # they name the folder, and its size
            assert (saved / name).read_bytes() == (twin / name).read_bytes(), name
    assert index_of(saved) == index_of(twin)
    later = run / "checkpoints" / "iter_0000008" / "__0_0.distcp"
    assert later.read_bytes() != (saved / "__0_0.distcp").read_bytes(), "control: training has changed the tensors"


def fails_on_rank_1(rank: int, world_size: int, tree: dict[str, Any]) -> tuple[str, list[str]]:
    """Train; that rank's thread finds the disk full when it writes step 4. The error, and what was told."""
    from mtp_megatron.training.run_log import RunLog

    said: list[str] = []
    with SlowDisk(rank == 0, tree):
        from mtp_megatron.training import checkpoint_writer

        write = checkpoint_writer._write

        def on_a_full_disk(file: Path, data: Any) -> Any:
            if rank == 1 and file.parent.name == "iter_0000004.tmp":
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, data)

        with (
            mock.patch.object(checkpoint_writer, "_write", on_a_full_disk),
            mock.patch.object(RunLog, "message", lambda self, text: said.append(text)),
        ):
            try:
                train_body(rank, world_size, tree)
            except BaseException as error:  # noqa: BLE001 - torch's CheckpointException is no Exception
                return f"{type(error).__name__}: {error}", said
    return "", said


def test_a_rank_that_cannot_write_ends_the_run_on_all_and_the_run_goes_on_from_the_checkpoint_before(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"train__save_interval": 2, "run__keep_last": 1, "parallel__tensor": 2}
    tree = tiny_tree(data, run, **settings, **ASYNC)
    results = run_world(fails_on_rank_1, 4, tree)
    for error, _ in results:
        assert error.startswith("CheckpointException: ")
        assert "No space left on device" in error
    said = results[0][1]
    assert any(line.startswith("step 5/8") for line in said), "steps went on"
    complaint = "step 4 could not be saved (rank 1: OSError: [Errno 28] No space left on device); "
    assert said[-1].startswith(complaint)
    left = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert left == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    # Resumed without the setting, which may change.
    assert run_world(train_body, 4, tiny_tree(data, run, **settings, train__eval_batches=0)) == [8] * 4
    assert list(metrics(run)) == list(range(1, 9))


def stopped(rank: int, world_size: int, tree: dict[str, Any], step: int) -> tuple[int, list[str]]:
    """Train on a disk that gets fast when the training waits for it; the last rank alone gets a signal in ``step``."""
    with SlowDisk(rank == 0, tree, open_in=99):
        from mtp_megatron.training import loop

        whole = loop.train_step

        def signalled(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
            if rank == world_size - 1 and trainable.scheduler.num_steps == step - 2:
                os.kill(os.getpid(), signal.SIGTERM)  # the next step finds it
            return whole(recipe, trainable, *args, **kwargs)

        with mock.patch.object(loop, "train_step", signalled):
            return says_on_the_way(rank, world_size, tree)


def test_who_asks_to_stop_gets_the_checkpoint_that_is_being_written_and_that_of_the_last_step(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tree = tiny_tree(data, run, parallel__pipeline=2, train__save_interval=4, **ASYNC)
    (step, said), _ = run_world(stopped, 2, tree, 6)
    assert step == 6
    assert sorted(path.name for path in (run / "checkpoints").glob("iter_*")) == ["iter_0000004", "iter_0000006"]
    kinds = ("saved ", "the save", "asked")
    told = [line.split(",")[0].partition(" in ")[0] for line in said if line.startswith(kinds)]
    assert told[1:] == [
        *("saved checkpoints/iter_0000004", "saved checkpoints/iter_0000006"),
        "asked to stop: saved step 6 of 8. The same command continues from it.",
    ]
    assert told[0].startswith("the save of step 6 waited ")


def diverges_on_a_slow_disk(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    with SlowDisk(rank == 0, tree, open_in=99):
        return diverges(rank, world_size, tree)


def test_a_run_that_diverges_has_the_checkpoint_that_was_being_written(data: Path, tmp_path: Path) -> None:
    """And names it as the last good one: there is none before."""
    tree = tiny_tree(data, tmp_path / "run", parallel__pipeline=2, train__save_interval=4, **ASYNC)
    said = run_world(diverges_on_a_slow_disk, 2, tree)
    assert len(set(said)) == 1
    assert "TrainingDiverged: step 6: the loss of head 2 is nan" in said[0]
    assert "The last good checkpoint is" in said[0]
    assert "iter_0000004" in said[0]


def reads_anew(rank: int, world_size: int, tree: dict[str, Any]) -> tuple[list[str], list[bool]]:
    """Train on a disk that gets fast when the training waits for it. What was told; and whether a checkpoint was being
    written, whenever readers began."""
    with SlowDisk(True, tree, open_in=99):
        from mtp_megatron.training import loop

        build, writing = loop.build_train_iterator, list[bool]()

        def begun(*args: Any, **kwargs: Any) -> Any:
            writing.append(any(thread.name == "checkpoint" for thread in threading.enumerate()))
            return build(*args, **kwargs)

        with mock.patch.object(loop, "build_train_iterator", begun):
            return says_on_the_way(rank, world_size, tree)[1], writing


def test_readers_that_are_forked_on_the_way_hold_no_copies(data: Path, tmp_path: Path) -> None:
    """What a process is forked with stays allocated until that process ends, too."""
    skips = {"data__workers": 1, "train__skip_steps": [[6, 6]], "train__save_interval": 4}
    ((said, writing),) = run_world(reads_anew, 1, tiny_tree(data, tmp_path / "run", **skips, **ASYNC))
    assert writing == [False, False]
    assert any(line.startswith("passing over data waited ") for line in said)


def killed(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    """Train on a slow disk until a rank dies in step 7, with step 6 half written."""
    with SlowDisk(rank == 1, tree, open_in=1):
        from mtp_megatron.training import checkpoint_writer, loop

        write, whole = checkpoint_writer._write, loop.train_step
        half = threading.Event()

        def write_half(file: Path, data: Any) -> Any:
            if rank == world_size - 1 and file.parent.name == "iter_0000006.tmp":
                data = [next(iter(data)), *_never(half)]
            return write(file, data)

        def dies(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
            if trainable.scheduler.num_steps == 6 and rank == world_size - 1:
                half.wait(60)
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(recipe, trainable, *args, **kwargs)

        with (
            mock.patch.object(checkpoint_writer, "_write", write_half),
            mock.patch.object(loop, "train_step", dies),
        ):
            train_body(rank, world_size, tree)


def _never(half: threading.Event) -> list[Any]:
    half.set()
    threading.Event().wait(100)
    return []


def test_a_rank_that_is_killed_leaves_the_checkpoint_before_it_and_the_next_save_clears_up(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tree = tiny_tree(data, run, train__save_interval=3, optimizer__distributed=True, **ASYNC)
    with pytest.raises(RuntimeError):
        run_world(killed, 2, tree, fresh=True)
    left = sorted(entry.name for entry in (run / "checkpoints").glob("iter_*"))
    assert left == ["iter_0000003", "iter_0000006.tmp"]
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert run_world(train_body, 2, tree) == [8, 8]
    left = sorted(entry.name for entry in (run / "checkpoints").glob("iter_*"))
    assert left == ["iter_0000003", "iter_0000006", "iter_0000008"]
    assert list(metrics(run)) == list(range(1, 9))
