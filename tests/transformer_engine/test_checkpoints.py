"""A run may be resumed where Transformer Engine is or is not, or with another ``train.transformer_engine``: its
checkpoint is then read by other modules and another Adam."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adam_runs import Adam, trained
from tests.training_runs import make_data
from tests.transformer_engine import pretend, runs


@pytest.mark.parametrize("saved_by", ["local", "transformer_engine"])
@pytest.mark.parametrize(
    "settings",
    [{}, runs.TENSORWISE, runs.DELAYED, runs.EXPERTS, runs.EXPERTS | runs.DELAYED | {"optimizer__distributed": True}],
    ids=str,
)
def test_a_run_goes_on_with_the_other_modules(
    pretend_gpu: Callable[..., None], tmp_path: Path, saved_by: str, settings: dict[str, Any]
) -> None:
    make_data(tmp_path)
    of_both = {key: value for key, value in settings.items() if not key.startswith("train__fp8")}
    local = runs.recipe_of(**of_both, train__transformer_engine=False)
    pretend_gpu()
    engine = runs.recipe_of(**settings)
    first, second = (local, engine) if saved_by == "local" else (engine, local)
    saved, _ = trained(first, tmp_path, save=True)
    loaded, _ = trained(second, tmp_path, save=False)
    saved, loaded = ({runs.local_name(name): weight for name, weight in weights.items()} for weights in (saved, loaded))
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("saved_by", ["torch", "transformer_engine"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("distributed", [False, True], ids=["each rank its own", "distributed"])
def test_a_run_goes_on_with_the_other_adam(
    pretend_gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    saved_by: str,
    precision: str,
    distributed: bool,
) -> None:
    """Torch's keeps its step for each parameter, Transformer Engine's for each group."""
    make_data(tmp_path)
    pretend_gpu()
    recipe = runs.recipe_of(
        train__transformer_engine=False, train__precision=precision, optimizer__distributed=distributed
    )

    def adam(of: str, save: bool) -> Adam:
        with monkeypatch.context() as patch:
            if of == "torch":
                pretend.adam_of_torch(patch)
            return trained(recipe, tmp_path, save)[1]

    saved = adam(saved_by, save=True)
    loaded = adam("transformer_engine" if saved_by == "torch" else "torch", save=False)
    assert saved.step == loaded.step == 2
    assert saved.moments[0].abs().max() > 0
    torch.testing.assert_close(loaded.moments, saved.moments, rtol=1e-6, atol=0)
