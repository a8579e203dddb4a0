"""Learning rate schedules: rates worked out by hand, what is refused, and runs that are resumed with another decay.

Not covered here: trainings (tests/distributed/test_accept_changes.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.build import build_scheduler, learning_rate_at
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder, check_run_folder
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import tiny_tree

# lr 0.8, min_lr 0.2, 2 steps of warm-up, and a decay over steps 7 to 10: r is 1/4, 2/4, 3/4, 1.
WSD = {"schedule": "wsd", "lr": 0.8, "min_lr": 0.2, "warmup_steps": 2, "wsd_decay_steps": 4}
RISE_AND_STAY = [0.4, 0.8, 0.8, 0.8, 0.8, 0.8]


def checked(tmp_path: Path, steps: int = 10, optimizer: dict[str, Any] | None = None, **overrides: Any) -> Recipe:
    tree = tiny_tree(Path("data"), tmp_path, train__steps=steps, **overrides)
    tree["optimizer"] = optimizer or WSD
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=257)


def scheduler(recipe: Recipe) -> Any:
    return build_scheduler(recipe.optimizer, SimpleNamespace(param_groups=[{}]))


def rates(recipe: Recipe, steps: int = 12) -> list[float]:
    """What steps 1, 2, ... train at: as :mod:`mtp_megatron.training.step` steps the schedule."""
    schedule, found = scheduler(recipe), []
    for _ in range(steps):
        schedule.step(increment=1)
        found.append(schedule.get_lr({}))
        assert schedule.optimizer.param_groups[0]["lr"] == found[-1]
    return found


@pytest.mark.parametrize(
    ("style", "decay"),
    [
        ("linear", [0.65, 0.5, 0.35, 0.2]),
        ("cosine", [0.2 + 0.3 * (1 + math.sqrt(0.5)), 0.5, 0.2 + 0.3 * (1 - math.sqrt(0.5)), 0.2]),
        ("minus_sqrt", [0.5, 0.8 - 0.6 * math.sqrt(0.5), 0.8 - 0.6 * math.sqrt(0.75), 0.2]),
        ("exponential", [0.2 + 0.6 * (2 * 0.5**r - 1) for r in (0.25, 0.5, 0.75, 1.0)]),
        (None, [0.2 + 0.6 * (2 * 0.5**r - 1) for r in (0.25, 0.5, 0.75, 1.0)]),
    ],
)
def test_rates_of_wsd_by_hand(style: str | None, decay: list[float], tmp_path: Path) -> None:
    """min_lr is reached in the last step of the decay, and stays."""
    recipe = checked(tmp_path, optimizer={**WSD, "wsd_decay_style": style})
    assert rates(recipe) == pytest.approx([*RISE_AND_STAY, *decay, 0.2, 0.2], rel=1e-12)


def test_a_stable_phase_without_an_end_stays_however_long_it_is(tmp_path: Path) -> None:
    recipe = checked(tmp_path, optimizer={**WSD, "wsd_decay_steps": 0})
    assert recipe.optimizer.decay_steps is None
    assert rates(recipe, 40) == [0.4, *[0.8] * 39]
    # Nor does a run that ends within its warm-up, for now, stand in the way.
    short = checked(tmp_path, steps=3, optimizer={**WSD, "wsd_decay_steps": 0, "warmup_steps": 4})
    assert rates(short, 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-12)


def test_rates_of_the_inverse_square_root_by_hand(tmp_path: Path) -> None:
    """As upstream has it: a floor of min_lr, and min_lr itself after decay_steps."""
    peak = {"lr": 0.8, "min_lr": 0.4, "schedule": "inverse-square-root", "warmup_steps": 2}
    expected = [0.4, 0.8, 0.8 * math.sqrt(2 / 3), 0.8 * math.sqrt(2 / 4), 0.8 * math.sqrt(2 / 5)]
    expected += [0.8 * math.sqrt(2 / 6), 0.8 * math.sqrt(2 / 7), 0.4, 0.4, 0.4]
    assert rates(checked(tmp_path, optimizer=peak), 10) == pytest.approx(expected, rel=1e-12)
    assert rates(checked(tmp_path, optimizer={**peak, "decay_steps": 4}), 5)[-1] == 0.4


@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("decay", [{"wsd_decay_steps": 4}, {"wsd_decay_steps": 4, "decay_steps": 20}])
def test_a_decay_that_is_set_when_the_run_is_resumed_is_the_one_from_the_start(
    at: int, decay: dict[str, Any], tmp_path: Path
) -> None:
    """What a checkpoint brings is the place in the schedule alone."""
    before = scheduler(checked(tmp_path, steps=at, optimizer={**WSD, "wsd_decay_steps": 0}))
    before.step(increment=at)
    recipe = checked(tmp_path, optimizer={**WSD, **decay})
    resumed = scheduler(recipe)
    resumed.load_state_dict(before.state_dict())
    assert learning_rate_at(resumed, at + 1) == rates(recipe)[at]
    assert resumed.num_steps == at
    for step in range(at, 12):
        resumed.step(increment=1)
        assert resumed.get_lr({}) == rates(recipe)[step]


@pytest.mark.parametrize(
    ("field", "says", "remedy", "optimizer"),
    [
        ("wsd_decay_steps", "does not say how long", "or to 0", {"wsd_decay_steps": None}),
        ("wsd_decay_steps", "up to step 10 .* begin before the warm-up is over", "at most 8", {"wsd_decay_steps": 9}),
        ("wsd_decay_steps", "up to step 5 ", "at most 3", {"wsd_decay_steps": 4, "decay_steps": 5}),
        ("wsd_decay_steps", "schedule=cosine has no such decay", "schedule=wsd", {"schedule": "cosine"}),
        (
            "wsd_decay_style",
            "schedule=linear has no such decay",
            "schedule=wsd",
            {"schedule": "linear", "wsd_decay_steps": None, "wsd_decay_style": "linear"},
        ),
        ("decay_steps", "no decay that could end", "Leave it out", {"wsd_decay_steps": 0, "decay_steps": 10}),
        ("wsd_decay_steps", None, ">= 0", {"wsd_decay_steps": -1}),
        ("wsd_decay_style", None, "minus_sqrt", {"wsd_decay_style": "sqrt"}),
        ("schedule", None, "wsd", {"schedule": "WSD"}),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    field: str, says: str | None, remedy: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        checked(tmp_path, optimizer={**WSD, **optimizer})
    assert caught.value.field == f"optimizer.{field}"
    assert remedy in caught.value.remedy


def test_a_decay_that_begins_with_the_warm_ups_end_is_none_too_long(tmp_path: Path) -> None:
    recipe = checked(tmp_path, optimizer={**WSD, "wsd_decay_steps": 8, "wsd_decay_style": "linear"})
    assert rates(recipe, 3) == pytest.approx([0.4, 0.8, 0.8 - 0.6 / 8], rel=1e-12)


def test_a_stable_phase_is_made_longer_without_a_flag_and_its_decay_with_one(tmp_path: Path) -> None:
    stable = {**WSD, "wsd_decay_steps": 0}
    RunFolder(tmp_path).write_recipe(checked(tmp_path, optimizer=stable))
    assert check_run_folder(checked(tmp_path, steps=50, optimizer=stable))[1] == {}
    with pytest.raises(ConfigError, match="wsd_decay_steps is 0 there and 4 here") as caught:
        check_run_folder(checked(tmp_path, steps=50))
    assert "run.accept_changes=true" in caught.value.remedy
    assert "decay_steps=None" not in caught.value.remedy
    decays = checked(tmp_path, steps=50, run__accept_changes=True)
    assert check_run_folder(decays)[1].keys() == {"optimizer.wsd_decay_steps", "optimizer.decay_steps"}
    RunFolder(tmp_path).write_recipe(decays)
    assert check_run_folder(checked(tmp_path, steps=50))[1] == {}, "recorded"
    later = checked(tmp_path, steps=80, run__accept_changes=True)  # its end moves with train.steps
    assert check_run_folder(later)[1].keys() == {"optimizer.decay_steps"}


def test_a_run_of_another_schedule_may_begin_to_decay(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_recipe(checked(tmp_path, optimizer={"schedule": "constant"}))
    changed = checked(tmp_path, optimizer={"schedule": "wsd", "wsd_decay_steps": 4}, run__accept_changes=True)
    assert check_run_folder(changed)[1].keys() == {
        f"optimizer.{key}" for key in ("schedule", "wsd_decay_steps", "wsd_decay_style")
    }


def test_a_run_that_was_recorded_before_there_was_such_a_decay_is_resumed(tmp_path: Path) -> None:
    cosine = {"schedule": "cosine", "warmup_steps": 2}
    folder = RunFolder(tmp_path)
    folder.write_recipe(checked(tmp_path, optimizer=cosine))
    tree = yaml.safe_load(folder.recipe.read_text())
    for key in ("wsd_decay_steps", "wsd_decay_style"):
        del tree["optimizer"][key]
    folder.recipe.write_text(yaml.safe_dump(tree))
    assert check_run_folder(checked(tmp_path, optimizer=cosine))[1] == {}
