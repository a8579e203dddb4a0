"""Settings of a trunk with experts: what passes, and what is refused by name before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mtp_megatron.compat.versions import EnvironmentUnsupported
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.training.checkpointing import check_expert_parallel
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.step import _load_balancing_loss
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


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_experts_are_multiplied_together_in_transformer_engines_layers_alone(transformer_engine: bool) -> None:
    """Megatron-core's own layers would want a package of kernels for it that nobody keeps up."""
    from mtp_megatron.training.build import transformer_config

    recipe = checked(1, model__num_experts=2, train__transformer_engine=transformer_engine)
    config = transformer_config(recipe)
    assert config.moe_grouped_gemm == transformer_engine
    assert not config.moe_permute_fusion
    assert not config.moe_router_fusion


def test_a_transformer_engine_without_grouped_multiplications_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine

    from mtp_megatron.compat import specs
    from mtp_megatron.training.build import transformer_config

    monkeypatch.setattr(specs, "_prepare", lambda transformer_engine: None)
    monkeypatch.setattr(transformer_engine, "TEColumnParallelGroupedLinear", None)
    recipe = checked(1, model__num_experts=2, train__transformer_engine=True)
    with pytest.raises(EnvironmentUnsupported, match=r"no grouped matrix multiplications. Install 1\.9"):
        specs.trunk_block_spec(transformer_config(recipe), transformer_engine=True)


@pytest.mark.parametrize(
    ("saved", "here", "settings", "says"),
    [
        (2, 4, {"train__fp8": "hybrid"}, r"cannot be resumed with 4 in delayed scaling.*parallel\.expert=2, or start"),
        (2, 4, {"train__fp8": "hybrid", "train__fp8_recipe": "tensorwise"}, None),
        (2, 4, {}, None),
        (2, 2, {"train__fp8": "hybrid"}, None),
        (2, 1, {}, r"cannot be resumed with 1: shared experts"),
        (1, 2, {}, r"cannot be resumed with 2: shared experts"),
    ],
)
def test_resuming_at_another_expert_parallel_size(
    saved: int, here: int, settings: dict[str, Any], says: str | None
) -> None:
    engine = {"train__precision": "bf16", "train__transformer_engine": True}
    recipe = checked(4, model__num_experts=4, parallel__expert=here, **engine, **settings)
    if says is None:
        check_expert_parallel(recipe, Path("folder"), saved)
        return
    with pytest.raises(CheckpointError, match=says):
        check_expert_parallel(recipe, Path("folder"), saved)


def test_routers_that_count_nothing_are_not_reported_as_zero() -> None:
    """A frozen trunk that is recomputed in full never runs with gradients, and megatron-core's routers count there."""
    recipe = parse_recipe(
        tiny_tree(Path("data"), Path("run"), heads__trainable="heads", train__recompute="full", model__num_experts=4)
    )
    assert math.isnan(_load_balancing_loss(recipe, 1))
