"""``train.batch_size_schedule``: every step is what a run with one size makes of the same samples, in every layout and
after every interruption.

Not covered here: GPUs, loader processes (tests/unit/test_data_loader.py).
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.checkpoint.torch_dist import read_object
from tests.harness import run_world
from tests.training_runs import interrupted_copy, largest_difference, make_data, metrics, tiny_tree, train_body

# Samples 0 to 7, 8 to 23, and then 24 to 35 and so on: what a run with batches of 8 or 12 from the start reads, too.
GROWING: dict[str, Any] = {
    "train__batch_size_schedule": [[1, 4], [3, 8], [5, 12]],
    "train__global_batch_size": 12,
    "train__steps": 6,
    "optimizer__decay_steps": 6,
    "train__save_interval": 1,
    "train__eval_batches": 1,
    "train__eval_interval": 3,
}
# Weights stay what they are, so that a step's figures depend on its samples alone.
STILL = {"optimizer__lr": 1e-12, "optimizer__schedule": "constant", "optimizer__warmup_steps": 0}


def train_one_after_another(rank: int, world_size: int, *trees: dict[str, Any]) -> list[str]:
    """Train them; returns what each said, line by line."""
    from mtp_megatron.training.run_log import RunLog

    said: list[list[str]] = []
    message, RunLog.message = RunLog.message, lambda self, text: said[-1].append(text)
    try:
        for tree in trees:
            said.append([])
            train_body(rank, world_size, tree)
    finally:
        RunLog.message = message
    return ["\n".join(lines) for lines in said]


def figures(run: Path, step: int) -> dict[str, Any]:
    record = metrics(run)[step]
    return {name: record[name] for name in ("loss", "head_loss", "head_accuracy", "grad_norm")}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def used(run: Path, step: int) -> int:
    """Samples, by the checkpoint of ``step``."""
    described = json.loads((run / "checkpoints" / f"iter_{step:07d}" / "mtp_config.json").read_text())
    return sum(folder["samples"] for folder in described["data"]["folders"])


def consumed(run: Path, step: int) -> int:
    """Samples, as Megatron-LM would read them; megatron-core keeps them elsewhere from 0.19 on."""
    folder = run / "checkpoints" / f"iter_{step:07d}"
    file = folder / "common.pt"
    content = file.read_bytes() if file.exists() else read_object(folder, "common_state/shard_0_1")
    common = torch.load(io.BytesIO(content), weights_only=False)
    (state,) = common if isinstance(common, list) else [common]
    assert state["iteration"] == step
    return int(state["consumed_train_samples"])


def test_each_step_is_what_a_run_with_one_size_makes_of_its_samples(data: Path, tmp_path: Path) -> None:
    """On a blend; with steps passed over where the size changes; and where the schedule comes to a run that had none,
    recorded before there was one."""
    second = make_data(tmp_path / "second", seed=1, documents=2)
    settings = {**GROWING, **STILL, "data__path": None, "data__blend": [[1, str(data)], [4, str(second)]]}
    constant = {**settings, "train__batch_size_schedule": None, "train__save_interval": 2}
    names = ("growing", "of 4", "of 8", "of 12", "skipping")
    growing, *of, skipping = runs = [tmp_path / name for name in names]
    trees = [
        tiny_tree(data, growing, **settings),
        *(
            tiny_tree(data, run, **{**constant, "train__global_batch_size": size})
            for run, size in zip(of, (4, 8, 12), strict=True)
        ),
        tiny_tree(data, skipping, **settings, train__skip_steps=[[2, 3]]),
    ]
    said, *_, said_skipping = run_world(train_one_after_another, 1, *trees)[0]
    for step, size, at in [(3, 8, 2), (4, 8, 3), (5, 12, 3), (6, 12, 4)]:
        assert_same(figures(growing, step), figures(tmp_path / f"of {size}", at))
        assert metrics(growing)[step]["batch_size"] == size
    for step in (1, 2):
        assert_same(figures(growing, step), figures(tmp_path / "of 4", step))
    assert figures(growing, 3) != figures(tmp_path / "of 8", 3), "control"
    assert list(metrics(skipping)) == [1, 4, 5, 6]
    for step in metrics(skipping):
        assert_same(figures(skipping, step), figures(growing, step))
    assert [used(growing, step) for step in range(1, 7)] == [4, 8, 16, 24, 36, 48]
    assert [metrics(growing)[step]["tokens"] for step in (2, 3, 6)] == [8 * 32, 16 * 32, 48 * 32]
    assert used(skipping, 4) == 24
    assert consumed(growing, 3) == 16
    assert largest_difference(metrics(growing, "valid"), metrics(tmp_path / "of 12", "valid")) < 1e-6
    assert "4 from step 1 on, 8 from step 3 on, 12 from step 5 on; the next step, 1, takes 4" in said
    assert re.findall(r"from step (\d) on, a step takes (\d+) sequences", said) == [("3", "8"), ("5", "12")]
    assert re.findall(r"from step (\d) on, a step takes (\d+) sequences", said_skipping) == [("4", "8"), ("5", "12")]
    assert not any("batch_size" in record for record in metrics(runs[1]).values())

    changed = interrupted_copy(of[0], tmp_path / "changed", 2)
    recorded = changed / "recipe.yaml"
    lines = recorded.read_text().splitlines(keepends=True)
    older = [line for line in lines if "batch_size_schedule" not in line]
    assert len(older) == len(lines) - 1
    recorded.write_text("".join(older))
    again = {**settings, "train__steps": 7}  # and then without the flag, as it is recorded
    trees = [tiny_tree(data, changed, **settings, run__accept_changes=True), tiny_tree(data, changed, **again)]
    (said, said_again), *_ = run_world(train_one_after_another, 1, *trees)
    for step in range(1, 7):
        assert_same(figures(changed, step), figures(growing, step))
    assert [used(changed, step) for step in (2, 3, 6, 7)] == [8, 16, 48, 60]
    assert "train.global_batch_size is 4 there and 12 here; train.batch_size_schedule is None there and [[1" in said
    assert "accept_changes" not in said_again


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The schedule on one process, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("single") / "run"
    assert run_world(train_body, 1, tiny_tree(data, run, **GROWING)) == [6]
    return run


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2xPP2 from before the first change": (1, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "DP2xPP2, interleaved, from between the changes": (3, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "DP4 from where the size changes": (4, {"train__micro_batch_size": 3}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_goes_on_alike_in_another_layout(name: str, data: Path, single: Path, tmp_path: Path) -> None:
    """The last one's microbatches are larger than the batches of the steps before it."""
    step, layout = LAYOUTS[name]
    resumed = interrupted_copy(single, tmp_path / "resumed", step)
    assert run_world(train_body, 4, tiny_tree(data, resumed, **GROWING, **layout)) == [6] * 4
    assert metrics(resumed)[step] == metrics(single)[step]
    for later in range(step + 1, 7):
        record, expected = metrics(resumed)[later], metrics(single)[later]
        for key in ("loss", "head_loss", "head_accuracy", "tokens", "lr", "batch_size"):
            assert record[key] == pytest.approx(expected[key], rel=1e-5), (later, key)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert used(resumed, later) == used(single, later)
    assert largest_difference(metrics(resumed, "valid"), metrics(single, "valid")) < 1e-5


def test_it_goes_on_exactly_where_it_stopped(data: Path, single: Path, tmp_path: Path) -> None:
    copies = {step: interrupted_copy(single, tmp_path / f"from {step}", step) for step in (2, 3)}
    run_world(train_one_after_another, 1, *(tiny_tree(data, copy, **GROWING) for copy in copies.values()))
    for copy in copies.values():
        assert metrics(copy) == metrics(single)
        assert metrics(copy, "valid") == metrics(single, "valid")
