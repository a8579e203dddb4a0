"""Batch sizes by step: where a run is in its data, and what ``train.batch_size_schedule`` may and may not be.

Trainings: tests/distributed/test_batch_sizes.py; the samples that each rank reads: tests/unit/test_data_loader.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.deepspeed.refusals import refuse_unsupported
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.planning.estimate import Hardware, estimate
from mtp_megatron.planning.report import as_json, table
from mtp_megatron.training.architecture import model_description
from mtp_megatron.training.operations import StepOperations
from mtp_megatron.training.preflight import preflight
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe, overridden, parse_recipe
from mtp_megatron.training.run_folder import RunFolder, check_run_folder
from mtp_megatron.training.run_log import RunLog
from mtp_megatron.training.step import StepFigures
from mtp_megatron.training.validate import check_recipe, num_microbatches
from tests.training_runs import complete, metrics, tiny_tree

SIZES = BatchSizes(((1, 4), (3, 8), (5, 12)))
GROWING: dict[str, Any] = {
    "train__batch_size_schedule": [[1, 4], [3, 8], [5, 12]],
    "train__global_batch_size": 12,
}


def resolved(run: Path, data: Path = Path("data"), **settings: Any) -> Recipe:
    return parse_recipe(tiny_tree(data, run, **settings)).resolved(vocab_size=257)


# --- which step reads what ---


def test_by_hand() -> None:
    assert [SIZES.at(step) for step in range(1, 8)] == [4, 4, 8, 8, 12, 12, 12]
    assert [SIZES.samples(step) for step in range(7)] == [0, 4, 8, 16, 24, 36, 48]
    assert (SIZES.largest, SIZES.last) == (12, 12)
    assert BatchSizes(((1, 8), (2, 4))).largest == 8
    assert [SIZES.steps_within(samples) for samples in (0, 3, 4, 15, 16, 23, 24, 47, 48)] == [0, 0, 1, 2, 3, 3, 4, 5, 6]
    assert SIZES.until(2) == ((1, 4),)
    assert SIZES.until(3) == ((1, 4), (3, 8))
    assert SIZES.after(2) == ((3, 8), (5, 12))
    assert SIZES.after(3) == ((4, 8), (5, 12))
    assert SIZES.after(9) == ((10, 12),)
    assert BatchSizes(((1, 4), (2, 4), (3, 8))).until(9) == ((1, 4), (3, 8)), "the second entry changes nothing"
    assert str(BatchSizes(((1, 4),)).joined(2, SIZES)) == "[[1, 4], [3, 8], [5, 12]]"
    assert str(BatchSizes(((1, 8),)).joined(3, SIZES)) == "[[1, 8], [5, 12]]"


sizes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=5).map(
    lambda steps: BatchSizes(
        tuple((1 + sum(count for count, _ in steps[:number]), size) for number, (_, size) in enumerate(steps))
    )
)


@given(sizes, sizes, st.integers(0, 20))
def test_a_step_after_another(one: BatchSizes, other: BatchSizes, step: int) -> None:
    assert one.samples(step + 1) - one.samples(step) == one.at(step + 1)
    for rest in range(one.at(step + 1)):
        assert one.steps_within(one.samples(step) + rest) == step
    joined = one.joined(step, other)
    assert joined.samples(step) == one.samples(step)
    assert joined.until(step) == one.until(step)
    assert [joined.at(later) for later in range(step + 1, 30)] == [other.at(later) for later in range(step + 1, 30)]
    same = [one.at(before) for before in range(1, step + 1)] == [other.at(before) for before in range(1, step + 1)]
    assert (one.until(step) == other.until(step)) == same


# --- the setting ---


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([], "it has no entry"),
        ([[0, 4]], r"\[0, 4\] is no \[first step, sequences\]"),
        ([[2, 4]], "begins with step 2"),
        ([[1, 4], [3]], r"\[3\] is no"),
        ([[1, 4], [3, 8, 9]], r"\[3, 8, 9\] is no"),
        ([[1, 4], [3, 0]], r"\[3, 0\] is no"),
        ([[1, 4], [5, 8], [3, 12]], r"\[3, 12\] is no"),
        ([[1, 4], [1, 8]], r"\[1, 8\] is no"),
        ([1, 4], "list"),
        ([[1, 4.5]], "integer"),
        ("1:4 3:8", "list"),
    ],
)
def test_schedules_that_make_no_sense_are_refused_by_name(schedule: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_recipe({"train": {"batch_size_schedule": schedule}})
    assert caught.value.field.startswith("train.batch_size_schedule")
    assert caught.value.remedy


def test_it_is_read_from_a_command_line_and_null_is_one_size(tmp_path: Path) -> None:
    tree = overridden({}, ["train.batch_size_schedule=[[1, 4], [3, 8], [5, 12]]"])
    assert parse_recipe(tree).train.batch_sizes == SIZES
    assert parse_recipe({"train": {"global_batch_size": 6}}).train.batch_sizes == BatchSizes(((1, 6),))
    RunFolder(tmp_path).write_recipe(resolved(tmp_path, **GROWING))
    assert load_recipe(tmp_path / "recipe.yaml").train.batch_sizes == SIZES


INTERLEAVED = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}


@pytest.mark.parametrize(
    ("world", "settings", "says", "remedy"),
    [
        (1, {"train__global_batch_size": 8}, "ends with 12 sequences, and train.global_batch_size=8", "batch_size=12"),
        (8, {}, "from step 1 on a step takes 4 sequences, and 8 data parallel ranks", "multiple of 8"),
        (1, {"train__micro_batch_size": 3}, "from step 1 on a step takes 4 .*micro_batch_size=3", "multiple of 3"),
        (1, {"train__batch_size_schedule": [[1, 4], [3, 7], [5, 12]], "train__micro_batch_size": 2}, "step 3.* 7", "2"),
        (2, {**INTERLEAVED, "train__micro_batch_size": 4}, "step 1.* 1 microbatches, .* 2 at a time", "multiple of 8"),
        (
            2,
            {**INTERLEAVED, "train__batch_size_schedule": [[1, 4], [3, 6], [5, 12]], "train__micro_batch_size": 2},
            "from step 3 on a step takes 6 sequences, and 3 microbatches",
            "multiple of 4",
        ),
    ],
)
def test_every_size_must_suit_the_ranks(world: int, settings: dict[str, Any], says: str, remedy: str) -> None:
    recipe = parse_recipe(tiny_tree(Path("data"), Path("run"), **{**GROWING, **settings}))
    with pytest.raises(ConfigError, match=says) as caught:
        check_recipe(recipe, world_size=world, tokenizer_vocab_size=257)
    assert caught.value.field == "train.batch_size_schedule"
    assert remedy in caught.value.remedy


def test_sizes_of_steps_that_are_over_need_not() -> None:
    recipe = parse_recipe(tiny_tree(Path("data"), Path("run"), **GROWING, train__micro_batch_size=2))
    with pytest.raises(ConfigError, match="from step 4 on a step takes 8"):
        check_recipe(recipe, world_size=6, tokenizer_vocab_size=257, done=3)
    check_recipe(recipe, world_size=6, tokenizer_vocab_size=257, done=4)


def test_an_engine_of_deepspeed_is_refused() -> None:
    refuse_unsupported(resolved(Path("run")), {}, 1)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps") as caught:
        refuse_unsupported(resolved(Path("run"), **GROWING), {}, 1)
    assert caught.value.field == "train.batch_size_schedule"


# --- a run that is resumed ---


def stopped(run: Path, data: Path, step: int, **settings: Any) -> Recipe:
    """A run at ``step``, as much of it as the checks look at."""
    plan = preflight(parse_recipe(tiny_tree(data, run, **settings)), 1)
    RunFolder(run).write_recipe(plan.recipe)
    complete(run, step, plan.recipe, **model_description(plan.recipe, plan.data, step))
    return plan.recipe


def test_sizes_of_steps_to_come_may_change_where_that_is_said(data: Path, tmp_path: Path) -> None:
    stopped(tmp_path, data, 3, **GROWING)
    for schedule in ([[1, 4], [3, 8], [4, 16]], [[1, 4], [3, 8], [9, 12], [20, 16]], [[1, 4], [2, 4], [3, 8], [5, 16]]):
        changed = {"train__batch_size_schedule": schedule, "train__global_batch_size": 16}
        with pytest.raises(ConfigError, match=r"batch_size_schedule is .* there and .* here") as caught:
            check_run_folder(resolved(tmp_path, data, **changed))
        assert "run.accept_changes=true" in caught.value.remedy
        accepted = parse_recipe(tiny_tree(data, tmp_path, **changed, run__accept_changes=True))
        assert len(preflight(accepted, 1).changes) == 2


def test_the_same_sizes_written_otherwise_are_no_change(data: Path, tmp_path: Path) -> None:
    for name, there, here in (
        ("one", {}, {"train__batch_size_schedule": [[1, 4], [9, 4]]}),
        ("several", GROWING, {**GROWING, "train__batch_size_schedule": [[1, 4], [2, 4], [3, 8], [5, 12], [7, 12]]}),
    ):
        for number, (before, now) in enumerate(((there, here), (here, there))):
            run = tmp_path / f"{name}{number}"
            stopped(run, data, 3, **before)
            assert preflight(parse_recipe(tiny_tree(data, run, **now)), 1).changes == ()


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    ("settings", "field", "advice"),
    [
        ({"train__global_batch_size": 16}, "batch_size_schedule", None),  # the same schedule, which ends otherwise
        (
            {"train__batch_size_schedule": None, "train__global_batch_size": 16},
            "global_batch_size",
            "[[1, 4], [3, 8], [4, 16]]",
        ),
        ({"train__batch_size_schedule": [[1, 4], [4, 8], [5, 12]]}, "batch_size_schedule", "[[1, 4], [3, 8], [5, 12]]"),
        (
            {"train__batch_size_schedule": [[1, 4], [2, 8], [3, 12], [9, 6]], "train__global_batch_size": 6},
            "batch_size_schedule",
            "[[1, 4], [3, 8], [4, 12], [9, 6]]",
        ),
    ],
)
def test_what_would_alter_the_steps_so_far_is_refused_by_name(
    flag: bool, settings: dict[str, Any], field: str, advice: str | None, data: Path, tmp_path: Path
) -> None:
    """The advice works."""
    stopped(tmp_path, data, 3, **GROWING)
    tree = tiny_tree(data, tmp_path, **{**GROWING, **settings}, run__accept_changes=flag)
    with pytest.raises(ConfigError) as caught:
        preflight(parse_recipe(tree), 1)
    assert caught.value.field == f"train.{field}"
    if advice is None:
        return
    assert "is at step 3, and its steps took [[1, 4], [3, 8]]" in caught.value.problem
    told = re.search(
        r"Set (train\.batch\S+='(.*)') (train\.global\S+)( run\.accept_changes=true)? to", str(caught.value)
    )
    assert told is not None
    assert told[2] == advice
    assert (told[4] is None) == flag
    overrides = [told[1].replace("'", ""), told[3], "run.accept_changes=true"]
    preflight(parse_recipe(overridden(tree, overrides)), 1)


@pytest.mark.parametrize("flag", [False, True])
def test_under_deepspeed_nobody_is_advised_to_take_a_schedule(flag: bool, data: Path, tmp_path: Path) -> None:
    """Its engine follows none; and the size may be the configuration's."""
    config, run = tmp_path / "ds.json", tmp_path / "run"
    config.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 1}}')
    stopped(run, data, 3)
    tree = tiny_tree(data, run, run__deepspeed=str(config), run__accept_changes=flag)
    del tree["train"]["global_batch_size"]
    with pytest.raises(ConfigError, match=r"is at step 3, and its steps took \[\[1, 4\]\]") as caught:
        preflight(parse_recipe(tree), 1)
    assert caught.value.field == "train.global_batch_size"
    assert "Set it to 4, also by what" in caught.value.remedy
    assert "batch_size_schedule" not in caught.value.remedy
    config.write_text('{"train_batch_size": 4, "zero_optimization": {"stage": 1}}')
    with pytest.raises(CheckpointError, match="asks for the other"):  # the size is right now
        preflight(parse_recipe(tree), 1)


