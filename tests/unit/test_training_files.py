"""Checkpoint folders without tensors, metrics.jsonl, and requests to stop."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtp_megatron.errors import CheckpointError
from mtp_megatron.signals import stop_on_signal
from mtp_megatron.training import checkpoint_files as files
from mtp_megatron.training import run_log
from mtp_megatron.training.evaluation import Evaluation, FolderFigures
from mtp_megatron.training.metrics_file import drop_later_lines, read_metrics
from mtp_megatron.training.operations import StepOperations
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder
from mtp_megatron.training.run_log import RunLog
from mtp_megatron.training.step import StepFigures
from tests.training_runs import tiny_tree


def save(checkpoints: Path, step: int, content: str = "weights") -> Path:
    temporary = files.prepare_temporary(checkpoints, step)
    (temporary / ".metadata").write_text("index")
    (temporary / "__0_0.distcp").write_text(content)
    return files.publish(checkpoints, step)


def test_a_published_checkpoint_is_the_latest(tmp_path: Path) -> None:
    assert files.latest_complete(tmp_path / "none") is None
    save(tmp_path, 100)
    folder = save(tmp_path, 200)
    assert folder.name == "iter_0000200"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "200"
    assert files.latest_complete(tmp_path) == folder
    assert files.step_of(folder) == 200
    assert sorted(os.listdir(tmp_path)) == ["iter_0000100", "iter_0000200", "latest_checkpointed_iteration.txt"]


def test_an_unfinished_save_is_invisible_and_cleared_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 100)
    (files.prepare_temporary(tmp_path, 200) / "__0_0.distcp").write_text("half")
    assert files.latest_complete(tmp_path) == tmp_path / "iter_0000100"
    save(tmp_path, 300)
    assert not (tmp_path / "iter_0000200.tmp").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "__0_0.distcp").write_text("w"), "__0_0.distcp has 1 bytes instead of 7"),
        (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
        (lambda folder: (folder / "files.json").unlink(), "not finished"),
        (lambda folder: (folder / "files.json").write_text("{"), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: object, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 100)
    damage(save(tmp_path, 200))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert files.latest_complete(tmp_path) == tmp_path / "iter_0000100"
    assert says in caplog.text
    assert "iter_0000200" in caplog.text
    with pytest.raises(CheckpointError, match="Name another checkpoint"):
        files.find_checkpoint(tmp_path / "iter_0000200")


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 100) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint.*start from step 0"):
        files.latest_complete(tmp_path)


def test_a_checkpoint_is_found_from_its_run_its_folder_or_itself(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7)
    for path in (tmp_path, tmp_path / "checkpoints", folder):
        assert files.find_checkpoint(path) == folder
    for path in (tmp_path / "absent", tmp_path / "checkpoints" / "iter_0000009"):
        with pytest.raises(CheckpointError):
            files.find_checkpoint(path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 100, "old")
    folder = save(tmp_path, 100, "newer")
    assert (folder / "__0_0.distcp").read_text() == "newer"
    assert files.problem_of(folder) is None


def test_pruning_keeps_the_latest(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    files.prune(tmp_path, None, 100)
    assert list(files.list_iterations(tmp_path)) == [9, 10, 100]
    files.prune(tmp_path, 2, 100)
    assert list(files.list_iterations(tmp_path)) == [10, 100]


def test_pruning_keeps_every_so_many_steps_for_good(tmp_path: Path) -> None:
    """They do not count among the latest, the newest of all included."""
    kept = {}
    for step in range(100, 1300, 100):
        save(tmp_path, step)
        files.prune(tmp_path, 2, step, 500)
        kept[step] = list(files.list_iterations(tmp_path))
    assert kept[400] == [300, 400]
    assert kept[1000] == [500, 800, 900, 1000]
    assert kept[1200] == [500, 1000, 1100, 1200]
    files.prune(tmp_path, 2, 1000, 500)  # as after a resumption from step 900
    assert list(files.list_iterations(tmp_path)) == [500, 1000, 1100, 1200]
    (tmp_path / "iter_0000500/.metadata").unlink()
    files.prune(tmp_path, 1, 1200, 500)
    assert list(files.list_iterations(tmp_path)) == [500, 1000, 1200]
    files.prune(tmp_path, None, 1200, 500)
    assert list(files.list_iterations(tmp_path)) == [500, 1000, 1200]
    files.prune(tmp_path, 1, 1200)  # the setting was taken back
    assert list(files.list_iterations(tmp_path)) == [1200]


def test_pruning_counts_no_damaged_checkpoint_and_keeps_the_one_just_saved(tmp_path: Path) -> None:
    """A run whose newest checkpoint was damaged goes on from the one before it."""
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
    (tmp_path / "iter_0000400/.metadata").unlink()
    (tmp_path / "iter_0000200/.metadata").unlink()
    save(tmp_path, 350)
    files.prune(tmp_path, 2, 350)
    assert list(files.list_iterations(tmp_path)) == [300, 350, 400]
    files.prune(tmp_path, 1, 350)
    assert list(files.list_iterations(tmp_path)) == [350, 400]
    assert files.latest_complete(tmp_path) == tmp_path / "iter_0000350"


@pytest.mark.parametrize("content", [b"\xff\x00", b"[]"])
def test_a_table_of_sizes_that_is_none_is_a_damaged_checkpoint(content: bytes, tmp_path: Path) -> None:
    """And does not end a run that has just saved another one."""
    for step in (100, 200, 300):
        save(tmp_path, step)
    (tmp_path / "iter_0000200/files.json").write_bytes(content)
    assert "is damaged" in (files.problem_of(tmp_path / "iter_0000200") or "")
    files.prune(tmp_path, 2, 300)
    assert list(files.list_iterations(tmp_path)) == [100, 200, 300]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Network file systems refuse while another process reads a file of it. The next save tries again."""
    for step in (100, 200):
        save(tmp_path, step)
    held = {"iter_0000100"}
    rmtree = shutil.rmtree

    def refuse(folder: Path) -> None:
        if folder.name.partition(".")[0] in held:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        rmtree(folder)

    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    files.prune(tmp_path, 1, 200)
    assert list(files.list_iterations(tmp_path)) == [200]
    assert "cannot be deleted" in caplog.text
    save(tmp_path, 300)
    assert len(list(tmp_path.glob("iter_0000100.*.tmp"))) == 1
    held.clear()
    save(tmp_path, 400)
    assert list(tmp_path.glob("*.tmp")) == []
    held.add("iter_0000500")  # an interrupted save of the step that is saved next
    files.prepare_temporary(tmp_path, 500)
    save(tmp_path, 500)
    assert files.latest_complete(tmp_path) == tmp_path / "iter_0000500"


