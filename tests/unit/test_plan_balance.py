"""Layers and heads over stages: against every possible layout of small pipelines."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from mtp_megatron.layout import stage_layouts
from mtp_megatron.planning.balance import as_layout, balance, slowest


def compositions(total: int, least: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every way to share ``total`` among places that take some at least."""
    if not least:
        if total == 0:
            yield ()
        return
    for own in range(least[0], total + 1):
        for rest in compositions(total - own, least[1:]):
            yield own, *rest


def least_by_trying(ranks: int, chunks: int, layers: int, heads: int, head: float, head_stages: int) -> float | None:
    stages, loads = ranks * chunks, []
    first = stages - head_stages
    if first < 0:
        return None
    for more in compositions(heads, (1,) * head_stages):
        for counts in compositions(layers, (*(1,) * first, 0)):
            layout = [
                (counts[stage] if stage <= first else 0, more[stage - first] if stage >= first else 0)
                for stage in range(stages)
            ]
            loads.append(slowest(layout, ranks, 1.0, head))
    return min(loads, default=None)


def test_no_layout_has_a_faster_slowest_rank() -> None:
    generator, compared = random.Random(1), 0
    for _ in range(120):
        ranks, chunks = generator.choice([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2)])
        layers, heads, head_stages = (generator.randint(1, most) for most in (8, 4, 4))
        head = generator.choice([0.5, 1.0, 2.4, 3.7])
        found = balance(
            ranks=ranks, chunks=chunks, layers=layers, heads=heads, layer=1.0, head=head, head_stages=head_stages
        )
        least = least_by_trying(ranks, chunks, layers, heads, head, head_stages)
        assert (least is None) == (not found)
        for counts in found:
            compared += 1
            assert slowest(counts, ranks, 1.0, head) == pytest.approx(least)
            assert [sum(column) for column in zip(*counts, strict=True)] == [layers, heads]
            assert all(t + m for t, m in counts)
    assert compared > 60


@pytest.mark.parametrize(
    ("ranks", "chunks", "head_stages", "layout"),
    [
        (2, 1, 1, "Etttttt|L"),  # a head weighs three layers
        (2, 1, 2, "Ettttttm|mL"),
        (2, 2, 2, "Ettt|ttt|m|mL"),
    ],
)
def test_layouts_in_megatrons_letters(ranks: int, chunks: int, head_stages: int, layout: str) -> None:
    sizes = {"ranks": ranks, "chunks": chunks, "heads": 2}
    found = balance(**sizes, layers=6, layer=1.0, head=3.0, head_stages=head_stages)
    written = as_layout(found[0])
    assert written == layout
    stages = stage_layouts(written, ranks=ranks, chunks=chunks, trunk_layers=6, heads=2)
    assert [(stage.layers, len(stage.heads)) for stage in stages] == found[0]


def test_there_may_be_no_such_layout() -> None:
    assert balance(ranks=4, chunks=2, layers=5, heads=2, layer=1.0, head=1.0, head_stages=2) == []
    assert balance(ranks=2, chunks=1, layers=5, heads=2, layer=1.0, head=1.0, head_stages=3) == []
