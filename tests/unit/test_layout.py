"""Which stage holds which layers and heads."""

from __future__ import annotations

import pytest

from mtp_megatron.layout import StageLayout, expanded, heads_are_spread, stage_layouts, trunk_layout


def stages(layout: str | None, *, ranks: int, chunks: int = 1, layers: int = 4, heads: int = 4) -> list[tuple]:
    found = stage_layouts(layout, ranks=ranks, chunks=chunks, trunk_layers=layers, heads=heads)
    assert [stage.first for stage in found] == [True] + [False] * (len(found) - 1)
    assert [stage.last for stage in found] == [False] * (len(found) - 1) + [True]
    return [(stage.layers, stage.heads) for stage in found]


def test_the_last_stage_holds_the_first_heads() -> None:
    assert stages("Ettttmm|mmL", ranks=2) == [(4, (2, 3)), (0, (0, 1))]
    assert stages("Ett|ttm|mm|mL", ranks=4) == [(2, ()), (2, (3,)), (0, (1, 2)), (0, (0,))]
    assert stages("Et|t|tt|mmm|m|L", ranks=3, chunks=2)[3:] == [(0, (1, 2, 3)), (0, (0,)), (0, ())]


@pytest.mark.parametrize(
    ("layout", "ranks", "chunks", "layers"),
    [("Ettt|tL", 2, 1, [3, 1]), (None, 2, 1, [2, 2]), (None, 2, 2, [1, 1, 1, 1]), (None, 1, 1, [4])],
)
def test_without_m_all_heads_are_on_the_last_stage(
    layout: str | None, ranks: int, chunks: int, layers: list[int]
) -> None:
    found = stages(layout, ranks=ranks, chunks=chunks)
    assert [number for number, _ in found] == layers
    assert [owned for _, owned in found] == [()] * (len(layers) - 1) + [(0, 1, 2, 3)]


def test_spread_means_heads_before_the_last_stage() -> None:
    def spread(layout: str | None) -> bool:
        return heads_are_spread(stage_layouts(layout, ranks=2, chunks=1, trunk_layers=2, heads=2))

    assert spread("Ettm|mL")
    assert not spread("Ett|mmL")
    assert not spread("Et|tL")
    assert not spread(None)


def test_megatron_hears_of_the_trunk_alone() -> None:
    assert trunk_layout("Ettttmm|mmL") == "Etttt|L"
    assert trunk_layout("Ett|ttm|mm|mL") == "Ett|tt||L"
    assert trunk_layout("Et*3|(tt|)*2L") == "Et*3|(tt|)*2L"  # as the user wrote it
    assert trunk_layout(None) is None


def test_shorthand_is_megatrons_own() -> None:
    assert expanded("Et*3|(tt|)*2m*4L") == ["Ettt", "tt", "tt", "mmmmL"]
    assert expanded("Ett,m|mL") == ["Ettm", "mL"]
    assert trunk_layout("Et*3|(tt|)*2m*4L") == "Ettt|tt|tt|L"
    assert stages("Et*2m*2|t*2m*2L", ranks=2) == [(2, (2, 3)), (2, (0, 1))]


def test_a_stage_says_what_it_holds() -> None:
    assert stage_layouts("Etm|mL", ranks=2, chunks=1, trunk_layers=1, heads=2) == (
        StageLayout(layers=1, heads=(1,), first=True, last=False),
        StageLayout(layers=0, heads=(0,), first=False, last=True),
    )
