"""Preparing a process for megatron: checks, stand-ins where there is no CUDA, repaired fallbacks; the device to use."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from mtp_megatron.compat import cpu, fallbacks, packages
from mtp_megatron.compat.versions import EnvironmentUnsupported, UnusableGPUs, require_megatron_core
from mtp_megatron.errors import ConfigError
from mtp_megatron.imports import imports_that_stay

_DRIVER = Path("/dev/nvidiactl")  # there where NVIDIA's driver is loaded, of whatever version


def why_no_gpu() -> str | None:
    """Why this torch, which is built for CUDA, cannot use the GPUs of this machine, in its own words.

    None where it can, where there are none or they are hidden on purpose, and with a torch for CPUs. An old driver is
    the usual reason: torch warns of it once, among other warnings, and says that there is no device.
    """
    if torch.version.cuda is None or torch.cuda.is_available() or not _driver_is_there():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return " ".join(str(error).split())
    return "torch.cuda.is_available() is False"


def require_usable_gpu() -> None:
    """Refuse to train on the CPU because something is wrong with the GPUs; without any, or with hidden ones, go on.

    Raises:
        UnusableGPUs: with torch's reason and the ways out.
    """
    reason = why_no_gpu()
    if reason is not None:
        raise UnusableGPUs(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and cannot use this machine's GPUs: "
            f"{reason.rstrip('.')}. Update NVIDIA's driver, install a torch that is built for the driver's CUDA, or "
            f"ask the scheduler for GPUs; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU."
        )


def gpus_left_out() -> str | None:
    """One line for the log where a torch for CPUs trains on a machine with NVIDIA's GPUs; else None."""
    if torch.version.cuda is not None or torch.version.hip is not None or not _driver_is_there():
        return None
    return (
        f"torch {torch.__version__} is a CPU build: this machine's GPUs are not used. Install a build for CUDA; "
        "CUDA_VISIBLE_DEVICES= (empty) ends this message."
    )


def _driver_is_there() -> bool:
    """Whether NVIDIA's driver is loaded and its GPUs are not hidden from this process on purpose."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    # The count comes from the driver's own library, also where torch's CUDA is too new for it. Stand-ins make one up.
    return _DRIVER.exists() or (not cpu.installed() and torch.cuda.device_count() > 0)


def prepare() -> None:
    """Make megatron-core usable in this process; idempotent, to be called before anything of megatron is used.

    Without a CUDA device it installs the CPU stand-ins (`mtp_megatron.compat.cpu`). Everywhere it repairs those of
    megatron-core's pure-torch fallbacks that this package relies on (`mtp_megatron.compat.fallbacks`).

    Raises:
        EnvironmentUnsupported: megatron-core is missing or of an unsupported version, or a package that Megatron would
            pick up cannot work, such as the `apex` of PyPI or a Transformer Engine that was built for another torch.
    """
    if fallbacks.installed() and (cpu.installed() or torch.cuda.is_available()):
        return
    require_megatron_core()
    if torch.cuda.is_available() and packages.locate("transformer_engine") is not None:
        packages.name_cuda_headers()
    packages.require_no_wrong_package(torch.cuda.is_available())
    with imports_that_stay(), warnings.catch_warnings():
        # Each missing optional package warns at import; `python -m mtp_megatron.compat` says the same in one place.
        warnings.simplefilter("ignore")
        cpu.install()
        fallbacks.install()
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    # Every TransformerConfig of 0.16.1 warns about its own default value.
    warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)


def device() -> torch.device:
    """Device of this process: the CUDA device of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return cpu.CPU
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def take_own_gpu() -> None:
    """Make the GPU of this rank the current one, and start CUDA on it; without GPUs, do nothing.

    Before anything else touches CUDA: a rank that imports Transformer Engine first may leave a context on GPU 0, where
    all ranks' contexts would take its memory; and a GPU that is broken, or held by another process, is found out where
    the ranks still tell one another.

    Raises:
        ConfigError: this node starts more ranks than it has GPUs, or they do not see them all, or do not know which is
            whose.
        EnvironmentUnsupported: this rank's GPU does not answer.
    """
    if not torch.cuda.is_available():
        return
    _check_local_rank()
    own = device()
    try:
        torch.cuda.set_device(own)
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise EnvironmentUnsupported(
            f"GPU {own.index} of this node cannot be used: {said}. nvidia-smi shows whether it is broken or taken: "
            "leave the node out, or end the process that holds the GPU."
        ) from error


def _check_local_rank() -> None:
    # By every rank, so that the one that reports for its node does.
    visible, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if local_rank is None and visible > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        raise ConfigError(
            "LOCAL_RANK",
            None,
            f"this node has {visible} CUDA devices, and a rank that does not know its place on the node would take the "
            "first one, as the others would",
            "Start the ranks with torchrun, or export LOCAL_RANK for each (under srun LOCAL_RANK=$SLURM_LOCALID).",
        )
    started = int(os.environ.get("LOCAL_WORLD_SIZE", int(local_rank or "0") + 1))
    if started <= visible:
        return
    if visible == 1:  # of a small node, or because a scheduler binds each rank to a GPU of its own
        raise ConfigError(
            "processes per node",
            started,
            "each rank needs a CUDA device of its own, by its LOCAL_RANK, and this one sees a single device",
            "Let every rank see all GPUs of its node (SLURM: no --gpus-per-task or --gpu-bind for srun; the same "
            "CUDA_VISIBLE_DEVICES for all). If the node has only that one, start one rank there.",
        )
    raise ConfigError(
        "processes per node",
        started,
        f"this node has {visible} CUDA devices, and each rank needs its own",
        "Start fewer ranks per node, or set CUDA_VISIBLE_DEVICES= to train on the CPU.",
    )


def backend() -> str:
    """Backend of torch.distributed that fits `device()`: "nccl" or "gloo".

    Raises:
        UnusableGPUs: there are GPUs, and torch cannot use them.
    """
    require_usable_gpu()
    return "nccl" if torch.cuda.is_available() else "gloo"
