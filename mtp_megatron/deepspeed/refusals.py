"""What does not go together with a DeepSpeed engine: refused by name, with what to use instead. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe

_MEGATRON = "leave out run.deepspeed: megatron-core's own loop"


def refuse_unsupported(recipe: Recipe, config: dict[str, Any], stage: int) -> None:
    """Refuse what cannot work, the first of it.

    Raises:
        ConfigError: names field, value and what to use instead.
    """
    for error in (*_of_recipe(recipe, stage), *_of_config(config)):
        raise error


def _of_recipe(recipe: Recipe, stage: int) -> Iterator[ConfigError]:
    parallel, optimizer = recipe.parallel, recipe.optimizer
    if parallel.pipeline > 1:
        yield ConfigError(
            "parallel.pipeline",
            parallel.pipeline,
            "DeepSpeed pipelines a PipelineModule (ZeRO 0 and 1 only), which cuts the layers itself and reads the loss "
            "in the last stage's forward pass. megatron-core cuts these layers, and deferred heads make the loss, "
            "and z's gradient for the stage before, in the backward pass",
            f"Set it to 1, or {_MEGATRON} runs PP x TP with optimizer.distributed (ZeRO 1).",
        )
    if recipe.model.num_experts is not None:
        yield ConfigError(
            "model.num_experts",
            recipe.model.num_experts,
            "DeepSpeed would average the gradients of different ranks' experts, and megatron-core's schedule, which "
            "scales the routers' load-balancing loss, does not run",
            f"Leave it out, or {_MEGATRON} trains experts (parallel.expert).",
        )
    for name in ("distributed", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(optimizer, name):
            yield ConfigError(
                f"optimizer.{name}",
                True,
                f"with run.deepspeed the engine shards and overlaps (zero_optimization.stage={stage}, overlap_comm)",
                "Set it to false.",
            )
    if recipe.train.batch_size_schedule is not None:
        yield ConfigError(
            "train.batch_size_schedule",
            recipe.train.batch_size_schedule,
            "DeepSpeed's engine ends a step where its count of all microbatches so far divides by "
            "gradient_accumulation_steps, which after a change it need not",
            f"Set it to null, or {_MEGATRON} follows it.",
        )
    if recipe.train.async_save:
        yield ConfigError(
            "train.async_save",
            True,
            "the engine writes its checkpoint itself, and the training waits for it",
            f"Set it to false, or {_MEGATRON} trains on meanwhile.",
        )
    if recipe.heads.execution == "joint" and stage == 3:
        yield ConfigError(
            "heads.execution",
            "joint",
            "under zero_optimization.stage=3 the unembedding is gathered for one head at a time",
            "Set it to deferred, or the stage to 2 or less.",
        )


def _of_config(config: dict[str, Any]) -> Iterator[ConfigError]:
    optimizer = config.get("optimizer", {})
    kind, adamw = optimizer.get("type", "AdamW"), "The recipe's section optimizer is AdamW's"
    if str(kind).lower() not in ("adam", "adamw", "auto"):
        yield ConfigError("optimizer.type", kind, f"the recipe trains with AdamW ({_keys()})", "Set it to AdamW.")
    if optimizer.get("params", {}).get("adam_w_mode") is False:
        yield ConfigError("optimizer.params.adam_w_mode", False, f"{adamw}: its decay is decoupled", "Leave it out.")
    if "scheduler" in config:
        scheduler = config["scheduler"]
        value = scheduler.get("type") if isinstance(scheduler, dict) else scheduler
        yield ConfigError(
            "scheduler.type",
            value,
            "the learning rate follows the recipe (optimizer.schedule, optimizer.warmup_steps, optimizer.min_lr)",
            "Leave the section out and set those.",
        )
    autotp = config.get("tensor_parallel", {})
    if isinstance(autotp, dict) and autotp.get("autotp_size", 0):
        yield ConfigError(
            "tensor_parallel.autotp_size",
            autotp["autotp_size"],
            "the layers are tensor parallel by megatron-core",
            "Leave it out and set parallel.tensor.",
        )
    if config.get("sequence_parallel_size", 1) != 1:
        yield ConfigError(
            "sequence_parallel_size",
            config["sequence_parallel_size"],
            "sequences are cut by megatron-core",
            "Leave it out and set parallel.sequence_parallel or parallel.context.",
        )
    if config.get("managed_gradient_accumulation", True) is not True:
        yield ConfigError(
            "managed_gradient_accumulation",
            config["managed_gradient_accumulation"],
            "the engine must know which microbatch is the last one of a step",
            "Leave it out.",
        )
    if config.get("checkpoint", {}).get("load_universal"):
        yield ConfigError(
            "checkpoint.load_universal",
            True,
            "a run decides by its checkpoint: at another TP or DP it goes through the universal format by itself",
            "Leave it out.",
        )


def _keys() -> str:
    return "optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay"
