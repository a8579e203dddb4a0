"""Preparing a process for megatron: checks, stand-ins where there is no CUDA, repaired fallbacks; the device to use."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import torch

from mtp_megatron.compat import cpu, fallbacks, packages
from mtp_megatron.compat.versions import UnusableGPUs, require_megatron_core
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


def backend() -> str:
    """Backend of torch.distributed that fits `device()`: "nccl" or "gloo".

    Raises:
        UnusableGPUs: there are GPUs, and torch cannot use them.
    """
    require_usable_gpu()
    return "nccl" if torch.cuda.is_available() else "gloo"
