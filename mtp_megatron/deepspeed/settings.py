"""The DeepSpeed configuration and the recipe as one: read, held against each other, merged. Imports no torch.

A value that one of them leaves open is taken from the other; where both say something, it must be the same. "auto" in
the DeepSpeed configuration means: as the recipe says.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from mtp_megatron.config import parse_section
from mtp_megatron.deepspeed.refusals import refuse_unsupported
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe

Config = dict[str, Any]
AUTO = "auto"
# Key of the DeepSpeed configuration -> key of the recipe with the same meaning.
SAME = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "train_batch_size": "train.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.betas": "optimizer.beta1, optimizer.beta2",
}
_ACCUMULATION = "gradient_accumulation_steps"
_QUIET = 10**9  # steps between DeepSpeed's own progress lines: the run's log has them


def read_config(path: str | Path) -> Config:
    """A DeepSpeed configuration file.

    Raises:
        ConfigError: there is none, it is no JSON object, or it gives a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("run.deepspeed", str(path), "there is no such file", "Give a DeepSpeed configuration (JSON).")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> Config:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the key {name!r} is given twice")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, OSError) as error:
        raise ConfigError("run.deepspeed", str(path), f"it is not readable JSON ({error})", "Correct it.") from error
    if not isinstance(config, dict):
        raise ConfigError("run.deepspeed", str(path), f"it holds a {type(config).__name__}", "Give a JSON object.")
    return config


def zero_stage(config: Config) -> int:
    """``zero_optimization.stage``, 0 where it is absent.

    Raises:
        ConfigError: it is not 0, 1, 2 or 3.
    """
    section = config.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else section
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError("zero_optimization.stage", stage, "no ZeRO stage", "Set it to 0, 1, 2 or 3.")
    return int(stage)


def merged_recipe(recipe: Recipe, config: Config, data_parallel: int) -> Recipe:
    """The recipe with what the DeepSpeed configuration adds to it.

    Args:
        recipe: as read; keys that it does not set may be set by ``config``.
        data_parallel: copies of the model in the job.

    Raises:
        ConfigError: both say something and disagree (both values are named), or one asks for what cannot be done.
    """
    _check_sections(config)
    refuse_unsupported(recipe, config, zero_stage(config))
    for theirs, ours in SAME.items():
        value = _get(config, theirs)
        if value is None or value == AUTO:
            continue
        if theirs == "optimizer.params.betas":
            recipe = _adopt_betas(recipe, value)
        else:
            recipe = _adopt(recipe, theirs, value, ours)
    recipe = _adopt_precision(recipe, config)
    return _adopt_accumulation(recipe, config, data_parallel)


