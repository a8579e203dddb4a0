"""Whole training runs in gloo worlds: layouts agree, resuming is exact, checkpoints survive.

Not covered here: GPUs, several nodes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.adam_runs import train_with_fused_adam
from tests.harness import run_world
from tests.training_runs import (
    assert_trained_on_scarce_targets,
    interrupted_copy,
    largest_difference,
    metrics,
    tiny_tree,
    train_body,
    train_in_small_buckets,
    train_on_scarce_targets,
)

STEPS = 10  # of the runs that layouts are compared by: what a wrong gradient does is seen from the second on
TP2_PP2 = {"parallel__tensor": 2, "parallel__pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2xPP2": (4, TP2_PP2),
    "TP2xPP2, sequence parallel, distributed optimizer": (
        4,
        {**TP2_PP2, "parallel__sequence_parallel": True, "optimizer__distributed": True},
    ),
    "TP2xDP2, distributed optimizer, overlapped": (
        4,
        {
            "parallel__tensor": 2,
            "optimizer__distributed": True,
            "optimizer__overlap_grad_reduce": True,
            "optimizer__overlap_param_gather": True,
        },
    ),
    "PP2 with the heads alone on the last stage": (2, {"parallel__pipeline": 2, "parallel__layout": "Etttt|L"}),
    "TP2, the trunk recomputed": (2, {"parallel__tensor": 2, "train__recompute": "full"}),
    "TP2, attention recomputed, all heads at once": (
        2,
        {"parallel__tensor": 2, "train__recompute": "selective", "heads__execution": "joint"},
    ),
    "PP2 interleaved": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "CP2xTP2": (4, {"parallel__context": 2, "parallel__tensor": 2}),
    "PP2xDP2": (4, {"parallel__pipeline": 2}),
}


@pytest.fixture(scope="module")
def seedling(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose weights the others start from."""
    run = tmp_path_factory.mktemp("runs") / "seedling"
    run_world(train_body, 1, tiny_tree(data, run, train__steps=1, optimizer__warmup_steps=0))
    return run


@pytest.fixture(scope="module")
def single(data: Path, seedling: Path) -> Path:
    """What every layout must reproduce, on one process."""
    run = seedling.parent / "single"
    steps = {"train__steps": STEPS, "train__save_interval": STEPS // 2}
    run_world(train_body, 1, tiny_tree(data, run, run__load=str(seedling), **steps))
    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_like_one_process(name: str, data: Path, seedling: Path, single: Path, tmp_path: Path) -> None:
    world, settings = LAYOUTS[name]
    run = tmp_path / "run"
    once = {"train__steps": STEPS, "train__save_interval": 0}  # saved at the end: earlier saves are others' to test
    tree = tiny_tree(data, run, run__load=str(seedling), **once, **settings)
    assert run_world(train_body, world, tree) == [STEPS] * world
    assert largest_difference(metrics(run), metrics(single)) < 1e-5
    for step, record in metrics(run).items():
        assert record["grad_norm"] == pytest.approx(metrics(single)[step]["grad_norm"], rel=1e-4)
        assert record["lr"] == metrics(single)[step]["lr"]
    assert largest_difference(metrics(run, "valid"), metrics(single, "valid")) < 1e-5
    last = metrics(run, "valid")[STEPS]
    assert last["tokens_per_forward"] == pytest.approx(metrics(single, "valid")[STEPS]["tokens_per_forward"], abs=0.02)


def test_the_comparison_of_layouts_can_fail(data: Path, seedling: Path, single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    once = {"train__steps": STEPS, "train__save_interval": 0, "train__eval_batches": 0}
    run_world(train_body, 1, tiny_tree(data, run, run__load=str(seedling), data__seed=99, **once))
    assert largest_difference(metrics(run), metrics(single)) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"optimizer__distributed": True}, {"model__hidden_dropout": 0.1}], ids=str)
