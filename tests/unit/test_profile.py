"""`StepProfiler` and its labels: which steps of which ranks, what a run that ends early leaves, and at what cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import profiler

from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.labels import label
from mtp_megatron.training import profile
from mtp_megatron.training.preflight import preflight
from mtp_megatron.training.profile import StepProfiler
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder
from mtp_megatron.training.validate import check_recipe
from tests.toy import ToyModel, batch, deferred
from tests.training_runs import make_data, tiny_tree
from tests.unit.test_no_synchronisation import Reads


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def profiler_of(path: Path, steps: list[int], ranks: list[int]) -> StepProfiler:
    return StepProfiler(RunFolder(path), parse_recipe({"train": {"profile_steps": steps, "profile_ranks": ranks}}))


def recorded(recorder: StepProfiler, steps: range, error: type[Exception] | None = None) -> None:
    """Train that many steps, each one addition, then end, with an error where one is given."""
    with recorder:
        for step in steps:
            recorder.begin(step)
            torch.ones(2) + 1
            if recorder.passed(step):
                recorder.write()
        if error is not None:
            raise error


def names(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "profile").glob("*")) if (path / "profile").exists() else []


@pytest.mark.usefixtures("_one_rank")
class TestSteps:
    def test_its_own_steps_are_written_when_they_are_over(self, tmp_path: Path) -> None:
        recorder = profiler_of(tmp_path, [3, 4], [0])
        recorded(recorder, range(1, 4))
        assert names(tmp_path) == ["rank0-steps3-3.json.gz", "rank0-steps3-3.txt"], "the run ended before"
        recorder = profiler_of(tmp_path, [3, 4], [0])
        recorder.begin(4)  # resumed there
        assert profiler._is_profiler_enabled
        assert recorder.passed(4)
        recorder.write()
        assert not profiler._is_profiler_enabled
        recorder.begin(3)  # nobody goes back; it is over all the same
        assert not profiler._is_profiler_enabled
        assert names(tmp_path)[2:] == ["rank0-steps4-4.json.gz", "rank0-steps4-4.txt"]

    def test_other_ranks_and_steps_record_nothing(self, tmp_path: Path) -> None:
        recorded(profiler_of(tmp_path, [1, 4], [1]), range(1, 5))
        recorded(profiler_of(tmp_path, [5, 6], [0]), range(1, 5))
        assert names(tmp_path) == []

    def test_an_error_leaves_what_there_is_and_a_former_file_stays(self, tmp_path: Path) -> None:
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                recorded(profiler_of(tmp_path, [1, 9], [0]), range(1, 3), ArithmeticError)
        assert [name for name in names(tmp_path) if name.endswith("gz")] == [
            "rank0-steps1-2.2.json.gz",
            "rank0-steps1-2.json.gz",
        ]
        assert not profiler._is_profiler_enabled

    def test_after_an_error_under_nccl_nothing_waits_for_kernels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(profile, "waits_for_others", lambda: True)
        recorder = profiler_of(tmp_path, [1, 9], [0])
        with pytest.raises(ArithmeticError):
            recorded(recorder, range(1, 3), ArithmeticError)
        assert names(tmp_path) == []
        recorder.write()  # or the next test records

    def test_a_disk_that_takes_nothing_ends_no_run(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "profile").write_text("no folder")
        with caplog.at_level(logging.WARNING):
            recorded(profiler_of(tmp_path, [1, 2], [0]), range(1, 4))
        assert "the profile of steps 1 to 2 was not written: FileExistsError" in caplog.text


def test_labels_are_nothing_while_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "record_function", lambda name: 1 / 0)
    with label("head", 1, "forward") as entered:
        assert entered is None


def test_labels_read_no_value_either() -> None:
    """Neither forward nor backward; and all parts of every head are there."""
    model = ToyModel(HeadsConfig(n=2))
    inputs = batch(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded, Reads() as reads:
        loss, _ = deferred(model, *inputs)
        loss.backward()
    assert reads.names == []
    seen = {event.key for event in recorded.key_averages() if event.key.startswith("mtp/")}
    parts = ("forward", "loss", "loss and backward")
    assert seen == {"mtp/heads", *(f"mtp/head {head} {part}" for head in (1, 2) for part in parts)}


@pytest.mark.parametrize("steps", [[3], [0, 2], [5, 4], [1, 2, 3]], ids=str)
def test_what_is_no_pair_of_steps_is_refused(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"train\.profile_steps=.* no pair of steps.*\[10, 12\]"):
        parse_recipe({"train": {"profile_steps": steps}})


def test_steps_beyond_the_run_are_refused() -> None:
    recipe = parse_recipe({"train": {"profile_steps": [9, 9], "steps": 8}})
    with pytest.raises(ConfigError, match=r"train\.profile_steps=\[9, 9\]: the run ends at train\.steps=8"):
        check_recipe(recipe, world_size=1, tokenizer_vocab_size=257)


@pytest.mark.parametrize("ranks", [[2], [-1], [0, 0], []], ids=str)
def test_a_job_that_has_not_the_ranks_is_refused(ranks: list[int], data: Path, tmp_path: Path) -> None:
    """Only the job: a plan of the recipe may be of other GPUs."""

    def recipe(**train: Any) -> Recipe:
        settings = {f"train__{key}": value for key, value in train.items()}
        return parse_recipe(tiny_tree(data, tmp_path / "run", parallel__tensor=2, **settings))

    with pytest.raises(ConfigError, match="not different ranks of 0 to 1") as refused:
        preflight(recipe(profile_steps=[1, 1], profile_ranks=ranks), 2)
    assert (refused.value.field, refused.value.value) == ("train.profile_ranks", ranks)
    assert not (tmp_path / "run").exists()
    preflight(recipe(profile_ranks=ranks), 2)  # nothing is recorded
    preflight(recipe(profile_steps=[1, 1], profile_ranks=[1]), 2)


def test_what_is_announced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def said(step: int, ranks: list[int]) -> str | None:
        recipe = parse_recipe({"train": {"profile_steps": [5, 7], "profile_ranks": ranks}})
        return StepProfiler.announcement(folder, recipe, step)

    assert said(0, [0]) == f"rank 0 records steps 5 to 7 into {tmp_path}/profile"
    assert said(5, [8, 0, 1]) == f"ranks 0-1, 8 record steps 6 to 7 into {tmp_path}/profile"
    assert said(7, [0]) is None
    assert StepProfiler.announcement(folder, parse_recipe({}), 0) is None
