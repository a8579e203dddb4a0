"""The schedule simulator against closed forms, and its order against megatron-core's."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.picture import save_picture
from mtp_megatron.planning.simulate import in_flight, least_seconds, order, simulate


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 8), (4, 3), (8, 32)])
def test_the_bubble_of_even_stages(ranks: int, microbatches: int) -> None:
    schedule = simulate([1.0] * ranks, [2.0] * ranks, ranks=ranks, microbatches=microbatches)
    assert schedule.seconds == pytest.approx(3 * (microbatches + ranks - 1))
    assert schedule.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 16, 2)])
def test_the_bubble_of_interleaved_even_stages(ranks: int, microbatches: int, chunks: int) -> None:
    stages = ranks * chunks
    schedule = simulate([1.0] * stages, [2.0] * stages, ranks=ranks, microbatches=microbatches)
    assert schedule.bubble == pytest.approx((ranks - 1) / (chunks * microbatches + ranks - 1))


def test_a_slow_last_stage_sets_the_pace() -> None:
    """It never waits between a forward pass through the others and their last backward."""
    schedule = simulate([1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 10.0], ranks=4, microbatches=16)
    assert schedule.seconds == pytest.approx(3 * 1.0 + 16 * 15.0 + 3 * 2.0)
    assert schedule.busy(3) == pytest.approx(16 * 15.0)


def test_latency_delays_each_hop() -> None:
    one = simulate([1.0] * 4, [2.0] * 4, ranks=4, microbatches=1, latency=0.25)
    assert one.seconds == pytest.approx(4 * 3 + 6 * 0.25)


@pytest.mark.parametrize("chunks", [1, 2])
def test_every_pass_runs_once_and_after_what_it_needs(chunks: int) -> None:
    ranks, microbatches = 4, 8
    stages = ranks * chunks
    forward = [1.0 + 0.3 * stage for stage in range(stages)]
    schedule = simulate(forward, [2.0 * time for time in forward], ranks=ranks, microbatches=microbatches)
    ends = {(p.backward, p.chunk * ranks + p.rank, p.microbatch): p for p in schedule.passes}
    assert len(ends) == len(schedule.passes) == 2 * stages * microbatches
    for (backward, stage, microbatch), work in ends.items():
        needed = (True, stage + 1, microbatch) if backward else (False, stage - 1, microbatch)
        if needed in ends:
            assert work.start >= ends[needed].end
        if backward:
            assert work.start >= ends[False, stage, microbatch].end
    for rank in range(ranks):
        mine = [work for work in schedule.passes if work.rank == rank]
        assert all(after.start >= before.end for before, after in itertools.pairwise(mine))


def test_1f1b_holds_as_many_microbatches_as_stages_lie_ahead() -> None:
    assert [in_flight(4, rank, 8) for rank in range(4)] == [{(0, (held,))} for held in (4, 3, 2, 1)]
    assert in_flight(4, 0, 2) == {(0, (2,))}


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (2, 5), (4, 3), (8, 2)])
def test_more_microbatches_than_fill_the_pipeline_are_not_held(ranks: int, chunks: int) -> None:
    """Only four groups of microbatches are walked through; all of 16 hold no more, and some moment as much."""
    for rank in range(ranks):
        held, moments = [0] * chunks, set()
        for work in order(ranks, rank, 16 * ranks, chunks):
            if work.backward:
                moments.add((work.chunk, tuple(held)))
            held[work.chunk] += -1 if work.backward else 1
        most = in_flight(ranks, rank, 16 * ranks, chunks)
        assert most <= moments
        for chunk, counts in moments:
            assert any(chunk == c and all(a >= b for a, b in zip(m, counts, strict=True)) for c, m in most)


def test_the_bound_of_a_step_is_below_it_and_close_where_one_stage_rules() -> None:
    generator = random.Random(0)
    for _ in range(40):
        ranks, chunks = generator.choice([(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
        forward = [generator.random() for _ in range(ranks * chunks)]
        backward = [2 * generator.random() for _ in forward]
        settings = {"ranks": ranks, "microbatches": 2 * ranks, "latency": 0.1 * generator.random()}
        assert least_seconds(forward, backward, **settings) <= simulate(forward, backward, **settings).seconds + 1e-9
    slow = {"forward": [1.0, 1.0, 5.0], "backward": [2.0, 2.0, 9.0], "ranks": 3, "microbatches": 9}
    assert least_seconds(**slow) == pytest.approx(simulate(**slow).seconds)


def test_the_interleaved_order_is_megatron_cores() -> None:
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core.pipeline_parallel import schedules

    ranks, microbatches, chunks = 4, 8, 3
    table = schedules.get_schedule_table(microbatches, chunks, ranks)
    mine = order(ranks, 1, microbatches, chunks)
    assert [(p.microbatch, p.chunk) for p in mine if not p.backward] == [tuple(row) for row in table]
    assert [(p.microbatch, chunks - 1 - p.chunk) for p in mine if p.backward] == [tuple(row) for row in table]
    warmup = next(index for index, p in enumerate(mine) if p.backward) - 1
    assert warmup == 2 * (ranks - 1 - 1) + (chunks - 1) * ranks


@pytest.mark.parametrize(
    "bad", [{"forward": [1.0] * 3}, {"backward": [1.0]}, {"forward": [-1.0] * 4}, {"microbatches": 0}]
)
def test_impossible_pipelines_are_refused(bad: dict) -> None:
    good = {"forward": [1.0] * 4, "backward": [2.0] * 4, "microbatches": 4}
    with pytest.raises(ValueError, match=r"times for|negative|microbatches"):
        simulate(**{**good, **bad}, ranks=2)  # type: ignore[arg-type]


def test_interleaving_takes_whole_groups_of_microbatches() -> None:
    with pytest.raises(ValueError, match="4 at a time"):
        order(4, 0, 6, chunks=2)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_written(tmp_path: Path, suffix: str) -> None:
    schedule = simulate([1.0] * 4, [2.0, 2.0, 2.0, 4.0], ranks=2, microbatches=4)
    path = tmp_path / f"pipeline.{suffix}"
    save_picture(path, schedule, "two stages", head_seconds=[0.0, 0.0, 0.0, 2.0])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    save_picture(path, schedule, "two stages")
    assert path.read_bytes() != content  # without the heads' colour


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="picture"):
        save_picture(tmp_path / "pipeline.txt", simulate([1.0], [2.0], ranks=1, microbatches=1), "one")
