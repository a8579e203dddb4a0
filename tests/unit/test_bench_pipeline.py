"""bench_pipeline without its processes: what it compares, and what it makes of measured times. No times here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import bench_pipeline
from bench_pipeline import END, SPREAD

SIZES = argparse.Namespace(layers=6, heads=8, hidden=128, vocab=16384, sequence=64, microbatches=8)


def test_both_cuts_are_of_one_model() -> None:
    cuts = bench_pipeline.recipes(SIZES)
    end, spread = cuts[END], cuts[SPREAD]
    assert [(stage.layers, len(stage.heads)) for stage in end.stages] == [(6, 0), (0, 8)]
    assert [stage.layers for stage in spread.stages] == [6, 0]  # the whole trunk and some heads on the first stage
    assert all(stage.heads for stage in spread.stages)
    assert end.model == spread.model


def test_simulated_from_measured_passes() -> None:
    """Medians of the passes, so that one slow pass does not count, and the reduction of the rank that waits least."""
    first = {"forward": [1.0, 1.0, 9.0], "backward": [2.0, 2.0, 2.0], "reduction": [0.5, 0.7]}
    last = {"forward": [1.0, 1.0, 1.0], "backward": [2.0, 8.0, 2.0], "reduction": [4.0, 0.1]}
    assert bench_pipeline.simulated([first, last], 5) == pytest.approx(3 * (5 + 1) + (0.5 + 0.1) / 2)


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
