"""Operations that a model asks for in a training step, however it is cut over ranks: for TFLOP/s per GPU and MFU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtp_megatron.training.recipe import ParallelSection, Recipe
from mtp_megatron.training.shapes import Sizes, attention_flops, head_layer_flops, layer_flops, unembedding_flops


class StepOperations:
    """Floating-point operations of one step over its whole global batch, by the weights of the heads' losses.

    Those of the matrix products, two for each multiplication with its addition: forward, and twice as many backward. As
    in the plan (:mod:`.shapes`) causal attention counts half of ``s * s``, as in Megatron-LM; a count of the whole
    square (PaLM's, arXiv:2204.02311, appendix B) is larger. The unembedding counts once for each head, with the rows of
    the vocabulary and no padding; of experts count those that a token goes through, and the router. A head of weight 0
    counts nothing, unless another reads its output. What is frozen has no gradient: a frozen trunk counts its forward
    pass alone. Recomputation, norms, softmaxes and the optimizer count nothing.

    Args:
        recipe: resolved.
    """

    def __init__(self, recipe: Recipe) -> None:
        train = recipe.train.model_copy(update={"micro_batch_size": 1})
        self._largest = recipe.train.batch_sizes.largest
        self._recipe = recipe.model_copy(update={"parallel": ParallelSection(), "train": train})
        sizes = Sizes.of(self._recipe)
        self._sizes = replace(sizes, rows=recipe.model.vocab_size or sizes.rows)
        self._known: dict[tuple[bool, ...], float] = {}  # of one sequence

    def __call__(self, weights: Sequence[float], sequences: int | None = None) -> float:
        """Operations of a step whose heads have these weights, ``[n]``, and that takes so many sequences; None: the
        run's largest batch."""
        active = tuple(bool(weight) for weight in weights)
        if active not in self._known:
            heads = sum(self._chain(chain, active) for chain in self._recipe.heads.chains)
            self._known[active] = self._trunk() + heads
        return self._known[active] * (self._largest if sequences is None else sequences)

    def _trunk(self) -> float:
        passes = 3 if self._recipe.heads.trainable == "all" else 1
        return passes * self._recipe.model.num_trunk_layers * self._trunk_layer()

    def _trunk_layer(self) -> float:
        model, sizes = self._recipe.model, self._sizes
        if model.num_experts is None or model.moe_ffn_hidden_size is None:
            return layer_flops(sizes)
        qkv, projection, *_ = sizes.matrices
        experts = model.num_experts * sizes.hidden + model.moe_top_k * 3 * model.moe_ffn_hidden_size * sizes.hidden
        return 2.0 * sizes.tokens * (qkv + projection + experts) + attention_flops(sizes)

    def _chain(self, chain: Sequence[int], active: Sequence[bool]) -> float:
        """Of heads that run one after another: up to the last one with a loss."""
        trainable = self._recipe.heads.trainable
        last = max((place for place, head in enumerate(chain) if active[head]), default=-1)
        total, gradient = 0.0, trainable == "all"  # whether anything before the layer learns
        for head in chain[: last + 1]:
            learns = trainable != "new_heads" or head > 0
            gradient |= learns
            total += (1 + gradient + learns) * head_layer_flops(self._recipe, self._sizes, head)
            if active[head]:
                total += (1 + gradient + self._unembedding_learns(head)) * unembedding_flops(self._sizes)
        return total

    def _unembedding_learns(self, head: int) -> bool:
        heads, tied = self._recipe.heads, self._recipe.model.tied_embeddings
        own = heads.unembedding == "replicated" and head > 0
        return heads.trainable == "all" or own or (heads.trainable == "heads" and not tied)
