"""Fused kernels that megatron-core can be told to use, what each needs, and which of them this machine has."""

from __future__ import annotations

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


def fusions() -> dict[str, bool]:
    """Keyword arguments for TransformerConfig: every fused kernel that works on this machine on, the others off."""
    return {fusion.setting: fusion.available for fusion in FUSIONS}
