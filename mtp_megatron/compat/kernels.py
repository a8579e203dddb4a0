"""Fused kernels that megatron-core can be told to use and the loss's own, what each needs, which this machine has."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mtp_megatron.compat import packages
from mtp_megatron.compat.extensions import why_not_importable


@dataclass(frozen=True)
class Fusion:
    """One switch of TransformerConfig.

    Attributes:
        setting: its name.
        needs: what has to be there, in words.
        missing: what of it is not there, given a CUDA device; None: it is all there.
    """

    setting: str
    needs: str
    missing: Callable[[], str | None]

    @property
    def why_not(self) -> str | None:
        """Why switching it on does not work here; None where it does."""
        return "no CUDA device" if not torch.cuda.is_available() else self.missing()

    @property
    def available(self) -> bool:
        """Whether switching it on works here."""
        return self.why_not is None


def _modules(*names: str) -> Callable[[], str | None]:
    """Of extensions: the first one that is missing or was built for another torch."""

    def missing() -> str | None:
        for name in names:
            if packages.locate(name) is None:
                return f"{name} is not installed"
            if (reason := why_not_importable(name)) is not None:
                return f"{name} does not import ({reason}); build Apex again for this torch"
        return None

    return missing


def _transformer_engine() -> str | None:
    package = packages.transformer_engine(cuda=True)
    return None if package.state is packages.State.USABLE else f"{package.name}: {package}"


@functools.cache
def why_no_compiler() -> str | None:
    """Why Triton cannot compile the small C module that starts its kernels; None where it can.

    It looks as Triton does (runtime/build.py), and where the compiler looks for headers by itself.
    """
    chosen = os.environ.get("CC")
    if chosen is None:
        found = shutil.which("gcc") or shutil.which("clang")
    else:
        found = shutil.which(chosen)
    if found is None:
        what = "there is no C compiler" if chosen is None else f"CC={chosen!r} is no program here"
        return f"{what} for triton (apt install gcc python3-dev)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own
    include = sysconfig.get_paths(scheme=scheme)["include"]
    more = (os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    folders = [include, *(folder for folders in more for folder in folders.split(os.pathsep) if folder)]
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        return f"there is no Python.h in {include} for triton (apt install gcc python3-dev)"
    return None


def _triton() -> str | None:
    """What is missing for kernels that are compiled where they run, torch.compile's among them."""
    return why_no_compiler() if _has_triton() else "triton is not installed"


_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
_SOFTMAX = ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda")

FUSIONS: tuple[Fusion, ...] = (
    # Compiled by torch.compile: without a GPU that takes a C++ compiler and most of a minute to gain nothing.
    Fusion("bias_activation_fusion", "a CUDA device, triton and a C compiler with Python.h", _triton),
    Fusion("bias_dropout_fusion", "a CUDA device, triton and a C compiler with Python.h", _triton),
    Fusion("masked_softmax_fusion", "a CUDA device and Apex built with its softmax kernels", _modules(*_SOFTMAX)),
    Fusion(
        "gradient_accumulation_fusion",
        f"a CUDA device and Apex built with {_WEIGHT_GRADIENT}",
        _modules(_WEIGHT_GRADIENT),
    ),
    Fusion("apply_rope_fusion", "a CUDA device and Transformer Engine", _transformer_engine),
    # Megatron's torch norm refuses it and Transformer Engine's ignores it.
    Fusion("persist_layer_norm", "a norm other than RMSNorm", lambda: "the trunk's is RMSNorm"),
)


TRITON_CAPABILITY = (8, 0)
"""Lowest compute capability for which the loss uses Triton: the first one with bf16."""


def why_no_triton(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the loss leaves logits of this type to torch's operations; None where it has Triton kernels for them."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
    if device.type != "cuda" and not interpreted:
        return "no CUDA device"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"logits of {dtype}"
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda" and not interpreted and (reason := why_no_compiler()) is not None:
        return reason
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return f"a GPU of compute capability below {'.'.join(map(str, TRITON_CAPABILITY))}"
    return None


@functools.cache
def _has_triton() -> bool:
    return packages.locate("triton") is not None


def slower_without_triton() -> str | None:
    """One line for the log where a GPU's loss has to do without its Triton kernels; else None."""
    reason = why_no_triton(torch.device("cuda")) if torch.cuda.is_available() else None
    if reason is None:
        return None
    return f"the loss is slower and needs more memory without its Triton kernels: {reason}."


def fusions() -> dict[str, bool]:
    """Keyword arguments for TransformerConfig: every fused kernel that works on this machine on, the others off."""
    return {fusion.setting: fusion.available for fusion in FUSIONS}


def slower_without_apex(cuda: bool | None = None) -> str | None:
    """One line for the log: what runs slower because NVIDIA's Apex, or a part of it, is missing; None if nothing does.

    Megatron-core itself takes Adam and gradient clipping from Transformer Engine, else from Apex, else from torch, and
    its LayerNorm from Apex (its RMSNorm is torch's either way). Without a GPU Apex would not be used: None.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if not cuda:
        return None
    slower = []
    apex = packages.apex(cuda).state is packages.State.USABLE
    if not apex and _transformer_engine() is not None:
        slower += ["Adam and gradient clipping are torch's", "so is LayerNorm (RMSNorm is anyway)"]
    if (reason := _modules(_WEIGHT_GRADIENT)()) is not None:
        why = "" if packages.locate(_WEIGHT_GRADIENT) is None else f" ({reason})"
        slower.append(f"weight gradients are added to their fp32 buffers in a pass of their own{why}")
    if not slower:
        return None
    missing = f"Apex's {_WEIGHT_GRADIENT}" if apex else "NVIDIA Apex"
    return f"without {missing} this is slower: {'; '.join(slower)}. `python -m mtp_megatron.compat` lists the kernels."
