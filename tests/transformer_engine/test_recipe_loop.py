"""Trainings of a recipe in FP8, on one rank and on several: layouts, checkpoints, initial weights.

Delayed scaling is the one with a state of its own (scales and histories, reduced over ranks), so most are with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fp8_runs import Seen
from tests.harness import run_world
from tests.training_runs import interrupted_copy, largest_difference, metrics, tiny_tree, train_body
from tests.transformer_engine.loops import masters, train_recipe
from tests.transformer_engine.runs import DELAYED, TENSORWISE, TRUNK

pytestmark = pytest.mark.timeout(900)

STEPS, MICROBATCHES = 8, 4
EVALUATIONS = 4  # two batches, twice
DISTRIBUTED = {"optimizer__distributed": True}
PARAM = DISTRIBUTED | {"train__fp8_param": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 sp": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "pp2": {"parallel__pipeline": 2},
    "heads on both stages": {"parallel__pipeline": 2, "parallel__layout": "Ettttm|mmL"},
    "dp2": DISTRIBUTED,
}


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step in bf16 and without Transformer Engine: initial weights that are the same in every layout."""
    run = tmp_path_factory.mktemp("start") / "run"
    first = {"train__precision": "bf16", "train__steps": 1, "optimizer__warmup_steps": 0}
    run_world(train_body, 1, tiny_tree(data, run, **first))
    return run


Train = Callable[..., list[Seen]]


@pytest.fixture(scope="module")
def train(data: Path, start: Path) -> Train:
    """Train from these weights into a folder, with some settings of the recipe."""

    def trained(run: Path, world: int = 1, **settings: Any) -> list[Seen]:
        common = {"train__precision": "bf16", "train__transformer_engine": True, "run__load": str(start)}
        # The norm's last bit depends on the order of the sum, over ranks too; clipped by it an update in bf16 may, too.
        common |= {"optimizer__clip_grad": 0}
        return run_world(train_recipe, world, tiny_tree(data, run, **common | settings), fresh=True, timeout=300)

    return trained


@pytest.fixture(scope="module")
def one(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], float]:
    """What one rank logged of a training in FP8, and how far from bf16 that is."""
    folder = tmp_path_factory.mktemp("one")
    train(folder / "fp8", **DELAYED)
    train(folder / "bf16")
    logged = metrics(folder / "fp8")
    return logged, largest_difference(logged, metrics(folder / "bf16"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_learn_alike(train: Train, one: tuple[dict[int, Any], float], tmp_path: Path, layout: str) -> None:
    logged, cost = one
    assert cost > 1e-4, "control: FP8 takes part"
    ranks = train(tmp_path / "run", 2, **DELAYED, **LAYOUTS[layout])
    difference = largest_difference(metrics(tmp_path / "run"), logged)
    # A pipeline rounds nothing otherwise, unless stages add up their heads' gradients.
    assert difference <= (0 if layout == "pp2" else 0.5 * cost)

    microbatches = MICROBATCHES // (2 if layout == "dp2" else 1)
    for seen in ranks:
        assert all(seen.trunk)
        assert not any(seen.heads)
        # A stage of heads alone has no layer that could have a history of gradients.
        assert seen.updates == {True: STEPS * microbatches} | ({False: STEPS * microbatches} if seen.trunk else {})
        assert seen.regions == (STEPS + EVALUATIONS) * microbatches


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        pytest.param(DELAYED | {"train__recompute": "full"}, DELAYED, id="full recomputation, delayed"),
        pytest.param(TENSORWISE | {"train__recompute": "full"}, TENSORWISE, id="full recomputation, tensorwise"),
    ],
)
def test_nothing_changes(train: Train, tmp_path: Path, settings: dict[str, Any], others: dict[str, Any]) -> None:
    train(tmp_path / "one", **settings)
    train(tmp_path / "other", **others)
    assert largest_difference(metrics(tmp_path / "one"), metrics(tmp_path / "other")) == 0


def test_documents_in_one_row_train_as_under_a_mask(train: Train, tmp_path: Path) -> None:
    """``data.reset_attention_mask``: these layers take a microbatch as one row with its documents' boundaries."""
    within = {
        "data__reset_attention_mask": True,
        "train__precision": "fp32",
        "train__micro_batch_size": 2,
        "model__seq_length": 256,  # the documents have some 480 tokens
        "train__steps": 3,
        "train__eval_interval": 3,
        "train__eval_batches": 1,
        "optimizer__warmup_steps": 0,
    }
    own = within | {"train__transformer_engine": False}
    train(tmp_path / "start", **own | {"run__load": None, "train__steps": 1})
    within["run__load"] = own["run__load"] = str(tmp_path / "start")
    train(tmp_path / "mask", **own)
    train(tmp_path / "rows", 2, **within, **LAYOUTS["heads on both stages"])
    train(tmp_path / "control", **within | {"data__reset_attention_mask": False})
    for kind in ("train", "valid"):
        wanted = metrics(tmp_path / "mask", kind)
        assert largest_difference(metrics(tmp_path / "rows", kind), wanted) < 1e-5
        assert largest_difference(metrics(tmp_path / "control", kind), wanted) > 1e-4


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        pytest.param(DELAYED, "tp2 sp", id="delayed, tp2 sp"),
        pytest.param(DELAYED, "heads on both stages", id="delayed, heads on both stages"),
        pytest.param(TENSORWISE, "pp2", id="tensorwise, pp2"),
        pytest.param(DELAYED | PARAM, "dp2", id="delayed, parameters in FP8, dp2"),
        pytest.param(TENSORWISE | PARAM, "dp2", id="tensorwise, parameters in FP8, dp2"),
    ],
)
def test_a_resumed_run_goes_on_exactly(train: Train, tmp_path: Path, settings: dict[str, Any], layout: str) -> None:
    """Scales and histories are in the checkpoint: a run that began with new ones would differ (the control)."""
    whole = tmp_path / "whole"
    ranks = train(whole, 2, **settings | LAYOUTS[layout])
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    again = train(resumed, 2, **settings | LAYOUTS[layout])
    assert again[0].regions == ranks[0].regions // 2, "control: it was resumed"
    for kind in ("train", "valid"):
        assert metrics(resumed, kind) == metrics(whole, kind)
    for one, other in zip(ranks, again, strict=True):
        assert len(one.scales) == len(other.scales) == (2 * len(one.trunk) if "delayed" in settings.values() else 0)
        assert all(torch.equal(a, b) for a, b in zip(one.scales, other.scales, strict=True))


@pytest.mark.parametrize("recipe", [DELAYED, TENSORWISE], ids=["delayed", "tensorwise"])
def test_parameters_in_fp8_start_from_what_was_loaded(
    start: Path, data: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    """And not from what FP8 made of it: the optimizer's copies have every digit of the checkpoint."""
    common = {"train__precision": "bf16", "train__transformer_engine": True, "run__load": str(start)}
    (expected,) = run_world(masters, 1, tiny_tree(data, tmp_path / "run", **common, **DISTRIBUTED), fresh=True)
    (found,) = run_world(masters, 1, tiny_tree(data, tmp_path / "run", **common, **recipe | PARAM), fresh=True)
    assert len(found) == 4 * TRUNK
    for name, (master, in_fp8) in found.items():
        saved, in_bf16 = expected[name]
        assert torch.equal(saved, in_bf16), "control: a checkpoint in bf16"
        assert torch.equal(master, saved), name
        assert not torch.equal(in_fp8, saved), "control: FP8 has rounded it"
        assert torch.allclose(in_fp8, saved, rtol=2**-4, atol=2**-9), name
