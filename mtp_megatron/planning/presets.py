"""What a plan can start from: a size by name, a recipe, or a Hugging Face model's config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe, overridden, parse_recipe

# layers (trunk and, of n heads, the n last ones), hidden, attention heads, key/value heads, SwiGLU width, TP, PP.
# 1.3B to 13B: Gloeckle et al. 2024; 34B and 70B: the shapes of Code Llama 34B and Llama 2 70B.
_SIZES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "1.3B": (24, 2048, 16, 16, 5632, 1, 1),
    "7B": (32, 4096, 32, 32, 11008, 2, 1),
    "13B": (40, 5120, 40, 40, 13824, 4, 2),
    "34B": (48, 8192, 64, 8, 22016, 8, 4),
    "70B": (80, 8192, 64, 8, 28672, 8, 8),
}
PRESETS = tuple(_SIZES)


def read_plan(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a job to be planned, as read.

    Args:
        source: a name of :data:`PRESETS`, a ``config.json`` (or its folder), or a YAML recipe.
        overrides: ``section.key=value``.

    Raises:
        ConfigError: there is no such thing, or a setting that cannot be.
        CheckpointError: a configuration of another family.
    """
    if source.upper() in _SIZES:
        layers, tree = _preset(source.upper())
        return _with_layout(overridden(tree, overrides), layers)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix == ".json" and path.is_file():
        layers, tree = _hugging_face(path)
        return _with_layout(overridden(tree, overrides), layers)
    if not path.is_file():
        raise ConfigError(
            "model",
            source,
            "neither a size nor a file",
            f"Give {', '.join(PRESETS)}, a YAML recipe, or a Hugging Face config.json.",
        )
    return load_recipe(path, overrides)


def _training(tensor: int, pipeline: int) -> dict[str, Any]:
    return {
        "heads": {"n": 4},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "optimizer": {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "train": {
            "micro_batch_size": 1,
            "global_batch_size": 512,
            "precision": "bf16",
            "transformer_engine": True,
        },
    }


def _preset(name: str) -> tuple[int, dict[str, Any]]:
    layers, hidden, heads, groups, ffn, tensor, pipeline = _SIZES[name]
    model = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        "seq_length": 4096,
        "vocab_size": 32000,
    }
    return layers, {"model": model, **_training(tensor, pipeline)}


def _hugging_face(path: Path) -> tuple[int, dict[str, Any]]:
    from mtp_megatron.checkpoint.hf_config import model_settings

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError("model", str(path), f"it is not readable JSON ({error})", "Give a config.json.") from error
    if not isinstance(config, dict):
        raise ConfigError("model", str(path), "it holds no settings", "Give a model's config.json.")
    model = model_settings(config, path, heads_are_layers=False)
    return model.pop("num_trunk_layers"), {"model": model, **_training(1, 1)}


def _with_layout(tree: dict[str, Any], layers: int) -> Recipe:
    """Of ``layers`` layers n become the heads, unless the trunk's number is given; stages are balanced."""
    model, parallel = tree["model"], tree["parallel"]
    parallel.setdefault("sequence_parallel", parallel["tensor"] > 1)
    recipe = parse_recipe(tree)
    heads = recipe.heads.n if recipe.heads.kind == "transformer" else 0
    given = "num_trunk_layers" in model
    trunk = model.setdefault("num_trunk_layers", layers - heads)
    stages = recipe.parallel.pipeline * (recipe.parallel.virtual_pipeline or 1)
    if trunk < (stages if recipe.parallel.layout is None else 1):
        if given:
            raise ConfigError(
                "model.num_trunk_layers", trunk, f"there are {stages} stages", "Set it higher, or give parallel.layout."
            )
        raise ConfigError(
            "heads.n",
            recipe.heads.n,
            f"of {layers} layers {trunk} are left for the trunk, on {stages} stages",
            "Choose fewer heads or stages.",
        )
    if stages > 1 and recipe.parallel.layout is None:
        parallel["layout"] = balanced_layout(trunk, heads, stages)
    return parse_recipe(tree)


def balanced_layout(trunk: int, heads: int, stages: int) -> str:
    """Layers on stages as evenly as whole layers can be, all heads at the end: ``Etttt|tttt|tt..L``.

    The first stages get what does not divide; the last one, which has the unembedding too, gets the fewest.
    """
    share, more = divmod(trunk + heads, stages)
    if share > heads:
        counts = [share + (stage < more) for stage in range(stages)]
        counts[-1] -= heads
    else:  # a last stage of heads alone is full already: the trunk is for the others
        share, more = divmod(trunk, stages - 1)
        counts = [*(share + (stage < more) for stage in range(stages - 1)), 0]
    return "E" + "|".join("t" * count for count in counts) + "L"
