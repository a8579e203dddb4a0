"""A planned recipe as lines to paste: YAML for ``mtp-megatron train``, or settings for a command line."""

from __future__ import annotations

from typing import Any

import yaml

from mtp_megatron.training.recipe import Recipe

_HEADS = ("heads", "n")
_DERIVED = (
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "optimizer.min_lr",
    "optimizer.decay_steps",
    "optimizer.wsd_decay_style",
    "train.seq_length",
)
"""Settings that :meth:`.Recipe.resolved` fills in where they are null."""


def recipe_tree(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every setting that differs from its default, and the number of heads, as a recipe file nests them."""
    for key in _DERIVED:
        without = changed(recipe, {key: None})
        if without.resolved() == recipe.resolved():
            recipe = without
    ours, default = recipe.model_dump(mode="json"), Recipe().model_dump(mode="json")
    return {
        section: changes
        for section, values in ours.items()
        if (
            changes := {
                key: value
                for key, value in values.items()
                if value != default[section][key] or (section, key) == _HEADS
            }
        )
    }


def recipe_lines(recipe: Recipe) -> str:
    """:func:`recipe_tree` as YAML; reading it back gives a recipe that resolves to the same one."""
    return yaml.safe_dump(recipe_tree(recipe), sort_keys=False, width=1000)


def settings(changes: dict[str, Any]) -> list[str]:
    """``section.key=value`` as the command line takes it."""
    return [f"{key}={_text(value)}" for key, value in changes.items()]


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with settings replaced, by dotted key; what the recipe would refuse is the caller's business."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        sections.setdefault(section, {})[leaf] = value
    return recipe.model_copy(
        update={section: getattr(recipe, section).model_copy(update=values) for section, values in sections.items()}
    )


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
