"""Operations of a training step: worked out by hand, and counted while a step runs.

Not covered here: what a GPU's kernels run beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_megatron.training.operations import StepOperations
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import tiny_tree

VOCABULARY = 250  # not padded to 256
TOKENS = 4 * 32  # of a step
# h 32, 4 heads and 2 groups of 8 channels, SwiGLU of 64: qkv 32 x 64, output 32 x 32, 3 matrices of 32 x 64.
MATRICES = 32 * 64 + 32 * 32 + 3 * 32 * 64
ATTENTION = 2 * 32 * 32 // 2  # scores and values of a token: half of 32 others, 32 channels, for each of the two
LAYER = 2 * (MATRICES + ATTENTION)
LOGITS = 2 * 32 * VOCABULARY


def recipe_of(world_size: int = 1, **overrides: Any) -> Recipe:
    tree = tiny_tree(Path("data"), Path("run"), **overrides)
    return check_recipe(parse_recipe(tree), world_size=world_size, tokenizer_vocab_size=VOCABULARY)


def per_token(recipe: Recipe, weights: tuple[float, ...] = (1, 1, 1)) -> float:
    return StepOperations(recipe)(weights) / TOKENS


def test_by_hand() -> None:
    assert per_token(recipe_of()) == 3 * (4 * LAYER + 3 * (LAYER + LOGITS))


CASES: dict[str, tuple[dict[str, Any], tuple[float, ...], float]] = {
    "a head without weight is not run": ({}, (1, 0, 0.5), 3 * (4 * LAYER + 2 * (LAYER + LOGITS))),
    "unless another one reads it": (
        {"heads__arrangement": "causal"},
        (0, 1, 0),
        3 * (4 * LAYER + 2 * LAYER + LOGITS),
    ),
    "the chain's other direction": (
        {"heads__arrangement": "anticausal"},
        (1, 0, 0),
        3 * (4 * LAYER + 3 * LAYER + LOGITS),
    ),
    "linear heads": ({"heads__kind": "linear"}, (1, 1, 1), 3 * (4 * LAYER + 2 * 2 * 32 * 32 + 3 * LOGITS)),
    "a frozen trunk": ({"heads__trainable": "heads"}, (1, 1, 1), 4 * LAYER + 3 * 3 * (LAYER + LOGITS)),
    "and a frozen head, norm and unembedding": (
        {"heads__trainable": "new_heads"},
        (1, 1, 1),
        5 * LAYER + LOGITS + 2 * (3 * LAYER + 2 * LOGITS),
    ),
    "a tied unembedding is the frozen embedding": (
        {"heads__trainable": "heads", "model__tied_embeddings": True},
        (1, 1, 1),
        4 * LAYER + 3 * (3 * LAYER + 2 * LOGITS),
    ),
    "experts that a token goes through, and the router": (
        {"model__num_experts": 4, "model__moe_ffn_hidden_size": 16},
        (1, 1, 1),
        3 * (4 * 2 * (32 * 64 + 32 * 32 + 4 * 32 + 2 * 3 * 32 * 16 + ATTENTION) + 3 * (LAYER + LOGITS)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_models_by_hand(case: str) -> None:
    settings, weights, expected = CASES[case]
    assert per_token(recipe_of(**settings), weights) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel__tensor": 2, "parallel__sequence_parallel": True, "parallel__pipeline": 2},
        {"parallel__context": 2, "parallel__pipeline": 2, "parallel__layout": "Ettttmm|mL"},
        {"train__recompute": "full", "train__micro_batch_size": 1, "parallel__pipeline": 4},
        {"parallel__tensor": 2, "heads__execution": "joint", "train__precision": "bf16", "heads__loss_chunk_tokens": 8},
    ],
)
def test_how_a_step_is_cut_and_run_changes_nothing(settings: dict[str, Any]) -> None:
    assert per_token(recipe_of(4, **settings)) == per_token(recipe_of())
    linear = {"heads__kind": "linear"}
    if "parallel__layout" not in settings:
        assert per_token(recipe_of(4, **settings, **linear)) == per_token(recipe_of(**linear))


def test_a_longer_sequence_has_more_attention() -> None:
    longer = recipe_of(model__seq_length=64, train__global_batch_size=2)  # as many tokens
    assert per_token(longer) - per_token(recipe_of()) == 3 * 7 * 2 * ATTENTION


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    from mtp_megatron.training.world import model_parallel_world

    with model_parallel_world(recipe_of()):
        yield


def counted(recipe: Recipe) -> int:
    """Operations of the matrix products in one training step on this process."""
    from mtp_megatron.training.batches import to_microbatch
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.step import train_step

    def addmm(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
        return int(2 * left[0] * left[1] * right[1])

    text = torch.randint(VOCABULARY - 1, (4, 1, 33), generator=torch.Generator().manual_seed(1))
    samples = [{"tokens": row[:, :-1], "labels": row[:, 1:], "loss_mask": torch.ones(1, 32)} for row in text]
    batches = iter([to_microbatch(recipe, sample, eod=VOCABULARY - 1) for sample in samples])
    trainable = build_trainable(recipe)
    # PyTorch's table lacks the sum in place.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        train_step(recipe, trainable, [batches], 4, False)
    return int(counter.get_total_flops())


COUNTED: dict[str, tuple[dict[str, Any], Callable[[int], int]]] = {
    "transformer heads": ({}, lambda whole: 7 * whole),
    "linear heads": ({"heads__kind": "linear"}, lambda whole: 4 * whole),
    "experts": ({"model__num_experts": 4, "model__moe_ffn_hidden_size": 16}, lambda whole: 7 * whole),
    "a head without weight": ({"heads__loss_weights": [1.0, 0.0, 1.0]}, lambda whole: 6 * whole),
}


@pytest.mark.parametrize("case", COUNTED)
def test_a_step_that_runs_has_as_many(case: str, world: None) -> None:
    """megatron-core's own attention works out the upper half of the scores, too: that half is all there is more."""
    settings, attentions = COUNTED[case]
    recipe = recipe_of(**settings)
    upper_halves = 3 * attentions(2 * ATTENTION) * TOKENS
    assert counted(recipe) == StepOperations(recipe)(recipe.heads.base_weights()) + upper_halves
