"""A rank whose GPU is full, by a stand-in: the run ends with the error that names the step and the recipe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.harness import run_world
from tests.training_runs import tiny_tree


def runs_out_in_step_3(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    import torch

    from mtp_megatron.training import loop
    from mtp_megatron.training.out_of_memory import OutOfMemory
    from mtp_megatron.training.recipe_io import parse_recipe

    whole = loop.train_step

    def train_step(recipe: Any, trainable: Any, *args: Any) -> Any:
        if trainable.scheduler.num_steps == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(recipe, trainable, *args)

    gpu = SimpleNamespace(total_memory=2**30)
    with (
        mock.patch.object(loop, "train_step", train_step),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu),
    ):
        try:
            loop.train(parse_recipe(tree))
        except OutOfMemory as error:
            return str(error)
    return ""


def test_the_run_ends_with_what_may_help(data: Path, tmp_path: Path) -> None:
    (said,) = run_world(runs_out_in_step_3, 1, tiny_tree(data, tmp_path / "run"))
    assert ", stage 1 of 1: out of GPU memory in step 3 (" in said
    assert f"'mtp-megatron plan {tmp_path / 'run' / 'recipe.yaml'} --gpus 1 --memory 1' says" in said
