"""Megatron's own training with nothing of this package but `compat`: every layout trains the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import parallel, run_world
from tests.models import train_plain_gpt

STEPS = 3
REPLICA = 4  # microbatches of one data parallel rank in the layouts without data parallelism

LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "tp2-pp2": (4, {"tp": 2, "pp": 2}, {}),
    "tp2-pp2-sp": (4, {"tp": 2, "pp": 2}, {"sequence_parallel": True}),
    "tp2-pp2-vp2": (4, {"tp": 2, "pp": 2, "vp": 2}, {}),
    "tp2-pp2-recompute": (
        4,
        {"tp": 2, "pp": 2},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "dp2": (2, {}, {"microbatches": 2}),
    "dp2-overlap": (2, {}, {"microbatches": 2, "overlap": True}),
    "dp2-distributed": (2, {}, {"microbatches": 2, "distributed_optimizer": True}),
    "pp2-dp2-distributed-overlap": (
        4,
        {"pp": 2},
        {"microbatches": 2, "distributed_optimizer": True, "overlap": True},
    ),
    "vp2-dp2-distributed-overlap": (
        4,
        {"pp": 2, "vp": 2},
        {"microbatches": 2, "distributed_optimizer": True, "overlap": True},
    ),
}


def _train(rank: int, world_size: int, layout: dict[str, int], settings: dict[str, Any]) -> torch.Tensor:
    with parallel(**layout):
        return torch.tensor(train_plain_gpt(STEPS, **settings), dtype=torch.float64)


def _train_with_unmarked_norms(
    rank: int, world_size: int, layout: dict[str, int], settings: dict[str, Any]
) -> torch.Tensor:
    def unmark(chunks: list[torch.nn.Module]) -> None:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if "norm" in name:
                    parameter.sequence_parallel = False  # type: ignore[attr-defined]

    with parallel(**layout):
        return torch.tensor(train_plain_gpt(STEPS, edit=unmark, **settings), dtype=torch.float64)


def _measured(name: str, body: Any = _train, **more: Any) -> torch.Tensor:
    """Losses and gradient norms `[2, STEPS]` of a layout; the ranks agree on them."""
    world_size, layout, settings = LAYOUTS[name]
    ranks = run_world(body, world_size, layout, {**settings, **more})
    assert all(torch.equal(values, ranks[0]) for values in ranks)
    return ranks[0]


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return run_world(_train, 1, {}, {"microbatches": REPLICA})[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_the_same_model(name: str, alone: torch.Tensor) -> None:
    torch.testing.assert_close(_measured(name), alone, rtol=2e-6, atol=0)


def test_tied_embeddings_across_stages() -> None:
    alone = run_world(_train, 1, {}, {"tied": True})[0]
    torch.testing.assert_close(_measured("tp2-pp2", tied=True), alone, rtol=2e-6, atol=0)


def test_other_weights_are_noticed(alone: torch.Tensor) -> None:
    assert (_measured("tp2-pp2", weights_seed=1) - alone).abs().min() > 1e-4


def test_sequence_parallel_norms_need_their_mark(alone: torch.Tensor) -> None:
    """Control of `compat.fallbacks.NORM`: unmarked, each TP rank keeps the gradient of its own part of the sequence."""
    unmarked = run_world(_train_with_unmarked_norms, 4, {"tp": 2, "pp": 2}, {"sequence_parallel": True})[0]
    assert (unmarked[1] - alone[1]).abs().min() > 1e-5
