"""A run that diverges: what it leaves, what torchrun's restarts do, and that each way back it names is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_megatron import cli
from mtp_megatron.errors import ConfigError
from mtp_megatron.reporting.metrics import read_metrics
from mtp_megatron.training.divergence import DivergenceFile, refuse_repetition
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder
from tests.distributed.test_training import diverges
from tests.harness import run_world
from tests.training_runs import metrics, tiny_tree, train_body

SETTINGS: dict[str, Any] = {"train__eval_batches": 0, "train__save_interval": 2, "train__log_interval": 4}
RESTART = {"TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.fixture
def diverged(data: Path, tmp_path: Path) -> tuple[Path, dict[str, Any], str]:
    """A run on two stages whose second head turned NaN in step 6, its recipe, and what it said."""
    run = tmp_path / "run"
    tree = tiny_tree(data, run, parallel__pipeline=2, **SETTINGS)
    said = run_world(diverges, 2, tree)
    assert len(set(said)) == 1
    return run, tree, said[0]


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "diverged.json").read_text())
    return content


def test_figures_of_the_step_and_of_those_before_it_are_kept(diverged: tuple[Path, dict[str, Any], str]) -> None:
    run, _, said = diverged
    left = record(run)
    assert left["step"] == 6
    assert left["message"] == "step 6: the loss of head 2 is nan"
    first, second, third = left["head_loss_sum"]
    assert second is None
    assert 0 < first / left["head_tokens"][0] < 10
    assert 0 < third / left["head_tokens"][2] < 10
    assert left["head_weights"] == [1, 1, 1]
    assert left["grad_norm"] is None
    assert left["resumed_from"] is None
    assert datetime.fromisoformat(left["time"]).utcoffset() is not None
    assert list(metrics(run)) == [4, 5], "step 5 was not to be logged before step 8"
    assert read_metrics(run).train[-1]["step"] == 5
    for way in (
        "train.skip_steps='[[5, 6]]'",
        "run.accept_changes=true",
        f"mtp-megatron rollback {run} STEP",
        "weights",
    ):
        assert way in said


def test_what_is_left_is_removed_when_the_step_has_been_trained(diverged: tuple[Path, dict[str, Any], str]) -> None:
    run, tree, _ = diverged
    five = {**tree, "train": {**tree["train"], "steps": 5}, "optimizer": {**tree["optimizer"], "decay_steps": 8}}
    assert run_world(train_body, 2, five) == [5, 5]
    assert record(run)["step"] == 6
    assert run_world(train_body, 2, tree) == [8, 8]
    assert not (run / "diverged.json").exists()


def test_a_restart_to_the_same_numbers_is_refused_on_every_rank(diverged: tuple[Path, dict[str, Any], str]) -> None:
    run, tree, _ = diverged
    (said, _) = run_world(diverges, 2, tree, env=RESTART)
    assert said.startswith("TrainingDiverged"), "the first attempt started elsewhere: from the beginning"
    assert record(run)["resumed_from"] == "iter_0000004"
    for said in run_world(diverges, 2, tree, env=RESTART):
        assert said.startswith("ConfigError: run.path=")
        assert re.search(r"from .*iter_0000004 with the same recipe, diverged at step 6 .*skip_steps", said)
    (said, _) = run_world(diverges, 2, tree)
    assert said.startswith("TrainingDiverged"), "a job started by hand is not refused"
    assert run_world(train_body, 2, {**tree, "train": {**tree["train"], "skip_steps": [[6, 8]]}}, env=RESTART) == [8, 8]
    assert not (run / "diverged.json").exists(), "the step is passed over"


def test_the_ways_back_lead_on(diverged: tuple[Path, dict[str, Any], str]) -> None:
    """Further back, past the data, with a lower learning rate."""
    run, tree, said = diverged
    advice = re.search(r"train\.(skip_steps)='(.*?)'", said)
    assert advice is not None
    assert cli.main(["rollback", str(run), "2"]) == 0
    tree["train"] |= {advice[1]: yaml.safe_load(advice[2]), "log_interval": 1}
    tree["optimizer"]["lr"] = 5e-4
    tree["run"]["accept_changes"] = True
    assert run_world(train_body, 2, tree) == [8, 8]
    assert list(metrics(run)) == [3, 4, 7, 8], "from step 2 on, without 5 and 6"
    assert [path.name for path in sorted(run.glob("rolled_back/*/*"))] == ["iter_0000004", "metrics.jsonl"]
    assert not (run / "diverged.json").exists()


def test_only_the_same_attempt_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, recipe = RunFolder(tmp_path), parse_recipe({})
    other = parse_recipe({"train": {"skip_steps": [[2, 3]]}})
    five, seven = tmp_path / "iter_0000005", tmp_path / "iter_0000007"
    DivergenceFile(folder, recipe, five, enabled=False).write(6, {}, "nan")
    assert list(tmp_path.iterdir()) == []
    refuse_repetition(folder, recipe, five)
    DivergenceFile(folder, recipe, five, enabled=True).write(6, {}, "nan")
    refuse_repetition(folder, recipe, five)  # by hand
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    for again in ((other, five), (recipe, seven), (recipe, None)):
        refuse_repetition(folder, *again)
    with pytest.raises(ConfigError, match="diverged at step 6"):
        refuse_repetition(folder, recipe, five)

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    DivergenceFile(folder, recipe, five, enabled=True)  # tried again by hand: a node may die in it and be restarted
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refuse_repetition(folder, recipe, five)
    attempt = DivergenceFile(folder, recipe, five, enabled=True)
    attempt.passed(5)
    assert record(tmp_path)["message"] == "nan"
    attempt.passed(6)
    assert not folder.diverged.exists()
    for damaged in ("{", "[]", '{"step": "six"}'):
        folder.diverged.write_text(damaged)
        refuse_repetition(folder, recipe, five)


def test_torchrun_does_not_train_to_the_same_nan_again(data: Path, tmp_path: Path) -> None:
    """The whole command, restarted by torchrun itself."""
    run, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(data, run, optimizer__lr=1e30, optimizer__warmup_steps=0, **SETTINGS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run(
        [*command, "--max-restarts", "1", "-m", "mtp_megatron.train", str(file)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert result.returncode != 0
    assert result.stdout.count("error: step ") == 1, result.stdout
    assert result.stdout.count("the attempt before this restart, from the beginning") == 1, result.stdout
    assert record(run)["resumed_from"] is None
