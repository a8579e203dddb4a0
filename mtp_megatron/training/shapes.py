"""Which layers and heads a pipeline rank holds, with their parameters and arithmetic: pure arithmetic on a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_megatron.layout import StageLayout
from mtp_megatron.training.recipe import Recipe, padded_vocab_size

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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


def layer_parameters(recipe: Recipe, sizes: Sizes) -> int:
    """Of one transformer layer on this rank."""
    model = recipe.model
    extra = sizes.queries + 2 * sizes.keys if model.qkv_bias else 0
    extra += 2 * model.attention_head_size if model.qk_norm else 0
    return sum(sizes.matrices) + 2 * sizes.hidden + extra


def head_parameters(recipe: Recipe, sizes: Sizes, stage: StageLayout) -> int:
    """Of the heads of one (virtual) stage on this rank, without norm and unembedding."""
    kind = recipe.heads.kind
    if kind == "transformer":
        return len(stage.heads) * layer_parameters(recipe, sizes)
    further = sum(head > 0 for head in stage.heads)  # head 1 is the trunk's own output
    return further * (sizes.hidden**2 + (sizes.hidden if kind == "medusa" else 0))


def unembedding_copies(recipe: Recipe, stage: StageLayout) -> int:
    """Unembeddings of a (virtual) stage: one, or one for each of its heads; a tied one may be the embedding itself."""
    if not stage.heads:
        return 0
    return len(stage.heads) if recipe.heads.unembedding == "replicated" else 1


def stage_parameters(recipe: Recipe, sizes: Sizes, stage: StageLayout) -> int:
    """Of one (virtual) stage on this rank. Every stage with heads has its own final norm and unembedding."""
    tables = unembedding_copies(recipe, stage) + stage.first
    if stage.first and stage.heads and recipe.model.tied_embeddings:
        tables -= 1
    norm = sizes.hidden if stage.heads else 0
    layers = stage.layers * layer_parameters(recipe, sizes)
    return layers + head_parameters(recipe, sizes, stage) + norm + tables * sizes.rows * sizes.hidden


def attention_flops(sizes: Sizes) -> float:
    """Of one layer's scores and values, forward; causal attention counts half of ``s * s``."""
    return 2.0 * sizes.tokens * sizes.length * sizes.queries


def layer_flops(sizes: Sizes) -> float:
    """Of one layer's forward pass over a microbatch on this rank."""
    return 2.0 * sizes.tokens * sum(sizes.matrices) + attention_flops(sizes)


def heads_flops(recipe: Recipe, sizes: Sizes, stage: StageLayout) -> float:
    """Of the forward pass of a stage's heads over a microbatch on this rank, unembedding included."""
    layers = sum(head_layer_flops(recipe, sizes, head) for head in stage.heads)
    return layers + len(stage.heads) * unembedding_flops(sizes)


def head_layer_flops(recipe: Recipe, sizes: Sizes, head: int) -> float:
    """Of a head's own layer (``head`` from 0), forward over a microbatch on this rank."""
    if recipe.heads.kind == "transformer":
        return layer_flops(sizes)
    if head == 0:  # the trunk's own output
        return 0.0
    # The matrices are replicated over tensor parallel ranks, each with its share of the sequence.
    return 2.0 * sizes.tokens_shard * sizes.hidden**2


def unembedding_flops(sizes: Sizes) -> float:
    """Of one head's logits, forward over a microbatch on this rank."""
    return 2.0 * sizes.tokens * sizes.rows * sizes.hidden
