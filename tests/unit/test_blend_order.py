"""In which order a blend's samples come: megatron-core's within a block, Webster's shares of the blocks."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_megatron import compat
from mtp_megatron.data import blend_order
from mtp_megatron.data.blend_order import BLOCK, BlendOrder, shares

WEIGHTS = {
    "two": [7, 3],
    "equal": [1, 1, 1],
    "one large among many": [100, *[1] * 40],
    "one hardly ever": [1, 1e-6, 2],
}


def normalised(weights: list[float]) -> np.ndarray:
    return np.asarray(weights) / sum(weights)


def first(order: BlendOrder, samples: int, start: int = 0) -> list[tuple[int, int]]:
    return [order[position] for position in range(start, start + samples)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blend_order, "BLOCK", 50)
    return 50


def megatron_blend(sizes: list[int]) -> list[tuple[int, int]]:
    """What megatron-core's BlendedDataset makes of as many samples of each data set; those of no sample have no place
    in it."""
    compat.prepare()
    from megatron.core.datasets.blended_dataset import BlendedDataset

    class Numbered:
        """As much of a MegatronDataset as a blend of it looks at."""

        index_split, unique_identifiers = SimpleNamespace(name="train"), "numbered"

        def __init__(self, size: int) -> None:
            self._size = size

        def __len__(self) -> int:
            return self._size

    config = SimpleNamespace(path_to_cache=None, defer_npy_index_mmap=False, mid_level_dataset_surplus=0.0)
    blend = BlendedDataset([Numbered(size) for size in sizes], sizes, None, config)  # type: ignore[arg-type]
    return list(zip(blend.dataset_index.tolist(), blend.dataset_sample_index.tolist(), strict=True))


def test_the_order_by_hand() -> None:
    """Written out, so that a change of the rule is seen: runs that go on would meet other samples."""
    order = BlendOrder((0.5, 0.3, 0.2))
    assert [order[position][0] for position in range(11)] == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 1]
    assert [order[position][1] for position in range(11)] == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 3]
    assert order.counts(65_536).tolist() == [32_768, 19_661, 13_107]
    assert [order[position] for position in range(65_536, 65_539)] == [(0, 32_768), (1, 19_661), (2, 13_107)]


@pytest.mark.parametrize("block", [0, 7])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_within_a_block_the_order_is_megatron_cores(weights: list[float], block: int) -> None:
    share = normalised(weights)
    before, after = (shares(share, number * BLOCK) for number in (block, block + 1))
    sizes = (after - before).tolist()
    taking_part = [part for part, size in enumerate(sizes) if size]
    theirs = [
        (taking_part[part], int(before[taking_part[part]]) + position)
        for part, position in megatron_blend([sizes[part] for part in taking_part])
    ]
    assert first(BlendOrder(share), BLOCK, block * BLOCK) == theirs


def test_a_data_set_that_comes_in_few_blocks_comes() -> None:
    """In most blocks it has no sample, which megatron-core's function must not be given."""
    order = BlendOrder(normalised(WEIGHTS["one hardly ever"]))
    assert order.counts(12 * BLOCK).tolist()[1] == 0
    assert order.counts(30 * BLOCK).tolist()[1] == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=7), st.integers(0, 400))
@example([1, 1, 1], 4)
@example([5, 5, 1], 17)
def test_shares_are_what_is_due_first(weights: list[int], total: int) -> None:
    """Against a list of everything that is due, in fractions."""
    scale = sum(weights)
    due = sorted(
        (Fraction(2 * number + 1, 2 * weight) * scale, part)
        for part, weight in enumerate(weights)
        for number in range(total)
    )
    expected = [sum(part == other for _, other in due[:total]) for part in range(len(weights))]
    found = shares(np.asarray(weights) / scale, total)
    # Floating point decides otherwise where two are due together, and nowhere else.
    assert found.sum() == total
    if len(due) == total or total == 0 or due[total - 1][0] != due[total][0]:
        assert found.tolist() == expected
    else:
        assert abs(found - expected).max() <= 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=40),
    st.integers(0, 10**10),
    st.integers(0, 200),
)
def test_shares_add_up_and_never_fall(weights: list[float], total: int, more: int) -> None:
    share = normalised(weights)
    before, after = shares(share, total), shares(share, total + more)
    assert (before.sum(), after.sum()) == (total, total + more)
    assert (after >= before).all()
    assert (before >= 0).all()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_each_data_set_gives_its_samples_one_after_another_in_proportion(
    weights: list[float], small_blocks: int
) -> None:
    share = normalised(weights)
    order = BlendOrder(share)
    counts = np.zeros(len(weights), dtype=np.int64)
    for position, (part, within) in enumerate(first(order, 10 * small_blocks), start=1):
        assert within == counts[part]
        counts[part] += 1
        assert order.counts(position).tolist() == counts.tolist()
        assert abs(counts - share * position).max() < 17  # 40 equal ones share what rounding leaves of a block
        if len(weights) <= 3:
            assert abs(counts - share * position).max() < 1.5


def test_any_position_is_found_at_once(small_blocks: int) -> None:
    share = normalised([5, 3, 1])
    in_turn = first(BlendOrder(share), 500)
    order = BlendOrder(share)
    for position in (499, 3, 250, 251, 49, 50, 0):
        assert order[position] == in_turn[position]
    far = 10**12
    part, within = order[far]
    assert within == order.counts(far)[part]
    assert order.counts(far).sum() == far


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 300), st.data())
def test_covered_ends_before_the_first_sample_that_is_not_there(
    weights: list[int], most: int, data: st.DataObject
) -> None:
    available = [data.draw(st.integers(1, 150)) for _ in weights]
    share = normalised(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_order, "BLOCK", 50)
        order = BlendOrder(share)
        expected = 0
        while expected < most and order[expected][1] < available[order[expected][0]]:
            expected += 1
        assert BlendOrder(share).covered(available, most) == expected
