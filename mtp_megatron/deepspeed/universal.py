"""DeepSpeed's universal checkpoints: a checkpoint whose parameters are whole, so that another TP x DP can load it."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.checkpoint import tensor_parallel
from mtp_megatron.errors import CheckpointError
from mtp_megatron.model import MTPGPTModel

INFO = "universal_checkpoint_info"
_SUFFIX = "_universal"
logger = logging.getLogger(__name__)


def information(model: MTPGPTModel) -> dict[str, Any]:
    """What ``ds_to_universal`` must know about the model: how its tensor parallel shards become whole.

    The padding of the vocabulary is kept: in this package it is the same in every layout.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def present(patterns: tuple[str, ...]) -> list[str]:  # DeepSpeed refuses patterns that match nothing
        found = [pattern for pattern in patterns if any(tensor_parallel.matches(name, (pattern,)) for name in names)]
        return [f"{pattern}$" for pattern in found]

    replicated = [name.replace(".", r"\.") + "$" for name in names if not tensor_parallel.is_sharded(name)]
    return {
        "universal_checkpoint_version": 0.2,
        "tp_replicated_parameter_patterns": replicated,
        "parameter_with_row_parallelism_patterns": present(tensor_parallel.COLUMNS),
        "parameter_with_2_sub_params_cat_dim_0": present(tensor_parallel.GATE_AND_UP),
    }


def universal_folder(folder: Path) -> Path:
    """Where the universal form of a checkpoint folder lies."""
    return folder.with_name(folder.name + _SUFFIX)


@contextmanager
def converted(folder: Path) -> Iterator[Path]:
    """The universal form of a checkpoint: made by rank 0 and removed at the end, unless it lay there. Collective.

    What a user made with ``python -m deepspeed.checkpoint.ds_to_universal --input_folder .../iter_0000100
    --output_folder .../iter_0000100_universal`` (with as many workers as the machine has room for) is used as it is.

    Raises:
        CheckpointError: on every rank: rank 0 cannot make it.
    """
    target = universal_folder(folder)
    made = dist.get_rank() == 0 and not target.is_dir()
    if made:
        logger.warning("resuming at another TP x DP: making the universal form of %s", folder)
        try:
            _convert(folder, target)
        except Exception as error:  # whatever it is, the others wait for word of it
            _tell(str(error) or type(error).__name__)
            raise
    complaint = _tell("")
    if complaint:
        raise CheckpointError(f"rank 0: {complaint}")
    try:
        yield target
        dist.barrier()
    finally:
        if made:
            shutil.rmtree(target)


def _tell(complaint: str) -> str:
    """What rank 0 complains of, on every rank; also the barrier after its work."""
    told = [complaint]
    dist.broadcast_object_list(told, src=0, device=compat.device())
    return told[0]


def _convert(folder: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    workshop = target.with_name(target.name + ".tmp")  # a folder of its own: the tool leaves a file beside its output
    shutil.rmtree(workshop, ignore_errors=True)
    workshop.mkdir()
    temporary = workshop / target.name
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(temporary),
        num_extract_workers=1,  # in this process: it has a process group that children must not inherit
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            ds_to_universal.main(arguments)
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:  # its checks are asserts
            raise CheckpointError(
                f"{folder}: DeepSpeed cannot make it universal ({error}). Resume at the TP x DP that saved it, or "
                "start another run from these weights with run.load."
            ) from error
    temporary.rename(target)
    shutil.rmtree(workshop)


@contextmanager
def loading(engine: Any) -> Iterator[None]:
    """The engine's ``load_checkpoint`` reads universal checkpoints inside, as with ``checkpoint.load_universal``.

    Stage 3 then gives every group of parameters the first one's settings, and all parameters one step tensor, which
    would advance once for each of them: which groups decay is put back, and each parameter gets a step of its own.
    """
    settings, groups = engine._config, engine.optimizer.param_groups
    before = settings.load_universal_checkpoint
    decay = [(group["weight_decay"], group["wd_mult"]) for group in groups]
    settings.load_universal_checkpoint = True
    try:
        yield
    finally:
        settings.load_universal_checkpoint = before
        for group, (weight_decay, factor) in zip(engine.optimizer.param_groups, decay, strict=True):
            group["weight_decay"], group["wd_mult"] = weight_decay, factor
        for state in engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
