"""Settings of the heads: what is refused and how it says so, weights over training, and the order of chains."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pydantic
import pytest

from mtp_megatron.config import HeadsConfig, parse_section
from mtp_megatron.errors import ConfigError, MTPError


class Inner(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    depth: int = pydantic.Field(ge=0, lt=10)


class Outer(pydantic.BaseModel):
    """Stands for a recipe: sections inside sections."""

    model_config = pydantic.ConfigDict(extra="forbid")
    heads: HeadsConfig
    inner: Inner = Inner(depth=1)


# Refused --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, Any, str, str]] = {
    # settings, field that is named, value that is shown, part of the problem, part of the remedy
    "no heads": ({"n": 0}, "n", 0, "greater than or equal to 1", ">= 1"),
    "negative": ({"n": -3}, "n", -3, "greater than or equal to 1", ">= 1"),
    "a word": ({"n": "four"}, "n", "four", "valid integer", "type or value"),
    "half a head": ({"n": 2.5}, "n", 2.5, "valid integer", "type or value"),
    "kind": ({"kind": "lstm"}, "kind", "lstm", "'transformer', 'linear' or 'medusa'", "Choose one of 'transformer'"),
    "execution": ({"execution": "lazy"}, "execution", "lazy", "'deferred'", "Choose one of 'deferred' or 'joint'"),
    "chunk": ({"loss_chunk_tokens": 0}, "loss_chunk_tokens", 0, "greater than or equal to 1", ">= 1"),
    "decay 0": ({"loss_decay": 0.0}, "loss_decay", 0.0, "greater than 0", "> 0"),
    "decay 2": ({"loss_decay": 2}, "loss_decay", 2, "less than or equal to 1", "<= 1"),
    "negative z-loss": ({"z_loss": -1e-4}, "z_loss", -1e-4, "greater than or equal to 0", ">= 0.0"),
    "z-loss 1": ({"z_loss": 1}, "z_loss", 1, "less than 1", "< 1.0"),
    "infinite z-loss": ({"z_loss": float("inf")}, "z_loss", float("inf"), "finite number", "type or value"),
    "curriculum": ({"curriculum_steps": 0}, "curriculum_steps", 0, "greater than or equal to 1", ">= 1"),
    "count of weights": (
        {"n": 3, "loss_weights": [1, 2]},
        "loss_weights",
        (1.0, 2.0),
        "2 weights for n=3",
        "exactly 3",
    ),
    "negative weight": ({"n": 2, "loss_weights": [1, -1]}, "loss_weights", (1.0, -1.0), ">= 0", "Change the weights"),
    "no weight": (
        {"n": 2, "loss_weights": [0, 0]},
        "loss_weights",
        (0.0, 0.0),
        "one of them > 0",
        "Change the weights",
    ),
    "weight as a word": ({"n": 2, "loss_weights": [1, "x"]}, "loss_weights.1", "x", "valid number", "type or value"),
    "infinite weight": (
        {"n": 2, "loss_weights": [1, float("inf")]},
        "loss_weights.1",
        float("inf"),
        "finite",
        "type or value",
    ),
    "two kinds of weights": (
        {"n": 2, "loss_weights": [1, 1], "loss_decay": 0.5},
        "loss_decay",
        0.5,
        "loss_weights is set as well",
        "Set only one",
    ),
    "curriculum without head 1": (
        {"n": 2, "loss_weights": [0, 1], "curriculum_steps": 10},
        "curriculum_steps",
        10,
        "starts with head 1 alone",
        "Give head 1 a weight > 0",
    ),
    "chain of linear heads": (
        {"kind": "linear", "arrangement": "causal"},
        "arrangement",
        "causal",
        "a chain of kind=linear heads is not defined",
        "Use kind=transformer, or arrangement=parallel",
    ),
    "lone Medusa": ({"n": 1, "kind": "medusa"}, "n", 1, "a head beside", "Set n to 2 or more"),
    "no new heads": ({"n": 1, "trainable": "new_heads"}, "trainable", "new_heads", "no head beside", "Set n to 2"),
    "misspelt": ({"loss_wieghts": [1]}, "loss_wieghts", [1], "no such setting", "Did you mean 'loss_weights'?"),
    "plural": ({"kinds": "linear"}, "kinds", "linear", "no such setting", "Did you mean 'kind'?"),
    "unknown": ({"zzz": 1}, "zzz", 1, "no such setting", "Known settings here: n, kind, arrangement,"),
}


@pytest.mark.parametrize("prefix", ["heads", "model.heads", ""])
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_field_value_and_remedy(name: str, prefix: str) -> None:
    settings, field, value, problem, remedy = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        HeadsConfig.parse(settings, prefix=prefix)
    error = caught.value
    assert error.field == ".".join(part for part in (prefix, field) if part)
    assert error.value == value
    assert problem in error.problem
    assert remedy in error.remedy
    assert str(error) == f"{error.field}={value!r}: {error.problem}. {error.remedy}"
    assert isinstance(error, MTPError)  # printed by the command line without a traceback
    assert error.__cause__ is None


def test_nan_weight_is_refused() -> None:
    for settings, field in (
        ({"n": 2, "loss_weights": [1, "nan"]}, "loss_weights.1"),
        ({"loss_decay": "nan"}, "loss_decay"),
        ({"z_loss": "nan"}, "z_loss"),
    ):
        with pytest.raises(ConfigError, match=f"heads.{field}="):
            HeadsConfig.parse(settings)


@pytest.mark.parametrize(
    ("values", "field", "remedy"),
    [
        ({"heads": {"n": 0}}, "recipe.heads.n", "Set it to a value >= 1"),
        ({"heads": {"kid": "linear"}}, "recipe.heads.kid", "Did you mean 'kind'?"),
        ({"heads": {"n": 2, "loss_weights": [1]}}, "recipe.heads.loss_weights", "Give exactly 2 numbers"),
        ({"head": {}}, "recipe.heads", "Set it in the recipe"),
        ({"heads": {}, "iner": {}}, "recipe.iner", "Did you mean 'inner'?"),
        ({"heads": {}, "inner": {"depth": 12}}, "recipe.inner.depth", "Set it to a value < 10"),
        ({"heads": {}, "inner": {"dpth": 1, "depth": 2}}, "recipe.inner.dpth", "Did you mean 'depth'?"),
        ({"heads": {}, "inner": 3}, "recipe.inner", "Correct its type or value"),
    ],
)
def test_sections_inside_sections_are_named_by_their_path(values: dict, field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section(Outer, values, "recipe")
    assert (caught.value.field, caught.value.remedy) == (field, remedy)


def test_control_what_is_refused_is_near_to_what_is_accepted() -> None:
    HeadsConfig.parse({"n": 1, "loss_weights": [0.5], "curriculum_steps": 1, "loss_chunk_tokens": 1})
    HeadsConfig.parse({"n": "3", "loss_decay": 1.0, "arrangement": "anticausal", "unembedding": "replicated"})
    HeadsConfig.parse({"n": 2, "loss_weights": [0, 1], "trainable": "new_heads", "kind": "medusa"})
    HeadsConfig.parse({"n": 2, "loss_weights": [1, 0], "curriculum_steps": 10, "z_loss": 0})
    HeadsConfig.parse({"z_loss": "1e-4"})


def test_defaults_are_the_papers() -> None:
    config = HeadsConfig.parse()
    assert (config.n, config.kind, config.arrangement, config.unembedding) == (4, "transformer", "parallel", "shared")
    assert config.execution == "deferred"
    assert config.documents == "separate"
    assert config.base_weights() == (1.0, 1.0, 1.0, 1.0)


def test_frozen_and_the_same_after_a_round_trip() -> None:
    config = HeadsConfig.parse({"n": 3, "loss_weights": [1, 0.5, 0.25]})
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.n = 5
    assert HeadsConfig.parse(config.model_dump(mode="json")) == config
    assert hash(config) == hash(HeadsConfig.parse(config.model_dump()))


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_of_the_heads() -> None:
    assert HeadsConfig.parse({"n": 3, "loss_decay": 0.5}).base_weights() == (1.0, 0.5, 0.25)
    assert HeadsConfig.parse({"n": 2, "loss_weights": [2, 0]}).base_weights() == (2.0, 0.0)
    assert HeadsConfig.parse({"n": 2}).weights_at(10**9) == (1.0, 1.0)


def test_curriculum_lets_heads_join_at_equal_intervals() -> None:
    config = HeadsConfig.parse({"n": 4, "curriculum_steps": 100, "loss_decay": 0.5})
    active = [sum(weight > 0 for weight in config.weights_at(step)) for step in range(150)]
    assert active == [1] * 25 + [2] * 25 + [3] * 25 + [4] * 75
    assert config.weights_at(60) == (1.0, 0.5, 0.25, 0.0)
    assert config.weights_at(75) == config.base_weights()


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10, 101])
def test_curriculum_for_any_length(n: int, steps: int) -> None:
    config = HeadsConfig.parse({"n": n, "curriculum_steps": steps})
    active = [sum(weight > 0 for weight in config.weights_at(step)) for step in range(steps + 1)]
    assert active[0] == 1
    assert active[steps] == n
    assert active == sorted(active)
    if steps >= n:
        assert active[steps - 1] == n  # the last head has joined before the curriculum is over
        assert set(active) == set(range(1, n + 1))  # one by one


# Chains ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrangement", "chains"),
    [("parallel", ((0,), (1,), (2,))), ("causal", ((0, 1, 2),)), ("anticausal", ((2, 1, 0),))],
)
def test_chains(arrangement: str, chains: tuple) -> None:
    assert HeadsConfig.parse({"n": 3, "arrangement": arrangement}).chains == chains


def test_reading_settings_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, mtp_megatron.config; print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
