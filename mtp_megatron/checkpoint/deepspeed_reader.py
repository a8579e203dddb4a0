"""Reads the model tensors of a DeepSpeed checkpoint whose model is tensor parallel by megatron-core.

No pickle is run (:mod:`.pth`), no DeepSpeed is needed, and memory is bounded by the tensor asked for. Files of a tag's
folder, by ZeRO stage:

- 0 to 2: ``mp_rank_TT_model_states.pt`` holds TP rank TT's share of the parameters, in the type that was trained.
- 3: ``*zero_pp_rank_D_mp_rank_TT_optim_states.pt`` holds data parallel rank D's piece of each of them in fp32, one
  parameter's after another's in flat groups; ``zero_pp_rank_D_mp_rank_TT_model_states.pt`` says in which order, and
  holds the pieces of the frozen ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_megatron.checkpoint import tensor_parallel
from mtp_megatron.checkpoint.pth import PthFile
from mtp_megatron.checkpoint.source import fingerprint
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import find_checkpoint, problem_of, read_mtp_config

_MODEL_STATES = "mp_rank_*_model_states.pt"
_NAME = re.compile(r"(?:.*zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
_REMEDY = "Copy the checkpoint again or give another one."
# Norms that a plain layer keeps beside its linear layers go by Transformer Engine's fused names in every table.
_FUSED = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Inert:
    """Stands for any class of DeepSpeed's in the pickle: does nothing with what it is given."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS = [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
    )
]


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder holds the files of one DeepSpeed checkpoint (one tag)."""
    return any(folder.glob(_MODEL_STATES)) or any(folder.glob(f"*zero_pp_rank_*_{_MODEL_STATES}"))


def deepspeed_folder(path: Path) -> Path | None:
    """The newest DeepSpeed checkpoint of a run, of a checkpoints folder, or the folder itself; None: there is none."""
    if is_deepspeed(path):
        return path
    try:
        folder = find_checkpoint(path)
    except CheckpointError:  # said again by whoever opens the folder as another layout
        return None
    return folder if is_deepspeed(folder) else None


class DeepSpeedCheckpoint:
    """The model tensors of one DeepSpeed checkpoint by Megatron's key, tensor parallel shards merged.

    Attributes:
        folder: the checkpoint's.
        fingerprint: identity of its files.

    Raises:
        CheckpointError: files are missing, damaged or ask for more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        problem = problem_of(folder)
        if problem:
            raise CheckpointError(f"{folder}: {problem}. {_REMEDY}")
        self.fingerprint = fingerprint(folder.glob("*_states.pt"))
        self._ranks = _open_ranks(folder)
        self._names = {megatron_key(name): name for name in self._ranks[0].names}
        for rank in self._ranks[1:]:
            if set(rank.names) != set(self._ranks[0].names):
                raise CheckpointError(f"{folder}: its tensor parallel ranks hold different parameters. {_REMEDY}")

    def keys(self) -> list[str]:
        """Keys of the model's tensors, by Megatron's names."""
        return list(self._names)

    def meta(self, key: str) -> Tensor:
        """The whole tensor without its values."""
        name = self._names[key]
        return tensor_parallel.merge(name, [rank.meta(name) for rank in self._ranks])

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        name = self._names[key]
        return tensor_parallel.merge(name, [rank.read(name) for rank in self._ranks])


class _WholeRank:
    """One TP rank's parameters where data parallel ranks keep copies (ZeRO 0 to 2)."""

    def __init__(self, path: Path) -> None:
        self._file = PthFile(path, pick=_module)
        self.names = self._file.keys()

    def meta(self, name: str) -> Tensor:
        return self._file.meta(name)

    def read(self, name: str) -> Tensor:
        return self._file.read(name)


class _Place(NamedTuple):
    """Where a parameter's pieces are: a flat group and the first value in it; a frozen one's group is its own."""

    group: str
    start: int
    shape: tuple[int, ...]
    frozen: bool


class _PiecedRank:
    """One TP rank's parameters where each data parallel rank keeps a piece of everything (ZeRO 3)."""

    def __init__(self, model_states: Sequence[Path], optimizer_states: Sequence[Path], dtype: torch.dtype) -> None:
        self._dtype, self._count = dtype, len(model_states)
        if len(optimizer_states) != self._count:
            raise CheckpointError(
                f"{model_states[0].parent}: {self._count} files of model states and {len(optimizer_states)} of "
                f"optimizer states. {_REMEDY}"
            )
        self._places: dict[str, _Place] = {}
        self._frozen = [PthFile(model_states[0], pick=self._look_up)]
        self._frozen += [PthFile(path, pick=lambda state: state["frozen_param_fragments"]) for path in model_states[1:]]
        self._trained = [PthFile(path, pick=_flat_groups, stand_ins=_STAND_INS) for path in optimizer_states]
        self.names = list(self._places)

    def meta(self, name: str) -> Tensor:
        return torch.empty(self._places[name].shape, dtype=self._dtype, device="meta")

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        count = math.prod(place.shape)
        piece = -(-count // self._count)
        files = self._frozen if place.frozen else self._trained
        values = torch.cat([file.read_part(place.group, place.start, piece) for file in files])
        return values[:count].view(place.shape).to(self._dtype)

    def _look_up(self, state: dict[str, Any]) -> Any:
        for group, shapes in enumerate(state["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                self._places[name] = _Place(str(group), start, tuple(shape), frozen=False)
                start += -(-math.prod(shape) // self._count)
        for name, shape in state["frozen_param_shapes"].items():
            self._places[name] = _Place(name, 0, tuple(shape), frozen=True)
        return state["frozen_param_fragments"]


def _open_ranks(folder: Path) -> list[_WholeRank] | list[_PiecedRank]:
    whole: dict[int, Path] = {}
    pieces: dict[tuple[int, str], dict[int, Path]] = {}
    for path in folder.glob("*_states.pt"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: not a file of a DeepSpeed checkpoint with TP x DP. {_REMEDY}")
        data, tensor, kind = match.groups()
        if data is None:
            whole[int(tensor)] = path
        else:
            pieces.setdefault((int(tensor), kind), {})[int(data)] = path
    if whole:
        return [_WholeRank(path) for path in _complete(folder, whole)]
    ranks = _complete(folder, {tensor: folder for tensor, kind in pieces if kind == "model"})
    dtype = _PRECISIONS[str(read_mtp_config(folder).get("precision", "fp32"))]
    opened = []
    for rank in range(len(ranks)):
        model, optimizer = (_complete(folder, pieces.get((rank, kind), {})) for kind in ("model", "optim"))
        opened.append(_PiecedRank(model, optimizer, dtype))
    return opened


def _complete(folder: Path, found: dict[int, Path]) -> list[Path]:
    """Files by rank, in order; none may be missing in between."""
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{folder}: of its ranks only {sorted(found)} are there. {_REMEDY}")
    return [found[rank] for rank in sorted(found)]


def _module(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state["module"].items() if value is not None}


def _flat_groups(state: dict[str, Any]) -> dict[str, Any]:
    return {str(number): group for number, group in enumerate(state["optimizer_state_dict"]["fp32_flat_groups"])}


def megatron_key(name: str) -> str:
    """The key that a distributed checkpoint gives to parameter ``name`` of a model."""
    for plain, fused in _FUSED:
        if name.endswith(plain):
            return name.removesuffix(plain) + fused
    return name
