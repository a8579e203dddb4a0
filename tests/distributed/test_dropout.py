"""Dropout in trunk and heads: reproducible, really drawn, the same with recompute although heads run in backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity import Case, Step, make_parameters, megatron_step

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def same(left: Step, right: Step) -> bool:
    return torch.equal(left.loss_sum, right.loss_sum) and all(
        torch.equal(left.gradients[name], right.gradients[name]) for name in left.gradients
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(world=2, tp=2, sequence_parallel=True, config=DROPOUT),
        Case(world=2, pp=2, config=DROPOUT, heads={"n": 3, "arrangement": "causal"}),
    ],
    ids=["tp2-sp", "pp2-causal"],
)
def test_dropout_is_reproducible_and_survives_recompute(case: Case) -> None:
    parameters = make_parameters(case)
    first = megatron_step(case, parameters)
    assert same(first, megatron_step(case, parameters))
    assert same(first, megatron_step(replace(case, config={**DROPOUT, **FULL}), parameters))
    plain = megatron_step(replace(case, config={}), parameters)
    assert not same(first, plain)


def test_each_head_draws_its_own_masks() -> None:
    """Two heads with the same weights and targets differ only by their dropout."""
    case = Case(heads={"n": 2}, config=DROPOUT)
    parameters = make_parameters(case)
    for name in list(parameters):
        if name.startswith("heads.1."):
            parameters[name] = parameters[name.replace("heads.1.", "heads.0.")].clone()
    got = megatron_step(case, parameters, _same_targets)
    assert got.loss_sum[0] != got.loss_sum[1]
    without = megatron_step(replace(case, config={}), parameters, _same_targets)
    assert without.loss_sum[0] == without.loss_sum[1]


def _same_targets(chunks: list) -> None:
    for chunk in chunks:
        loss = chunk.future_heads_loss
        chunk.future_heads_loss = lambda z, t, kw, loss=loss, **more: loss(z, t[:1].expand_as(t), kw, **more)
