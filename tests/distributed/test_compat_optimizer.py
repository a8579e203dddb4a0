"""Optimizer state through distributed checkpoints with torch's Adam: the runs go on as if they had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mtp_megatron import compat
from mtp_megatron.compat import fallbacks
from mtp_megatron.compat.patching import replace
from tests.harness import parallel, run_world
from tests.models import PlainTraining

SPLIT, STEPS = 2, 4  # saved after two steps, four in all
DISTRIBUTED = {"distributed_optimizer": True}

TP2_PP2: dict[str, int] = {"tp": 2, "pp": 2}
TP2: dict[str, int] = {"tp": 2}
ALONE: dict[str, int] = {}

Layout = tuple[int, dict[str, int], dict[str, Any]]
MOVES: dict[str, tuple[Layout, Layout]] = {
    "distributed-tp2dp2-to-pp2dp2": (
        (4, TP2, {"microbatches": 2, **DISTRIBUTED}),
        (4, {"pp": 2}, {"microbatches": 2, **DISTRIBUTED}),
    ),
    "distributed-tp2pp2-to-dp1": ((4, TP2_PP2, DISTRIBUTED), (1, ALONE, DISTRIBUTED)),
    "distributed-dp1-to-dp2": ((1, ALONE, DISTRIBUTED), (2, ALONE, {"microbatches": 2, **DISTRIBUTED})),
    "replicated-tp2pp2-to-dp1": ((4, TP2_PP2, {}), (1, ALONE, {})),
}


def _save(rank: int, world_size: int, layout: dict[str, int], settings: dict[str, Any], folder: str) -> None:
    with parallel(**layout):
        training = PlainTraining(**settings)
        for index in range(SPLIT):
            training.step(index)
        training.save(folder)


def _continue(
    rank: int,
    world_size: int,
    layout: dict[str, int],
    settings: dict[str, Any],
    folder: str,
    fully_parallel: bool = False,
) -> torch.Tensor:
    """Losses and gradient norms `[steps, 2]` of the steps after the checkpoint, in a model that had other weights."""
    with parallel(**layout):
        training = PlainTraining(weights_seed=9, **settings)
        training.load(folder, fully_parallel)
        return torch.tensor([training.step(index) for index in range(SPLIT, STEPS)], dtype=torch.float64)


def _straight(rank: int, world_size: int) -> torch.Tensor:
    with parallel():
        training = PlainTraining()
        return torch.tensor([training.step(index) for index in range(STEPS)], dtype=torch.float64)[SPLIT:]


@contextmanager
def _repaired_but(missing: Sequence[str]) -> Iterator[None]:
    """Take all repairs out and put those of torch's Adam back that are not `missing`."""
    compat.prepare()
    fallbacks.uninstall()
    undo: list[Callable[[], None]] = []
    try:
        for row in fallbacks.TORCH_ADAM:
            if row.name not in missing:
                replace(row, undo)
        with mock.patch.object(fallbacks, "installed", return_value=True):  # so that nobody repairs the rest
            yield
    finally:
        while undo:
            undo.pop()()
        compat.prepare()


def _continue_without(rank: int, world_size: int, folder: str, missing: tuple[str, ...]) -> torch.Tensor:
    with _repaired_but(missing):
        return _continue(rank, world_size, ALONE, DISTRIBUTED, folder)


@pytest.fixture(scope="module")
def straight() -> torch.Tensor:
    return run_world(_straight, 1)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of one rank with the distributed optimizer."""
    folder = _new_folder(tmp_path_factory.mktemp("saved"))
    run_world(_save, 1, ALONE, DISTRIBUTED, folder)
    return folder


def _new_folder(parent: Path) -> str:
    folder = parent / "checkpoint"
    folder.mkdir()
    return str(folder)


@pytest.mark.parametrize("name", MOVES)
def test_training_goes_on_in_another_layout(name: str, straight: torch.Tensor, tmp_path: Path) -> None:
    (world, layout, settings), (new_world, new_layout, new_settings) = MOVES[name]
    folder = _new_folder(tmp_path)
    run_world(_save, world, layout, settings, folder)
    for continued in run_world(_continue, new_world, new_layout, new_settings, folder):
        torch.testing.assert_close(continued, straight, rtol=5e-6, atol=0)


def test_data_parallel_ranks_share_the_reading(saved: str, straight: torch.Tensor) -> None:
    for continued in run_world(_continue, 2, ALONE, {"microbatches": 2, **DISTRIBUTED}, saved, True):
        torch.testing.assert_close(continued, straight, rtol=5e-6, atol=0)


@pytest.mark.parametrize(
    ("missing", "problem"), [("state_dict", "AssertionError"), ("_set_main_param_and_optimizer_states", "KeyError")]
)
def test_load_fails_without_repair(missing: str, problem: str, saved: str) -> None:
    with pytest.raises((RuntimeError, AssertionError), match=problem):
        run_world(_continue_without, 1, saved, (missing,))


def test_shared_step_is_silently_wrong(saved: str, straight: torch.Tensor) -> None:
    """Control: without its own step for every parameter, the first step after the load is right and the next is not."""
    continued = run_world(_continue_without, 1, saved, ("load_state_dict",))[0]
    torch.testing.assert_close(continued[0], straight[0], rtol=5e-6, atol=0)
    assert (continued[1] - straight[1]).abs().max() > 1e-4


def test_controls_pass_with_all_repairs(saved: str, straight: torch.Tensor) -> None:
    continued = run_world(_continue_without, 1, saved, ())[0]
    torch.testing.assert_close(continued, straight, rtol=5e-6, atol=0)
