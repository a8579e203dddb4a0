"""Trunk layers and heads on the stages of a pipeline, so that its slowest rank does as little as possible.

Layers are alike and heads are alike, so a layout is a number of each on every (virtual) stage. A head follows all
trunk layers: the stages with heads are the last ones, and only the first of those may have layers too.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

Counts = list[tuple[int, int]]
"""Layers and heads of each global stage; stage ``i`` is chunk ``i // ranks`` of pipeline rank ``i % ranks``."""


def balance(
    *, ranks: int, chunks: int, layers: int, heads: int, layer: float, head: float, head_stages: int
) -> list[Counts]:
    """Layouts with ``head_stages`` stages of heads whose slowest rank is the fastest; empty: there is none.

    Exact: the least limit under which :func:`_under` finds a place for everything is found by bisection over all
    sums that a rank can have. No stage is empty. The layouts differ in where a rank's layers are among its own
    stages, which the interleaved schedule may like better or worse: the simulator knows.

    Args:
        layers, heads: how many in all.
        layer, head: what one of them takes, in any one unit.
        head_stages: 1: all heads on the last stage.
    """
    stages = ranks * chunks
    if not 1 <= head_stages <= min(heads, stages) or layers < stages - head_stages:
        return []
    limits = sorted({count * layer + more * head for count in range(layers + 1) for more in range(heads + 1)})

    def per_rank(limit: float) -> list[int] | None:
        return _under(limit * (1 + 1e-12), ranks, chunks, layers, heads, layer, head, head_stages)

    index = bisect.bisect_left(limits, True, key=lambda limit: per_rank(limit) is not None)
    heads_of = per_rank(limits[index]) if index < len(limits) else None
    if heads_of is None:
        return []
    layers_of = _filled(heads_of, ranks, chunks, layers, layer, head, head_stages)
    found: list[Counts] = []
    for by_chunk in (False, True) if chunks > 1 else (False,):
        counts = _placed(heads_of, layers_of, ranks, chunks, layer, head, head_stages, by_chunk)
        if counts not in found:
            found.append(counts)
    return found


def slowest(counts: Sequence[tuple[int, int]], ranks: int, layer: float, head: float) -> float:
    """What the slowest rank takes."""
    return max(sum(t * layer + m * head for t, m in counts[rank::ranks]) for rank in range(ranks))


def as_layout(counts: Sequence[tuple[int, int]]) -> str:
    """``parallel.layout``; without the letter ``m`` where all heads are on the last stage, as Megatron writes it."""
    spread = any(m for _, m in counts[:-1])
    return "E" + "|".join("t" * t + "m" * (m if spread else 0) for t, m in counts) + "L"


def _with_trunk(rank: int, ranks: int, chunks: int, head_stages: int) -> list[int]:
    """A rank's stages that may have trunk layers: those before the heads', and the first of the heads'."""
    return list(range(rank, ranks * chunks - head_stages + 1, ranks))


def _least(rank: int, ranks: int, chunks: int, head_stages: int) -> tuple[int, int]:
    """The fewest layers and heads of a rank: one on each of its stages."""
    trunk = len(range(rank, ranks * chunks - head_stages, ranks))
    return trunk, chunks - trunk


def _under(
    limit: float, ranks: int, chunks: int, layers: int, heads: int, layer: float, head: float, head_stages: int
) -> list[int] | None:
    """Heads of each rank such that no rank exceeds the limit and all layers find a place; None: impossible.

    Over the ranks in turn, for each number of heads placed so far: the most layers that fit beside them.
    """
    most: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for rank in range(ranks):
        least_layers, least_heads = _least(rank, ranks, chunks, head_stages)
        can_have_layers = bool(_with_trunk(rank, ranks, chunks, head_stages))
        following: dict[int, tuple[int, list[int]]] = {}
        for placed, (room, before) in most.items():
            for own in range(least_heads, (heads - placed if least_heads else 0) + 1):
                left = limit - own * head
                fit = int(left // layer) if left >= 0 else -1
                fit = min(fit, layers if can_have_layers else 0)
                if fit < least_layers:
                    break
                if placed + own not in following or following[placed + own][0] < room + fit:
                    following[placed + own] = (room + fit, [*before, own])
        most = following
    room, heads_of = most.get(heads, (-1, []))
    return heads_of if room >= layers else None


def _filled(
    heads_of: Sequence[int], ranks: int, chunks: int, layers: int, layer: float, head: float, head_stages: int
) -> list[int]:
    """Layers of each rank: one after another to the rank that has least to do, the last one among equals.

    (The first ranks hold most microbatches under 1F1B, and the embedding.)
    """
    counts = [_least(rank, ranks, chunks, head_stages)[0] for rank in range(ranks)]
    able = [rank for rank in range(ranks) if _with_trunk(rank, ranks, chunks, head_stages)]
    for _ in range(layers - sum(counts)):
        counts[min(able, key=lambda rank: (heads_of[rank] * head + counts[rank] * layer, -rank))] += 1
    return counts


def _placed(
    heads_of: Sequence[int],
    layers_of: Sequence[int],
    ranks: int,
    chunks: int,
    layer: float,
    head: float,
    head_stages: int,
    by_chunk: bool,
) -> Counts:
    """Each rank's layers and heads on its stages: evenly, the odd layers on the first ones. With ``by_chunk`` a layer
    goes where it adds least to the slowest stage of its chunk, and then where least is: all ranks work on the same
    chunk at about the same time."""
    stages = ranks * chunks
    layers, heads = [0] * stages, [0] * stages
    for rank in range(ranks):
        places = [stage for stage in range(rank, stages, ranks) if stage >= stages - head_stages]
        for index in range(heads_of[rank]):
            heads[places[index % len(places)]] += 1
    for stage in range(stages - head_stages):
        layers[stage] = 1

    def load(stage: int) -> float:
        return layers[stage] * layer + heads[stage] * head

    longest = [max(load(stage) for stage in range(chunk * ranks, (chunk + 1) * ranks)) for chunk in range(chunks)]

    def price(stage: int) -> tuple[float, float, int]:
        more = load(stage) + layer
        return max(0.0, more - longest[stage // ranks]) if by_chunk else 0.0, more, stage

    for rank in sorted(range(ranks), key=lambda rank: -heads_of[rank]):
        # Layers beside heads make one stage long: only where the rank has no other.
        places = [stage for stage in _with_trunk(rank, ranks, chunks, head_stages) if not heads[stage]] or [
            stages - head_stages
        ]
        for _ in range(layers_of[rank] - sum(layers[rank::ranks])):
            stage = min(places, key=price)
            layers[stage] += 1
            longest[stage // ranks] = max(longest[stage // ranks], load(stage))
    return list(zip(layers, heads, strict=True))