def test_a_run_recorded_before_there_were_schedules_goes_on_and_takes_one(data: Path, tmp_path: Path) -> None:
    stopped(tmp_path, data, 5)
    recorded = RunFolder(tmp_path).recipe
    tree = yaml.safe_load(recorded.read_text())
    del tree["train"]["batch_size_schedule"]
    recorded.write_text(yaml.safe_dump(tree))
    assert preflight(parse_recipe(tiny_tree(data, tmp_path)), 1).changes == ()
    grows = {"train__batch_size_schedule": [[1, 4], [6, 8]], "train__global_batch_size": 8, "run__accept_changes": True}
    assert len(preflight(parse_recipe(tiny_tree(data, tmp_path, **grows)), 1).changes) == 2
    grows["train__batch_size_schedule"] = [[1, 4], [5, 8]]
    with pytest.raises(
        ConfigError, match=r"batch_size_schedule='\[\[1, 4\], \[6, 8\]\]' train\.global_batch_size=8 to"
    ):
        preflight(parse_recipe(tiny_tree(data, tmp_path, **grows)), 1)


def test_a_run_without_a_checkpoint_has_no_past(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_recipe(resolved(tmp_path))
    check_run_folder(resolved(tmp_path, **GROWING, run__accept_changes=True))


def test_another_run_is_called_so_whatever_its_sizes(data: Path, tmp_path: Path) -> None:
    stopped(tmp_path, data, 3)
    with pytest.raises(ConfigError, match="it holds another run") as caught:
        check_run_folder(resolved(tmp_path, data, **GROWING, heads__n=2))
    assert caught.value.field == "run.path"


def test_a_checkpoint_elsewhere_in_the_data_is_refused(data: Path, tmp_path: Path) -> None:
    """Where somebody edited the run's recipe.yaml, say."""
    stopped(tmp_path, data, 3, **GROWING)
    other = {**GROWING, "train__batch_size_schedule": [[1, 4], [3, 12]]}
    RunFolder(tmp_path).write_recipe(resolved(tmp_path, data, **other))
    with pytest.raises(
        CheckpointError, match=r"iter_0000003: saved when 16 sequences were used, .* 3 steps .* took 20"
    ):
        preflight(parse_recipe(tiny_tree(data, tmp_path, **other)), 1)


def test_more_ranks_than_the_first_steps_had_sequences(data: Path, tmp_path: Path) -> None:
    settings = {**GROWING, "train__batch_size_schedule": [[1, 4], [3, 12]]}
    with pytest.raises(ConfigError, match="from step 1 on a step takes 4 sequences, and 6"):
        preflight(parse_recipe(tiny_tree(data, tmp_path, **settings)), 6)
    stopped(tmp_path, data, 2, **settings)
    preflight(parse_recipe(tiny_tree(data, tmp_path, **settings)), 6)


# --- what is counted ---


def test_the_log_counts_what_each_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = resolved(tmp_path, **GROWING, train__log_interval=2, run__tensorboard=True)
    clock = iter([100.0, 102.0, 104.0, 108.0])
    monkeypatch.setattr("mtp_megatron.training.run_log.time.perf_counter", lambda: next(clock))
    folder = RunFolder(tmp_path / "run")
    with RunLog(folder, recipe, start_step=0, world_size=2, enabled=True) as log:
        for step in (1, 2, 5, 6, 7, 8):
            if step == 5:
                log.passed_over(4, 2)
            log.step(step, StepFigures(1.0, [1.0] * 3, [0.5] * 3, tokens=1, grad_norm=1.0, lr=0.1))
    monkeypatch.undo()
    records = metrics(folder.path)
    assert {step: (record["tokens"], record["batch_size"]) for step, record in records.items()} == {
        2: (8 * 32, 4),
        6: (48 * 32, 12),
        8: (72 * 32, 12),
    }
    said = capsys.readouterr().err
    speeds = re.findall(r"(\d+) tokens/s  (\S+) TFLOP/s", said)
    assert [int(tokens) for tokens, _ in speeds] == [8 * 32 // 2, 24 * 32 // 2, 24 * 32 // 4], "not what is passed over"
    a_sequence = StepOperations(recipe)((1, 1, 1), 1)
    assert StepOperations(recipe)((1, 1, 1)) == 12 * a_sequence
    expected = [sequences * a_sequence / seconds / 2 / 1e12 for sequences, seconds in ((8, 2), (24, 2), (24, 4))]
    assert [float(tflops) for _, tflops in speeds] == pytest.approx(expected, rel=5e-3)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/batch_size")] == [(2, 4), (6, 12), (8, 12)]


def test_a_plan_is_that_of_the_largest_size_and_says_so() -> None:
    falls = {"train__batch_size_schedule": [[1, 4], [3, 12], [5, 8]], "train__global_batch_size": 8}
    recipe, largest = (
        check_recipe(
            parse_recipe(tiny_tree(Path("data"), Path("run"), **settings)), world_size=2, tokenizer_vocab_size=257
        )
        for settings in (falls, {"train__global_batch_size": 12})
    )
    assert (num_microbatches(recipe, 2), num_microbatches(recipe, 2, 4)) == (6, 2)
    hardware = Hardware()
    plan = estimate(recipe, 2, hardware)
    assert plan == estimate(largest, 2, hardware)
    said = "steps of 12 sequences, the largest of train.batch_size_schedule"
    assert said in table(recipe, 2, hardware, plan, None)
    assert said in as_json(recipe, 2, hardware, plan, None)["remarks"]
    for plain in (table(largest, 2, hardware, plan, None), *as_json(largest, 2, hardware, plan, None)["remarks"]):
        assert "batch_size_schedule" not in plain
