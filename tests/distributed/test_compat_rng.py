"""Dropout on the CPU as on GPUs: tensor parallel ranks differ exactly where they must, and recompute repeats masks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from mtp_megatron import compat
from mtp_megatron.compat import cpu
from tests.harness import parallel, run_world
from tests.models import train_plain_gpt

SHAPE = (64,)


def _dropped(x: torch.Tensor) -> torch.Tensor:
    """Dropout outside and inside Megatron's forked region, one after the other: `[2, 64]`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    outside = torch.nn.functional.dropout(x, 0.5)
    with get_cuda_rng_tracker().fork():
        inside = torch.nn.functional.dropout(x, 0.5)
    return torch.stack([outside, inside])


def _masks(rank: int, world_size: int, tp: int, seed: int) -> torch.Tensor:
    """Masks of two successive calls, `[call, region, 64]`."""
    with parallel(tp=tp, seed=seed):
        return torch.stack([_dropped(torch.ones(SHAPE)) != 0 for _ in range(2)])


def _recomputed(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs of a checkpointed forward `[2, 64]`, those of its recompute, and a draw after each of two such passes."""
    from megatron.core import tensor_parallel

    calls: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(_dropped(x))
        return calls[-1]

    later = []
    for checkpointed in (True, False):
        with parallel(tp=2):
            x = torch.ones(SHAPE, requires_grad=True)
            output = tensor_parallel.checkpoint(function, False, x) if checkpointed else function(x)
            output.sum().backward()
            later.append(_dropped(torch.ones(SHAPE)))
    assert len(calls) == 3
    return calls[0].detach(), calls[1].detach(), torch.stack(later)


def _without_setting_states(rank: int, world_size: int) -> torch.Tensor:
    """The masks with one row of the shim missing; upstream waits for CUDA to start, so nothing ever happens."""
    compat.prepare()
    from megatron.core.tensor_parallel import random

    with mock.patch.object(random, "_set_cuda_rng_state", return_value=None):
        return _masks(rank, world_size, 2, 1234)


def _train(rank: int, world_size: int, layout: dict[str, int], settings: dict[str, Any]) -> torch.Tensor:
    with parallel(**layout):
        return torch.tensor(
            train_plain_gpt(2, hidden_dropout=0.2, attention_dropout=0.2, **settings), dtype=torch.float64
        )


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about the stand-ins for CUDA's random numbers")


def test_forked_region_differs_by_rank_and_default_region_does_not() -> None:
    first, second = run_world(_masks, 2, 2, 1234)
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[0, 1], second[0, 1])
    assert not torch.equal(first[1, 1], second[1, 1])
    for masks in (first, second):
        assert not torch.equal(masks[0, 0], masks[1, 0]), "the default stream must advance"
        assert not torch.equal(masks[0, 1], masks[1, 1]), "the forked stream must advance"
        assert not torch.equal(masks[0, 0], masks[0, 1]), "the two streams must be different ones"
        assert 0.2 < masks.float().mean() < 0.8


def test_data_parallel_replicas_share_the_forked_stream() -> None:
    ranks = run_world(_masks, 4, 2, 1234)
    assert torch.equal(ranks[0], ranks[2])
    assert torch.equal(ranks[1], ranks[3])


def test_the_seed_decides() -> None:
    assert torch.equal(run_world(_masks, 2, 2, 1234)[1], run_world(_masks, 2, 2, 1234)[1])
    assert not torch.equal(run_world(_masks, 2, 2, 1234)[1], run_world(_masks, 2, 2, 4321)[1])


def test_recompute_repeats_the_masks_and_leaves_the_streams_where_they_were() -> None:
    for forward, recompute, later in run_world(_recomputed, 2):
        assert torch.equal(forward, recompute)
        assert torch.equal(later[0], later[1])


def test_without_the_stand_in_replicated_activations_diverge() -> None:
    """Control: nothing raises, but ranks drop different parts of what must be the same on all of them, or (0.19) the
    same parts of what each has for itself."""
    assert "_set_cuda_rng_state" in {row.name for row in cpu.MEGATRON}
    first, second = run_world(_without_setting_states, 2)
    assert not torch.equal(first[:, 0], second[:, 0]) or torch.equal(first[:, 1], second[:, 1])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_training_with_dropout_is_the_same_with_recompute(sequence_parallel: bool) -> None:
    layout, settings = {"tp": 2, "pp": 2}, {"sequence_parallel": sequence_parallel}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain = run_world(_train, 4, layout, settings)[0]
    assert torch.equal(run_world(_train, 4, layout, settings)[0], plain)
    torch.testing.assert_close(run_world(_train, 4, layout, {**settings, **recompute})[0], plain, rtol=1e-6, atol=0)
