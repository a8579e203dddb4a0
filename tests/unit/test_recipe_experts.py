"""Settings of a trunk with experts: what passes, and what is refused by name before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import tiny_tree

TP2 = {"parallel__tensor": 2, "parallel__sequence_parallel": True}


def checked(world: int, **overrides: Any) -> Recipe:
    recipe = parse_recipe(tiny_tree(Path("data"), Path("run"), **overrides))
    return check_recipe(recipe, world_size=world, tokenizer_vocab_size=257)


def test_good_recipes_pass_resolved() -> None:
    assert checked(1).model.moe_ffn_hidden_size is None
    assert checked(2, model__num_experts=2, parallel__expert=2).model.moe_ffn_hidden_size == 64
    assert checked(4, model__num_experts=4, parallel__expert=4, **TP2).model.num_experts == 4
    assert checked(1, model__num_experts=2, model__moe_ffn_hidden_size=48).model.moe_ffn_hidden_size == 48


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, {"parallel__expert": 2}),
        (2, {"parallel__expert": 2, **TP2}),
        (4, {"parallel__expert": 4, **TP2}),
        (4, {"parallel__expert": 2, "parallel__pipeline": 2}),
    ],
)
def test_the_command_starts_as_many_processes_as_the_layout_takes(world: int, overrides: dict[str, Any]) -> None:
    recipe = checked(world, model__num_experts=4, **overrides)
    assert recipe.smallest_world == world


@pytest.mark.parametrize(
    ("field", "says", "world", "overrides"),
    [
        ("parallel.expert", "no experts", 2, {"parallel__expert": 2}),
        ("model.moe_top_k", "num_experts=2", 1, {"model__num_experts": 2, "model__moe_top_k": 3}),
        ("parallel.expert", "num_experts=4", 3, {"model__num_experts": 4, "parallel__expert": 3}),
        ("parallel.expert", "the 1 ranks", 1, {"model__num_experts": 2, "parallel__expert": 2}),
        ("parallel.expert", "not sum their gradients", 2, {"model__num_experts": 2, **TP2}),
        (
            "parallel.sequence_parallel",
            "need it with parallel.tensor",
            2,
            {"model__num_experts": 2, "parallel__expert": 2, "parallel__tensor": 2},
        ),
        (
            "parallel.layout",
            "every stage",
            2,
            {"model__num_experts": 2, "parallel__pipeline": 2, "parallel__layout": "Etttt|L"},
        ),
    ],
)
def test_refused_by_name(field: str, says: str, world: int, overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(world, train__global_batch_size=12, **overrides)
    assert caught.value.field == field
    assert says in str(caught.value)
    assert caught.value.remedy
