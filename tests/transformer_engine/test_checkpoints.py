"""A run may change ``train.transformer_engine`` when it is resumed: its checkpoint is then read by other modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training_runs import make_data
from tests.transformer_engine import runs
from tests.transformer_engine.test_modules import local_name


def trained(recipe: Any, folder: Path, save: bool) -> dict[str, Tensor]:
    """Build, then save to the folder or load from it; the weights by their local names."""
    from mtp_megatron.data.manifest import load_manifest
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
    from mtp_megatron.training.world import model_parallel_world

    with model_parallel_world(recipe):
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        if save:
            for parameter in model.parameters():
                parameter.main_grad.fill_(1e-3)
            trainable.update()  # a step, so that there are moments to be saved
            save_checkpoint(recipe, load_manifest(folder / "data"), trainable, folder / "checkpoints", 3)
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
            checkpoint = latest_checkpoint(folder / "checkpoints")
            assert checkpoint is not None
            assert load_checkpoint(recipe, trainable, checkpoint) == 3
        return {local_name(name): value for name, value in runs.weights_of(model).items()}


@pytest.mark.parametrize("saved_by", ["local", "transformer_engine"])
@pytest.mark.parametrize("settings", [{}, runs.TENSORWISE, runs.DELAYED], ids=str)
def test_a_run_goes_on_with_the_other_modules(
    pretend_gpu: Callable[..., None], tmp_path: Path, saved_by: str, settings: dict[str, Any]
) -> None:
    make_data(tmp_path)
    local = runs.recipe_of(train__transformer_engine=False)
    pretend_gpu()
    engine = runs.recipe_of(**settings)
    first, second = (local, engine) if saved_by == "local" else (engine, local)
    saved = trained(first, tmp_path, save=True)
    loaded = trained(second, tmp_path, save=False)
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, msg=name)
