"""Memory and arithmetic of every pipeline rank by formula: instant, where a trace takes seconds.

Held against the trace (:mod:`.trace`, fused kernels), which runs the code that trains: tests/unit/test_plan_cost.py.
The formulas know what megatron-core's layers keep for their backward pass when attention, norms and SwiGLU are fused.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_megatron.errors import ConfigError
from mtp_megatron.layout import StageLayout
from mtp_megatron.loss import VocabShard, chunk_tokens_for
from mtp_megatron.planning.shapes import Sizes, heads_flops, layer_flops, stage_parameters, stages_of
from mtp_megatron.planning.simulate import order
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.validate import data_parallel_size, num_microbatches


@dataclass(frozen=True)
class RankCost:
    """What one GPU of a pipeline rank takes; bytes, and operations of one microbatch.

    Attributes:
        rank: pipeline rank.
        layers, heads: trunk layers and heads on it.
        parameters: on this GPU.
        weights, main_gradients, master_weights, moments: what stays between steps.
        activations: all that comes and goes during a step, at the most.
        forward_flops, backward_flops: of each chunk.
        head_flops: the part of the last chunk's backward pass that runs the heads.
    """

    rank: int
    layers: int
    heads: int
    parameters: int
    weights: int
    main_gradients: int
    master_weights: int
    moments: int
    activations: int
    forward_flops: tuple[float, ...]
    backward_flops: tuple[float, ...]
    head_flops: float

    @property
    def memory(self) -> int:
        """The step's peak in bytes: the trace's figure."""
        return self.weights + self.main_gradients + self.master_weights + self.moments + self.activations


def rank_costs(recipe: Recipe, world_size: int) -> list[RankCost]:
    """The cost of every pipeline rank.

    Args:
        recipe: resolved and checked.

    Raises:
        ConfigError: a recipe that the formulas do not know.
    """
    check_known(recipe)
    sizes, stages = Sizes.of(recipe), stages_of(recipe)
    ranks = recipe.parallel.pipeline
    return [_rank(recipe, sizes, stages[rank::ranks], rank, world_size) for rank in range(ranks)]


def check_known(recipe: Recipe) -> None:
    """Refuse by name what the formulas do not know; most of it can be traced."""
    model, heads = recipe.model, recipe.heads
    unknown: tuple[tuple[str, object, bool], ...] = (
        ("model.num_experts", model.num_experts, model.num_experts is not None),
        ("model.hidden_dropout", model.hidden_dropout, model.hidden_dropout > 0),
        ("model.attention_dropout", model.attention_dropout, model.attention_dropout > 0),
        ("heads.execution", heads.execution, heads.execution != "deferred"),
        ("heads.trainable", heads.trainable, heads.trainable != "all"),
        ("run.deepspeed", recipe.run.deepspeed, recipe.run.deepspeed is not None),
        ("train.precision", recipe.train.precision, recipe.train.precision == "fp16"),
        ("train.fp8", recipe.train.fp8, recipe.train.fp8 is not None),
        ("train.fp4", recipe.train.fp4, recipe.train.fp4 is not None),
        ("parallel.context", recipe.parallel.context, recipe.parallel.context > 1),
    )
    for field, value, refused in unknown:
        if refused:
            raise ConfigError(field, value, "the cost model does not know it", "Leave it out, or try --trace RANK.")


def _rank(recipe: Recipe, sizes: Sizes, chunks: list[StageLayout], rank: int, world_size: int) -> RankCost:
    parameters = sum(stage_parameters(recipe, sizes, chunk) for chunk in chunks)
    half = recipe.train.precision == "bf16"
    shards = data_parallel_size(recipe, world_size) * recipe.parallel.context if recipe.optimizer.distributed else 1
    layer, heads = layer_flops(sizes), heads_flops(recipe, sizes)
    again = 1 if recipe.train.recompute == "full" else 0
    return RankCost(
        rank=rank,
        layers=sum(chunk.layers for chunk in chunks),
        heads=recipe.heads.n if chunks[-1].last else 0,
        parameters=parameters,
        weights=parameters * sizes.element,
        main_gradients=4 * parameters,
        master_weights=4 * parameters // shards if half else 0,
        moments=8 * parameters // shards,
        activations=_activations(recipe, sizes, chunks, rank, world_size, parameters // shards),
        forward_flops=tuple(chunk.layers * layer for chunk in chunks),
        backward_flops=tuple((2 + again) * chunk.layers * layer + 3 * heads * chunk.last for chunk in chunks),
        head_flops=3 * heads if chunks[-1].last else 0.0,
    )


def _activations(
    recipe: Recipe, sizes: Sizes, chunks: list[StageLayout], rank: int, world_size: int, shard: int
) -> int:
    """The most beyond what stays between steps: over the backward passes in their order, and the optimizer's step."""
    element, shared = sizes.element, sizes.tokens_shard * sizes.hidden
    whole = layer_activations(recipe, sizes)
    kept = element * shared if recipe.train.recompute == "full" else whole
    # A recomputed layer's activations exist only while it goes back; its input was kept anyway.
    transient = _layer_backward(recipe, sizes) + (whole - kept if recipe.train.recompute == "full" else 0)
    batch = 8 * sizes.tokens * (recipe.heads.n + 3)
    # A chunk of no layers (the heads alone) keeps its input, which is z.
    sizes_held = [
        chunk.layers * kept + element * shared * chunk.last + batch * (chunk.first or chunk.last) for chunk in chunks
    ]
    held = most = 0
    for work in order(recipe.parallel.pipeline, rank, num_microbatches(recipe, world_size), len(chunks)):
        if not work.backward:
            held += sizes_held[work.chunk]
            continue
        extra = transient
        if chunks[work.chunk].last:
            extra = max(extra if chunks[work.chunk].layers else 0, _heads(recipe, sizes, whole))
        most = max(most, held + extra)
        held -= sizes_held[work.chunk]
    pipeline = 2 * element * shared if recipe.parallel.pipeline > 1 else 0  # received, and received next
    gathered = (
        element * sizes.tokens * sizes.hidden if recipe.parallel.sequence_parallel else 0
    )  # Megatron's own buffer
    adam = 2 * 4 * min(shard, max(*sizes.matrices, sizes.rows * sizes.hidden))
    return max(most + pipeline + gathered, adam)


