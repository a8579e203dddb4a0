"""Transformer Engine's CUDA kernels that a layer calls, dense or with experts, in torch: slow, and on any device.

Everything that decides *whether* something is quantised, with which scale and what becomes of the largest values is
Transformer Engine's own Python; these are the leaves below it. Signatures are those of version 2.11
(transformer_engine/pytorch/csrc/extensions/pybind.cpp).
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    """``x [tokens, h]`` -> normed (quantised, where a quantizer is given), and ``1 / rms [tokens]``."""
    assert out is None
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    gamma = weight.float() + 1 if zero_centered else weight.float()
    normed = (wide * inverse.unsqueeze(-1) * gamma).to(_torch_type(dtype))
    return (normed if quantizer is None else quantizer(normed)), None, inverse


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rmsnorm_fwd` by input and weight."""
    wide, inverse = x.float(), inverse.unsqueeze(-1)
    gamma = weight.float() + 1 if zero_centered else weight.float()
    normed = wide * inverse
    scaled = grad.float() * gamma
    by_input = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return by_input.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype)


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    bias: Tensor | None,
    *more: Any,
    **overlap: Any,
) -> tuple[Tensor, None, None, None]:
    """``op(b) @ op(a)`` (column-major cuBLAS in the eyes of row-major torch), accumulated in fp32."""
    assert (quantizer, bias, overlap.get("comm_overlap")) == (None, None, None), "not needed by these tests"
    accumulate = more[-2]
    left, right = _values(b), _values(a)
    result = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    result = result.to(result.dtype if dtype is None else _torch_type(dtype))
    if not transpose_b:
        result = result.reshape(*b.size()[:-1], result.shape[-1])
    if out is None:
        return result, None, None, None
    return (out.add_(result) if accumulate else out.copy_(result)), None, None, None


def te_general_grouped_gemm(
    a: list[Any],
    transpose_a: bool,
    b: list[Any],
    transpose_b: bool,
    out: list[Tensor],
    dtype: Any,
    splits: list[int],
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    pre_gelu: list[Tensor],
    grad: bool,
    workspaces: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """:func:`generic_gemm` of each pair, into ``out``: a tensor each, or ``single_output``, whose rows are ``splits``.

    What nothing is multiplied with becomes zero, unless it is added to what is there.
    """
    assert not any(tensor.numel() for tensor in (*bias, *pre_gelu)), "not needed by these tests"
    outputs = out[0].split(splits) if single_output else out
    assert len(a) == len(b) == len(outputs) == len(splits)
    for left, right, result in zip(a, b, outputs, strict=True):
        if 0 in (*left.size(), *right.size()):
            if not accumulate:
                result.zero_()
            continue
        generic_gemm(left, transpose_a, right, transpose_b, result, None, dtype, None, accumulate, None)
    return bias


def split_quantize(tensor: Tensor, splits: list[int], quantizers: list[Any]) -> list[Any]:
    """:func:`quantize` of each part of the rows, with a quantizer each."""
    parts = tensor.split(splits)
    return [quantizer(part.contiguous()) for part, quantizer in zip(parts, quantizers, strict=True)]


def fused_multi_row_padding(rows: Tensor, out: Tensor, splits: list[int], padded: list[int]) -> None:
    """Each part of ``rows [sum(splits), h]`` to the head of its part of ``out [sum(padded), h]``, zero behind it."""
    for source, target in zip(rows.split(splits), out.split(padded), strict=True):
        target[: len(source)] = source
        target[len(source) :] = 0


def fused_multi_row_unpadding(rows: Tensor, out: Tensor, padded: list[int], splits: list[int]) -> None:
    """The reverse of :func:`fused_multi_row_padding`."""
    for source, target in zip(rows.split(padded), out.split(splits), strict=True):
        target.copy_(source[: len(target)])


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, skip: Any = None) -> Any:
    """Per-tensor FP8: delayed scaling, whose scale is given, or current scaling, which computes it.

    The largest value goes where the quantizer wants it: into the history, or beside the scale. Of nothing there is
    none: both stay as they are.
    """
    from transformer_engine.pytorch.tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
        Float8Tensor,
        Float8TensorStorage,
    )

    assert type(quantizer) in (Float8Quantizer, Float8CurrentScalingQuantizer), type(quantizer).__name__
    assert skip is None
    kind = _torch_type(quantizer.dtype)
    limit = torch.finfo(kind).max
    wide = tensor.detach().float()
    if wide.numel() and quantizer.amax.numel():
        quantizer.amax.copy_(wide.abs().max())
    if wide.numel() and type(quantizer) is Float8CurrentScalingQuantizer:
        if quantizer.with_amax_reduction:
            dist.all_reduce(quantizer.amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        assert not quantizer.use_existing_amax
        quantizer.scale.copy_(_scale(quantizer.amax, limit, quantizer.force_pow_2_scales, quantizer.amax_epsilon))
    data = (wide * quantizer.scale).clamp(-limit, limit).to(kind).view(torch.uint8)
    fields = {
        "data": data if quantizer.rowwise_usage else None,
        "fp8_scale_inv": quantizer.scale.reciprocal().reshape(1),
        "fp8_dtype": quantizer.dtype,
        "data_transpose": data.reshape(-1, data.shape[-1]).t().contiguous() if quantizer.columnwise_usage else None,
        "quantizer": quantizer,
    }
    if out is not None:
        # In place, as there: a parameter's data may be a view, and part of a buffer that is gathered from the ranks.
        for mine, name in (("_data", "data"), ("_scale_inv", "fp8_scale_inv"), ("_transpose", "data_transpose")):
            if getattr(out, mine) is None:
                setattr(out, mine, fields[name])
            elif fields[name] is not None:
                getattr(out, mine).copy_(fields[name].reshape(getattr(out, mine).shape))
        out._transpose_invalid = fields["data_transpose"] is None
        return out
    if quantizer.internal:
        return Float8TensorStorage(**fields)
    return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, **fields)


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    transposed = data.reshape(-1, data.shape[-1]).t()
    return transposed.contiguous() if out is None else out.copy_(transposed)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return _values(tensor).reshape(tensor.size()).to(_torch_type(dtype))


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().max())