def test_differences_name_nested_fields() -> None:
    there = {"model": {"n": 1, "h": 2}, "gone": 1}
    here = {"model": {"n": 1, "h": 3}, "new": 2}
    assert list(files.differences(there, here)) == [
        "model.h is 2 there and 3 here",
        "gone is 1 there and None here",
        "new is None there and 2 here",
    ]


def test_a_missing_description_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing, so what the checkpoint holds is unknown"):
        files.read_mtp_config(tmp_path)
    (tmp_path / "mtp_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        files.read_mtp_config(tmp_path)


def test_metrics_after_the_resumed_step_are_dropped_and_a_cut_line_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2, 3)) + '{"kind": "tr')
    drop_later_lines(path, 2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert path.read_text().endswith("\n")
    drop_later_lines(tmp_path / "new" / "metrics.jsonl", 0)
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == []


def test_a_bad_line_in_the_middle_of_the_metrics_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk or two writers leave such lines; a run must resume all the same."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"kind": "tr{"step": 2}\n\xff\x00\n[]\n{"kind": "train"}\n{"step": 3}\n')
    drop_later_lines(path, 9)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    for number in (2, 3, 4, 5):
        assert f"{path}, line {number} is no record" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_are_on_disk_before_they_replace_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fsync a power cut may leave an empty file under the name."""
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    drop_later_lines(tmp_path / "metrics.jsonl", 0)
    assert [Path(name).name.startswith(".metrics.jsonl") for name in synced] == [True, False]


def recipe_of(tmp_path: Path, **overrides: Any) -> Recipe:
    return parse_recipe(tiny_tree(tmp_path, tmp_path / "run", **overrides)).resolved(vocab_size=257)


def figures(loss: float) -> StepFigures:
    return StepFigures(loss, [loss, 2 * loss], [0.5, 0.25], tokens=32, grad_norm=1.5, lr=1e-3)


def test_the_log_writes_lines_points_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of(tmp_path, heads__n=2, train__log_interval=2, run__tensorboard=True)
    folder = RunFolder(tmp_path / "run")
    with RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:
        for step in range(1, 5):
            log.step(step, figures(step + 0.5))
        log.evaluation(4, Evaluation(3.0, [1.0, 2.0], [0.5, 0.25], tokens_per_forward=1.75))
    with RunLog(folder, recipe, start_step=0, world_size=2, enabled=False) as silent:
        silent.step(1, figures(9.0))
    records = read_metrics(folder.metrics)
    assert [(record["kind"], record["step"]) for record in records] == [("train", 2), ("train", 4), ("valid", 4)]
    assert records[0]["head_loss"] == [2.5, 5.0]
    assert records[0]["tokens"] == 2 * recipe.train.global_batch_size * recipe.train_seq_length
    assert records[0]["tokens_per_second"] > 0
    a_token = StepOperations(recipe)((1, 1)) / (recipe.train.global_batch_size * recipe.train_seq_length)
    for record in records[:2]:
        per_gpu = record["tokens_per_second"] * a_token / 1e12 / 2  # two ranks
        assert record["tflops_per_gpu"] == pytest.approx(per_gpu, rel=1e-3)
    assert records[2]["tokens_per_forward"] == 1.75
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert {
        *("train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "train/tflops_per_gpu"),
        *("train_loss/head_1", "train_loss/head_2", "train_accuracy/head_1", "train_accuracy/head_2"),
        *("valid/loss", "valid/tokens_per_forward", "valid_loss/head_1", "valid_accuracy/head_2"),
    } <= set(events.Tags()["scalars"])
    assert [(point.step, point.value) for point in events.Scalars("train_loss/head_2")] == [(2, 5.0), (4, 9.0)]
    assert "folders" not in records[2], "this is no blend"
    assert not any("head_z_loss" in record for record in records), "there is no z-loss"
    said = capsys.readouterr().err
    assert "by folder" not in said
    assert "step 2/8  loss 2.5000  heads 2.500 5.000" in said
    assert re.search(r"  [0-9]+ tokens/s  [0-9.e-]+ TFLOP/s per GPU\n", said)
    assert "tokens per forward 1.75" in said


def test_the_z_loss_stands_beside_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of(tmp_path, heads__n=2, heads__z_loss=1e-4, train__log_interval=1, run__tensorboard=True)
    folder = RunFolder(tmp_path / "run")
    with RunLog(folder, recipe, start_step=0, world_size=1, enabled=True) as log:
        log.step(1, replace(figures(2.5), head_z_loss=[16.0, math.nan]))
        log.evaluation(1, Evaluation(3.0, [1.0, 2.0], [0.5, 0.25], tokens_per_forward=1.75, head_z_loss=[9.0, 4.0]))
    train, valid = read_metrics(folder.metrics)
    assert (train["head_loss"], train["head_z_loss"]) == ([2.5, 5.0], [16.0, None])
    assert (valid["head_loss"], valid["head_z_loss"]) == ([1.0, 2.0], [9.0, 4.0])
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    for name, value in (("train_z_loss/head_1", 16.0), ("valid_z_loss/head_2", 4.0)):
        assert [(point.step, point.value) for point in events.Scalars(name)] == [(1, value)]


def test_the_log_has_the_held_out_figures_of_every_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path / "run")
    web = FolderFigures(2.5, [1.0, 1.5], [0.5, 0.25], [30, 28])
    none = FolderFigures(math.nan, [math.nan] * 2, [math.nan] * 2, [0, 0])
    folders = {"web": web, "code": none, **{f"more{number}": web for number in range(8)}}
    recipe = recipe_of(tmp_path, heads__n=2, run__tensorboard=True)
    with RunLog(folder, recipe, start_step=0, world_size=1, enabled=True) as log:
        log.evaluation(4, Evaluation(3.0, [1.0, 2.0], [0.5, 0.25], tokens_per_forward=1.75, folders=folders))
    (record,) = read_metrics(folder.metrics)
    assert list(record["folders"]) == list(folders)
    assert record["folders"]["web"] == {
        "loss": 2.5,
        "head_loss": [1.0, 1.5],
        "head_accuracy": [0.5, 0.25],
        "head_tokens": [30, 28],
    }
    assert record["folders"]["code"]["loss"] is None
    assert record["folders"]["code"]["head_loss"] == [None, None]
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert events.Scalars("valid_folder_loss/web/head_2")[0].value == 1.5
    assert {"valid_folder/web/loss", "valid_folder_accuracy/more7/head_1"} <= set(tags)
    assert not any("code" in tag for tag in tags)
    said = capsys.readouterr().err
    assert "step 4  validation of head 1 by folder: web 1.000 50.0%  code -  more0 1.000 50.0%" in said
    assert said.endswith("more5 1.000 50.0%  and 2 more\n")


def test_an_error_does_not_lose_the_steps_since_the_last_line(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, heads__n=2, train__log_interval=3)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyError), RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:  # noqa: PT012
        for step in range(1, 6):
            log.step(step, figures(step + 0.5))
        raise KeyError
    records = read_metrics(folder.metrics)
    assert [(record["step"], record["loss"]) for record in records] == [(3, 3.5), (4, 4.5), (5, 5.5)]
    for speed in ("tokens_per_second", "tflops_per_gpu"):
        assert [record[speed] is None for record in records] == [False, True, True]
    with RunLog(folder, recipe, start_step=3, world_size=2, enabled=True) as log:
        log.step(4, figures(1.0))
    assert [record["step"] for record in read_metrics(folder.metrics)] == [3], "no error, and no line was due"


def test_steps_that_are_never_due_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "_REMEMBERED", 2)
    recipe = recipe_of(tmp_path, heads__n=2, train__log_interval=10**9)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyError), RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:  # noqa: PT012
        for step in range(1, 6):
            log.step(step, figures(step + 0.5))
        raise KeyError
    assert [record["step"] for record in read_metrics(folder.metrics)] == [4, 5]


def test_the_last_trained_steps_are_written_where_the_end_is_passed_over(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, train__log_interval=4, train__steps=8)
    folder = RunFolder(tmp_path / "run")
    with RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:
        for step in range(1, 6):
            log.step(step, StepFigures(1.0, [1.0], [0.5], tokens=1, grad_norm=1.0, lr=0.1))
        log.passed_over(8, 3)
    assert [record["step"] for record in read_metrics(folder.metrics)] == [4, 5]


class Disk:
    """With room for so many bytes of metrics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        disk, whole = self, Path.open

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                if not disk.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                taken = super().write(content[: disk.room])
                disk.room -= taken
                return taken

        def opened(path: Path, mode: str = "r", **settings: Any) -> Any:
            return File(path, "a") if (path.name, mode) == ("metrics.jsonl", "ab") else whole(path, mode, **settings)

        monkeypatch.setattr(Path, "open", opened)


def test_a_full_disk_delays_metrics_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, heads__n=2)
    folder = RunFolder(tmp_path / "run")
    disk = Disk(monkeypatch, 300)  # one line, and a part of the next
    with RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:
        for step in (1, 2, 3, 4):
            log.step(step, figures(step + 0.5))
        assert [record["step"] for record in read_metrics(folder.metrics)] == [1]
        disk.room = 10_000
        log.step(5, figures(5.5))
        assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5]
        disk.room = 0
        log.step(6, figures(6.5))
        disk.room = 10_000  # at the end, at the latest
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5, 6]
    said = [record.getMessage() for record in caplog.records]
    assert [line.removeprefix(f"{folder.metrics} ") for line in said] == [
        *["cannot be written ([Errno 28] No space left on device): lines wait in memory, training goes on"],
        "is complete again",
        *["cannot be written ([Errno 28] No space left on device): lines wait in memory, training goes on"],
        "is complete again",
    ]
    caplog.clear()
    disk.room = 0
    with pytest.raises(KeyError), RunLog(folder, recipe, start_step=6, world_size=2, enabled=True) as log:  # noqa: PT012
        for step in (7, 8):
            log.step(step, figures(7.5))
        raise KeyError  # is what is seen
    assert f"{folder.metrics} lacks its last 2 lines" in caplog.text


