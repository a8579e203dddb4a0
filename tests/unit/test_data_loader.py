"""Batches as a pure function of the samples consumed, at every data-parallel size."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.data.dataset import Samples
from mtp_megatron.data.loader import build_train_iterator, build_valid_batches, count_valid_batches
from mtp_megatron.errors import ConfigError


class Numbered:
    """Stands for one epoch of a GPTDataset: sample i says i, None is masked."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        value = -1 if index is None else index
        mask = 0.0 if index is None else 1.0
        return {"tokens": torch.full((2,), value), "loss_mask": torch.full((2,), mask)}


def numbered(size, length=None, seed=3):
    return Samples(Numbered(size), size if length is None else length, seed)


def sample_ids(batches):
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def train_ids(dataset, step, mbs, gbs, rank, size, workers=0):
    """After ``step``; ``gbs`` is one size, or ``(first step, size)`` pairs."""
    return sample_ids(
        build_train_iterator(
            dataset,
            step=step,
            batch_sizes=BatchSizes(((1, gbs),) if isinstance(gbs, int) else tuple(gbs)),
            micro_batch_size=mbs,
            dp_rank=rank,
            dp_size=size,
            workers=workers,
        )
    )


def test_the_layout_by_hand():
    """Two ranks, micro-batches of 2, global batches of 8: written out, so that a change of the rule is seen."""
    dataset = numbered(19)
    assert train_ids(dataset, 0, 2, 8, 0, 2) == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert train_ids(dataset, 0, 2, 8, 1, 2) == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert train_ids(dataset, 1, 2, 8, 1, 2) == [[10, 11], [14, 15]]
    assert train_ids(dataset, 2, 2, 8, 0, 2) == []


def test_the_layout_of_growing_batches_by_hand():
    """Two ranks, micro-batches of 2: two steps of 4, then of 8."""
    dataset, sizes = numbered(27), ((1, 4), (3, 8))
    assert train_ids(dataset, 0, 2, sizes, 0, 2) == [[0, 1], [4, 5], [8, 9], [12, 13], [16, 17], [20, 21]]
    assert train_ids(dataset, 0, 2, sizes, 1, 2) == [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19], [22, 23]]
    assert train_ids(dataset, 1, 2, sizes, 1, 2) == [[6, 7], [10, 11], [14, 15], [18, 19], [22, 23]]
    assert train_ids(dataset, 3, 2, sizes, 0, 2) == [[16, 17], [20, 21]]
    assert train_ids(dataset, 2, 4, sizes, 1, 2) == [[12, 13, 14, 15], [20, 21, 22, 23]], "the first steps are over"


@settings(max_examples=60, deadline=None)
@given(
    mbs=st.sampled_from([1, 2, 3]),
    dp=st.sampled_from([1, 2, 4]),
    accumulate=st.integers(1, 3),
    steps=st.integers(0, 4),
    skip=st.integers(0, 4),
    rest=st.integers(0, 3),
)
def test_a_global_batch_holds_the_same_samples_at_any_size(mbs, dp, accumulate, steps, skip, rest):
    gbs = mbs * 4 * accumulate  # divides by every dp of this test
    consumed = skip * gbs
    dataset = numbered(consumed + steps * gbs + min(rest, gbs - 1))
    per_step = gbs // (mbs * dp)
    ranks = [train_ids(dataset, skip, mbs, gbs, rank, dp) for rank in range(dp)]
    assert {len(rank) for rank in ranks} == {steps * per_step}
    for step in range(steps):
        blocks = [rank[step * per_step : (step + 1) * per_step] for rank in ranks]
        everything = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(blocks)))
        assert everything == list(range(consumed + step * gbs, consumed + (step + 1) * gbs))


