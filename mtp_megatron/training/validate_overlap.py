"""Rules of ``parallel.tp_comm_overlap``: checked with the others of :mod:`.validate`."""

from __future__ import annotations

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe

FIELD = "parallel.tp_comm_overlap"


def check_overlap(recipe: Recipe) -> None:
    """Refuse an overlap that cannot work; the recipe must be resolved.

    Raises:
        ConfigError: names the field, its value and the remedy.
    """
    parallel, train = recipe.parallel, recipe.train
    if not parallel.tp_comm_overlap:
        return

    def refuse(problem: str, remedy: str) -> ConfigError:
        return ConfigError(FIELD, True, problem, remedy)

    if parallel.tensor == 1:
        raise refuse("there is nothing to communicate with parallel.tensor=1", "Set it to false.")
    if not parallel.sequence_parallel:
        raise refuse(
            "it overlaps the gathers and scatters of sequence parallelism",
            "Set parallel.sequence_parallel=true, or this to false.",
        )
    if not train.transformer_engine:
        raise refuse("it is Transformer Engine's", "Set train.transformer_engine=true, or this to false.")
    if train.precision == "fp32":
        raise refuse("its buffers are in bf16 or FP8", "Set train.precision=bf16, or this to false.")
    if recipe.run.deepspeed is not None:
        raise refuse("it is not tested under DeepSpeed", "Set it to false, or leave run.deepspeed out.")
    if recipe.model.num_experts is not None:
        raise refuse("it is not tested with experts", "Set it to false.")
    _check_scaling(recipe)


def _check_scaling(recipe: Recipe) -> None:
    """Transformer Engine's gathers through userbuffers know three ways of scaling (``module/base.py``,
    ``fill_userbuffers_buffer_for_all_gather``)."""
    train, parallel = recipe.train, recipe.parallel
    if train.fp4 is not None:
        raise ConfigError(FIELD, True, f"its buffers hold no train.fp4={train.fp4}", "Set it to false.")
    if train.fp8 is None:
        return
    if train.fp8_recipe == "blockwise":
        raise ConfigError(
            FIELD,
            True,
            "its buffers hold no train.fp8_recipe=blockwise",
            "Set it to false, or train.fp8_recipe to tensorwise.",
        )
    tokens = train.micro_batch_size * recipe.train_seq_length // parallel.context // parallel.tensor
    if train.fp8_recipe == "mxfp8" and tokens % 128:
        raise ConfigError(
            FIELD,
            True,
            f"a rank has {tokens} tokens of a microbatch, and mxfp8 goes through its buffers in multiples of 128",
            "Change train.micro_batch_size or the parallel sizes, or set it to false.",
        )