def engine_config(recipe: Recipe, config: Config, data_parallel: int, *, context_parallel: int = 1) -> Config:
    """What ``deepspeed.initialize`` gets: ``config`` with every value that the recipe decides filled in.

    Args:
        recipe: merged and resolved.
        data_parallel, context_parallel: their product is what DeepSpeed takes for its data parallel size.
    """
    result = copy.deepcopy(config)
    train, optimizer = recipe.train, recipe.optimizer
    steps = train.global_batch_size // (train.micro_batch_size * data_parallel)
    result["train_micro_batch_size_per_gpu"] = train.micro_batch_size
    result[_ACCUMULATION] = steps
    result["train_batch_size"] = train.micro_batch_size * steps * data_parallel * context_parallel
    result["gradient_clipping"] = optimizer.clip_grad
    for name in ("fp16", "bf16"):
        result[name] = {**result.get(name, {}), "enabled": train.precision == name}
    given = result.get("optimizer", {})
    result["optimizer"] = {
        "type": "AdamW",
        "params": {
            **given.get("params", {}),
            "lr": optimizer.lr,
            "betas": [optimizer.beta1, optimizer.beta2],
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
    }
    result.setdefault("steps_per_print", _QUIET)
    if zero_stage(config) == 3 and recipe.model.tied_embeddings:
        # The heads gather the shared embedding themselves, so it must not be on its way for the trunk meanwhile.
        result["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    return result


_OBJECTS = ("optimizer", "optimizer.params", "fp16", "bf16", "checkpoint")


def _check_sections(config: Config) -> None:
    """Refuse what stands where an object of settings is looked for: it would be a traceback, or ignored."""
    for name in _OBJECTS:
        outer, _, last = name.rpartition(".")
        section = _get(config, outer) if outer else config
        if isinstance(section, dict) and last in section and not isinstance(section[last], dict):
            raise ConfigError(name, section[last], "no object of settings", "Give a JSON object, or leave it out.")
    if "bfloat16" in config:  # DeepSpeed looks at it only where there is no bf16, which engine_config always gives
        raise ConfigError("bfloat16", config["bfloat16"], "DeepSpeed's older name of bf16", "Rename it to bf16.")


def _get(config: Config, dotted: str) -> Any:
    node: Any = config
    for name in dotted.split("."):
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    return node


def _adopt(recipe: Recipe, theirs: str, value: Any, ours: str) -> Recipe:
    section_name, name = ours.split(".")
    section = getattr(recipe, section_name)
    if name in section.model_fields_set and getattr(section, name) != value:
        raise _disagreement(theirs, value, ours, getattr(section, name))
    kind = type(type(section).model_fields[name].default)
    if not _is_number(value) or (kind is int and value != int(value)):
        raise ConfigError(theirs, value, f"no value for {ours}", f"Give a number, or {AUTO!r} for the recipe's.")
    try:
        return _with(recipe, section_name, {name: kind(value)})
    except ConfigError as error:  # its range; named as the user wrote it
        raise ConfigError(theirs, value, f"no value for {ours}: {error.problem}", error.remedy) from None


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can hold: JSON's integers have no end."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _adopt_betas(recipe: Recipe, value: Any) -> Recipe:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError("optimizer.params.betas", value, "not two numbers", "Give Adam's beta1 and beta2.")
    for name, beta in zip(("beta1", "beta2"), value, strict=True):
        recipe = _adopt(recipe, "optimizer.params.betas", beta, f"optimizer.{name}")
    return recipe


def _adopt_precision(recipe: Recipe, config: Config) -> Recipe:
    switches = {name: _get(config, f"{name}.enabled") for name in ("bf16", "fp16")}
    for name, enabled in switches.items():
        if not isinstance(enabled, bool | None) and enabled != AUTO:  # not taken for false: it may mean true
            raise ConfigError(f"{name}.enabled", enabled, "neither true nor false", f"Give one of them, or {AUTO!r}.")
    on = [name for name, enabled in switches.items() if enabled is True]
    ours = recipe.train.precision
    if len(on) == 2:
        raise ConfigError("bf16.enabled", True, "fp16.enabled is true as well", "Turn one of them off.")
    said = "train.precision" if "precision" in recipe.train.model_fields_set else None
    if on and said and ours != on[0]:
        raise _disagreement(f"{on[0]}.enabled", True, said, ours)
    if said and switches.get(ours) is False:
        raise _disagreement(f"{ours}.enabled", False, said, ours)
    return _with(recipe, "train", {"precision": on[0]}) if on else recipe


def _adopt_accumulation(recipe: Recipe, config: Config, data_parallel: int) -> Recipe:
    steps = _get(config, _ACCUMULATION)
    if steps is None or steps == AUTO:
        return recipe
    if not _is_number(steps) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(_ACCUMULATION, steps, "no number of microbatches", "Set it to 1 or more.")
    train = recipe.train
    batch = steps * train.micro_batch_size * data_parallel
    if "global_batch_size" in train.model_fields_set and train.global_batch_size != batch:
        raise ConfigError(
            _ACCUMULATION,
            steps,
            f"with microbatches of {train.micro_batch_size} on {data_parallel} data parallel ranks it makes a global "
            f"batch of {batch}, and train.global_batch_size={train.global_batch_size}",
            "Make them agree, or leave one of them out.",
        )
    return _with(recipe, "train", {"global_batch_size": batch})


def _with(recipe: Recipe, section: str, values: dict[str, Any]) -> Recipe:
    """A copy with some values, which pass the recipe's own checks."""
    old = getattr(recipe, section)
    new = parse_section(type(old), {**old.model_dump(exclude_unset=True), **values}, section)
    return recipe.model_copy(update={section: new})


def _disagreement(theirs: str, value: Any, ours: str, own: Any) -> ConfigError:
    return ConfigError(
        theirs,
        value,
        f"the DeepSpeed configuration says so, and the recipe says {ours}={own!r}",
        f"Make them agree, or leave one of them out ({AUTO!r} takes the recipe's).",
    )
