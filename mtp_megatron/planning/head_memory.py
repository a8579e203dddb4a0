"""What the heads of a pipeline stage add to z while they run, one at a time, in bytes by formula."""

from __future__ import annotations

from mtp_megatron.layout import StageLayout
from mtp_megatron.loss import VocabShard, chunk_tokens_for
from mtp_megatron.planning.layer_memory import layer_activations, layer_backward, norm_activations, norm_backward
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes, unembedding_copies


def logits_chunk(recipe: Recipe, sizes: Sizes) -> int:
    """Tokens whose logits exist at one time."""
    shard = VocabShard(0, sizes.rows, sizes.rows)
    return min(sizes.tokens, chunk_tokens_for(shard, recipe.heads.loss_chunk_tokens))


def heads_memory(recipe: Recipe, sizes: Sizes, stage: StageLayout) -> int:
    """The most that a stage's heads add to z: in a head's loss, in the backward pass behind it, or when the gradients
    of the unembedding(s) are handed over."""
    element, elements, table = sizes.element, sizes.tokens_shard * sizes.hidden, sizes.rows * sizes.hidden
    copies = unembedding_copies(recipe, stage)
    several = 4 * elements if len(stage.heads) > 1 else 0  # their gradients of z are added in fp32
    later = 0 if stage.last else element * elements  # what came from the next stage
    delivered = element * (table * copies + elements) if element < 4 else 0  # in fp32 they are handed over as they are
    kept = 4 * table * copies  # fp32 gradients of the unembedding(s)
    if recipe.heads.kind != "transformer":
        return several + later + kept + max(delivered, _map(recipe, sizes, stage))
    # Layers of a chain wait for their losses, and each loss makes its unembedding's gradient.
    layer, chain = layer_activations(recipe, sizes), max(map(len, recipe.heads.chains))
    working = max(chain * layer + 4 * table, layer + kept) + _layer(recipe, sizes)
    return several + later + max(working, kept + delivered)


def _layer(recipe: Recipe, sizes: Sizes) -> int:
    """What the loss and the backward pass of a transformer layer add to what it keeps."""
    residual = sizes.element * sizes.tokens_shard * sizes.hidden
    normed = norm_activations(recipe, sizes) + residual
    loss = normed + _loss(recipe, sizes)
    norm = normed + _features_gradient(recipe, sizes) + norm_backward(recipe, sizes)
    return max(loss, norm, residual + layer_backward(recipe, sizes))


def _map(recipe: Recipe, sizes: Sizes, stage: StageLayout) -> int:
    """The most of a linear map or a Medusa block, which reads the normed z; head 1 is that itself."""
    element, elements = sizes.element, sizes.tokens_shard * sizes.hidden
    residual, kind = element * elements, recipe.heads.kind
    # What the norm keeps but for z, where it keeps that as it is and no copy in fp32.
    kept = norm_activations(recipe, sizes) - (residual if recipe.train.transformer_engine or element == 4 else 0)
    # The normed z, the map's output, and Medusa's sum of both.
    results = 1 if stage.heads == (0,) else {"linear": 2, "medusa": 3}[kind]
    loss = results * residual + _loss(recipe, sizes)
    # Gradients of the map's output, input and matrix.
    back = results * residual + _features_gradient(recipe, sizes) + residual + element * sizes.hidden**2
    norm = residual + _features_gradient(recipe, sizes) + norm_backward(recipe, sizes)
    return kept + max(loss, back, norm)


def _loss(recipe: Recipe, sizes: Sizes) -> int:
    """What a head's loss adds to its features: their gradient, gathered under sequence parallelism as the features
    are, a chunk of logits, in bf16 with the softmax in fp32, and what is added to the unembedding's gradient."""
    element, half = sizes.element, sizes.element < 4
    hidden = element * sizes.tokens * sizes.hidden * (2 if recipe.parallel.sequence_parallel else 1)
    logits = logits_chunk(recipe, sizes) * sizes.rows * (element + (4 if half else 0))
    return hidden + logits + (element * sizes.rows * sizes.hidden if half else 0)


def _features_gradient(recipe: Recipe, sizes: Sizes) -> int:
    """Of a head's features, when its loss is done; under sequence parallelism the gathered features are still there."""
    gathered = sizes.tokens if recipe.parallel.sequence_parallel else 0
    return sizes.element * sizes.hidden * (sizes.tokens_shard + gathered)
