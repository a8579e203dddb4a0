"""Preparing a process for megatron: checks, stand-ins where there is no CUDA, repaired fallbacks; the device to use."""

from __future__ import annotations

import importlib
import os
import warnings

import torch

from mtp_megatron.compat import cpu, fallbacks, packages
from mtp_megatron.compat.versions import require_megatron_core
from mtp_megatron.imports import imports_that_stay


def prepare() -> None:
    """Make megatron-core usable in this process; idempotent, to be called before anything of megatron is used.

    Without a CUDA device it installs the CPU stand-ins (`mtp_megatron.compat.cpu`). Everywhere it repairs those of
    megatron-core's pure-torch fallbacks that this package relies on (`mtp_megatron.compat.fallbacks`).

    Raises:
        EnvironmentUnsupported: megatron-core is missing or of an unsupported version, or a package that Megatron would
            pick up cannot work, such as the `apex` of PyPI.
    """
    if fallbacks.installed() and (cpu.installed() or torch.cuda.is_available()):
        return
    require_megatron_core()
    packages.require_no_wrong_package(torch.cuda.is_available())
    if packages.transformer_engine(torch.cuda.is_available()).state is packages.State.USABLE:
        packages.name_cuda_headers()
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
    """Backend of torch.distributed that fits `device()`: "nccl" or "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"
