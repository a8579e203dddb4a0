"""One rank of any job inside one process: fake tensors, which have shapes and no memory, and a fake process group.

Megatron's own code runs unchanged except for the rows of `REPLACEMENTS`, each of which says why it is there. They are
in place inside :func:`fake_rank` only. Nothing that is computed in there means anything; what is allocated does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_megatron import compat
from mtp_megatron.compat.patching import Replacement, replace


def _on_default_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("backend", None)
        return original(*args, **kwargs)

    return new_group


def _gather_own_object(original: Callable[..., Any]) -> Callable[..., None]:
    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    return all_gather_object


def _no_fork(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: contextlib.nullcontext()


def _no_states(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda: (None, None, None)


def _nothing(original: Callable[..., Any]) -> Callable[..., None]:
    return lambda *args, **kwargs: None


def _convert_by_hand(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Module._apply` that makes a new parameter where the conversion changes anything, with the old one's marks."""

    def apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        for module in self.modules() if recurse else [self]:
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                with torch.no_grad():
                    converted = fn(parameter)
                if converted is not parameter:
                    new = torch.nn.Parameter(converted, parameter.requires_grad)
                    new.__dict__.update(parameter.__dict__)
                    module._parameters[key] = new
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = fn(buffer)
        return self

    return apply


def _of_numbers(original: Callable[..., Any]) -> Callable[..., Tensor]:
    def number(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [number(item) for item in value]
        return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = original(number(data), *args, **kwargs)
        return result

    return tensor


_RANDOM = "megatron.core.tensor_parallel.random"
REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement("torch.distributed", "new_group", _on_default_backend, "gloo would look for the other ranks"),
    Replacement(
        "torch.distributed", "all_gather_object", _gather_own_object, "unpickles what no rank wrote; used on settings"
    ),
    Replacement("torch.nn.Module", "_apply", _convert_by_hand, "cannot swap fake parameters"),
    Replacement("torch", "tensor", _of_numbers, "reads the memory of the scalars that it is given; gradient norms"),
    Replacement(f"{_RANDOM}.CudaRNGStatesTracker", "fork", _no_fork, "compares states of generators, which are fake"),
    Replacement(_RANDOM, "_get_all_rng_states", _no_states, "as above, in recomputation"),
    Replacement(_RANDOM, "_set_all_rng_states", _nothing, "as above, in recomputation"),
)


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and one logarithm per row; no ``[s, s]`` matrix.

    The value comes as a view of queries, keys and values; Transformer Engine makes it contiguous, as the others are
    (``get_qkv_layout``), and keeps that.
    """

    @staticmethod
    def forward(ctx, query, key, value):  # type: ignore[no-untyped-def]
        length, batch, heads, _ = query.shape
        value = value.contiguous()
        output = query.new_empty(length, batch, heads, value.shape[-1])
        log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output.view(length, batch, -1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input, contiguous as Transformer Engine makes it, and one number per row; not the input in fp32."""

    @staticmethod
    def forward(ctx, inputs, weight):  # type: ignore[no-untyped-def]
        inputs = inputs.contiguous()
        ctx.save_for_backward(inputs, weight, inputs.new_empty(inputs.shape[:-1], dtype=torch.float32))
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        inputs, weight, _ = ctx.saved_tensors
        return torch.empty_like(inputs), torch.empty_like(weight)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input ``[..., 2f]`` alone."""

    @staticmethod
    def forward(ctx, inputs):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs)
        return inputs.new_empty(*inputs.shape[:-1], inputs.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.empty_like(ctx.saved_tensors[0])


class _Rotary(torch.autograd.Function):
    """Keeps the angles, which all layers share, and no cosine or sine of them."""

    @staticmethod
    def forward(ctx, inputs, angles):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(angles)
        return torch.empty_like(inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.empty_like(grad), None


def _attention(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, query, key, value, *args, **kwargs: _Attention.apply(query, key, value)


def _rms_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, inputs: _RMSNorm.apply(inputs, self.weight)


def _swiglu(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda inputs, *args, **kwargs: _SwiGLU.apply(inputs)


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda inputs, angles, *args, **kwargs: _Rotary.apply(inputs, angles)


def _scale_in_place(original: Callable[..., Any]) -> Callable[..., None]:
    def scale_all(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: float) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            target.copy_(source).mul_(scale)

    return scale_all


# What a kernel that needs a GPU takes, or keeps for its backward pass, in place of what the unfused operations do.
FUSED_KERNELS: tuple[Replacement, ...] = (
    Replacement(
        "megatron.core.transformer.dot_product_attention.DotProductAttention",
        "forward",
        _attention,
        "keeps [s, s] matrices",
    ),
    Replacement(
        "mtp_megatron.compat.context_attention.GatherContextAttention",
        "forward",
        _attention,
        "keeps keys and values of the whole sequence, where a ring passes them on",
    ),
    Replacement(
        "megatron.core.transformer.attention", "apply_rotary_pos_emb", _rotary, "keeps a cosine and a sine per layer"
    ),
    Replacement("torch.nn.RMSNorm", "forward", _rms_norm, "keeps its input in fp32 too"),
    Replacement("megatron.core.transformer.mlp", "bias_swiglu_impl", _swiglu, "is compiled for a GPU"),
    Replacement(
        "megatron.core.optimizer.clip_grads", "multi_tensor_scale_impl", _scale_in_place, "makes a scaled copy of each"
    ),
)


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int, *, fused_kernels: bool) -> Iterator[None]:
    """Be one rank of a world that does not exist; tensors made inside are fake.

    Args:
        rank: the rank to be.
        world_size: ranks of the job.
        fused_kernels: attention, rotary positions, norms, SwiGLU and clipping take the memory of fused kernels. SwiGLU
            needs ``bias_activation_fusion`` in Megatron's configuration besides.

    Raises:
        RuntimeError: a CUDA device is visible, or this process belongs to a process group: both would be used.
    """
    if torch.cuda.is_available():
        raise RuntimeError("fake ranks are CPU ranks: set CUDA_VISIBLE_DEVICES= before torch is imported")
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a real job")
    compat.prepare()
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    undo: list[Callable[[], None]] = []
    try:
        for row in (*REPLACEMENTS, *(FUSED_KERNELS if fused_kernels else ())):
            replace(row, undo)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        # The schedules read scalars that exist outside, such as the seeds' generators.
        with FakeTensorMode(allow_non_fake_inputs=True), _FakeAnswers():
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        while undo:
            undo.pop()()


class _FakeAnswers(TorchDispatchMode):
    """Answers what fake tensors cannot.

    Any number that the code reads out of a tensor is 1: losses and norms are finite, batches have a token. A coalesced
    collective, of which torch has no fake version, is done at once; its results lie in tensors that exist already.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func.namespace == "c10d" and func._opname.endswith("_coalesced_"):
            return FakeWork().boxed()
        return func(*args, **(kwargs or {}))
