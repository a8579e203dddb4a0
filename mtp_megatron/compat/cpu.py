"""Stand-ins for the CUDA calls that megatron-core makes unconditionally, so that it runs on a machine without a GPU.

`install()` works through two tables: `TORCH` first, as importing some megatron modules already calls into `torch.cuda`,
then `MEGATRON`, functions that megatron looks up at call time. Each row says why it is there. It also hides packages
whose kernels need a GPU. `uninstall()` puts everything back. With a CUDA device, `install()` does nothing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device

from mtp_megatron.compat import packages
from mtp_megatron.compat.eager import JIT_FUSER, import_megatron
from mtp_megatron.compat.experts import draw_every_expert
from mtp_megatron.compat.gloo import share_device
from mtp_megatron.compat.patching import Replacement, replace
from mtp_megatron.compat.versions import require_megatron_core

CPU = torch.device("cpu")


class NullStream:
    """A stream, or an event on it, on a device that has none: every operation has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> object:
        return self if event is None else event

    def synchronize(self) -> None: ...


def _returns(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """Stand-in that ignores its arguments and returns `value`."""
    return lambda original: lambda *args, **kwargs: value


def _on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor constructor: a CUDA device becomes the CPU, anything else passes unchanged."""

    @functools.wraps(original)
    def construct(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # there is no device to copy to, and no pinned memory without one
        return original(*args, **kwargs)

    return construct


def _itself(original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if args or kwargs or not result.startswith("torch."):
            return result
        return "torch.cuda." + result.removeprefix("torch.").removeprefix("cuda.")

    return type_


def _get_state(original: Any) -> Callable[..., torch.Tensor]:
    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    return get_rng_state


def _set_state(original: Any) -> Callable[..., None]:
    def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    return set_rng_state


def _manual_seed(original: Any) -> Callable[[int], None]:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def _counts_as_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


def _local_ranks(original: Any) -> Callable[[], int]:
    return lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device_properties(original: Any) -> Callable[..., Any]:
    """Of a GPU of compute capability 8.0, which asks for no workaround for older or newer ones."""
    properties = types.SimpleNamespace(major=8, minor=0, name="cpu", total_memory=0, multi_processor_count=1)
    return lambda *args, **kwargs: properties


def _no_memory(original: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: collections.defaultdict(int)


def _without_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(original, allow_no_cuda=True)


TORCH: tuple[Replacement, ...] = (
    Replacement("torch.cuda", "current_device", _returns(CPU), "raises; megatron passes the result on as `device=`"),
    Replacement("torch.cuda", "synchronize", _returns(None), "raises; called around pipeline communication"),
    Replacement("torch.cuda", "current_stream", _returns(NullStream()), "raises; 0.19 reduces gradients on it"),
    Replacement("torch.cuda", "Stream", lambda original: NullStream, "raises; expert layers make one to copy counts"),
    Replacement("torch.cuda", "stream", lambda original: contextlib.nullcontext, "raises for a stream that is none"),
    Replacement("torch.cuda", "manual_seed", _manual_seed, "waits for CUDA to start: seeds are lost silently"),
    Replacement(
        "torch.cuda", "get_rng_state", _get_state, "raises; the RNG tracker and checkpoints save states with it"
    ),
    Replacement(
        "torch.cuda", "set_rng_state", _set_state, "waits for CUDA to start: restored states are lost silently"
    ),
    Replacement("torch.Tensor", "cuda", _itself, "raises; batches and checkpoints are moved with it"),
    Replacement("torch.nn.Module", "cuda", _itself, "raises; Megatron-LM's own loop moves models with it"),
    Replacement(
        "torch.Tensor", "type", _cuda_type_name, "optimizers accept parameters of type 'torch.cuda.FloatTensor'"
    ),
    Replacement("torch", "tensor", _on_cpu, "megatron clips and scales with device='cuda'"),
    Replacement("torch", "zeros", _on_cpu, "megatron counts tokens and norms with device='cuda'"),
    Replacement("torch", "ones", _on_cpu, "megatron makes causal masks with device='cuda'"),
    Replacement("torch", "empty", _on_cpu, "fully parallel loading of checkpoints allocates with device='cuda'"),
    Replacement("torch", "empty_like", _on_cpu, "fully parallel loading of checkpoints allocates with device='cuda'"),
    Replacement(
        "torch.distributed.ProcessGroupGloo",
        "__init__",
        share_device,
        "each of megatron's dozens of groups has a thread that polls: a sixth of two cores",
    ),
)

MEGATRON: tuple[Replacement, ...] = (
    JIT_FUSER,
    Replacement(
        "megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_state, "raises inside forked RNG regions"
    ),
    Replacement(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_state,
        "waits for CUDA to start: forked regions and recompute draw wrong dropout silently",
    ),
    Replacement(
        "megatron.core.transformer.moe.experts.SequentialMLP",
        "__init__",
        draw_every_expert,
        "experts of different ranks start with the same weights",
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _counts_as_numpy,
        "leaves counts that are on the CPU already as tensors, which all-to-all does not take",
    ),
)

# What Megatron-LM's training loop (megatron.training) calls beside megatron-core. All of these raise without a device.
TRAINING_LOOP: tuple[Replacement, ...] = (
    Replacement("torch.cuda", "device_count", _local_ranks, "is 0: the loop then sets up no model parallelism"),
    Replacement("torch.cuda", "set_device", _returns(None), "raises; each rank chooses its device"),
    Replacement("torch.cuda", "get_device_properties", _device_properties, "raises; arguments depend on the GPU's age"),
    Replacement("torch.cuda", "get_device_capability", _returns((8, 0)), "raises; asked for which fusions there are"),
    Replacement("torch.cuda", "Stream", _returns(NullStream()), "raises; models are wrapped in DDP on a stream"),
    Replacement("torch.cuda", "memory_stats", _no_memory, "raises; logged with the losses"),
    Replacement("torch.cuda", "memory_allocated", _returns(0), "raises; logged after the first step"),
    Replacement("torch.cuda", "max_memory_allocated", _returns(0), "raises; logged after the first step"),
    Replacement("torch.cuda", "memory_reserved", _returns(0), "raises; logged after the first step"),
    Replacement("torch.cuda", "max_memory_reserved", _returns(0), "raises; logged after the first step"),
    Replacement("torch.cuda", "device_memory_used", _returns(0), "raises; logged after the first step"),
    Replacement("torch.cuda", "reset_peak_memory_stats", _returns(None), "raises; called before evaluation"),
    Replacement("megatron.training.training", "initialize_megatron", _without_cuda, "refuses to start without CUDA"),
    Replacement(
        "megatron.training.initialize", "_warmup_jit_function", _returns(None), "warms up kernels of the device"
    ),
)
# Of releases before 0.18.
FUSED_KERNELS = Replacement(
    "megatron.legacy.fused_kernels", "load", _returns(None), "looks for the CUDA compiler at every start"
)

_PAGED_STASH = "megatron.core.transformer.moe.ops.paged_stash"
_BATCH_INVARIANT = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
_RNG_LOGGER = "megatron.core.tensor_parallel.random"
_undo: list[Callable[[], None]] = []
_training_loop = False


def _not_about_cpu_rng(record: logging.LogRecord) -> bool:
    # On CPU the forked state *is* the CPU state, so the tracker's warning about it says nothing.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _stub_for_triton(module: str, **contents: Any) -> None:
    """Put a module of kernels that are never called in the place of one that needs triton to be imported."""
    if importlib.util.find_spec("triton") is not None or module in sys.modules:
        return
    stub = types.ModuleType(module)
    vars(stub).update(contents)
    sys.modules[module] = stub
    _undo.append(lambda: sys.modules.__delitem__(module))


def _hide(module: str) -> None:
    """Make `import module` fail: Megatron would prefer it to torch, and its kernels need a GPU."""
    if packages.locate(module) is None or module in sys.modules:
        return
    sys.modules[module] = None  # type: ignore[assignment]  # documented: the import raises ModuleNotFoundError
    _undo.append(lambda: sys.modules.__delitem__(module))


def installed() -> bool:
    """Whether the stand-ins are in place."""
    return bool(_undo)


def install() -> bool:
    """Put the stand-ins in place; a second call does nothing. Returns whether they are in place."""
    if torch.cuda.is_available():
        return False
    if installed():
        return True
    # `with torch.device(...)` knows the constructors by identity and looks them up once. That must be before they
    # are wrapped, or who builds on the meta device later (transformers does) silently gets uninitialised tensors.
    _device._device_constructors()
    try:
        for row in TORCH:
            replace(row, _undo)
        for module in packages.GPU_ONLY:
            _hide(module)
        # Imported by the expert layers of 0.19; CPU builds of torch have no triton.
        _stub_for_triton(
            _PAGED_STASH, GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None
        )
        import_megatron()
        for row in MEGATRON:
            replace(row, _undo)
    except BaseException:
        uninstall()
        raise
    logger = logging.getLogger(_RNG_LOGGER)
    logger.addFilter(_not_about_cpu_rng)
    _undo.append(lambda: logger.removeFilter(_not_about_cpu_rng))
    return True


def _forget_training_loop() -> None:
    global _training_loop
    _training_loop = False


def install_training_loop() -> None:
    """Put the stand-ins for Megatron-LM's own loop in place too; does nothing with a CUDA device, or a second time."""
    global _training_loop
    if not install() or _training_loop:
        return
    _training_loop = True
    _undo.append(_forget_training_loop)
    torch_rows = [row for row in TRAINING_LOOP if row.owner == "torch.cuda"]
    for row in torch_rows:  # first: megatron.training asks for the device while it is imported
        replace(row, _undo)
    if require_megatron_core().release < (0, 17):  # later ones do without triton by themselves
        _stub_for_triton(_BATCH_INVARIANT, enable_batch_invariant_mode=None)
    if importlib.util.find_spec("megatron.legacy") is not None:
        replace(FUSED_KERNELS, _undo)
    for row in TRAINING_LOOP:
        if row not in torch_rows:
            replace(row, _undo)


def uninstall() -> None:
    """Put every original back, in reverse order; does nothing when the shim is not installed."""
    while _undo:
        _undo.pop()()