@settings(max_examples=60, deadline=None)
@given(
    mbs=st.sampled_from([1, 2, 3]),
    dp=st.sampled_from([1, 2, 4]),
    # Steps of the same size one after another, and what each takes.
    phases=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    skip=st.integers(0, 12),
    rest=st.integers(0, 3),
)
def test_batches_that_change_read_every_sample_once(mbs, dp, phases, skip, rest):
    """Step by step, in order, from wherever a run is resumed."""
    steps = [mbs * 4 * accumulate for count, accumulate in phases for _ in range(count)]
    firsts = [1 + sum(count for count, _ in phases[:number]) for number in range(len(phases))]
    sizes = [(first, mbs * 4 * accumulate) for first, (_, accumulate) in zip(firsts, phases, strict=True)]
    skip = min(skip, len(steps))
    ranks = [train_ids(numbered(sum(steps) + rest % steps[-1]), skip, mbs, sizes, rank, dp) for rank in range(dp)]
    position = sum(steps[:skip])
    for size in steps[skip:]:
        blocks = [[rank.pop(0) for _ in range(size // (mbs * dp))] for rank in ranks]
        assert sorted(itertools.chain(*itertools.chain(*blocks))) == list(range(position, position + size))
        position += size
    assert ranks == [[]] * dp


def test_resuming_continues_the_sequence():
    dataset = numbered(10, length=64)
    whole = train_ids(dataset, 0, 2, 4, 0, 1)
    for step in range(0, 16, 5):
        assert train_ids(numbered(10, length=64), step, 2, 4, 0, 1) == whole[2 * step :]


def test_every_epoch_is_a_whole_pass_in_an_order_of_its_own():
    dataset = numbered(10, length=35)
    order = [int(dataset[i]["tokens"][0]) for i in range(35)]
    epochs = [order[0:10], order[10:20], order[20:30]]
    assert epochs[0] == list(range(10))  # the data set's own shuffle
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert order[20:30] == [int(numbered(10, length=1000)[i]["tokens"][0]) for i in range(20, 30)]
    assert order[20:30] != [int(numbered(10, length=1000, seed=4)[i]["tokens"][0]) for i in range(20, 30)]


def test_there_is_nothing_beyond_the_samples_asked_for():
    with pytest.raises(IndexError, match="sample 35 of 35"):
        numbered(10, length=35)[35]
    with pytest.raises(ConfigError, match="step=9: 36 samples were used before, of 35"):
        train_ids(numbered(10, length=35), 9, 1, 4, 0, 1)


def valid(dataset, gbs, rank=0, size=1, batches=None):
    return list(
        build_valid_batches(
            dataset, micro_batch_size=2, global_batch_size=gbs, dp_rank=rank, dp_size=size, batches=batches
        )
    )


def test_evaluation_uses_each_sample_once_and_fills_up_with_masked_ones():
    dataset = numbered(11)
    assert count_valid_batches(dataset, global_batch_size=8) == 2
    for size in (1, 2, 4):
        batches = [valid(dataset, 8, rank, size) for rank in range(size)]
        assert {len(rank) for rank in batches} == {2 * 8 // (2 * size)}
        samples = [i for rank in batches for ids in sample_ids(rank) for i in ids]
        assert sorted(samples) == [-1] * 5 + list(range(11))
        mask = torch.cat([batch["loss_mask"] for rank in batches for batch in rank])
        assert mask.sum() == 2 * 11


def test_evaluation_is_limited_to_the_first_batches():
    assert sample_ids(valid(numbered(30), 4, batches=2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert count_valid_batches(numbered(3), global_batch_size=4, batches=50) == 1


@pytest.mark.parametrize(
    ("mbs", "gbs", "rank", "size", "message"),
    [
        (2, 6, 0, 2, r"train\.global_batch_size=6: is not a multiple of .* 2 x 2. Set it to a multiple of 4"),
        (0, 6, 0, 1, r"train\.micro_batch_size=0"),
        (1, 0, 0, 1, r"train\.global_batch_size=0"),
        (1, 4, 2, 2, r"dp_rank=2"),
        (2, ((1, 4), (3, 6)), 0, 2, r"train\.global_batch_size=6: is not a multiple of .* 2 x 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(mbs, gbs, rank, size, message):
    with pytest.raises(ConfigError, match=message):
        train_ids(numbered(10), 0, mbs, gbs, rank, size)


def test_loading_leaves_the_global_random_state_alone():
    """Otherwise a resumed run, which starts another loader, would draw other dropout masks."""
    state = torch.get_rng_state()
    train_ids(numbered(8), 0, 2, 4, 0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    list(torch.utils.data.DataLoader(numbered(8)))  # the control: a plain loader does draw from it
    assert not torch.equal(torch.get_rng_state(), state)


def test_reading_ahead_changes_nothing():
    dataset = numbered(10, length=24)
    for sizes in (4, ((1, 4), (3, 8))):
        assert train_ids(dataset, 1, 2, sizes, 1, 2, workers=2) == train_ids(dataset, 1, 2, sizes, 1, 2)


SIGNALLED = """
import os, signal, subprocess, sys
import psutil
from tests.unit.test_data_loader import numbered
from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.data.loader import build_train_iterator

sizes = dict(step=0, micro_batch_size=2, batch_sizes=BatchSizes(((1, 2),)), dp_rank=0, dp_size=1)
batches = build_train_iterator(numbered(100), workers=2, **sizes)
next(batches), next(batches)  # one of each
readers = [str(reader.pid) for reader in psutil.Process().children()]
for name in ("TERM", "INT", "HUP", "USR1"):
    subprocess.run(["kill", f"-{name}", *readers], check=True)  # from another process than their parent
print(len(readers), sum(1 for _ in zip(batches, range(40))))
# The iterator is still alive when the interpreter exits.
"""


def test_readers_leave_requests_to_stop_to_their_parent_and_end_with_it():
    """torchrun and SLURM signal all processes of a rank; an interpreter that exits waits for those that it started."""
    said = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=200)
    assert (said.returncode, said.stdout) == (0, "2 40\n"), said.stderr
