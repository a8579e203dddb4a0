"""The recipe's FP8 and FP4: its rules, and its settings in the words of megatron-core. Imports neither torch nor
megatron."""

from __future__ import annotations

from typing import Any

from mtp_megatron.compat import fp8
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe

# What has been seen to train a trunk with experts (tests/transformer_engine/test_experts.py), the better one first.
WITH_EXPERTS = ("tensorwise", "delayed")
NAMES = {
    **{name: f"train.{name}" for name in ("fp8", "fp8_recipe", "fp8_param", "fp4", "first_last_layers_bf16")},
    "heads": "heads.fp8",
    "bf16": "train.precision=bf16",
    "transformer_engine": "train.transformer_engine=true",
}


def request_of(recipe: Recipe) -> fp8.Request:
    """What the recipe asks for."""
    train = recipe.train
    return fp8.Request(
        fp8=train.fp8,
        fp8_recipe=train.fp8_recipe,
        fp8_param=train.fp8_param,
        fp4=train.fp4,
        first_last_layers_bf16=train.first_last_layers_bf16,
        heads=recipe.heads.fp8,
        bf16=train.precision == "bf16",
        transformer_engine=train.transformer_engine,
    )


def config_fields(recipe: Recipe) -> dict[str, Any]:
    """Fields of TransformerConfig; none where the recipe asks for no FP8."""
    train = recipe.train
    if not request_of(recipe).wanted:
        return {}
    names = (
        *("fp8", "fp8_recipe", "fp8_param", "fp4", "first_last_layers_bf16"),
        *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
    )
    return {name: getattr(train, name) for name in names}


def check_low_precision(recipe: Recipe) -> None:
    """Refuse what cannot work on any machine; the recipe must be resolved.

    Raises:
        ConfigError: names the field, its value and the remedy.
    """
    request = request_of(recipe)
    fp8.check_request(request, NAMES)
    if not request.wanted:
        return
    kind = "train.fp8" if request.fp8 else "train.fp4"
    value = request.fp8 or request.fp4
    if recipe.run.deepspeed is not None:
        raise ConfigError(kind, value, "it is not tested under DeepSpeed", "Leave it or run.deepspeed out.")
    _check_experts(recipe, request)
    if request.fp8_param and not recipe.optimizer.distributed:
        raise ConfigError(
            "train.fp8_param",
            True,
            "megatron-core keeps the full weights beside FP8 ones in its distributed optimizer alone",
            "Set optimizer.distributed=true, or this to false.",
        )
    if request.fp8_param and request.fp8_recipe == "mxfp8":
        raise ConfigError(
            "train.fp8_param",
            True,
            "Transformer Engine cannot put mxfp8's matrices into megatron-core's buffers",
            "Set it to false, or train.fp8_recipe to tensorwise.",
        )
    _check_layers_in_bf16(recipe)
    _check_multiples(recipe, request.scaling)


def check_machine(recipe: Recipe) -> None:
    """Refuse FP8 or FP4 that does not work where this process runs.

    Raises:
        ConfigError: names the field, why, and the recipe that would work on this device.
        EnvironmentUnsupported: torch cannot use this machine's GPUs.
    """
    request = request_of(recipe)
    if request.wanted:
        from mtp_megatron.compat.devices import require_usable_gpu  # imports torch, which takes seconds

        require_usable_gpu()
        fp8.check_machine(request, fp8.this_machine(), NAMES)


def _check_experts(recipe: Recipe, request: fp8.Request) -> None:
    """Those of a rank are quantised and multiplied together, in code of Transformer Engine that no dense layer has."""
    if recipe.model.num_experts is None:
        return
    name = request.scaling.name
    if name not in WITH_EXPERTS:
        raise ConfigError(
            "train.fp8_recipe" if request.fp8 else "train.fp4",
            request.fp8_recipe if request.fp8 else request.fp4,
            f"no trunk with experts has been trained with {name} scaling yet, not on a CPU either",
            f"Set train.fp8_recipe to {' or '.join(WITH_EXPERTS)}."
            if request.fp8
            else f"Leave it out, and set train.fp8=hybrid and train.fp8_recipe={WITH_EXPERTS[0]}.",
        )
    if request.fp8_param:
        raise ConfigError(
            "train.fp8_param", True, "no trunk with experts has been trained with it yet", "Set it to false."
        )


def _check_layers_in_bf16(recipe: Recipe) -> None:
    train, most = recipe.train, recipe.model.num_trunk_layers // recipe.parallel.pipeline
    if not train.first_last_layers_bf16:
        return
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(train, name) > most:
            raise ConfigError(
                f"train.{name}",
                getattr(train, name),
                f"megatron-core takes at most the {most} layers of one pipeline stage",
                f"Set it to <= {most}.",
            )


def _check_multiples(recipe: Recipe, scaling: fp8.Scaling) -> None:
    """Every multiplication in FP8 works on whole blocks."""
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    tokens = train.micro_batch_size * recipe.train_seq_length // parallel.context
    if parallel.sequence_parallel:
        tokens //= parallel.tensor
    groups = model.num_query_groups or model.num_attention_heads
    queries = model.num_attention_heads * model.attention_head_size
    keys = groups * model.attention_head_size
    plain = scaling.multiple
    gathered = max(plain, scaling.gathered) if parallel.sequence_parallel else plain
    widths = {"ffn_hidden_size": parallel.tensor}  # and by how many ranks they are cut
    if model.num_experts is not None:
        # No trunk layer has the other one then. Tokens of an expert are made up to a multiple by megatron-core.
        widths = {"moe_ffn_hidden_size": 1} | (widths if recipe.heads.fp8 else {})
    for name, value, size, multiple in (
        ("train.micro_batch_size", train.micro_batch_size, tokens, gathered),
        ("model.hidden_size", model.hidden_size, model.hidden_size, gathered),
        ("model.num_attention_heads", model.num_attention_heads, queries // parallel.tensor, plain),
        ("model.num_query_groups", groups, (queries + 2 * keys) // parallel.tensor, plain),
        *((f"model.{key}", getattr(model, key), (getattr(model, key) or 0) // by, plain) for key, by in widths.items()),
    ):
        if size % multiple:
            what = "tokens of a microbatch" if name.startswith("train.") else "channels"
            raise ConfigError(
                name,
                value,
                f"it makes {size} {what} on a rank, and {scaling.name} scaling takes multiples of {multiple}"
                + (" with sequence parallelism" if multiple > plain else ""),
                "Change it or the parallel sizes"
                + (", or set parallel.sequence_parallel=false." if size % plain == 0 else "."),
            )
