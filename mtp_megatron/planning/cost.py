"""Memory and arithmetic of every pipeline rank by formula: instant, where a trace takes seconds.

Held against the trace (:mod:`.trace`), which runs the code that trains: tests/unit/test_plan_cost.py. What a layer
keeps for its backward pass (:mod:`.layer_memory`) depends on its kernels: fused ones where the recipe asks for
Transformer Engine, else megatron-core's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mtp_megatron.errors import ConfigError
from mtp_megatron.layout import StageLayout
from mtp_megatron.planning.head_memory import heads_memory
from mtp_megatron.planning.layer_memory import (
    documents_mask,
    layer_activations,
    layer_backward,
    scores_buffer,
)
from mtp_megatron.planning.simulate import in_flight
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import (
    Sizes,
    attention_flops,
    heads_flops,
    layer_flops,
    stage_parameters,
)
from mtp_megatron.training.validate import data_parallel_size, num_microbatches

_USERBUFFERS = 12
"""Buffers of ``[tokens, h]`` that Transformer Engine's ``initialize_ub`` makes outside torch's allocator."""


@dataclass(frozen=True)
class Peak:
    """What comes and goes during a step, at its fullest moment; bytes.

    Attributes:
        in_flight: microbatches of each chunk whose backward pass has not ended.
        kept: for those: activations of layers, z, targets and the documents' masks.
        layer: what a layer's backward pass, or the embedding's, adds; 0 where heads are at work.
        heads: what the heads of a microbatch add; 0 where a layer goes back.
        exchange: buffers between ranks, and Megatron's one buffer, which stays.
        optimizer: its intermediate results, where they outweigh all the above (of which that buffer is left then).
    """

    in_flight: tuple[int, ...]
    kept: int = 0
    layer: int = 0
    heads: int = 0
    exchange: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.layer + self.heads + self.exchange + self.optimizer


@dataclass(frozen=True)
class RankCost:
    """What one GPU of a pipeline rank takes; bytes, and operations of one microbatch.

    Attributes:
        rank: pipeline rank.
        layers, heads: trunk layers and heads on it.
        parameters: on this GPU; every chunk with heads has an unembedding of its own.
        weights, main_gradients, master_weights, moments: what stays between steps.
        activations: all that comes and goes during a step, at the most; ``peak`` says what it is.
        forward_flops, backward_flops: of each chunk.
        head_flops: of each chunk, the part of its backward pass that runs its heads.
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
    peak: Peak
    forward_flops: tuple[float, ...]
    backward_flops: tuple[float, ...]
    head_flops: tuple[float, ...]

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
    sizes, stages = Sizes.of(recipe), recipe.stages
    ranks = recipe.parallel.pipeline
    return [_rank(recipe, sizes, list(stages[rank::ranks]), rank, world_size) for rank in range(ranks)]


def check_known(recipe: Recipe) -> None:
    """Refuse by name what the formulas do not know; some of it can be traced.

    Raises:
        ConfigError: names ``--trace`` where it takes the recipe.
    """
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
    )
    for field, value, refused in unknown:
        if refused:
            remedy = "Leave it out, or try --trace RANK." if _traceable(recipe) else "Leave it out."
            raise ConfigError(field, value, "the cost model does not know it", remedy)


def _traceable(recipe: Recipe) -> bool:
    from mtp_megatron.planning.trace import check_traceable

    try:
        check_traceable(recipe, 0, 1)
    except ConfigError:
        return False
    return True


