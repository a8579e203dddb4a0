"""A rank whose GPU is full, by a stand-in: the run ends with the error that names the step and the recipe."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.harness import run_world
from tests.training_runs import tiny_tree

SIZES = ("memory_allocated", "memory_reserved", "max_memory_allocated")


def runs_out_in_step_3(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    import torch

    from mtp_megatron.training import loop
    from mtp_megatron.training.out_of_memory import OutOfMemory
    from mtp_megatron.training.recipe_io import parse_recipe

    whole = loop.train_step

    def train_step(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
        if trainable.scheduler.num_steps == 2:  # only now: megatron-core asks for the device, too
            gpu = SimpleNamespace(total_memory=2**30)
            told = {"current_device": lambda: 0, "get_device_properties": lambda device: gpu}
            stand_ins.enter_context(mock.patch.multiple(torch.cuda, **told, **dict.fromkeys(SIZES, lambda: 2**20)))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(recipe, trainable, *args, **kwargs)

    with ExitStack() as stand_ins:
        stand_ins.enter_context(mock.patch.object(loop, "train_step", train_step))
        try:
            loop.train(parse_recipe(tree))
        except OutOfMemory as error:
            return str(error)
    return ""


def test_the_run_ends_with_what_may_help(data: Path, tmp_path: Path) -> None:
    (said,) = run_world(runs_out_in_step_3, 1, tiny_tree(data, tmp_path / "run"))
    assert ", stage 1 of 1: out of GPU memory in step 3 (" in said
    assert f"'mtp-megatron plan {tmp_path / 'run' / 'recipe.yaml'} --gpus 1 --memory 1' says" in said
