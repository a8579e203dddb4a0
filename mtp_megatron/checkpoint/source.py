"""Where a conversion's tensors come from: one at a time, by key, with shapes known before values are read."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mtp_megatron.checkpoint.sharded import is_finite
from mtp_megatron.checkpoint.tables import DERIVED, Mapping, check_complete
from mtp_megatron.checkpoint.transforms import ModelShape
from mtp_megatron.errors import CheckpointError

# Called with the number of bytes just written and the total.
Progress = Callable[[int, int], None]
_EXPERT = re.compile(r"(\.experts\.)\d+\.")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Tensors(Protocol):
    """Tensors of one file or folder by key.

    ``folder`` is named in messages. ``meta`` gives shape and dtype on the meta device, ``read`` the values on the CPU;
    between calls no values are kept.
    """

    folder: Path

    def keys(self) -> list[str]: ...

    def meta(self, key: str) -> Tensor: ...

    def read(self, key: str) -> Tensor: ...


class TensorSource(Tensors, Protocol):
    """The tensors of a model; ``fingerprint`` differs between models."""

    fingerprint: str


class Remapped:
    """Another layout's tensors under Megatron's keys, put together when they are asked for.

    Args:
        parts: the other layout's tensors.
        mappings: the expanded table.
        shape: of the model.
        tied_copy: ``(copy, original)`` keys of a copy that tied models may store; it must equal the original.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape, not floating point, or an untied "tied" copy.
    """

    def __init__(
        self,
        parts: TensorSource,
        mappings: Sequence[Mapping],
        shape: ModelShape,
        *,
        tied_copy: tuple[str, str] | None = None,
    ) -> None:
        self.folder, self.fingerprint = parts.folder, parts.fingerprint
        self._parts, self._shape = parts, shape
        self._mappings = {mapping.megatron: mapping for mapping in mappings}
        present = {key for key in parts.keys() if not DERIVED.fullmatch(key)}  # noqa: SIM118 (not a dict)
        wanted = [part for mapping in mappings for part in mapping.parts]
        if tied_copy is not None and shape.tied_embeddings and present.issuperset(tied_copy):
            present.discard(tied_copy[0])
            self._check_copy(*tied_copy)
        check_complete(
            wanted, present, str(self.folder), remedy="Give all files of one model, as its makers wrote them."
        )
        self._check_shapes()

    def keys(self) -> list[str]:
        """Keys of the model's tensors in Megatron's names."""
        return list(self._mappings)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values."""
        mapping = self._mappings[key]
        return mapping.join([self._parts.meta(part) for part in mapping.parts], self._shape)

    def read(self, key: str) -> Tensor:
        """The whole tensor, put together from its parts."""
        mapping = self._mappings[key]
        return mapping.join([self._parts.read(part) for part in mapping.parts], self._shape)

    def _check_copy(self, copy: str, original: str) -> None:
        for key in (copy, original):
            check_dtype(self.folder, key, self._parts.meta(key))
        if not torch.equal(self._parts.read(copy), self._parts.read(original)):
            raise CheckpointError(
                f"{self.folder}: config.json ties the embeddings, and {copy} differs from {original}. Set "
                "tie_word_embeddings to what the model was trained with."
            )

    def _check_shapes(self) -> None:
        shapes = model_shapes(self._shape)
        for mapping in self._mappings.values():
            whole = torch.empty(expected_shape(mapping.megatron, shapes), device="meta")
            for part, expected in mapping.split(whole, self._shape).items():
                found = self._parts.meta(part)
                if found.shape != expected.shape:
                    raise CheckpointError(
                        f"{self.folder}: {part} has shape {list(found.shape)}, and its configuration describes "
                        f"{list(expected.shape)}. Give the tensors together with their own configuration."
                    )
                check_dtype(self.folder, part, found)


def check_dtype(folder: Path, key: str, tensor: Tensor) -> None:
    """Refuse quantised and integer tensors.

    Raises:
        CheckpointError: names key and type.
    """
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{folder}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}, a quantised model's type. Give "
            "the model in fp32, bf16 or fp16."
        )


def fingerprint(files: Iterable[Path]) -> str:
    """Identity of files by name, size and time of change, which takes no reading of them."""
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat()
        digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def model_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors and of those outside layers, by the end of their Megatron key without the number
    of an expert. Where two ends fit, the first is meant."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    qkv = (shape.num_attention_heads + 2 * shape.num_query_groups) * d
    return {
        "experts.linear_fc1.weight": (2 * shape.expert_width, h),
        "experts.linear_fc2.weight": (h, shape.expert_width),
        "router.weight": (shape.num_experts or 0, h),
        "word_embeddings.weight": (shape.padded_vocab_size, h),
        "output_layer.weight": (shape.padded_vocab_size, h),
        "layer_norm_weight": (h,),
        "final_norm.weight": (h,),
        "linear_qkv.weight": (qkv, h),
        "linear_qkv.bias": (qkv,),
        "q_layernorm.weight": (d,),
        "k_layernorm.weight": (d,),
        "linear_proj.weight": (h, shape.num_attention_heads * d),
        "linear_fc1.weight": (2 * f, h),
        "linear_fc2.weight": (h, f),
        "linear.weight": (h, h),
        "linear.bias": (h,),
    }


def expected_shape(key: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the tensor that ends as ``key`` does in ``shapes`` (:func:`model_shapes`).

    Raises:
        KeyError: none does.
    """
    name = _EXPERT.sub(r"\1", key)
    for suffix, size in shapes.items():
        if name.endswith(suffix):
            return size
    raise KeyError(key)


def check_shapes(source: TensorSource, shape: ModelShape, described_by: str) -> None:
    """Hold the tensors of a Megatron checkpoint against the sizes of its description.

    Raises:
        CheckpointError: names the first tensor of another shape or type.
    """
    shapes = model_shapes(shape)
    for key in source.keys():  # noqa: SIM118 (not a dict)
        tensor = source.meta(key)
        try:
            expected = expected_shape(key, shapes)
        except KeyError:  # no tensor of the model: refused by name when its place is looked for
            expected = tuple(tensor.shape)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{source.folder}: {key} has shape {list(tensor.shape)}, and {described_by} describes "
                f"{list(expected)}: a checkpoint of another architecture. Give the checkpoint with its own "
                f"{described_by}."
            )
        check_dtype(source.folder, key, tensor)


def read_finite(source: TensorSource, key: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the type asked for, checked.

    Raises:
        CheckpointError: it holds NaN or infinity, as stored or after the cast.
    """
    stored = source.read(key)
    if not is_finite(stored):
        raise CheckpointError(
            f"{source.folder}: {key} holds NaN or infinity: a training that diverged, or a damaged file. Give an "
            "earlier checkpoint, or copy the file again."
        )
    tensor = stored.to(dtype=dtype)
    if tensor is not stored and not is_finite(tensor):
        raise CheckpointError(f"{source.folder}: {key} does not fit {tensor.dtype}. Choose another --dtype.")
    return tensor


def total_bytes(source: TensorSource, dtype: torch.dtype | None) -> int:
    """Bytes of all tensors in the type asked for."""
    metas = (source.meta(key).to(dtype=dtype) for key in source.keys())  # noqa: SIM118 (not a dict)
    return sum(math.prod(meta.shape) * meta.element_size() for meta in metas)
