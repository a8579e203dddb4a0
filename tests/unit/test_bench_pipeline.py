"""bench_pipeline without its processes: what it compares, and what it makes of measured times. No times here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import bench_pipeline
from bench_pipeline import END, INTERLEAVED, SPREAD, STAGES

from mtp_megatron.planning.simulate import order

SIZES = argparse.Namespace(layers=6, heads=8, hidden=128, vocab=16384, sequence=64, microbatches=8)


def test_all_cuts_are_of_one_model() -> None:
    cuts = bench_pipeline.recipes(SIZES)
    end, spread = cuts[END], cuts[SPREAD]
    assert [(stage.layers, len(stage.heads)) for stage in end.stages] == [(6, 0), (0, 8)]
    assert [stage.layers for stage in spread.stages] == [6, 0]  # the whole trunk and some heads on the first stage
    assert all(stage.heads for stage in spread.stages)
    assert end.model == spread.model
    interleaved = cuts[INTERLEAVED]
    assert [(stage.layers, len(stage.heads)) for stage in interleaved.stages] == [(3, 0), (3, 0), (0, 4), (0, 4)]
    assert {name for names in bench_pipeline.WORLDS for name in names} == set(cuts)


def test_simulated_from_measured_passes() -> None:
    """Medians of the passes, so that one slow pass does not count, and the reduction of the rank that waits least."""
    first = {"forward": [[1.0, 1.0, 9.0]], "backward": [[2.0, 2.0, 2.0]], "reduction": [0.5, 0.7]}
    last = {"forward": [[1.0, 1.0, 1.0]], "backward": [[2.0, 8.0, 2.0]], "reduction": [4.0, 0.1]}
    assert bench_pipeline.simulated([first, last], 5) == pytest.approx(3 * (5 + 1) + (0.5 + 0.1) / 2)


@pytest.mark.parametrize("cut", [SPREAD, INTERLEAVED])
@pytest.mark.parametrize("rank", range(STAGES))
def test_passes_are_counted_to_their_chunks(cut: str, rank: int) -> None:
    """In the order of the schedule; those of the first step are left out."""
    recipe = bench_pipeline.recipes(SIZES)[cut]
    works = order(STAGES, rank, SIZES.microbatches, recipe.parallel.virtual_pipeline or 1)
    watch = bench_pipeline.Stopwatch()
    watch.passes = [100.0] * len(works) + 2 * [10.0 * work.chunk + work.backward for work in works]
    chunks = range(recipe.parallel.virtual_pipeline or 1)
    times = 2 * SIZES.microbatches
    assert watch.by_chunk(rank, recipe) == {
        "forward": [times * [10.0 * chunk] for chunk in chunks],
        "backward": [times * [10.0 * chunk + 1] for chunk in chunks],
    }


def test_the_schedules_functions_are_put_back() -> None:
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core.pipeline_parallel import schedules

    before = schedules.forward_step, schedules.backward_step
    with bench_pipeline.Stopwatch().running():
        assert schedules.forward_step is not before[0]
    assert (schedules.forward_step, schedules.backward_step) == before


def test_calls_are_timed() -> None:
    seconds: list[float] = []
    assert bench_pipeline.timed(sum, seconds)([1, 2]) == 3
    assert len(seconds) == 1
    assert seconds[0] >= 0
