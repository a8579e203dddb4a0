"""A planned recipe as lines to paste: YAML for ``mtp-megatron train``, or settings for a command line."""

from __future__ import annotations

from typing import Any

import yaml

from mtp_megatron.training.recipe import Recipe


def recipe_tree(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every setting that differs from its default, as a recipe file nests them."""
    ours, default = recipe.model_dump(mode="json"), Recipe().model_dump(mode="json")
    changed = {
        section: {key: value for key, value in values.items() if value != default[section][key]}
        for section, values in ours.items()
    }
    return {section: values for section, values in changed.items() if values}


def recipe_lines(recipe: Recipe) -> str:
    """:func:`recipe_tree` as YAML; reading it back gives an equal recipe."""
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