def layer_activations(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes that a layer keeps of one microbatch: inputs of both norms and of the four matrices, queries, keys and
    values, SwiGLU's input, and a number per row of norms and attention."""
    a, g = sizes.queries, sizes.keys
    residual = 4 * sizes.tokens_shard * sizes.hidden
    attention = sizes.tokens * (3 * a + 3 * g)  # rotated q and k; the value holds qkv whole; the output
    if recipe.model.qk_norm:
        attention += sizes.tokens * (a + g)
    rows = 4 * (2 * sizes.tokens_shard + sizes.tokens * sizes.attention_heads)
    return sizes.element * (residual + attention + 3 * sizes.tokens * sizes.ffn) + rows


def _layer_backward(recipe: Recipe, sizes: Sizes) -> int:
    """What the MLP's backward pass adds while nothing of its layer is freed: gradients of both matrices' sides."""
    t, h, f = sizes.tokens, sizes.hidden, sizes.ffn
    gathered = t * h if recipe.parallel.sequence_parallel else 0
    second = gathered + 2 * sizes.tokens_shard * h + t * f + f * h
    first = 2 * sizes.tokens_shard * h + t * h + 2 * t * f + 2 * f * h - 3 * t * f
    return sizes.element * max(first, second)


def _heads(recipe: Recipe, sizes: Sizes, layer: int) -> int:
    """The most that the heads add to z: in a head's loss, in its layer's backward pass, or when the unembedding's
    gradient is handed over."""
    heads, element = recipe.heads, sizes.element
    residual, table = sizes.tokens_shard * sizes.hidden, sizes.rows * sizes.hidden
    copies = heads.n if heads.unembedding == "replicated" else 1
    kept = layer * max(map(len, heads.chains)) if heads.kind == "transformer" else 3 * element * residual
    summed = 4 * table * copies + (4 * residual if heads.n > 1 else 0)  # fp32: of the unembedding(s) and of z
    features = element * 2 * residual
    hidden = element * sizes.tokens * sizes.hidden * (2 if recipe.parallel.sequence_parallel else 1)
    shard = VocabShard(0, sizes.rows, sizes.rows)
    chunk = min(sizes.tokens, chunk_tokens_for(shard, heads.loss_chunk_tokens))
    logits = chunk * sizes.rows * (element + (4 if element < 4 else 0))
    outer = element * table if element < 4 else 0
    loss = kept + summed + features + hidden + logits + outer
    backward = kept + summed + element * residual + _layer_backward(recipe, sizes)
    delivery = summed + element * (table * copies + residual)
    return max(loss, backward, delivery)