def test_an_error_of_tensorboard_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    recipe = recipe_of(tmp_path, heads__n=2, run__tensorboard=True)
    folder = RunFolder(tmp_path / "run")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # its writer's thread dies of it
    with RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:
        log.step(1, figures(1.5))
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in range(2, 9):
            log.step(step, figures(step + 0.5))
    with RunLog(folder, recipe, start_step=8, world_size=2, enabled=True) as log:  # also from its start on
        log.step(9, figures(9.5))
    assert [record["step"] for record in read_metrics(folder.metrics)] == list(range(1, 10))
    assert caplog.text.count("TensorBoard gets no further points of this attempt (OSError: [Errno 28]") == 2


def test_a_terminal_that_is_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is said before it is saved, and who closes a terminal asks to stop."""
    recipe = recipe_of(tmp_path, heads__n=2)

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with RunLog(RunFolder(tmp_path / "run"), recipe, start_step=0, world_size=2, enabled=True) as log:
        log.step(1, figures(1.5))
        log.message("saved")
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_small_file_that_cannot_be_written_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a first start on a full disk would leave a folder that the second one takes for a stranger's."""
    path = tmp_path / "recipe.yaml"
    files.write_atomically(path, "old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            files.write_atomically(path, "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("recipe.yaml", "old")]


def test_nan_is_null_in_metrics(tmp_path: Path) -> None:
    """A head that a curriculum leaves out has no loss, and NaN is no JSON."""
    recipe = recipe_of(tmp_path, train__log_interval=1)
    with RunLog(RunFolder(tmp_path / "run"), recipe, start_step=0, world_size=2, enabled=True) as log:
        log.step(1, StepFigures(1.0, [1.0, math.nan], [0.5, math.nan], tokens=1, grad_norm=1.0, lr=0.1))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["head_loss"] == [1.0, None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.usefixtures("without_nohup")
def test_signals_are_noted_inside_and_left_alone_outside(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal is number
    assert signal.getsignal(number) == former


@pytest.mark.usefixtures("without_nohup")
def test_under_nohup_the_end_of_a_terminal_goes_unnoticed() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


_CHILD = """
import sys, time
from mtp_megatron.signals import end_with_parent
end_with_parent(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(600)
"""
_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_may_end_with_its_parent_however_that_dies() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, _CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=60)
    orphan = subprocess.run([sys.executable, "-c", _CHILD, str(parent.pid)])
    assert orphan.returncode == -signal.SIGKILL, "its parent has died already"
