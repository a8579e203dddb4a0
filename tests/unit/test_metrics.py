"""Figures of a run, against hand-written numbers."""

from __future__ import annotations

import math

import pytest
import torch

from mtp_megatron.metrics import agreement_counts, expected_tokens_per_forward, objective, per_token
from mtp_megatron.targets import IGNORE_INDEX as _

# One sequence of 5 positions. Head 1 says HEAD_1; head i is accepted at t if it says head 1's word at t + i - 1.
HEAD_1 = [1, 2, 3, 4, 5]


def counts(*heads: list[int], targets: list[list[int]] | None = None) -> tuple[list[int], list[int]]:
    predictions = torch.tensor([[head] for head in heads])
    accepted, positions = agreement_counts(
        predictions, torch.zeros_like(predictions) if targets is None else torch.tensor([[row] for row in targets])
    )
    return accepted.tolist(), positions.tolist()


def test_heads_that_repeat_what_head_1_says_later_are_accepted() -> None:
    targets = [[0] * 5, [0, 0, 0, 0, _], [0, 0, 0, _, _]]
    accepted, positions = counts(HEAD_1, [2, 3, 4, 5, 9], [3, 4, 5, 9, 9], targets=targets)
    assert accepted == [5, 4, 3]
    assert positions == [5, 4, 3]
    assert expected_tokens_per_forward(accepted, positions) == 3.0


def test_a_head_counts_only_where_all_before_it_were_accepted() -> None:
    targets = [[0] * 5, [0, 0, 0, 0, _], [0, 0, 0, _, _]]
    # Head 2 is wrong at position 1, head 3 is right there and wrong at position 2.
    accepted, positions = counts(HEAD_1, [2, 0, 4, 5, 9], [3, 4, 0, 9, 9], targets=targets)
    assert accepted == [5, 3, 1]
    assert expected_tokens_per_forward(accepted, positions) == pytest.approx(1 + 3 / 4 + 1 / 3)


def test_positions_without_a_target_are_not_counted() -> None:
    # A document ends at position 1: head 2 has no target there, head 3 none at 0 and 1.
    targets = [[0, _, 0, 0, 0], [0, _, 0, 0, _], [_, _, 0, _, _]]
    accepted, positions = counts(HEAD_1, [2, 3, 4, 5, 9], [3, 4, 5, 9, 9], targets=targets)
    assert positions == [4, 3, 1]
    assert accepted == [4, 3, 1]


def test_one_head_yields_one_token() -> None:
    accepted, positions = counts(HEAD_1)
    assert expected_tokens_per_forward(accepted, positions) == 1.0


def test_more_heads_than_positions() -> None:
    accepted, positions = counts([1, 2], [2, 9], [9, 9], targets=[[0, 0], [0, _], [_, _]])
    assert (accepted, positions) == ([2, 1, 0], [2, 1, 0])
    assert expected_tokens_per_forward(accepted, positions) == 2.0


def test_batches_are_independent() -> None:
    predictions = torch.tensor([[HEAD_1, HEAD_1], [[2, 3, 4, 5, 9], [9, 9, 9, 9, 2]]])
    targets = torch.zeros_like(predictions)
    targets[1, :, 4] = _
    accepted, positions = agreement_counts(predictions, targets)
    assert accepted.tolist() == [10, 4]
    assert positions.tolist() == [10, 8]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must be"):
        agreement_counts(torch.zeros(2, 1, 5), torch.zeros(3, 1, 5))


def test_means_over_nothing_are_nan() -> None:
    values = per_token([6.0, 0.0], [3, 0])
    assert values[0] == 2.0
    assert math.isnan(values[1])


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_head_of_weight_0_takes_no_part_in_the_objective(lost: float) -> None:
    """In training it has no sum; in an evaluation it may have overflowed."""
    assert objective([1.0, 0.5, 0.0], [12.0, 8.0, lost], 4) == 4.0
    assert objective([0.0, 2.0], [lost, 8.0], 4) == 4.0
    assert not math.isfinite(objective([1.0, 0.5], [12.0, lost], 4)), "one that has a weight does"
    assert objective([0.0, 0.0], [lost, lost], 4) == 0.0


def test_the_objective_of_no_target_is_no_number() -> None:
    assert math.isnan(objective([1.0, 1.0], [0.0, 0.0], 0))
