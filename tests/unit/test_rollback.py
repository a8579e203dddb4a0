"""``mtp-megatron rollback``: what is moved, what is refused, and what others see of the run afterwards."""

from __future__ import annotations

import fcntl
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_megatron import cli
from mtp_megatron.checkpoint.kinds import detect
from mtp_megatron.reporting.metrics import read_metrics
from mtp_megatron.training import checkpoint_files as files


def save(checkpoints: Path, step: int) -> Path:
    (files.prepare_temporary(checkpoints, step) / "__0_0.distcp").write_text(f"weights of {step}")
    return files.publish(checkpoints, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5, 10, 15 and 20."""
    run = tmp_path / "run"
    for step in (5, 10, 15, 20):
        save(run / "checkpoints", step)
    record = {"kind": "train", "loss": 1.0, "head_loss": [1.0], "head_accuracy": [0.5]}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**record, "step": step}) + "\n" for step in range(1, 21)))
    (run / "recipe.yaml").write_text("{}")
    return run


def test_newer_checkpoints_are_moved_and_nothing_is_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.relative_to(run / "checkpoints"): path.read_bytes() for path in run.glob("checkpoints/iter_*/*")}
    assert cli.main(["rollback", str(run), "10"]) == 0
    checkpoints = run / "checkpoints"
    assert list(files.list_iterations(checkpoints)) == [5, 10]
    assert files.latest_complete(checkpoints) == checkpoints / "iter_0000010"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert not (checkpoints / "latest").exists(), "DeepSpeed's file, where there was none"
    (target,) = (run / "rolled_back").iterdir()
    assert {path.name for path in target.iterdir()} == {"iter_0000015", "iter_0000020", "metrics.jsonl"}
    after = {
        path.relative_to(place): path.read_bytes() for place in (checkpoints, target) for path in place.glob("iter_*/*")
    }
    assert after == before
    assert (target / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    said = capsys.readouterr().out
    for word in (str(target), "iter_0000020, iter_0000015", "continues from step 10", "skip_steps", "accept_changes"):
        assert word in said


def test_a_run_that_was_rolled_back_is_a_run_as_before(run: Path) -> None:
    cli.main(["rollback", str(run), "10"])
    assert detect(run) == "megatron"
    assert files.find_checkpoint(run) == run / "checkpoints/iter_0000010"
    (moved,) = run.glob("rolled_back/*/iter_0000015")
    assert files.find_checkpoint(moved) == moved, "run.load can name it"
    assert read_metrics(run).num_heads == 1
    save(run / "checkpoints", 15)
    files.prune(run / "checkpoints", 1, 15)
    assert list(files.list_iterations(run / "checkpoints")) == [15]
    assert moved.is_dir()


def test_a_second_rollback_has_its_own_folder_and_a_repeated_one_moves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (15, 5, 5):
        assert cli.main(["rollback", str(run), str(step)]) == 0
    assert len(list((run / "rolled_back").iterdir())) == 2
    assert "nothing was moved" in capsys.readouterr().out


def test_the_tracker_is_mended_where_nothing_is_newer(run: Path) -> None:
    """As after a rollback that a crash ended."""
    (run / "checkpoints/latest").write_text("iter_0000099")
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("99")
    cli.main(["rollback", str(run), "20"])
    assert (run / "checkpoints/latest").read_text() == "iter_0000020"
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "20"


def test_what_cannot_be_is_refused_and_moves_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/iter_0000010/__0_0.distcp").write_text("cut")
    for argv, words in (
        ([str(run / "absent"), "5"], ("absent", "no run", "run.path")),
        ([str(run), "7"], ("no checkpoint of step 7", "5, 10, 15, 20")),
        ([str(run), "10"], ("iter_0000010", "__0_0.distcp has 3 bytes", "Name another")),
    ):
        assert cli.main(["rollback", *argv]) == 2
        said = capsys.readouterr().err
        for word in words:
            assert word in said
    assert list(files.list_iterations(run / "checkpoints")) == [5, 10, 15, 20]
    assert not (run / "rolled_back").exists()
    assert not (run / "absent").exists()


def test_a_job_that_writes_to_the_run_is_not_disturbed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["rollback", str(run), "10"]) == 2
    assert "another job is writing to it" in capsys.readouterr().err
    assert list(files.list_iterations(run / "checkpoints")) == [5, 10, 15, 20]
    assert cli.main(["rollback", str(run), "10"]) == 0


def test_it_needs_no_torch() -> None:
    """On a login node there may be no time, or no GPU's libraries, to import it."""
    code = "import sys, mtp_megatron.training.rollback; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in out


def test_a_tracker_that_names_an_older_checkpoint_is_not_ignored_in_silence(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, tracker = run / "checkpoints", run / "checkpoints/latest_checkpointed_iteration.txt"
    with caplog.at_level(logging.WARNING):
        newest = files.latest_complete(checkpoints)
        assert newest == checkpoints / "iter_0000020"
        files.warn_of_older_tracker(checkpoints, newest)
        tracker.write_text("7")  # no such checkpoint: nothing was meant by it that could be done
        files.warn_of_older_tracker(checkpoints, newest)
        assert caplog.text == ""
        tracker.write_text("5\n")
        assert files.find_checkpoint(run) == newest, "for weights: no word on how to go on"
        assert caplog.text == ""
        files.warn_of_older_tracker(checkpoints, newest)
    assert f"{tracker} names step 5, but the newest complete checkpoint is iter_0000020 and is used" in caplog.text
    assert f"mtp-megatron rollback {run} 5" in caplog.text
