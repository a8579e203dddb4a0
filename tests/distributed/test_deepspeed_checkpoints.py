"""DeepSpeed's checkpoints of a run: resumed at the same and at other layouts, read and exported without DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed_runs import TIMEOUT, assert_alike, deepspeed_tree, furthest, parameters, zero
from tests.harness import run_world
from tests.training_runs import interrupted_copy, metrics, tiny_tree, train_body

pytestmark = pytest.mark.deepspeed

RUN = {"model__num_trunk_layers": 2, "train__eval_batches": 0, "train__global_batch_size": 2}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """8 steps at TP2xDP2 by ZeRO stage, saved at steps 4 and 8; made when first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    class Runs(dict):
        def __missing__(self, stage: int) -> Path:
            run = folder / f"zero{stage}"
            run_world(train_body, 4, deepspeed_tree(data, run, zero(stage), parallel__tensor=2, **RUN), timeout=TIMEOUT)
            self[stage] = run
            return run

    return Runs()


def resume(data: Path, run: Path, stage: int, world: int, tensor: int, **settings: Any) -> list[int]:
    tree = deepspeed_tree(data, run, zero(stage), **{**RUN, "parallel__tensor": tensor, **settings})
    return run_world(train_body, world, tree, timeout=TIMEOUT)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_at_the_same_layout_changes_nothing(stage: int, data: Path, tmp_path: Path) -> None:
    one, settings = tmp_path / "whole", {"model__hidden_dropout": 0.1}
    assert resume(data, one, stage, 2, 1, **settings) == [8, 8]
    resumed = interrupted_copy(one, tmp_path / "resumed", step=4)
    resume(data, resumed, stage, 2, 1, **settings)
    assert metrics(resumed) == metrics(one)
    assert furthest(parameters(resumed), parameters(one)) == 0


@pytest.mark.parametrize(("stage", "world", "tensor"), [(1, 2, 1), (2, 2, 1), (3, 2, 1), (2, 2, 2), (1, 1, 1)], ids=str)
def test_a_run_goes_on_exactly_at_another_tp_and_dp(
    stage: int, world: int, tensor: int, data: Path, whole: Any, tmp_path: Path
) -> None:
    resumed = interrupted_copy(whole[stage], tmp_path / "resumed", step=4)
    assert resume(data, resumed, stage, world, tensor) == [8] * world
    assert_alike(metrics(resumed), metrics(whole[stage]))
    assert furthest(parameters(resumed), parameters(whole[stage])) < 1e-5
    assert not list((resumed / "checkpoints").glob("*_universal*")), "the universal form is removed after the load"


def cannot_convert(rank: int, world_size: int, folder: Path) -> str:
    """Ask for the universal form where making it fails on rank 0."""
    from mtp_megatron.deepspeed import universal
    from mtp_megatron.errors import CheckpointError

    convert = universal._convert

    def failing(folder: Path, target: Path) -> None:
        raise CheckpointError(f"{folder}: the disk is full")

    universal._convert = failing
    try:
        with universal.converted(folder):
            return "loaded"
    except CheckpointError as error:
        return str(error)
    finally:
        universal._convert = convert


def test_what_rank_0_cannot_convert_ends_every_rank_at_once(tmp_path: Path) -> None:
    said = run_world(cannot_convert, 2, tmp_path / "iter_0000004")
    assert said == [f"{tmp_path}/iter_0000004: the disk is full", f"rank 0: {tmp_path}/iter_0000004: the disk is full"]


