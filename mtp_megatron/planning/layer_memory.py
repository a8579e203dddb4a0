"""What a transformer layer keeps for its backward pass, and what that pass adds, in bytes by formula.

Two sets of kernels: Transformer Engine's (attention, norms, SwiGLU and rotary positions are fused) and megatron-core's
own, which a recipe without ``train.transformer_engine`` runs, on GPUs too. The own attention keeps the softmax of
``[heads, s/cp, s]``, which soon outweighs everything else of a layer.
"""

from __future__ import annotations

from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes


def layer_activations(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes that a layer keeps of one microbatch."""
    return _fused(recipe, sizes) if recipe.train.transformer_engine else _own(recipe, sizes)


def layer_backward(recipe: Recipe, sizes: Sizes) -> int:
    """What a layer's backward pass adds at its fullest moment to what :func:`layer_activations` says."""
    if recipe.train.transformer_engine:
        return _mlp_backward(recipe, sizes)
    return max(_mlp_backward(recipe, sizes), _own_attention_backward(recipe, sizes) - _own(recipe, sizes))


def scores_buffer(recipe: Recipe, sizes: Sizes) -> int:
    """The buffer for attention scores, which megatron-core's own attention makes once and keeps."""
    return 0 if recipe.train.transformer_engine else sizes.element * scores(sizes)


def scores(sizes: Sizes) -> int:
    """Elements of one layer's attention scores, ``[b, heads, s/cp, s]``."""
    return sizes.tokens * sizes.length * sizes.attention_heads


def documents_mask(recipe: Recipe, sizes: Sizes) -> int:
    """The mask of a microbatch that all layers of a stage share, ``[b, s/cp, s]``, where attention stays within
    documents; Transformer Engine's takes their boundaries, which are nothing."""
    if not recipe.data.reset_attention_mask or recipe.train.transformer_engine:
        return 0
    return sizes.tokens * sizes.length


def norm_activations(recipe: Recipe, sizes: Sizes) -> int:
    """What an RMSNorm over the residual stream keeps beside its output."""
    elements = sizes.tokens_shard * sizes.hidden
    # Torch's norm keeps its input and the normalised one in fp32; Transformer Engine's keeps the input as it is.
    return elements * (sizes.element if recipe.train.transformer_engine else 8) + 4 * sizes.tokens_shard


def norm_backward(recipe: Recipe, sizes: Sizes) -> int:
    """What its backward pass adds to that and to its output's gradient."""
    # Torch's makes five tensors in fp32, when one of those that it kept is gone.
    return sizes.tokens_shard * sizes.hidden * (sizes.element if recipe.train.transformer_engine else 16)


def _fused(recipe: Recipe, sizes: Sizes) -> int:
    """Inputs of both norms and of the four matrices, queries, keys and values, SwiGLU's input, and a number per row of
    norms and attention."""
    a, g = sizes.queries, sizes.keys
    attention = sizes.tokens * (2 * a + 2 * g)  # rotated q and k, the value, the output
    if recipe.train.recompute == "selective":  # keeps the value as the view that it is, and with it qkv whole
        attention += sizes.tokens * (a + g)
    if recipe.model.qk_norm:
        attention += sizes.tokens * (a + g)
    attention = sizes.element * attention + 4 * sizes.tokens * sizes.attention_heads
    return attention + 2 * _normed(recipe, sizes) + sizes.element * 3 * sizes.tokens * sizes.ffn


def _own(recipe: Recipe, sizes: Sizes) -> int:
    """Of megatron-core's own kernels: norms keep fp32 copies, SwiGLU each step's results."""
    attention = _own_attention_inputs(recipe, sizes) + sizes.element * sizes.tokens * sizes.queries  # the output
    if recipe.train.recompute != "selective":
        attention += _own_probabilities(recipe, sizes)
    return attention + 2 * _normed(recipe, sizes) + sizes.element * 5 * sizes.tokens * sizes.ffn


def _normed(recipe: Recipe, sizes: Sizes) -> int:
    """A norm with its output, the input of a matrix."""
    return norm_activations(recipe, sizes) + sizes.element * sizes.tokens_shard * sizes.hidden


def _own_probabilities(recipe: Recipe, sizes: Sizes) -> int:
    """The softmax in fp32, its copy in bf16 and the mask."""
    half = sizes.element if sizes.element < 4 else 0
    return (4 + half) * scores(sizes) + _mask(recipe, sizes)


def _mask(recipe: Recipe, sizes: Sizes) -> int:
    """Every layer makes one of its own, ``[s/cp, s]``, where the microbatch brings none (:func:`documents_mask`)."""
    return 0 if recipe.data.reset_attention_mask else sizes.length // recipe.parallel.context * sizes.length


def _own_attention_inputs(recipe: Recipe, sizes: Sizes) -> int:
    """Queries, keys and values that are kept for the scores, with what rotary positions and norms of both keep."""
    a, g, context = sizes.queries, sizes.keys, recipe.parallel.context
    selective = recipe.train.recompute == "selective"
    whole = selective or (context == 1 and a == g)  # the value is a view, which holds queries, keys and values whole
    if whole:
        channels = 2 * a + 3 * g
    else:  # keys and values of the whole sequence, repeated for every query head
        channels = a + 2 * a * context
    norms = 0
    if recipe.model.qk_norm:  # over each head's channels: the input and the normalised one in fp32, a number per row
        norms = sizes.tokens * (8 * (a + g) + 4 * sizes.attention_heads * (a + g) // a)
        if sizes.element == 4:  # the key as input is such a view too
            channels += -g if whole else a + g
    angles = 4 * sizes.length // context * (a // sizes.attention_heads)  # cosine and sine, of queries and of keys
    return sizes.element * (sizes.tokens * channels + angles) + norms


def _own_attention_backward(recipe: Recipe, sizes: Sizes) -> int:
    """All of a layer while the softmax goes back, when the MLP's part is gone. Its forward pass holds as much: scores,
    their fp32 copy, the softmax and its copy."""
    t, a = sizes.tokens, sizes.queries
    # The softmax, its gradient and its input's, all in fp32; in fp32 the mask, set in place, copies one more.
    backward = (12 if sizes.element < 4 else 16) * scores(sizes) + _mask(recipe, sizes)
    inputs = _own_attention_inputs(recipe, sizes)
    if recipe.train.recompute == "selective":  # made again: the output, and keys repeated for every query head
        inputs += sizes.element * t * a * (1 + (a != sizes.keys))
    gradients = sizes.element * (sizes.tokens_shard * sizes.hidden + t * a)
    return _normed(recipe, sizes) + inputs + gradients + backward


def _mlp_backward(recipe: Recipe, sizes: Sizes) -> int:
    """What the MLP's backward pass adds while nothing of its layer is freed: the gradient of the layer's output, and
    those of SwiGLU's sides or of a matrix and its input."""
    t, h, f = sizes.tokens, sizes.hidden, sizes.ffn
    gathered = t * h if recipe.parallel.sequence_parallel else 0
    second = gathered + t * f + f * h
    between = 2 * t * f
    first = t * h + 2 * t * f + 2 * f * h - 3 * t * f
    return sizes.element * (sizes.tokens_shard * h + max(first, between, second))