def _rank(recipe: Recipe, sizes: Sizes, chunks: list[StageLayout], rank: int, world_size: int) -> RankCost:
    parameters = sum(stage_parameters(recipe, sizes, chunk) for chunk in chunks)
    half = recipe.train.precision == "bf16"
    shards = optimizer_shards(recipe, world_size)
    layer = layer_flops(sizes)
    again = {"full": layer, "selective": attention_flops(sizes), None: 0.0}[recipe.train.recompute]
    heads = tuple(3 * heads_flops(recipe, sizes, chunk) for chunk in chunks)
    peak = _peak(recipe, sizes, chunks, rank, num_microbatches(recipe, world_size), parameters // shards)
    return RankCost(
        rank=rank,
        layers=sum(chunk.layers for chunk in chunks),
        heads=sum(len(chunk.heads) for chunk in chunks),
        parameters=parameters,
        weights=parameters * sizes.element,
        main_gradients=4 * parameters,
        master_weights=4 * parameters // shards if half else 0,
        moments=8 * parameters // shards,
        activations=peak.total,
        peak=peak,
        forward_flops=tuple(chunk.layers * layer for chunk in chunks),
        backward_flops=tuple(
            chunk.layers * (2 * layer + again) + head for chunk, head in zip(chunks, heads, strict=True)
        ),
        head_flops=heads,
    )


def optimizer_shards(recipe: Recipe, world_size: int) -> int:
    """Ranks over which the optimizer's state of a parameter is cut."""
    return data_parallel_size(recipe, world_size) * recipe.parallel.context if recipe.optimizer.distributed else 1


def _peak(recipe: Recipe, sizes: Sizes, chunks: list[StageLayout], rank: int, microbatches: int, shard: int) -> Peak:
    """The fullest moment beyond what stays between steps: of the backward passes, or of the optimizer's step."""
    element, shared = sizes.element, sizes.tokens_shard * sizes.hidden
    whole = layer_activations(recipe, sizes)
    kept = element * shared if recipe.train.recompute == "full" else whole
    layer = layer_backward(recipe, sizes)
    if recipe.train.recompute == "full":
        # A recomputed layer's activations and output exist only while it goes back; its input was kept anyway.
        layer += whole - kept + element * shared
    heads = [heads_memory(recipe, sizes, chunk) if chunk.heads else 0 for chunk in chunks]
    batch = 8 * sizes.tokens * (recipe.heads.n + 3)
    # Heads keep their input, z, until their backward pass, and nothing else. Without layers z is a copy of what came.
    sizes_held = [
        chunk.layers * kept
        + element * shared * (bool(chunk.heads) + (not chunk.layers and not chunk.first))
        + batch * (chunk.first or bool(chunk.heads))
        + documents_mask(recipe, sizes)
        for chunk in chunks
    ]
    best = Peak(in_flight=(0,) * len(chunks))
    for chunk, counts in in_flight(recipe.parallel.pipeline, rank, microbatches, len(chunks)):
        held = sum(count * size for count, size in zip(counts, sizes_held, strict=True))
        back = _trunk_backward(recipe, sizes, chunks[chunk], layer, kept)
        if held + max(back, heads[chunk]) > best.total:
            best = Peak(counts, held, **({"heads": heads[chunk]} if heads[chunk] > back else {"layer": back}))
    # The gradient that was sent last; interleaved also the output, and what was received for the next passes.
    exchanged = 5 if len(chunks) > 1 else rank > 0 and microbatches > 1
    exchange = element * shared * exchanged
    if recipe.parallel.tp_comm_overlap:
        exchange += _USERBUFFERS * element * sizes.tokens * sizes.hidden
    # Megatron's one buffer, for gathering under sequence parallelism and for scores of its own attention.
    gathered = element * sizes.tokens * sizes.hidden if recipe.parallel.sequence_parallel else 0
    transformer = recipe.heads.kind == "transformer"
    has_layers = any(chunk.layers or (transformer and chunk.heads) for chunk in chunks)
    buffer = max(gathered, scores_buffer(recipe, sizes)) if has_layers else 0
    best = replace(best, exchange=exchange + buffer)
    # Torch's AdamW takes the roots of all second moments at once on a GPU. Transformer Engine's takes nothing, and
    # neither does Apex's, of which a plan cannot know.
    # (A recipe with userbuffers has Transformer Engine, so they are never left out here.)
    adam = 0 if recipe.train.transformer_engine else 4 * shard
    return best if best.total >= adam + buffer else Peak(best.in_flight, exchange=buffer, optimizer=adam)


def _trunk_backward(recipe: Recipe, sizes: Sizes, stage: StageLayout, layer: int, kept: int) -> int:
    """The most that a stage's layers or its embedding add in their backward pass to what was held before it.

    Args:
        layer: what one adds to what the stage's layers keep.
        kept: what one keeps.
    """
    residual, table = (sizes.element * count * sizes.hidden for count in (sizes.tokens_shard, sizes.rows))
    tied = table if stage.first and stage.heads and recipe.model.tied_embeddings else 0
    added = layer if stage.layers else 0
    if stage.first:
        # Its gradient, whole, with that of its output and what came from the next stage; its layers' share is gone.
        embedding = table + residual * (1 if stage.last else 2) - stage.layers * kept
        added = max(added, embedding + tied)  # the sum of both uses of a tied one
    # The heads' gradient of a tied embedding waits for its own. Their input, z, is gone.
    return max(0, added + tied - (residual if stage.heads else 0))