def test_resuming_at_the_same_layout_changes_nothing(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    settings = {**TP2_PP2, **settings}
    run_world(train_body, 4, tiny_tree(data, whole, **settings))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    run_world(train_body, 4, tiny_tree(data, resumed, **settings))
    assert metrics(resumed) == metrics(whole)
    assert metrics(resumed, "valid") == metrics(whole, "valid")


@pytest.mark.parametrize("distributed", [False, True])
def test_resuming_at_other_layouts_goes_on_alike(distributed: bool, data: Path, seedling: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    common = {"optimizer__distributed": distributed, "run__load": str(seedling)}
    run_world(train_body, 4, tiny_tree(data, whole, **TP2_PP2, **common))
    for number, (world, layout) in enumerate(
        [(1, {}), (2, {"parallel__tensor": 2}), (2, {"parallel__pipeline": 2}), (4, {"parallel__tensor": 2})]
    ):
        resumed = interrupted_copy(whole, tmp_path / f"resumed{number}", step=4)
        run_world(train_body, world, tiny_tree(data, resumed, **layout, **common))
        assert largest_difference(metrics(resumed), metrics(whole)) < 1e-5, layout


def resumes_without(rank: int, world_size: int, tree: dict[str, Any], what: str) -> None:
    """Resume, but forget one part of the checkpoint."""
    from megatron.core.optimizer import ChainedOptimizer

    from mtp_megatron.training import checkpointing

    load_optimizer, load_generators = ChainedOptimizer.load_state_dict, checkpointing.restore_rng_state

    def load_and_forget(self: Any, state: Any) -> None:
        load_optimizer(self, state)
        self.optimizer.state.clear()  # Adam starts anew

    try:
        if what == "optimizer":
            ChainedOptimizer.load_state_dict = load_and_forget
        else:
            checkpointing.restore_rng_state = lambda state: None
        train_body(rank, world_size, tree)
    finally:
        ChainedOptimizer.load_state_dict, checkpointing.restore_rng_state = load_optimizer, load_generators


@pytest.mark.parametrize("what", ["optimizer", "generators"])
def test_a_part_that_is_not_restored_would_be_noticed(what: str, data: Path, tmp_path: Path) -> None:
    """Control of the tests above."""
    whole = tmp_path / "whole"
    run_world(train_body, 1, tiny_tree(data, whole, model__hidden_dropout=0.1, train__eval_batches=0))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    tree = tiny_tree(data, resumed, model__hidden_dropout=0.1, train__eval_batches=0)
    run_world(resumes_without, 1, tree, what)
    assert largest_difference(metrics(resumed), metrics(whole)) > 1e-5


def dies_while_saving(rank: int, world_size: int, tree: dict[str, Any], step: int) -> None:
    """Train; the process dies inside the save of ``step``, after the shards and before the rest."""
    from mtp_megatron.training import checkpoint_files

    publish = checkpoint_files.publish

    def dying_publish(checkpoints: Path, at: int) -> Path:
        if at == step:
            os._exit(9)
        return publish(checkpoints, at)

    checkpoint_files.publish = dying_publish
    train_body(rank, world_size, tree)


def test_a_crash_in_the_middle_of_a_save_leaves_the_previous_checkpoint(
    data: Path, seedling: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    tree = tiny_tree(data, run, run__load=str(seedling))
    with pytest.raises(RuntimeError, match="rank 0"):
        run_world(dies_while_saving, 1, tree, 8, fresh=True)
    names = {entry.name for entry in (run / "checkpoints").iterdir()}
    assert names == {"iter_0000004", "iter_0000008.tmp", "latest_checkpointed_iteration.txt"}
    assert run_world(train_body, 1, tree) == [8]
    assert not (run / "checkpoints" / "iter_0000008.tmp").exists()
    run_world(train_body, 1, tiny_tree(data, whole, run__load=str(seedling)))
    assert metrics(run) == metrics(whole)


def cannot_save(rank: int, world_size: int, tree: dict[str, Any], step: int) -> list[str]:
    """Train; the disk is full in the save of ``step``. What the run said."""
    from mtp_megatron.training import checkpoint_files
    from mtp_megatron.training.run_log import RunLog

    said: list[str] = []
    publish = checkpoint_files.publish

    def on_a_full_disk(checkpoints: Path, at: int) -> Path:
        if at == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(checkpoints, at)

    with (
        mock.patch.object(checkpoint_files, "publish", on_a_full_disk),
        mock.patch.object(RunLog, "message", lambda self, text: said.append(text)),
        pytest.raises(OSError, match="No space left"),
    ):
        train_body(rank, world_size, tree)
    return said


def test_a_save_that_fails_says_what_is_left(data: Path, tmp_path: Path) -> None:
    """Of a full disk torch says no more than ``unexpected pos 64 vs 0``."""
    run = tmp_path / "run"
    (said,) = run_world(cannot_save, 1, tiny_tree(data, run, run__keep_last=1), 8)
    complaint = r"step 8 could not be saved \(OSError: \[Errno 28\] No space left on device\); \d+\.\d GB are free in "
    assert re.match(complaint, said[-1])
    assert "the same command continues from the latest" in said[-1]
    left = {entry.name for entry in (run / "checkpoints").iterdir()}
    assert left == {"iter_0000004", "latest_checkpointed_iteration.txt"}, "the disk would stay full"
    assert run_world(says_on_the_way, 1, tiny_tree(data, run, run__keep_last=1))[0][0] == 8
    assert [entry.name for entry in (run / "checkpoints").glob("iter_*")] == ["iter_0000008"]


def test_a_truncated_checkpoint_is_passed_over(data: Path, single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(single, run)
    shard = run / "checkpoints" / f"iter_{STEPS:07d}" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    tree = tiny_tree(data, run, train__steps=STEPS, train__save_interval=STEPS // 2)
    assert run_world(train_body, 1, tree) == [STEPS]
    assert metrics(run) == metrics(single)


def resumes_with(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    from mtp_megatron.errors import MTPError

    try:
        train_body(rank, world_size, tree)
    except MTPError as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_old_checkpoints_are_pruned(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep = {"run__keep_last": 1, "run__keep_every": 4, "train__save_interval": 2, "train__eval_batches": 0}
    run_world(train_body, 1, tiny_tree(data, run, **keep))
    names = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert names == ["iter_0000004", "iter_0000006", "iter_0000008", "latest_checkpointed_iteration.txt"]


def test_a_checkpoint_of_another_architecture_is_refused_by_field(data: Path, single: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", run__load=str(single), model__ffn_hidden_size=128, heads__kind="linear")
    (said,) = run_world(resumes_with, 1, tree)
    assert said.startswith("CheckpointError")
    assert "model.ffn_hidden_size is 64 there and 128 here" in said
    assert "heads.kind is 'transformer' there and 'linear' here" in said


def diverges(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    """Train with a head that turns NaN in step 6."""
    from mtp_megatron.training import loop
    from mtp_megatron.training.build import Trainable

    train_step = loop.train_step

    def poisoned_step(recipe: Any, trainable: Trainable, *args: Any, **kwargs: Any) -> Any:
        if trainable.scheduler.num_steps == 5:
            for model in trainable.models:
                if model.post_process:
                    next(model.heads[1].parameters()).data.fill_(float("nan"))
        return train_step(recipe, trainable, *args, **kwargs)

    loop.train_step = poisoned_step
    try:
        return resumes_with(rank, world_size, tree)
    finally:
        loop.train_step = train_step


def test_a_nan_ends_the_run_on_every_rank_and_names_step_head_and_checkpoint(data: Path, tmp_path: Path) -> None:
    said = run_world(diverges, 4, tiny_tree(data, tmp_path / "run", **TP2_PP2))
    assert len(set(said)) == 1
    assert said[0].startswith("TrainingDiverged: step 6: the loss of head 2 is nan")
    assert "iter_0000004" in said[0]


def says_on_the_way(rank: int, world_size: int, tree: dict[str, Any]) -> tuple[int, list[str]]:
    """Train; what the run told the person who watches."""
    from mtp_megatron.training.run_log import RunLog

    said: list[str] = []
    message, RunLog.message = RunLog.message, lambda self, text: said.append(text)
    try:
        return train_body(rank, world_size, tree), said
    finally:
        RunLog.message = message


def says_until_stopped(rank: int, world_size: int, tree: dict[str, Any], step: int) -> tuple[int, list[str]]:
    """Train until the step in which a signal comes; what the run told."""
    from mtp_megatron.training import loop

    train_step = loop.train_step

    def signalled(recipe: Any, trainable: Any, iterators: Any, microbatches: int, stop: bool, **kwargs: Any) -> Any:
        asked = stop or trainable.scheduler.num_steps == step - 1
        return train_step(recipe, trainable, iterators, microbatches, asked, **kwargs)

    with mock.patch.object(loop, "train_step", signalled):
        return says_on_the_way(rank, world_size, tree)


def test_a_finished_run_says_how_to_go_on_and_that_works(data: Path, tmp_path: Path) -> None:
    settings = {"train__steps": 4, "train__eval_batches": 0}
    run_world(train_body, 1, tiny_tree(data, tmp_path / "run", **settings))
    ((step, said),) = run_world(says_on_the_way, 1, tiny_tree(data, tmp_path / "run", **settings))
    advice = re.search(r"was the last one: set train\.steps higher and optimizer\.decay_steps=(\d+)", "\n".join(said))
    assert step == 4
    assert advice is not None
    longer = {**settings, "train__steps": 6, "optimizer__decay_steps": int(advice[1])}
    assert run_world(train_body, 1, tiny_tree(data, tmp_path / "run", **longer)) == [6]
    assert metrics(tmp_path / "run")[6]["lr"] == metrics(tmp_path / "run")[4]["lr"], "the schedule had ended"


def test_every_save_is_said_and_a_request_to_stop_saves_without_an_evaluation(data: Path, tmp_path: Path) -> None:
    """Both are due after steps 2 and 4."""
    tree = tiny_tree(data, tmp_path / "run", train__eval_interval=2, train__save_interval=2)
    ((step, said),) = run_world(says_until_stopped, 1, tree, 4)
    assert step == 4
    assert list(metrics(tmp_path / "run", "valid")) == [2]
    saved = [line for line in said if line.startswith("saved ")]
    assert [line.split(" in ")[0] for line in saved] == [f"saved checkpoints/iter_000000{step}" for step in (2, 4)]
    assert all(re.fullmatch(r"\d+\.\d s", line.split(" in ")[1]) for line in saved)
    assert said[-1].startswith("asked to stop: saved step 4 of 8")


@pytest.mark.parametrize("stages", [1, 2])
def test_a_run_beyond_its_last_step_says_so_and_does_nothing(stages: int, data: Path, tmp_path: Path) -> None:
    settings = {"parallel__pipeline": stages, "optimizer__decay_steps": 4, "train__save_interval": 0}
    run_world(train_body, stages, tiny_tree(data, tmp_path / "run", train__steps=4, **settings))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    results = run_world(says_on_the_way, stages, tiny_tree(data, tmp_path / "run", train__steps=2, **settings))
    assert [step for step, _ in results] == [4] * stages
    assert (
        "the run is at step 4, beyond train.steps=2, so nothing is trained: set train.steps higher" in results[0][1][-1]
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("layout", ["|", "Ettttm|mmL"], ids=["data parallel", "heads on two stages"])
def test_heads_without_a_target_in_a_global_batch_do_not_end_the_run(layout: str, data: Path, tmp_path: Path) -> None:
    """Documents shorter than n: at any step the later heads, or all, may have nothing to predict."""
    pipeline = {} if layout == "|" else {"parallel__pipeline": 2, "parallel__layout": layout}
    tree = tiny_tree(data, tmp_path / "run", train__steps=3, train__eval_batches=0, train__save_interval=0, **pipeline)
    assert run_world(train_on_scarce_targets, 2, tree, 4 if pipeline else 2) == [3, 3]
    assert_trained_on_scarce_targets(tmp_path / "run")


def test_a_curriculum_keeps_late_heads_out_and_resumes_in_its_place(data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    settings = {**TP2_PP2, "heads__curriculum_steps": 6}
    run_world(train_body, 4, tiny_tree(data, whole, **settings))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    run_world(train_body, 4, tiny_tree(data, resumed, **settings))
    assert metrics(resumed) == metrics(whole)
    first = metrics(whole)[1]
    assert first["loss"] == pytest.approx(first["head_loss"][0], rel=1e-6)


@pytest.mark.parametrize("trainable", ["heads", "new_heads"])
def test_frozen_trunks_train_and_resume(trainable: str, data: Path, seedling: Path, tmp_path: Path) -> None:
    """The first stage has nothing to train there."""
    whole, single = tmp_path / "whole", tmp_path / "single"
    common = {"heads__trainable": trainable, "run__load": str(seedling)}
    run_world(train_body, 2, tiny_tree(data, whole, parallel__pipeline=2, **common))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    run_world(train_body, 2, tiny_tree(data, resumed, parallel__pipeline=2, **common))
    assert metrics(resumed) == metrics(whole)
    run_world(train_body, 1, tiny_tree(data, single, **common))
    assert largest_difference(metrics(whole), metrics(single)) < 1e-5


@pytest.mark.parametrize(
    "idle",
    [
        {"heads__curriculum_steps": 6},
        {"heads__loss_weights": [1.0, 0.5, 0.0]},
        {"heads__loss_weights": [1.0, 0.5, 0.0], "heads__unembedding": "replicated"},
        {"heads__loss_weights": [1.0, 0.5, 0.0], "heads__kind": "medusa"},
        {"heads__loss_weights": [1.0, 0.5, 0.0], "heads__arrangement": "causal"},
    ],
    ids=str,
)
def test_idle_heads_where_parameters_are_gathered_late(idle: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Each in buckets of its own, for which no forward pass waits."""
    overlapped = {f"optimizer__{name}": True for name in ("distributed", "overlap_grad_reduce", "overlap_param_gather")}
    plain, late = tmp_path / "plain", tmp_path / "late"
    run_world(train_body, 2, tiny_tree(data, plain, **idle))
    run_world(train_in_small_buckets, 2, tiny_tree(data, late, **overlapped, **idle))
    expected = metrics(plain)
    assert any(None in record["head_loss"] for record in expected.values()), "control: there are idle heads"
    for step, record in metrics(late).items():
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(expected[step][key], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train", [train_body, train_with_fused_adam], ids=["torch's Adam", "a fused one"])
def test_frozen_trunks_resume_again_and_again(
    train: Callable[..., int], precision: str, data: Path, seedling: Path, tmp_path: Path
) -> None:
    """Rank 0 writes for all, and its optimizer has neither parameters nor steps."""
    common = {"heads__trainable": "heads", "run__load": str(seedling), "train__precision": precision}
    common |= {"train__steps": 6, "train__save_interval": 2}
    whole, stages = tmp_path / "whole", {"parallel__pipeline": 2}
    run_world(train, 2, tiny_tree(data, whole, **stages, **common))
    once = interrupted_copy(whole, tmp_path / "once", step=2)
    run_world(train, 2, tiny_tree(data, once, **stages, **common))
    assert metrics(once) == metrics(whole)
    for name, layout in (("twice", stages), ("one stage", {})):
        twice = interrupted_copy(once, tmp_path / name, step=4)
        run_world(train, len(layout) + 1, tiny_tree(data, twice, **layout, **common))
        assert largest_difference(metrics(twice), metrics(whole)) < (1e-5 if layout != stages else 1e-12)


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_trains_with_fp32_masters_and_resumes(distributed: bool, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**TP2_PP2, "train__precision": "bf16", "optimizer__distributed": distributed, "train__steps": 20}
    tree = tiny_tree(data, run, train__save_interval=16, **settings)
    run_world(train_body, 4, tree)
    losses = [record["loss"] for record in metrics(run).values()]
    assert losses[-1] < losses[0] - 0.5
    resumed = interrupted_copy(run, tmp_path / "resumed", step=16)
    tree["run"]["path"] = str(resumed)
    run_world(train_body, 4, tree)
    assert metrics(resumed) == metrics(run)
