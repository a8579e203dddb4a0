"""The only place that knows Megatron versions, devices and optional packages.

Importing this package is cheap: torch and megatron are imported by the functions that need them.

    compat.prepare()                     # before anything of megatron is used
    compat.device(), compat.backend()    # ("cuda", local rank) and "nccl", or cpu and "gloo"
    compat.trunk_block_spec(config)      # layers of this pipeline stage, no final norm
    compat.layer_spec(config)            # one transformer layer, for a head
    compat.fusions()                     # arguments of TransformerConfig: the fused kernels that this machine has

`python -m mtp_megatron.compat` prints what was found on this machine and what follows from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_megatron.compat.devices import backend, device, prepare
    from mtp_megatron.compat.experts import aux_loss_coefficient, take_load_balancing_loss
    from mtp_megatron.compat.fp8 import fp8_context, without_fp8
    from mtp_megatron.compat.kernels import fusions, slower_without_apex, slower_without_triton
    from mtp_megatron.compat.overlap import userbuffers, without_overlap
    from mtp_megatron.compat.specs import layer_spec, norm_class, trunk_block_spec
    from mtp_megatron.compat.versions import MCORE_VERSION

# name -> module that defines it, imported at first use
_LAZY = {
    "MCORE_VERSION": "mtp_megatron.compat.versions",
    "aux_loss_coefficient": "mtp_megatron.compat.experts",
    "backend": "mtp_megatron.compat.devices",
    "device": "mtp_megatron.compat.devices",
    "fp8_context": "mtp_megatron.compat.fp8",
    "fusions": "mtp_megatron.compat.kernels",
    "prepare": "mtp_megatron.compat.devices",
    "layer_spec": "mtp_megatron.compat.specs",
    "norm_class": "mtp_megatron.compat.specs",
    "slower_without_apex": "mtp_megatron.compat.kernels",
    "slower_without_triton": "mtp_megatron.compat.kernels",
    "take_load_balancing_loss": "mtp_megatron.compat.experts",
    "trunk_block_spec": "mtp_megatron.compat.specs",
    "userbuffers": "mtp_megatron.compat.overlap",
    "without_fp8": "mtp_megatron.compat.fp8",
    "without_overlap": "mtp_megatron.compat.overlap",
}

__all__ = [
    "MCORE_VERSION",
    "aux_loss_coefficient",
    "backend",
    "device",
    "fp8_context",
    "fusions",
    "layer_spec",
    "norm_class",
    "prepare",
    "slower_without_apex",
    "slower_without_triton",
    "take_load_balancing_loss",
    "trunk_block_spec",
    "userbuffers",
    "without_fp8",
    "without_overlap",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
