"""Recipes from YAML files and ``key=value`` overrides, with errors that name the field, the value and the remedy."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with three repairs: ``3e-4`` is a number, a date is text, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {  # no setting is a date, and a folder may be named by one
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 demands a dot and a signed exponent, so 3e-4 would be a string
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: a YAML file with the sections of :class:`Recipe`; absent keys keep their defaults.
        overrides: ``section.key=value`` strings; the value is parsed as YAML, the last one of a key wins.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, or a value has a wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("recipe", str(path), "there is no such file", "Give the path of a YAML recipe.")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)  # a SafeLoader subclass: builds plain data only
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, or a number of thousands of digits
        raise ConfigError("recipe", str(path), f"it is not readable YAML ({error})", "Correct the file.") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            "recipe",
            str(path),
            f"it holds a {type(tree).__name__}, not sections",
            "Write 'model:', 'train:' and so on.",
        )
    return parse_recipe(overridden(tree, overrides))


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested plain data with ``section.key=value`` settings applied, in place; see :func:`load_recipe`."""
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate nested plain data as a recipe; see :func:`load_recipe` for the errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _as_config_error(error.errors()) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def describe_fields() -> str:
    """Every key of a recipe with its type, default and meaning, one per line."""
    rows = [
        (key, _type_name(field.annotation), _default_text(field), field.description or "") for key, field in _fields()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{key:<{widths[0]}}  {kind:<{widths[1]}}  {default:<{widths[2]}}  {meaning}".rstrip()
        for key, kind, default, meaning in rows
    )


def known_keys() -> list[str]:
    """Every dotted key that a recipe may hold, in the order of the sections."""
    return [key for key, _ in _fields()]


def _fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _type_name(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "null"
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (types.UnionType, typing.Union):
        return "|".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is not None:
        inner = ", ".join("..." if part is Ellipsis else _type_name(part) for part in typing.get_args(annotation))
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _default_text(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "default"
    if field.default is None:
        return "null"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of ``tree`` in place; whether the key exists is the schema's business."""
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise ConfigError("override", override, "must be section.key=value", "Write for example heads.n=8.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(key, text, "the value is not readable YAML", "Quote it, or write a plain value.") from error
    *sections, leaf = key.split(".")
    node = tree
    for depth, section in enumerate(sections):
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            parent = ".".join(sections[: depth + 1])
            raise ConfigError(key, value, f"{parent} is a value, not a section", f"Set {parent} itself.")
        node = child
    node[leaf] = value


def _as_config_error(errors: list[ErrorDetails]) -> ConfigError:
    """The first error of a validation, in the words of :class:`ConfigError`."""
    # An unknown key is the likeliest root cause, so it goes first.
    error = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    field = ".".join(str(part) for part in error["loc"] if _is_key(part))
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        # {'modle': {'hidden_size': 3}}: the key below the misspelt section says more than the section alone
        nearest = nearest_key(f"{field}.{next(iter(value))}" if isinstance(value, dict) and value else field)
        section = field.rpartition(".")[0]
        here = [key.removeprefix(f"{section}.") for key in known_keys() if key.startswith(f"{section}.")]
        if nearest:
            remedy = f"The nearest valid key is {nearest}."
        elif here:
            remedy = f"The keys of {section} are {', '.join(here)}."
        else:
            remedy = (
                f"The sections are {', '.join(Recipe.model_fields)}; 'mtp-megatron train --describe' lists every key."
            )
        return ConfigError(field, value, "there is no such key", remedy)
    cause = (error.get("ctx") or {}).get("error")
    if isinstance(cause, ConfigError):
        if cause.field.startswith(field) or not field:
            return cause
        return ConfigError(f"{field}.{cause.field}", cause.value, cause.problem, cause.remedy)
    expected = _expected(field)
    remedy = f"Set {field} to {expected}." if expected else f"Write '{field}:' with its keys below it."
    problem = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return ConfigError(field or "recipe", value, problem[:1].lower() + problem[1:], remedy)


def _is_key(part: int | str) -> bool:
    # pydantic adds the tried member of a union ("int", "literal[...]") to the location: not part of a key
    return isinstance(part, int) or (
        part.isidentifier() and part not in {"int", "float", "bool", "str", "none", "constrained"}
    )


def _expected(field: str) -> str:
    for key, info in _fields():
        if key == field:
            bounds = []
            for rule in info.metadata:
                for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
                    if getattr(rule, name, None) is not None:
                        bounds.append(f"{sign} {getattr(rule, name)}")
            kind = _type_name(info.annotation).replace("|", " or ")
            return " and ".join([f"{_article(kind)} {bounds[0]}" if bounds else _article(kind), *bounds[1:]])
    return ""


def _article(kind: str) -> str:
    if "|" not in kind and kind in {"float", "bool", "str"}:
        return f"a {kind}"
    return f"an {kind}" if kind.startswith("int") else kind


def nearest_key(key: str) -> str | None:
    """The valid key that ``key`` most likely means: a near spelling in its section, else the same name in another."""
    keys = known_keys()
    section, _, leaf = key.rpartition(".")
    siblings = {
        candidate.rpartition(".")[2]: candidate for candidate in keys if candidate.rpartition(".")[0] == section
    }
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    elsewhere = [known for known in keys if known.rpartition(".")[2] == leaf]
    if elsewhere:
        return elsewhere[0]
    if section in Recipe.model_fields:
        return None
    sections = difflib.get_close_matches(key.partition(".")[0], list(Recipe.model_fields), n=1, cutoff=0.6)
    if "." in key and sections:
        return nearest_key(f"{sections[0]}.{leaf}") or sections[0]
    matches = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    return matches[0] if matches else (sections[0] if sections else None)
