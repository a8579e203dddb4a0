"""``run.accept_changes``: a run goes on with another learning rate, schedule, weight decay, clipping or weights of its
heads.

Not covered here: GPUs, and Adams other than torch's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mtp_megatron.training.recipe_io import load_recipe
from tests.deepspeed_runs import TIMEOUT, deepspeed_tree, zero
from tests.harness import run_world
from tests.training_runs import interrupted_copy, metrics, tiny_tree, train_body

RUN: dict[str, Any] = {"train__steps": 6, "optimizer__decay_steps": 8, "train__save_interval": 4}
CHANGED: dict[str, Any] = {
    "optimizer__lr": 5e-4,
    "optimizer__min_lr": 1e-4,
    "optimizer__warmup_steps": 3,
    "optimizer__schedule": "wsd",
    "optimizer__decay_steps": 16,
    "optimizer__wsd_decay_steps": 12,
    "optimizer__wsd_decay_style": "linear",
    "optimizer__weight_decay": 0.3,
    "optimizer__clip_grad": 0.25,
    "heads__loss_weights": [1.0, 0.5, 0.0],
    "heads__z_loss": 0.01,
}


def train_and_look(rank: int, world_size: int, tree: dict[str, Any]) -> list[Any]:
    """Train; returns the last step's learning rates and weight decays of the optimizer's groups, its clipping, and what
    the run said."""
    from mtp_megatron.training import loop
    from mtp_megatron.training.run_log import RunLog

    seen: list[Any] = []
    said: list[str] = []
    train_step, message = loop.train_step, RunLog.message

    def look(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
        figures = train_step(recipe, trainable, *args, **kwargs)
        groups = trainable.scheduler.optimizer.param_groups
        engine = getattr(trainable, "engine", None)
        if engine is None:
            clip = {part.config.clip_grad for part in trainable.optimizer.chained_optimizers}
        else:
            clip = {getattr(engine.optimizer, "clip_grad", engine.gradient_clipping())}
        seen[:] = [{group["lr"] for group in groups}, {group["weight_decay"] for group in groups}, clip]
        return figures

    loop.train_step = look
    RunLog.message = lambda self, text: said.append(text)
    try:
        train_body(rank, world_size, tree)
    finally:
        loop.train_step, RunLog.message = train_step, message
    return [*seen, "\n".join(said)]


RATES = [1e-4 + 4e-4 * (1 - done / 12) for done in (1, 2)]  # of steps 5 and 6: its decay begins after step 4

LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2, fp32": {"parallel__pipeline": 2},
    "PP2, bf16": {"parallel__pipeline": 2, "train__precision": "bf16"},
    "DP2, distributed optimizer": {"train__precision": "bf16", "optimizer__distributed": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_new_values_take_effect_at_the_next_step_and_need_no_flag_afterwards(
    name: str, data: Path, tmp_path: Path
) -> None:
    settings = {**RUN, **LAYOUTS[name], "train__eval_batches": 0}
    whole, other = tmp_path / "whole", tmp_path / "other"
    run_world(train_body, 2, tiny_tree(data, whole, **settings))
    run_world(train_body, 2, tiny_tree(data, other, **{**settings, **CHANGED}))  # its schedule from the beginning
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    tree = tiny_tree(data, resumed, **{**settings, **CHANGED}, run__accept_changes=True)
    looks = run_world(train_and_look, 2, tree)
    rate = metrics(other)[6]["lr"]
    for rates, decays, clipping, _ in looks:
        assert rates == {rate}
        assert decays == {0.0, 0.3}
        assert clipping == {0.25}
    assert [metrics(resumed)[step]["lr"] for step in (5, 6)] == [metrics(other)[step]["lr"] for step in (5, 6)]
    assert [metrics(resumed)[step]["lr"] for step in (5, 6)] == pytest.approx(RATES, rel=1e-12)
    assert metrics(resumed)[5]["lr"] != metrics(whole)[5]["lr"], "control"
    assert metrics(resumed)[5]["head_loss"][:2] == metrics(whole)[5]["head_loss"][:2], "the weights are the run's"
    assert metrics(resumed)[5]["head_loss"][2] is None
    assert "head_z_loss" not in metrics(resumed)[4]
    assert [value is None for value in metrics(resumed)[5]["head_z_loss"]] == [False, False, True]
    assert "optimizer.lr is 0.001 there and 0.0005 here" in looks[0][-1]
    assert "heads.loss_weights is None there and [1.0, 0.5, 0.0] here" in looks[0][-1]
    assert looks[0][-1].count("; the next step, 5, trains at a learning rate of 4.667e-04") == 1
    recorded = load_recipe(resumed / "recipe.yaml")
    assert (recorded.optimizer.lr, recorded.run.accept_changes) == (5e-4, False)

    again = interrupted_copy(resumed, tmp_path / "again", step=4)  # saved under the old values, as after a rollback
    looks = run_world(train_and_look, 2, tiny_tree(data, again, **{**settings, **CHANGED}))
    assert metrics(again) == metrics(resumed)
    assert "accept_changes" not in looks[0][-1]


def test_a_decay_that_branches_off_a_stable_phase_is_the_one_from_the_start(data: Path, tmp_path: Path) -> None:
    """The stable phase goes on where it was, too, longer than was said at its start."""
    wsd = {"optimizer__schedule": "wsd", "train__save_interval": 2, "train__eval_batches": 0}
    stable = {**wsd, "optimizer__wsd_decay_steps": 0}
    decays = {**wsd, "optimizer__wsd_decay_steps": 2, "train__steps": 6}
    run, longer, branch, whole = (tmp_path / name for name in ("run", "longer", "branch", "whole"))
    run_world(train_body, 1, tiny_tree(data, run, **stable, train__steps=4))
    shutil.copytree(run, longer)
    shutil.copytree(run, branch)
    run_world(train_body, 1, tiny_tree(data, longer, **stable, train__steps=6))
    run_world(train_body, 1, tiny_tree(data, branch, **decays, run__accept_changes=True))
    run_world(train_body, 1, tiny_tree(data, whole, **decays))
    assert metrics(branch) == metrics(whole)
    assert {step: record["lr"] for step, record in metrics(longer).items() if step > 2} == dict.fromkeys(
        range(3, 7), 1e-3
    )
    assert metrics(longer)[5]["head_loss"] == metrics(whole)[5]["head_loss"], "the same weights and data"
    assert metrics(longer)[6]["head_loss"] != metrics(whole)[6]["head_loss"], "control"


def test_a_new_learning_rate_is_the_one_that_moves_the_weights(data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_world(train_body, 2, tiny_tree(data, whole, **RUN))
    still = interrupted_copy(whole, tmp_path / "still", step=4)
    changes = {"optimizer__lr": 1e-12, "run__accept_changes": True}
    run_world(train_body, 2, tiny_tree(data, still, **RUN, **changes))
    before, after = (metrics(still, "valid")[step]["head_loss"] for step in (4, 6))
    assert after == pytest.approx(before, rel=1e-6)
    assert metrics(whole, "valid")[6]["head_loss"] != pytest.approx(before, rel=1e-3), "control"


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_under_deepspeed_too(stage: int, data: Path, tmp_path: Path) -> None:
    settings = {**RUN, "model__num_trunk_layers": 2, "train__eval_batches": 0}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_world(train_body, 2, deepspeed_tree(data, whole, zero(stage), **settings), timeout=TIMEOUT)
    interrupted_copy(whole, resumed, step=4)
    tree = deepspeed_tree(data, resumed, zero(stage), **{**settings, **CHANGED}, run__accept_changes=True)
    looks = run_world(train_and_look, 2, tree, timeout=TIMEOUT)
    for rates, decays, clipping, _ in looks:
        assert rates == {metrics(resumed)[6]["lr"]}
        assert decays == {0.0, 0.3}
        assert clipping == {0.25}
    assert metrics(resumed)[6]["lr"] == pytest.approx(RATES[1], rel=1e-12)
    assert metrics(resumed)[6]["lr"] != metrics(whole)[6]["lr"], "control"
    assert metrics(resumed)[5]["head_loss"][:2] == metrics(whole)[5]["head_loss"][:2]
