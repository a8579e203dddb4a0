"""``train.skip_steps``: the data of these steps is passed over, whenever the run was interrupted.

Not covered here: GPUs, and a loader in processes of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_runs import TIMEOUT, deepspeed_tree, zero
from tests.harness import run_world
from tests.training_runs import interrupted_copy, metrics, tiny_tree, train_body

BATCH = 4
# A learning rate that does not depend on the step: then a run that never had the data goes exactly alike.
FLAT = {"optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
SETTINGS: dict[str, Any] = {**FLAT, "train__save_interval": 2, "train__eval_batches": 0}


class Without:
    """A data set in which the samples of steps 3 and 4 never were."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[(index if index < 2 * BATCH else index + 2 * BATCH) % len(self)]


def train_without_the_data(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    from mtp_megatron.training import loop

    build = loop.build_datasets

    def without(*args: Any, **kwargs: Any) -> Any:
        train, valid = build(*args, **kwargs)
        return Without(train), valid

    loop.build_datasets = without
    try:
        return train_body(rank, world_size, tree)
    finally:
        loop.build_datasets = build


def figures(run: Path, first: int, last: int) -> list[tuple[Any, ...]]:
    steps = metrics(run)
    return [(steps[step]["head_loss"], steps[step]["grad_norm"]) for step in range(first, last + 1)]


@pytest.fixture(scope="module")
def skipping(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps of which 3 and 4 are skipped, on two pipeline stages."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    tree = tiny_tree(data, run, parallel__pipeline=2, train__skip_steps=[[3, 4]], **SETTINGS)
    assert run_world(train_body, 2, tree) == [8, 8]
    return run


def test_it_trains_as_if_the_data_had_never_been_there(data: Path, skipping: Path, tmp_path: Path) -> None:
    run_world(train_without_the_data, 2, tiny_tree(data, tmp_path / "run", parallel__pipeline=2, **SETTINGS))
    assert list(metrics(skipping)) == [1, 2, 5, 6, 7, 8], "no line for what was not trained"
    assert figures(skipping, 1, 2) == figures(tmp_path / "run", 1, 2)
    assert figures(skipping, 5, 8) == figures(tmp_path / "run", 3, 6)
    assert figures(skipping, 5, 6) != figures(tmp_path / "run", 5, 6), "control"
    assert sorted(path.name for path in (skipping / "checkpoints").glob("iter_*")) == [
        *("iter_0000002", "iter_0000006", "iter_0000008"),
    ]


@pytest.mark.parametrize("step", [2, 6])
def test_a_run_with_skips_resumes_before_and_after_them(step: int, data: Path, skipping: Path, tmp_path: Path) -> None:
    resumed = interrupted_copy(skipping, tmp_path / "resumed", step)
    tree = tiny_tree(data, resumed, parallel__pipeline=2, train__skip_steps=[[3, 4]], **SETTINGS)
    run_world(train_body, 2, tree)
    assert metrics(resumed) == metrics(skipping)


def test_schedule_and_curriculum_go_on_and_a_checkpoint_inside_a_range_leaves_the_rest_of_it(
    data: Path, tmp_path: Path
) -> None:
    """The range is set after the fact, as it is when a run diverged."""
    whole, inside, rest = (tmp_path / name for name in ("whole", "inside", "rest"))
    settings = {"train__save_interval": 4, "train__eval_batches": 0, "heads__curriculum_steps": 6}
    run_world(train_body, 1, tiny_tree(data, whole, **settings))
    for run, ranges in ((inside, [[3, 6]]), (rest, [[5, 5], [6, 6]])):
        interrupted_copy(whole, run, 4)
        run_world(train_body, 1, tiny_tree(data, run, train__skip_steps=ranges, **settings))
    assert metrics(inside) == metrics(rest)
    assert list(metrics(inside)) == [1, 2, 3, 4, 7, 8]
    assert [metrics(inside)[step]["lr"] for step in (7, 8)] == [metrics(whole)[step]["lr"] for step in (7, 8)]
    assert None in metrics(whole)[4]["head_loss"]
    assert None not in metrics(inside)[7]["head_loss"]
    assert metrics(inside)[7]["head_loss"] != metrics(whole)[7]["head_loss"]


def test_a_range_up_to_the_end_still_ends_the_run_properly(data: Path, tmp_path: Path) -> None:
    from mtp_megatron.reporting.metrics import read_metrics

    run = tmp_path / "run"
    assert run_world(train_body, 1, tiny_tree(data, run, train__skip_steps=[[7, 99]])) == [8]
    assert list(metrics(run)) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(run, "valid")) == [4, 8]
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert read_metrics(run).train[-1]["step"] == 6


@pytest.mark.deepspeed
def test_under_deepspeed_too(data: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {**SETTINGS, "model__num_trunk_layers": 2, "train__skip_steps": [[3, 4]]}
    without = {key: value for key, value in settings.items() if key != "train__skip_steps"}
    run_world(train_body, 2, deepspeed_tree(data, run, zero(1), **settings), timeout=TIMEOUT)
    reference = deepspeed_tree(data, tmp_path / "reference", zero(1), **without)
    run_world(train_without_the_data, 2, reference, timeout=TIMEOUT)
    assert figures(run, 1, 2) == figures(tmp_path / "reference", 1, 2)
    assert figures(run, 5, 8) == figures(tmp_path / "reference", 3, 6)
    resumed = interrupted_copy(run, tmp_path / "resumed", 2)
    run_world(train_body, 2, deepspeed_tree(data, resumed, zero(1), **settings), timeout=TIMEOUT)
    assert metrics(resumed) == metrics(run)


def test_adams_step_is_not_the_runs_where_rank_0_trains_nothing(data: Path, tmp_path: Path) -> None:
    """It writes the step for all, and Adam has taken fewer than the run."""
    run, seedling = tmp_path / "run", tmp_path / "seedling"
    run_world(train_body, 1, tiny_tree(data, seedling, train__steps=1, **FLAT))
    settings = {**SETTINGS, "parallel__pipeline": 2, "heads__trainable": "heads", "run__load": str(seedling)}
    settings |= {"train__skip_steps": [[2, 3]], "train__save_interval": 4}
    run_world(train_body, 2, tiny_tree(data, run, **settings))
    resumed = interrupted_copy(run, tmp_path / "resumed", 4)
    run_world(train_body, 2, tiny_tree(data, resumed, **settings))
    assert metrics(resumed) == metrics(run)
