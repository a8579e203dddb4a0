"""The tensors behind a rank's memory by formula, alike ones together: what to blame when a plan does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mtp_megatron.planning.cost import RankCost, optimizer_shards
from mtp_megatron.planning.head_memory import logits_chunk
from mtp_megatron.planning.layer_memory import scores
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes, unembedding_copies

CATEGORIES = {
    "weights": "weights",
    "main_gradients": "main gradients",
    "master_weights": "master weights",
    "moments": "Adam moments",
    "activations": "activations",
}
"""What a rank's memory consists of: attributes of :class:`.RankCost`, with their names."""


@dataclass(frozen=True)
class Tensors:
    """Tensors of one shape.

    Attributes:
        what: such as ``the MLP's first matrix``.
        shape: of one of them on this GPU, before the optimizer's sharding.
        count: how many of them.
        bytes: of all of them.
    """

    what: str
    shape: tuple[int, ...]
    count: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.what}, {self.count} x {list(self.shape)} ({self.bytes / 1e9:.1f} GB)"


def largest_category(cost: RankCost) -> str:
    """The attribute of a rank's cost that takes most."""
    return max(CATEGORIES, key=lambda name: getattr(cost, name))


def largest_tensors(recipe: Recipe, cost: RankCost, world_size: int, category: str) -> Tensors:
    """Of one category of a rank: the tensors that take most of it."""
    sizes = Sizes.of(recipe)
    if category == "activations":
        found = list(_activations(recipe, sizes, cost))
    else:
        shards = optimizer_shards(recipe, world_size)
        each = {
            "weights": float(sizes.element),
            "main_gradients": 4.0,
            "master_weights": 4 / shards,
            "moments": 8 / shards,
        }[category]
        found = [
            Tensors(what, shape, count, int(each * count * shape[0] * shape[1]))
            for what, shape, count in matrices(recipe, sizes, cost)
        ]
    return max(found, key=lambda tensors: tensors.bytes)


def matrices(recipe: Recipe, sizes: Sizes, cost: RankCost) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Of a rank's weights: what they are, the shape on this GPU and how many there are."""
    h = sizes.hidden
    layers = cost.layers + (cost.heads if recipe.heads.kind == "transformer" else 0)
    yield "the MLP's first matrix", (2 * sizes.ffn, h), layers
    yield "the MLP's second matrix", (h, sizes.ffn), layers
    yield "the attention's first matrix", (sizes.queries + 2 * sizes.keys, h), layers
    yield "the attention's output matrix", (h, sizes.queries), layers
    chunks = recipe.stages[cost.rank :: recipe.parallel.pipeline]
    yield "the embedding", (sizes.rows, h), sum(chunk.first for chunk in chunks)
    yield "the unembedding", (sizes.rows, h), sum(unembedding_copies(recipe, chunk) for chunk in chunks)


def _activations(recipe: Recipe, sizes: Sizes, cost: RankCost) -> Iterator[Tensors]:
    """What layers keep for their backward passes, and what the heads at work add."""
    chunks = recipe.stages[cost.rank :: recipe.parallel.pipeline]
    count = sum(chunk.layers * held for chunk, held in zip(chunks, cost.peak.in_flight, strict=True))
    flying = f"of {sum(cost.peak.in_flight)} microbatches in flight"
    t, shard, h, f = sizes.tokens, sizes.tokens_shard, sizes.hidden, sizes.ffn
    kept: tuple[tuple[str, tuple[int, int], int], ...] = ((f"layers' inputs {flying}", (shard, h), count),)
    if recipe.train.recompute != "full":
        kept = (
            (f"inputs of norms and matrices {flying}", (shard, h), 4 * count),
            (f"SwiGLU's inputs {flying}", (t, 2 * f), count),
            (f"SwiGLU's outputs {flying}", (t, f), count),
            (f"queries, keys and values {flying}", (t, sizes.queries + 2 * sizes.keys), count),
        )
    for what, shape, number in kept:
        yield Tensors(what, shape, number, sizes.element * number * shape[0] * shape[1])
    if not recipe.train.transformer_engine:
        yield _scores(recipe, sizes, 0 if recipe.train.recompute else count, flying)
    if cost.peak.heads:
        rows, chunk = sizes.rows, logits_chunk(recipe, sizes)
        copies = max(unembedding_copies(recipe, stage) for stage in chunks)
        yield Tensors("the unembedding's fp32 gradient", (rows, h), copies, 4 * copies * rows * h)
        logits = sizes.element + (4 if sizes.element < 4 else 0)
        yield Tensors("a chunk of logits", (chunk, rows), 1, logits * chunk * rows)
    if cost.peak.optimizer:
        yield Tensors("roots of Adam's second moments", (cost.peak.optimizer // 4,), 1, cost.peak.optimizer)


def _scores(recipe: Recipe, sizes: Sizes, count: int, flying: str) -> Tensors:
    """What megatron-core's own attention makes of its scores: kept by ``count`` layers, or of one that goes back."""
    length = sizes.length // recipe.parallel.context
    shape = (sizes.tokens // length, sizes.attention_heads, length, sizes.length)
    if count:
        half = sizes.element if sizes.element < 4 else 0
        what = f"attention scores, which Transformer Engine or train.recompute=selective does not keep, {flying}"
        return Tensors(what, shape, count, (4 + half) * count * scores(sizes))
    return Tensors("attention scores of the layer that goes back", shape, 3, 3 * 4 * scores(sizes))
