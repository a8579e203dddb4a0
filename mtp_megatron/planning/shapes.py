"""Which layers and heads a pipeline rank holds, with their parameters and arithmetic: pure arithmetic on a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_megatron.layout import StageLayout
from mtp_megatron.training.recipe import Recipe, padded_vocab_size

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Sizes:
    """What one rank works on; the recipe must be resolved.

    Attributes:
        hidden: ``h``.
        queries, keys: channels of this rank's query and key/value heads, ``a`` and ``g``.
        attention_heads: of this rank.
        ffn: this rank's SwiGLU width, ``f``.
        rows: of the unembedding on this rank, ``V/tp``.
        tokens: of a microbatch on this rank, ``b * s/cp``.
        tokens_shard: those whose residual stream it holds: ``tokens/tp`` under sequence parallelism.
        length: of a sequence, ``s``.
        element: bytes of an activation.
    """

    hidden: int
    queries: int
    keys: int
    attention_heads: int
    ffn: int
    rows: int
    tokens: int
    tokens_shard: int
    length: int
    element: int

    @classmethod
    def of(cls, recipe: Recipe) -> Sizes:
        model, parallel = recipe.model, recipe.parallel
        groups, ffn = model.num_query_groups, model.ffn_hidden_size
        if groups is None or ffn is None:
            raise ValueError("resolve the recipe first")
        size, tensor = model.attention_head_size, parallel.tensor
        tokens = recipe.train.micro_batch_size * recipe.train_seq_length // parallel.context
        return cls(
            hidden=model.hidden_size,
            queries=size * model.num_attention_heads // tensor,
            keys=size * groups // tensor,
            attention_heads=model.num_attention_heads // tensor,
            ffn=ffn // tensor,
            rows=padded_vocab_size(recipe) // tensor,
            tokens=tokens,
            tokens_shard=tokens // tensor if parallel.sequence_parallel else tokens,
            length=recipe.train_seq_length,
            element=BYTES[recipe.train.precision],
        )

    @property
    def matrices(self) -> tuple[int, int, int, int]:
        """Elements of a layer's weight matrices on this rank: qkv, attention output, first and second of the MLP."""
        h = self.hidden
        return (self.queries + 2 * self.keys) * h, self.queries * h, 2 * self.ffn * h, self.ffn * h


def stages_of(recipe: Recipe) -> list[StageLayout]:
    """All (virtual) stages in the order of the model; stage ``i`` is chunk ``i // PP`` of pipeline rank ``i % PP``."""
    return list(recipe.stages)


def layer_parameters(recipe: Recipe, sizes: Sizes) -> int:
    """Of one transformer layer on this rank."""
    model = recipe.model
    extra = sizes.queries + 2 * sizes.keys if model.qkv_bias else 0
    extra += 2 * model.attention_head_size if model.qk_norm else 0
    return sum(sizes.matrices) + 2 * sizes.hidden + extra


def head_parameters(recipe: Recipe, sizes: Sizes) -> int:
    """Of all heads on this rank, without norm and unembedding."""
    heads = recipe.heads
    if heads.kind == "transformer":
        return heads.n * layer_parameters(recipe, sizes)
    return (heads.n - 1) * (sizes.hidden**2 + (sizes.hidden if heads.kind == "medusa" else 0))


def stage_parameters(recipe: Recipe, sizes: Sizes, stage: StageLayout) -> int:
    """Of one (virtual) stage on this rank."""
    table = sizes.rows * sizes.hidden
    total = stage.layers * layer_parameters(recipe, sizes)
    if stage.first:
        total += table
    if stage.last:
        shared_here = recipe.model.tied_embeddings and stage.first
        copies = recipe.heads.n if recipe.heads.unembedding == "replicated" else 1
        total += head_parameters(recipe, sizes) + sizes.hidden + (copies - shared_here) * table
    return total


def layer_flops(sizes: Sizes) -> float:
    """Of one layer's forward pass over a microbatch on this rank; causal attention counts half of ``s * s``."""
    context_share = sizes.tokens * sizes.length
    return 2.0 * sizes.tokens * sum(sizes.matrices) + 2.0 * context_share * sizes.queries


def heads_flops(recipe: Recipe, sizes: Sizes) -> float:
    """Of all heads' forward pass over a microbatch on this rank, unembedding included."""
    heads = recipe.heads
    if heads.kind == "transformer":
        layers = heads.n * layer_flops(sizes)
    else:  # the matrices are replicated over tensor parallel ranks, each with its share of the sequence
        layers = 2.0 * (heads.n - 1) * sizes.tokens_shard * sizes.hidden**2
    return layers + 2.0 * heads.n * sizes.tokens * sizes.rows * sizes.hidden
