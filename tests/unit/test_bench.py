"""What the benchmarks share: the memory counters, the timing in turns, the result's table, limits and JSON."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from bench.memory import LiveTensors, allocator_peak, live_peak
from bench.report import Column, Limit, Result
from bench.timing import interleave

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KIB // 4)


def test_live_tensors_follows_storages_to_their_end() -> None:
    with LiveTensors() as live:
        first = kib(8)
        second = kib(4)
        assert live.now == 12 * KIB
        view = first.view(2, -1)[0]
        del first
        assert live.now == 12 * KIB, "a view keeps the storage"
        del view
        assert live.now == 4 * KIB
        second = second + 1  # old and new at once
        assert live.now == 4 * KIB
    assert live.peak == 12 * KIB


def test_live_tensors_leaves_out_what_comes_from_outside() -> None:
    parameter, buffer = kib(8), kib(8)
    with LiveTensors() as live:
        kept = parameter.view(2, -1)[1]
        buffer.add_(1)
        torch.mul(parameter, 2, out=buffer)
        assert live.now == live.peak == 0
        doubled = kept * 2
    assert live.peak == doubled.untyped_storage().nbytes() == 4 * KIB


def test_live_tensors_counts_what_only_the_graph_holds() -> None:
    weight = kib(1).requires_grad_()
    with LiveTensors() as live:
        loss = (weight * 2).exp().sum()  # exp keeps its result for the backward pass
        gc.collect()
        assert live.now == KIB + 4
        loss.backward()
        del loss
        gc.collect()
        assert live.now == KIB, "only the gradient is left"


def test_live_tensors_sees_a_storage_grow() -> None:
    with LiveTensors() as live:
        small = kib(1)
        torch.add(torch.ones(2 * KIB), 1, out=small.resize_(0))
        assert live.now == 8 * KIB


def test_live_tensors_explains_its_peak() -> None:
    with LiveTensors(explain=True) as live:
        small, large = kib(1), kib(2)
    assert [entry[0] for entry in live.at_peak] == [2 * KIB, KIB]
    assert live.at_peak[0][1:] == ((512,), "torch.float32", "aten.zeros.default")
    del small, large


def test_live_tensors_agrees_with_the_allocator() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 512))
    inputs = torch.randn(256, 64)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        torch.nn.functional.cross_entropy(network(inputs), torch.zeros(256, dtype=torch.long)).backward()

    step()
    assert live_peak(step) == pytest.approx(allocator_peak(step), rel=0.02)


def test_allocator_peak_counts_the_most_that_was_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            kib(64)
        held = kib(64), kib(32)
        del held

    assert allocator_peak(work) == 96 * KIB


def test_interleave_takes_turns_and_leaves_the_warmup_out() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 3, warmup=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {len(entry.wall) for entry in times.values()} == {len(entry.cpu) for entry in times.values()} == {3}


def test_result_prints_a_table_and_fails_on_a_broken_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("Title", {"hidden": 8}, [Column("name", "name"), Column("value", "MiB", ".1f")])
    result.rows = [{"name": "one", "value": 1.25}, {"name": "two", "value": None}]
    result.limits = [Limit("one / two", 0.5, 1.0)]
    path = tmp_path / "result.json"
    assert result.finish(argparse.Namespace(json=str(path))) == 0
    printed = capsys.readouterr().out
    assert "| name | MiB |\n| ---- | --: |\n| one  | 1.2 |\n| two  |   - |" in printed
    assert "holds: one / two = 0.500 (at most 1)" in printed
    for key in ("command: ", "megatron-core ", "torch ", "device: ", "threads: ", "date: "):
        assert key in printed
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["rows"] == result.rows
    assert written["limits"] == [{"what": "one / two", "value": 0.5, "bound": 1.0, "holds": True}]

    result.limits = [Limit("one / two", 1.5, 1.0)]
    assert result.finish(argparse.Namespace(json="-")) == 1
    assert "BROKEN: one / two = 1.500" in capsys.readouterr().out
