"""Which pipeline stage holds which trunk layers and heads: the letters of ``parallel.layout``.

Megatron's own letters: ``E`` embedding, ``t`` trunk layer, ``m`` multi-token prediction layer (here: a head), ``L``
loss, ``|`` between (virtual) stages. ``'Ettttmm|mmL'`` is four trunk layers and two heads on the first stage, and two
heads on the last. A layout without ``m`` has all heads on the last stage.

The last stage holds the first heads, so that the next-token head is where the model ends; the stages before it hold
the following ones: in the example heads 1 and 2 are on the last stage, heads 3 and 4 on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


@dataclass(frozen=True)
class StageLayout:
    """What one (virtual) pipeline stage holds.

    Attributes:
        layers: number of trunk layers.
        heads: 0-based; ascending.
        first: whether the embedding is on it.
        last: whether the model ends on it.
    """

    layers: int
    heads: tuple[int, ...]
    first: bool
    last: bool


def stage_layouts(
    layout: str | None, *, ranks: int, chunks: int, trunk_layers: int, heads: int
) -> tuple[StageLayout, ...]:
    """All (virtual) stages in the order of the model.

    Stage ``i`` is chunk ``i // ranks`` of pipeline rank ``i % ranks``.

    Args:
        layout: checked by :mod:`mtp_megatron.training.validate_layout`; None: trunk layers evenly, heads at the end.
        ranks: pipeline parallel size.
        chunks: of each pipeline rank (virtual stages); 1 without.
        trunk_layers: read where ``layout`` is None.
        heads: of the model.
    """
    if layout is None:
        layers = [trunk_layers // (ranks * chunks)] * (ranks * chunks)
        counts = [0] * len(layers)
    else:
        parts = expanded(layout)
        layers = [part.count("t") for part in parts]
        counts = [part.count("m") for part in parts]
    if not any(counts):
        counts[-1] = heads
    last = len(layers) - 1
    # Heads are numbered from the last stage on, towards the first.
    return tuple(
        StageLayout(number, tuple(range(after, after + count)), index == 0, index == last)
        for index, (number, count) in enumerate(zip(layers, counts, strict=True))
        for after in (sum(counts[index + 1 :]),)
    )


def heads_are_spread(stages: Sequence[StageLayout]) -> bool:
    """Whether a stage other than the last one holds heads."""
    return any(stage.heads for stage in stages if not stage.last)


def trunk_layout(layout: str | None) -> str | None:
    """What Megatron is told (``pipeline_model_parallel_layout``): ``layout`` as it is, or without its heads."""
    if layout is None or "m" not in layout:
        return layout
    return "|".join(part.replace("m", "") for part in expanded(layout))


def expanded(layout: str) -> list[str]:
    """One string of letters for each (virtual) stage; Megatron's shorthand, ``'Et*3|(tt|)*2m*4L'``, is written out.

    Raises:
        AssertionError: a letter that Megatron does not know (upstream's check).
    """
    if set(layout) <= set("Etm|L"):
        return layout.split("|")
    # Its own parser knows the shorthand; only that is worth the seconds that importing megatron takes.
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    return ["".join(_LETTERS[kind.name] for kind in stage) for stage in stages]
