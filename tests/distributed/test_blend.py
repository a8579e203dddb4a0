"""Trainings on a blend of data sets: the same in every layout, under both engines and after every interruption.

Not covered here: GPUs, hosts without a shared disk (of a single data set: tests/distributed/test_shared_index.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.preflight import preflight
from mtp_megatron.training.recipe_io import parse_recipe
from tests.deepspeed_runs import TIMEOUT, deepspeed_tree, zero
from tests.distributed.test_agreement import started
from tests.harness import run_world
from tests.training_runs import interrupted_copy, largest_difference, make_data, metrics, tiny_tree, train_body

Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The second has fewer samples than the trainings here take of it: it is read more than once."""
    return data, make_data(tmp_path_factory.mktemp("second"), seed=1, documents=2)


def blend_of(folders: Folders, weights: tuple[float, float] = (1, 4)) -> dict[str, Any]:
    pairs = [[weight, str(folder)] for weight, folder in zip(weights, folders, strict=True)]
    return {"data__path": None, "data__blend": pairs}


def blend_tree(folders: Folders, run: Path, weights: tuple[float, float] = (1, 4), **settings: Any) -> dict[str, Any]:
    return tiny_tree(Path(), run, **blend_of(folders, weights), **settings)


@pytest.fixture(scope="module")
def single(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps on one process."""
    run = tmp_path_factory.mktemp("single") / "run"
    assert run_world(train_body, 1, blend_tree(folders, run)) == [8]
    return run


def assert_held_out_figures_alike(run: Path, other: Path) -> None:
    """Of the whole and of every folder."""
    mine, theirs = metrics(run, "valid"), metrics(other, "valid")
    assert largest_difference(mine, theirs) < 1e-5
    for step, record in theirs.items():
        assert mine[step]["folders"].keys() == record["folders"].keys()
        for name, found in record["folders"].items():
            same = mine[step]["folders"][name]
            assert same["head_tokens"] == found["head_tokens"]
            assert same["head_loss"] == pytest.approx(found["head_loss"], rel=1e-5)
            assert same["head_accuracy"] == pytest.approx(found["head_accuracy"], abs=0.01)


def test_two_copies_train_like_one_process(folders: Folders, single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_world(train_body, 2, blend_tree(folders, run)) == [8, 8]
    assert largest_difference(metrics(run), metrics(single)) < 1e-5
    assert_held_out_figures_alike(run, single)


def test_every_folder_has_held_out_figures(folders: Folders, single: Path) -> None:
    """Both are called ``data``, so their names say more. The figures: tests/unit/test_evaluation_by_folder.py."""
    for record in metrics(single, "valid").values():
        assert list(record["folders"]) == [f"{folder.parent.name}/data" for folder in folders]
        tokens = [found["head_tokens"][0] for found in record["folders"].values()]
        losses = [found["head_loss"][0] for found in record["folders"].values()]
        assert losses[0] != pytest.approx(losses[1], rel=1e-4)
        total = sum(count * loss for count, loss in zip(tokens, losses, strict=True))
        assert total / sum(tokens) == pytest.approx(record["head_loss"][0], rel=1e-6)


def test_the_comparison_can_fail(folders: Folders, single: Path, data: Path, tmp_path: Path) -> None:
    run_world(train_body, 1, blend_tree(folders, tmp_path / "other", (4, 1)))
    assert largest_difference(metrics(tmp_path / "other"), metrics(single)) > 1e-3
    assert largest_difference(metrics(tmp_path / "other", "valid"), metrics(single, "valid")) > 1e-4
    run_world(train_body, 1, tiny_tree(data, tmp_path / "alone"))
    assert largest_difference(metrics(tmp_path / "alone"), metrics(single)) > 1e-3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_exactly_where_it_stopped(workers: int, folders: Folders, single: Path, tmp_path: Path) -> None:
    resumed = interrupted_copy(single, tmp_path / "resumed", 4)
    run_world(train_body, 1, blend_tree(folders, resumed, data__workers=workers))
    assert metrics(resumed) == metrics(single)
    assert metrics(resumed, "valid") == metrics(single, "valid")


LAYOUTS: dict[str, dict[str, Any]] = {
    "CP2, heads on two stages": {
        "parallel__context": 2,
        "parallel__pipeline": 2,
        "parallel__layout": "Ettttmm|mL",
    },
    "TP2 with SP, PP2": {"parallel__tensor": 2, "parallel__sequence_parallel": True, "parallel__pipeline": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_alike_in_another_layout_and_with_weights_of_another_scale(
    layout: str, folders: Folders, single: Path, tmp_path: Path
) -> None:
    resumed = interrupted_copy(single, tmp_path / "resumed", 4)
    tree = blend_tree(folders, resumed, (0.2, 0.8), **LAYOUTS[layout])
    assert run_world(train_body, 4, tree) == [8] * 4
    assert largest_difference(metrics(resumed), metrics(single)) < 1e-5
    assert_held_out_figures_alike(resumed, single)


def test_a_run_that_is_made_longer_trains_as_if_it_had_been_from_the_start(
    folders: Folders, single: Path, tmp_path: Path
) -> None:
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    shutil.copytree(single, longer)
    settings = {"train__steps": 12, "optimizer__decay_steps": 8}
    run_world(train_body, 1, blend_tree(folders, longer, **settings))
    run_world(train_body, 1, blend_tree(folders, whole, **settings))
    assert list(metrics(longer)) == list(range(1, 13))
    assert metrics(longer) == metrics(whole)


def test_its_checkpoints_say_what_it_was_trained_on(folders: Folders, single: Path) -> None:
    with pytest.raises(ConfigError, match=f"{folders[0]} had a weight of 0.2, and has 0.8; {folders[1]} had"):
        preflight(parse_recipe(blend_tree(folders, single, (4, 1))), 1)


def test_a_run_goes_on_with_another_blend_where_that_is_said(
    folders: Folders, single: Path, data: Path, tmp_path: Path
) -> None:
    """And is resumed on it without saying it again; each folder goes on where it was."""
    run, other = tmp_path / "run", tmp_path / "other"
    settings = {"train__save_interval": 2, "train__eval_batches": 0}
    for copy, world in ((run, 1), (other, 2)):
        interrupted_copy(single, copy, 4)
        tree = blend_tree(folders, copy, (4, 1), run__accept_changes=True, **settings)
        said, *_ = run_world(said_at_the_start, world, tree, "run.accept_changes")
        assert len(said) == 1
        assert f"{folders[0]} had a weight of 0.2, and has 0.8" in said[0]
    assert largest_difference(metrics(run), metrics(other)) < 1e-5
    assert metrics(run)[4] == metrics(single)[4]
    assert metrics(run)[5] != metrics(single)[5]
    resumed = interrupted_copy(run, tmp_path / "resumed", 6)
    assert run_world(said_at_the_start, 1, blend_tree(folders, resumed, (4, 1), **settings), "run.acc") == [[]]
    assert metrics(resumed) == metrics(run)
    for step, used in ((4, [3, 13]), (6, [9, 15]), (8, [16, 16])):
        folder = run / "checkpoints" / f"iter_{step:07d}"
        record = json.loads((folder / "mtp_config.json").read_text())["data"]
        assert [entry["samples"] for entry in record["folders"]] == used
        assert record["since"] == (0 if step == 4 else 16)


def said_at_the_start(rank: int, world_size: int, tree: dict[str, Any], begins: str) -> list[str]:
    """For ``run_world``: train; returns what it says that begins so."""
    from mtp_megatron.training.run_log import RunLog

    said: list[str] = []
    message, RunLog.message = RunLog.message, lambda self, text: said.append(text) if self._enabled else None
    try:
        train_body(rank, world_size, tree)
    finally:
        RunLog.message = message
    return [text for text in said if text.startswith(begins)]


def test_what_each_folder_gives_is_said_once(folders: Folders, tmp_path: Path) -> None:
    settings = {"train__steps": 1, "optimizer__warmup_steps": 0}
    (said,), silent = run_world(said_at_the_start, 2, blend_tree(folders, tmp_path / "run", **settings), "data.blend")
    assert silent == []
    _, _, first, second, *_ = said.splitlines()
    assert (first.split()[0], first.split()[-1]) == ("0.2", str(folders[0]))
    assert (second.split()[0], second.split()[2], second.split()[-1]) == ("0.8", "3", str(folders[1]))


def test_ranks_whose_folders_differ_are_refused_and_other_mounts_are_not(folders: Folders, tmp_path: Path) -> None:
    copies = (tmp_path / "one", tmp_path / "other")
    for folder, copy in zip(folders, copies, strict=True):
        shutil.copytree(folder, copy)
    here = blend_tree(folders, tmp_path / "run", parallel__pipeline=2)
    there = blend_tree(copies, tmp_path / "run", parallel__pipeline=2)
    assert started(here, there) == [("MTPError", "built", True)] * 2
    cases = {
        "folder 1.weight is 0.2 there and 0.25 here": blend_of(folders, (1, 3)),
        "folder 1.fingerprint is '": blend_of((folders[1], folders[0])),
        "folder 2 is {'weight': 0.8, ": {"data__path": str(folders[0])},
    }
    for says, others in cases.items():
        other = tiny_tree(folders[0], tmp_path / "run", parallel__pipeline=2, **others)
        for kind, said, built in started(here, other):
            assert kind == "ConfigError"
            assert said.startswith("data='...': rank 1 on ")
            assert says in said
            assert not built


@pytest.mark.deepspeed
def test_under_deepspeed_too(folders: Folders, tmp_path: Path) -> None:
    """And it resumes there."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    settings = {"model__num_trunk_layers": 2, **blend_of(folders)}
    tree = deepspeed_tree(Path(), run, zero(1), **settings)
    run_world(train_body, 2, tree, timeout=TIMEOUT)
    run_world(train_body, 2, tiny_tree(Path(), reference, **settings))
    one, other = metrics(run)[1]["head_loss"], metrics(reference)[1]["head_loss"]
    assert one == pytest.approx(other, rel=1e-4), "the weights are drawn alike, so the first losses are the data's"
    resumed = interrupted_copy(run, tmp_path / "resumed", 4)
    run_world(train_body, 2, deepspeed_tree(Path(), resumed, zero(1), **settings), timeout=TIMEOUT)
    assert metrics(resumed) == metrics(run)
