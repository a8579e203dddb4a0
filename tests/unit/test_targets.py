"""Future-token targets: hand-written integers, an obvious loop, and the ways in which other codebases get it wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_megatron.targets import (
    IGNORE_INDEX,
    context_positions,
    context_shard,
    document_ends_from_positions,
    document_ends_from_tokens,
    future_targets,
)

NO = IGNORE_INDEX
EOD = 9


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def built(labels: torch.Tensor, n: int, **masks: torch.Tensor) -> list[list[list[int]]]:
    return future_targets(labels, n, **masks).tolist()


# Hand-written integers ------------------------------------------------------------------------------------------------


def test_one_document() -> None:
    #            tokens 1 2 3 4, then 5
    assert built(row(2, 3, 4, 5), 3) == [[[2, 3, 4, 5]], [[3, 4, 5, NO]], [[4, 5, NO, NO]]]


def test_example_of_the_docstring() -> None:
    ends = document_ends_from_tokens(row(5, 6, 9, 7), EOD)
    assert ends.tolist() == [[False, False, True, False]]
    assert built(row(6, 9, 7, 8), 2, document_ends=ends) == [[[6, 9, NO, 8]], [[9, NO, NO, NO]]]


def test_packed_documents_of_lengths_3_1_2_and_an_open_one() -> None:
    #      documents: 11 12 9 | 9 | 21 9 | 31 32 ..33
    tokens = row(11, 12, 9, 9, 21, 9, 31, 32)
    labels = row(12, 9, 9, 21, 9, 31, 32, 33)
    assert built(labels, 4, document_ends=document_ends_from_tokens(tokens, EOD)) == [
        [[12, 9, NO, NO, 9, NO, 32, 33]],
        [[9, NO, NO, NO, NO, NO, 33, NO]],
        [[NO] * 8],
        [[NO] * 8],
    ]


def test_sequences_of_a_batch_are_independent() -> None:
    tokens = torch.tensor([[1, 2, 9, 3], [4, 9, 5, 6]])
    labels = torch.tensor([[2, 9, 3, 1], [9, 5, 6, 7]])
    assert built(labels, 2, document_ends=document_ends_from_tokens(tokens, EOD)) == [
        [[2, 9, NO, 1], [9, NO, 6, 7]],
        [[9, NO, NO, NO], [NO, NO, 7, NO]],
    ]


def test_ignored_label_is_ignored_by_every_head_that_would_predict_it() -> None:
    assert built(row(2, -100, 4, 5), 3) == [[[2, NO, 4, 5]], [[NO, 4, 5, NO]], [[4, 5, NO, NO]]]
    assert built(row(2, -1, 4, 5), 1) == [[[2, NO, 4, 5]]]  # Megatron's padding label


def test_loss_mask_masks_the_token_not_the_position() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0]])  # the prompt of a chat, say; float as Megatron's data sets deliver it
    assert built(row(2, 3, 4, 5), 2, loss_mask=mask) == [[[2, 3, NO, 5]], [[3, NO, 5, NO]]]


def test_masked_token_inside_a_document_does_not_end_it() -> None:
    ends = document_ends_from_tokens(row(1, 2, 3, 9, 5), EOD)
    assert built(row(2, -100, 9, 5, 6), 3, document_ends=ends) == [
        [[2, NO, 9, NO, 6]],
        [[NO, 9, NO, NO, NO]],
        [[9, NO, NO, NO, NO]],
    ]


def test_sequence_shorter_than_n() -> None:
    assert built(row(2, 3), 5) == [[[2, 3]], [[3, NO]], [[NO, NO]], [[NO, NO]], [[NO, NO]]]
    assert built(torch.zeros(2, 0, dtype=torch.int64), 2) == [[[], []], [[], []]]


def test_one_head_is_the_next_token_model() -> None:
    labels = torch.randint(0, 50, (3, 7))
    assert torch.equal(future_targets(labels, 1)[0], labels)


def test_nothing_to_learn() -> None:
    assert (future_targets(torch.randint(0, 9, (2, 5)), 3, loss_mask=torch.zeros(2, 5)) == NO).all()
    assert (future_targets(torch.full((2, 5), -100), 3) == NO).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str)
def test_any_integer_type(dtype: torch.dtype) -> None:
    """Tokens on disk are uint8 or uint16, where -100 would wrap around to a valid token."""
    labels = row(2, 3, 200).to(dtype)
    targets = future_targets(labels, 2, loss_mask=torch.tensor([[1, 0, 1]]))
    assert targets.dtype == torch.int64
    assert targets.tolist() == [[[2, NO, 200]], [[NO, 200, NO]]]


def test_inputs_are_not_written_to() -> None:
    labels, mask, ends = row(2, -1, 9, 5), torch.tensor([[1, 1, 0, 1]]), torch.tensor([[False, True, False, False]])
    before = labels.clone(), mask.clone(), ends.clone()
    future_targets(labels, 3, loss_mask=mask, document_ends=ends)
    assert all(torch.equal(x, y) for x, y in zip((labels, mask, ends), before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0: needs at least one head"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"\[batch, sequence\], got shape \(4,\)"),
        ({"loss_mask": torch.ones(1, 3)}, r"loss_mask has shape \(1, 3\), labels have \(1, 4\)"),
        ({"document_ends": torch.ones(2, 4)}, r"document_ends has shape \(2, 4\), labels have \(1, 4\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_shape(change: dict, message: str) -> None:
    arguments = {"labels": row(2, 3, 4, 5), "n": 2, **change}
    with pytest.raises(ValueError, match=message):
        future_targets(**arguments)


def test_document_ends_from_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [3, 4, 0, 1, 2, 3]])  # the second goes on from another sample
    assert document_ends_from_positions(positions).tolist() == [
        [False, False, True, True, False, False],
        [False, True, False, False, False, False],
    ]


# Context parallelism: targets first, then the cut ---------------------------------------------------------------------


def test_zigzag_of_megatron() -> None:
    assert context_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert context_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert sorted(p for rank in range(3) for p in context_positions(12, 3, rank).tolist()) == list(range(12))
    with pytest.raises(ValueError, match="10 positions cannot be cut into 2 x 2 equal chunks"):
        context_positions(10, 2, 0)
    whole = torch.arange(6).view(1, 6)
    assert context_shard(whole, 1, 0) is whole


def test_targets_are_built_before_the_cut() -> None:
    labels = torch.arange(11, 19).view(1, 8)
    right = [context_shard(future_targets(labels, 2), 2, rank).tolist() for rank in range(2)]
    assert right == [[[[11, 12, 17, 18]], [[12, 13, 18, NO]]], [[[13, 14, 15, 16]], [[14, 15, 16, 17]]]]
    # The control: labels that are cut first are rolled into the rank's other chunk (Megatron-LM#6205).
    wrong = [future_targets(context_shard(labels, 2, rank), 2).tolist() for rank in range(2)]
    assert wrong[0][1] == [[12, 17, 18, NO]]


# Against the obvious loop ---------------------------------------------------------------------------------------------


def obvious(
    labels: list[list[int]], n: int, mask: list[list[int]] | None, ends: list[list[bool]] | None
) -> list[list[list[int]]]:
    """Triple loop over head, sequence and position; walks from the position to its target."""
    targets = []
    for head in range(1, n + 1):
        rows = []
        for b, line in enumerate(labels):
            out = []
            for t in range(len(line)):
                place = t + head - 1  # labels[place] is token t + head
                target = NO
                if place < len(line) and line[place] >= 0 and (mask is None or mask[b][place]):
                    crossed = ends is not None and any(ends[b][t : t + head])
                    target = NO if crossed else line[place]
                out.append(target)
            rows.append(out)
        targets.append(rows)
    return targets


@st.composite
def packed(draw: st.DrawFn) -> dict:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    grid = lambda values: st.lists(  # noqa: E731
        st.lists(values, min_size=length, max_size=length), min_size=batch, max_size=batch
    )
    return {
        "labels": draw(grid(st.one_of(st.integers(0, 12), st.sampled_from([-100, -1])))),
        "n": draw(st.integers(1, 11)),
        "mask": draw(st.none() | grid(st.integers(0, 1))),
        "ends": draw(st.none() | grid(st.booleans())),
    }


def as_tensor(values: list | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values)


@settings(max_examples=150, deadline=None)
@given(packed())
def test_equals_the_obvious_loop(case: dict) -> None:
    targets = future_targets(
        torch.tensor(case["labels"]),
        case["n"],
        loss_mask=as_tensor(case["mask"]),
        document_ends=as_tensor(case["ends"]),
    )
    assert targets.tolist() == obvious(case["labels"], case["n"], case["mask"], case["ends"])


def test_control_the_loop_catches_a_rolled_label() -> None:
    """The bug of Megatron-LM#4495: labels rolled over the whole row, so targets wrap around and cross documents."""
    tokens, labels = row(1, 2, 9, 3, 4), row(2, 9, 3, 4, 5)
    ends = document_ends_from_tokens(tokens, EOD)
    right = obvious(labels.tolist(), 3, None, ends.tolist())
    rolled = torch.stack([labels.roll(-shift, dims=1) for shift in range(3)])
    assert rolled.tolist() != right
    cut = rolled.clone()  # even with the wrapped positions taken out, documents are crossed
    for shift in range(1, 3):
        cut[shift, :, -shift:] = NO
    assert cut.tolist() != right
    assert cut.tolist() == obvious(labels.tolist(), 3, None, None)  # and that is the only difference
    assert built(labels, 3, document_ends=ends) == right
