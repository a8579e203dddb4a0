"""What Megatron-LM would load wrongly from a checkpoint: refused by name, before anything is built.

Needs no Megatron-LM: everything here reads its arguments, and those that it stored in the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_megatron.checkpoint.megatron_args import StoredArguments, read_arguments
from mtp_megatron.checkpoint.torch_dist import METADATA
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.checkpoint_files import TRACKER, iteration_folder


def check_scales(args: argparse.Namespace) -> None:
    """Refuse to load the scales of experts in delayed scaling where the layers hold other numbers of experts.

    Megatron-core would give them to others (:func:`mtp_megatron.compat.checkpoints.leave_experts_scales` says how).

    Raises:
        ConfigError: another ``--expert-model-parallel-size``, or ``--moe-grouped-gemm`` on one side only.
        CheckpointError: the checkpoint's arguments cannot be read.
    """
    here = _experts_with_scales(vars(args))
    if here is None or (stored := _stored_arguments(args)) is None:
        return
    there = _experts_with_scales(stored.values)
    if there is None or there == here:
        return
    size = stored.values.get("expert_model_parallel_size", 1)
    grouped = "with" if stored.values.get("moe_grouped_gemm") else "without"
    raise ConfigError(
        "--expert-model-parallel-size",
        args.expert_model_parallel_size,
        f"with delayed scaling and {here} of the experts in a layer Megatron-core would give experts one another's "
        f"scales from {stored.path.parent}, saved with {there} in a layer",
        f"Load it with --expert-model-parallel-size {size} and {grouped} --moe-grouped-gemm, as it was saved, or set "
        "--fp8-recipe to tensorwise",
    )


def _experts_with_scales(args: Mapping[str, Any]) -> int | None:
    """Experts in one layer of Transformer Engine, by Megatron-LM's arguments; None where none has scales of its own
    that last."""
    experts = args.get("num_experts")
    if not experts or not args.get("fp8") or args.get("fp8_recipe", "delayed") != "delayed":
        return None
    return int(experts) // int(args.get("expert_model_parallel_size", 1)) if args.get("moe_grouped_gemm") else 1


def _stored_arguments(args: argparse.Namespace) -> StoredArguments | None:
    """Of the checkpoint that Megatron-LM will load; None where there is none, or one that has a file for each rank
    (``torch``), which no other layout loads."""
    place = getattr(args, "load", None)
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if pretrained is not None and not _tracked(place):
        place = pretrained
    step = str(getattr(args, "ckpt_step", None) or "") or _tracked(place)
    if getattr(args, "non_persistent_ckpt_type", None) == "global":
        between = args.non_persistent_global_ckpt_dir or (place and Path(place) / "non_persistent")
        latest = _tracked(between)
        if latest.isdigit() and int(latest) >= (int(step) if step.isdigit() else 0):
            place, step = between, latest
    if not place or not step:
        return None
    folder = iteration_folder(Path(place), int(step)) if step.isdigit() else Path(place) / step
    return read_arguments(folder) if (folder / METADATA).exists() else None


def _tracked(place: str | Path | None) -> str:
    """What the tracker in a folder of checkpoints names: a step, ``release``, or nothing."""
    try:
        return (Path(place) / TRACKER).read_text(encoding="utf-8").strip() if place else ""
    except OSError:
        return ""
