"""A CPU that passes for an H100 to Transformer Engine and to the project's own checks, for the time of a test.

Transformer Engine is imported before anything of Megatron, so that ``mtp_megatron.compat.cpu`` finds it in use and does
not hide it; the CPU stand-ins of the package do the rest of the work. Here are only those that Transformer Engine
itself asks for. Where PyTorch has a device for real, ``torch.cuda.is_available`` stays as it is: only those who ask for
Transformer Engine's sake are told of one, and nothing of the project's checks is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version

from mtp_megatron import compat
from mtp_megatron.compat import cpu, fallbacks, fp8, packages
from tests.transformer_engine import kernels

HOPPER, BLACKWELL = (9, 0), (10, 0)
# Functions of Transformer Engine that remember what they were told of the device.
_REMEMBERS = (
    ("transformer_engine.pytorch.utils", "_get_device_compute_capability"),
    ("transformer_engine.pytorch.utils", "is_non_tn_fp8_gemm_supported"),
    ("transformer_engine.pytorch.quantization", "check_fp8_support"),
    ("transformer_engine.pytorch.quantization", "check_mxfp8_support"),
    ("transformer_engine.pytorch.quantization", "check_nvfp4_support"),
    ("transformer_engine.pytorch.quantization", "check_fp8_block_scaling_support"),
)


def import_transformer_engine() -> Any:
    """The real one, before Megatron; then the package's stand-ins for CUDA."""
    module = importlib.import_module("transformer_engine.pytorch")
    compat.prepare()
    return module


def pretend(monkeypatch: pytest.MonkeyPatch, capability: fp8.Capability = HOPPER) -> None:
    """Everything of a GPU that Transformer Engine and the project's checks look at."""
    engine = import_transformer_engine()
    from megatron.core import fp8_utils

    assert fp8_utils.HAVE_TE, "Megatron was imported without Transformer Engine: run this folder alone"
    assert not torch.cuda.is_available()
    _tell_the_project(monkeypatch, capability)

    for path, name in _REMEMBERS:
        getattr(importlib.import_module(path), name).cache_clear()
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    # Whether a graph is being captured; raises without a driver.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Asserted of every input; the project's loss chooses kernels by it, and is told the truth.
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: _asked_by_the_engine()))
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    monkeypatch.setattr(base.TransformerEngineBaseModule, "__init__", _with_cuda(base.TransformerEngineBaseModule))
    # Scratch memory of cuBLAS, by the index of the device; a grouped multiplication has some for each stream.
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    monkeypatch.setattr(gemm, "get_cublas_workspace", _workspace)
    kernels.install(monkeypatch)
    # Generators, of its recomputation.
    states = importlib.import_module("transformer_engine.pytorch.distributed")
    monkeypatch.setattr(states, "_get_cuda_rng_state", cpu._get_state(None))
    monkeypatch.setattr(states, "_set_cuda_rng_state", cpu._set_state(None))
    # Masks are made with device="cuda".
    monkeypatch.setattr(torch, "arange", cpu._on_cpu(torch.arange))
    # Gloo packs what is coalesced into one type: parameters in bf16 beside those in FP8 receive the latter's bytes.
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    monkeypatch.setattr(buffers, "_coalescing_manager", _one_at_a_time)

    # Attention in torch's own operations: Transformer Engine's choice where neither flash nor cuDNN's fits.
    utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    monkeypatch.setattr(utils, "get_padding_mask", _on_this_device(utils.get_padding_mask))
    unfused = (False, None, False, None, True, [False, False, True])
    monkeypatch.setattr(utils, "get_attention_backend", lambda parameters: unfused)
    monkeypatch.setenv("NVTE_MASKED_SOFTMAX_FUSION", "0")
    # The update of the histories in its Python.
    monkeypatch.setenv("NVTE_UNFUSED_FP8_UPDATE", "1")
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "1")  # as Megatron sets them, and leaves them
    engine.fp8.FP8GlobalStateManager.reset()
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _asked_by_the_engine() -> bool:
    """Whether the caller of the caller of this function (a property) is Transformer Engine's code."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("transformer_engine.")


def forget() -> None:
    """What was remembered of the pretended device, and upstream's scale of the load-balancing loss: a backward pass
    without a schedule leaves one of another shape than a schedule writes into."""
    for path, name in _REMEMBERS:
        getattr(importlib.import_module(path), name).cache_clear()
    importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager.reset()


def _tell_the_project(monkeypatch: pytest.MonkeyPatch, capability: fp8.Capability) -> None:
    """Its checks run as they are, on this machine's own packages and a device that is not there."""
    from mtp_megatron.compat import specs
    from mtp_megatron.megatron_lm import arguments

    machine = dataclasses.replace(
        fp8.this_machine(),
        device=f"a pretended GPU of compute capability {capability[0]}.{capability[1]}",
        capability=capability,
        cuda=Version(str(torch.version.cuda)),
        transformer_engine=packages.transformer_engine(cuda=True),
    )
    monkeypatch.setattr(fp8, "this_machine", lambda: machine)
    for module in (specs, arguments):
        asked = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
        monkeypatch.setattr(module, "torch", asked)


def adam_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither Transformer Engine nor Apex is: Adam is torch's, with what the package repairs of it there."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    for row in fallbacks.TORCH_ADAM:
        original = getattr(distrib_optimizer.DistributedOptimizer, row.name)
        monkeypatch.setattr(distrib_optimizer.DistributedOptimizer, row.name, row.make(original))


def _one_at_a_time(*groups: Any, async_ops: bool = False) -> contextlib.AbstractContextManager[None]:
    assert not async_ops, "these tests overlap no communication"
    return contextlib.nullcontext()


def _workspace(device: int, overlapped: bool, grouped: bool) -> torch.Tensor | list[torch.Tensor]:
    return [torch.empty(0)] if grouped else torch.empty(0)


def _on_this_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """What moves its result to ``device="cuda"``, without that."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", cpu._on_cpu(torch.Tensor.to))
            return function(*args, **kwargs)

    return called


def _with_cuda(module: Any) -> Callable[..., None]:
    """Its constructor, with a device for as long as it asserts that there is one."""
    original = module.__init__

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            original(self, *args, **kwargs)

    return construct