def _scale(amax: Tensor, limit: float, powers_of_two: bool, epsilon: float) -> Tensor:
    """What makes the largest value the format's largest; 1 where there is none."""
    scale = limit / amax.clamp(min=epsilon)
    scale = torch.where((amax > 0) & amax.isfinite(), scale.clamp(max=torch.finfo(torch.float32).max), 1.0)
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale)[1] - 1) if powers_of_two else scale


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop: Tensor, lists: list[list[Tensor]], limit: float, powers_of_two: bool, epsilon: float
) -> None:
    """Of each largest value in the first list the scale, into the second, and its inverse, into the third."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax, limit, powers_of_two, epsilon))
        inverse.copy_(scale.reciprocal())


def multi_tensor_scale(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Each tensor of the first list, times ``scale``, into that of the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors of the only list together, and an empty one in the place of each one's."""
    assert not per_tensor, "not needed by these tests"
    return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().reshape(1), torch.empty(0)


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """A step of AdamW on the lists of gradients, parameters and both moments."""
    assert (mode, bias_correction) == (1, 1), "not needed by these tests"
    assert isinstance(step, int), "its binding takes no other"
    for gradient, parameter, first, second in zip(*lists, strict=True):
        gradient = gradient.float()
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        unbiased = (second / (1 - beta2**step)).sqrt_().add_(epsilon)
        update = (first / (1 - beta1**step)).div_(unbiased).add_(parameter, alpha=weight_decay)
        parameter.sub_(update, alpha=lr)


def convert_thd_to_bshd(packed: Tensor, bounds: Tensor, rows: int, longest: int) -> Tensor:
    """``[tokens, heads, size]`` -> ``[rows, longest, heads, size]``, zero behind each sequence's end."""
    padded = packed.new_zeros(rows, longest, *packed.shape[1:])
    for row, (first, end) in enumerate(itertools.pairwise(bounds.tolist())):
        padded[row, : end - first] = packed[first:end]
    return padded


def convert_bshd_to_thd(padded: Tensor, bounds: Tensor, tokens: int) -> Tensor:
    """The reverse of :func:`convert_thd_to_bshd`."""
    packed = padded.new_empty(int(tokens), *padded.shape[2:])
    for row, (first, end) in enumerate(itertools.pairwise(bounds.tolist())):
        packed[first:end] = padded[row, : end - first]
    return packed


def _values(tensor: Any) -> Tensor:
    """``[rows, columns]`` in fp32, of a plain tensor or of one in FP8."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.reshape(-1, tensor.shape[-1]).float()
    kind = _torch_type(tensor._fp8_dtype)
    if tensor._data is not None:
        data = tensor._data.reshape(-1, tensor._data.shape[-1])
    else:
        data = tensor._transpose.t().contiguous()
    return data.view(kind).float() * tensor._scale_inv


def _torch_type(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {"Float8E4M3": "float8_e4m3fn", "Float8E5M2": "float8_e5m2", "Float16": "float16"}
    name = dtype.name.removeprefix("k")
    kind: torch.dtype = getattr(torch, names.get(name, name.lower()))
    return kind


# Where Transformer Engine looks each of them up when it calls it.
_NATIVE = "transformer_engine_torch"
PLACES: dict[str, tuple[str, ...]] = {
    "rmsnorm_fwd": ("transformer_engine.pytorch.cpp_extensions", "transformer_engine.pytorch.ops.basic.rmsnorm"),
    "rmsnorm_bwd": (_NATIVE, "transformer_engine.pytorch.ops.basic.rmsnorm"),
    "generic_gemm": (_NATIVE,),
    "te_general_grouped_gemm": (_NATIVE,),
    "split_quantize": (_NATIVE,),
    "fused_multi_row_padding": (_NATIVE,),
    "fused_multi_row_unpadding": (_NATIVE,),
    "quantize": (_NATIVE,),
    "fp8_transpose": (_NATIVE,),
    "dequantize": (_NATIVE,),
    "convert_thd_to_bshd": (_NATIVE,),
    "convert_bshd_to_thd": (_NATIVE,),
    "compute_amax": (_NATIVE,),
    "multi_tensor_compute_scale_and_scale_inv": ("transformer_engine.pytorch.tensor.utils",),
    "multi_tensor_scale": ("transformer_engine.pytorch.tensor.utils",),
    "multi_tensor_adam": (_NATIVE,),
}
# Where Megatron keeps those of its optimizers.
OF_MEGATRON = {
    "megatron.core.optimizer.clip_grads": {
        "l2_norm_impl": multi_tensor_l2norm,
        "multi_tensor_scale_impl": multi_tensor_scale,
    },
    "megatron.core.optimizer.optimizer": {"multi_tensor_scale_impl": multi_tensor_scale},
}


def install(monkeypatch: Any) -> None:
    for name, places in PLACES.items():
        for place in places:
            monkeypatch.setattr(importlib.import_module(place), name, globals()[name])
    for place, kernels in OF_MEGATRON.items():
        for name, kernel in kernels.items():
            monkeypatch.setattr(importlib.import_module(place), name, kernel)
