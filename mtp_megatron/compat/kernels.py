"""Fused kernels that megatron-core can be told to use and the loss's own, what each needs, which this machine has."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mtp_megatron.compat import packages


@dataclass(frozen=True)
class Fusion:
    """One switch of TransformerConfig.

    Attributes:
        setting: its name.
        needs: what has to be there, in words.
        present: whether it is there, given a CUDA device.
    """

    setting: str
    needs: str
    present: Callable[[], bool]

    @property
    def available(self) -> bool:
        """Whether switching it on works here."""
        return torch.cuda.is_available() and self.present()


def _modules(*names: str) -> Callable[[], bool]:
    return lambda: all(packages.locate(name) is not None for name in names)


def _transformer_engine() -> bool:
    return packages.transformer_engine(cuda=True).state is packages.State.USABLE


_SOFTMAX = ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda")

FUSIONS: tuple[Fusion, ...] = (
    # Compiled by torch.compile: without a GPU that takes a C++ compiler and most of a minute to gain nothing.
    Fusion("bias_activation_fusion", "a CUDA device and triton", _modules("triton")),
    Fusion("bias_dropout_fusion", "a CUDA device and triton", _modules("triton")),
    Fusion("masked_softmax_fusion", "a CUDA device and Apex built with its softmax kernels", _modules(*_SOFTMAX)),
    Fusion(
        "gradient_accumulation_fusion",
        "a CUDA device and Apex built with fused_weight_gradient_mlp_cuda",
        _modules("fused_weight_gradient_mlp_cuda"),
    ),
    Fusion("apply_rope_fusion", "a CUDA device and Transformer Engine", _transformer_engine),
    # Megatron's torch norm refuses it and Transformer Engine's ignores it.
    Fusion("persist_layer_norm", "a norm other than RMSNorm", lambda: False),
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
    if not apex and not _transformer_engine():
        slower += ["Adam and gradient clipping are torch's", "so is LayerNorm (RMSNorm is anyway)"]
    if packages.locate("fused_weight_gradient_mlp_cuda") is None:
        slower.append("weight gradients are added to their fp32 buffers in a pass of their own")
    if not slower:
        return None
    missing = "Apex's fused_weight_gradient_mlp_cuda" if apex else "NVIDIA Apex"
    return f"without {missing} this is slower: {'; '.join(slower)}. `python -m mtp_megatron.compat` lists the kernels."