def forgets_the_moments(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """Resume, but let Adam start anew."""
    from mtp_megatron.deepspeed import checkpointing

    load = checkpointing._load

    def load_and_forget(trainer: Any, folder: Path) -> Any:
        state = load(trainer, folder)
        for values in trainer.engine.optimizer.optimizer.state.values():
            values["exp_avg"].zero_()
        return state

    checkpointing._load = load_and_forget
    try:
        return train_body(rank, world_size, tree)
    finally:
        checkpointing._load = load


def test_moments_that_are_not_restored_would_be_noticed(data: Path, whole: Any, tmp_path: Path) -> None:
    """Control of the tests above."""
    resumed = interrupted_copy(whole[1], tmp_path / "resumed", step=4)
    tree = deepspeed_tree(data, resumed, zero(1), parallel__tensor=1, **RUN)
    run_world(forgets_the_moments, 2, tree, timeout=TIMEOUT)
    assert metrics(resumed)[8]["loss"] != pytest.approx(metrics(whole[1])[8]["loss"], rel=1e-5)


@torch.no_grad()
def logits_of_the_run(rank: int, world_size: int, tree: dict[str, Any], tokens: list[int]) -> list[Any]:
    """Head 1's logits ``[s, V]`` from the engine that resumes a run."""
    from mtp_megatron.training.checkpointing import latest_checkpoint
    from mtp_megatron.training.host import host_of
    from mtp_megatron.training.preflight import preflight
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.world import model_parallel_world

    plan = preflight(parse_recipe(tree), world_size)
    with model_parallel_world(plan.recipe):
        host = host_of(plan.recipe)
        trainer: Any = host.build(plan.recipe, None)
        folder = latest_checkpoint(plan.folder.checkpoints)
        assert folder is not None
        host.load(plan.recipe, trainer, folder)
        ids = torch.tensor([tokens])
        with trainer.evaluating():
            logits = trainer.engine(ids, torch.arange(len(tokens))[None], None, runtime_gather_output=True)
        values: list[Any] = logits[0, :, : plan.recipe.model.vocab_size].tolist()
        return values


@pytest.mark.parametrize("stage", [2, 3])
def test_an_export_computes_the_logits_of_the_model_that_was_trained(
    stage: int, data: Path, whole: Any, tmp_path: Path
) -> None:
    from mtp_megatron.checkpoint.convert import convert
    from mtp_megatron.serving.export import open_export
    from mtp_megatron.serving.llama import HeadsLlama

    conversion = convert(whole[stage], tmp_path / "hf", to="hf", progress=False)
    assert (conversion.step, conversion.num_heads) == (8, 3)
    tokens = [3 * i % 257 for i in range(32)]
    decoder = HeadsLlama.load(open_export(tmp_path / "hf"))
    exported = decoder.run(torch.tensor(tokens), decoder.new_caches(len(tokens)), rows=len(tokens))[1]
    tree = deepspeed_tree(data, whole[stage], zero(stage), parallel__tensor=2, **RUN)
    trained = torch.tensor(run_world(logits_of_the_run, 4, tree, tokens, timeout=TIMEOUT)[0])
    assert trained.abs().max() > 0.1
    torch.testing.assert_close(exported, trained, rtol=1e-4, atol=1e-5)


def refused(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    from mtp_megatron.errors import MTPError

    try:
        train_body(rank, world_size, tree)
    except MTPError as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_another_stage_or_host_is_refused_by_name(data: Path, whole: Any, tmp_path: Path) -> None:
    resumed = interrupted_copy(whole[3], tmp_path / "resumed", step=4)
    (said,) = run_world(refused, 1, deepspeed_tree(data, resumed, zero(1), **RUN), timeout=TIMEOUT)
    assert "saved with zero_optimization.stage=3, and it is 1 here" in said
    (said,) = run_world(refused, 1, tiny_tree(data, resumed, **RUN))
    assert "saved by a DeepSpeed engine" in said
    assert "run.deepspeed" in said
    megatron = tmp_path / "megatron"
    run_world(train_body, 1, tiny_tree(data, megatron, **RUN))
    (said,) = run_world(refused, 1, deepspeed_tree(data, megatron, zero(1), **RUN))
    assert "saved by megatron-core's own loop" in said


def test_a_new_run_starts_from_a_deepspeed_run(data: Path, whole: Any, tmp_path: Path) -> None:
    """At any layout and under either host. Its older checkpoints are pruned."""
    start = {**RUN, "run__load": str(whole[3]), "train__steps": 4, "train__save_interval": 0}
    ours, theirs = tmp_path / "deepspeed", tmp_path / "megatron"
    keep = {"train__save_interval": 1, "run__keep_last": 1, "run__keep_every": 2}
    tree = deepspeed_tree(data, ours, zero(1), parallel__tensor=2, **start | keep)
    run_world(train_body, 2, tree, timeout=TIMEOUT)
    assert sorted(path.name for path in ours.glob("checkpoints/iter_*")) == [f"iter_000000{step}" for step in (2, 3, 4)]
    run_world(train_body, 1, tiny_tree(data, theirs, **start))
    assert_alike(metrics(ours), metrics(theirs))
    assert metrics(theirs)[1]["loss"] < metrics(whole[3])[5]["loss"] * 1.2


class MakesAFolder:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_damaged_and_dangerous_files_are_refused(whole: Any, tmp_path: Path) -> None:
    from mtp_megatron.checkpoint.deepspeed_reader import DeepSpeedCheckpoint
    from mtp_megatron.errors import CheckpointError

    folder = tmp_path / "iter_0000008"
    shutil.copytree(whole[3] / "checkpoints" / folder.name, folder)
    sizes = folder / "files.json"

    def accept_sizes() -> None:
        known = json.loads(sizes.read_text())
        sizes.write_text(json.dumps({name: (folder / name).stat().st_size for name in known}))

    states = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    content = states.read_bytes()
    states.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=f"{states.name} has"):
        DeepSpeedCheckpoint(folder)
    optimizer = folder / states.name.replace("model", "optim")
    for file, good in ((states, content), (optimizer, optimizer.read_bytes())):
        torch.save({"module": {}, "param_shapes": [], "optimizer_state_dict": MakesAFolder(tmp_path / "made")}, file)
        accept_sizes()
        with pytest.raises(CheckpointError, match="could run a stranger's code"):
            DeepSpeedCheckpoint(folder)
        assert not (tmp_path / "made").exists()
        file.write_bytes(good)
    accept_sizes()
    assert DeepSpeedCheckpoint(folder).keys()
    states.unlink()
    sizes.write_text(
        json.dumps({name: size for name, size in json.loads(sizes.read_text()).items() if name != states.name})
    )
    with pytest.raises(CheckpointError, match="1 files of model states and 2 of optimizer states"):
        DeepSpeedCheckpoint(folder)
