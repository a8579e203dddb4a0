"""Distributed checkpoints across versions of megatron-core: 0.19 reads older ones, older ones here those of 0.19;
across modules: names and extra states; across optimizers: Adam's step, parameters in FP8. The distributed optimizer's
state: :mod:`.optimizer_state`."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_torch_dist

from mtp_megatron.compat.devices import device


def load_strategies() -> dict[str, Any]:
    """Keyword arguments of ``dist_checkpointing.load`` with which this version reads what any other one saved.

    Until 0.18 the unsharded part of a checkpoint is a file, ``common.pt``. Later versions save it as one more object of
    the sharded part and read both.
    """
    strategy = _common_strategy()
    return {} if strategy is None else {"common_strategy": strategy()}


@functools.cache
def _common_strategy() -> type[Any] | None:
    try:
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    except ImportError:  # 0.19: there is one way left, and it reads both
        return None
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    class CommonStateOfAnyVersion(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            if (Path(checkpoint_dir) / "common.pt").exists():
                return super().load_common(checkpoint_dir)
            key = ShardedObject("common_state", None, (1,), (0,)).unique_key
            state: dict[str, Any] = {key: io.BytesIO()}
            load_torch_dist(state, storage_reader=FileSystemReader(checkpoint_dir), no_dist=True)
            loaded = state[key]
            if isinstance(loaded, io.BytesIO):
                loaded.seek(0)
                loaded = torch.load(loaded, weights_only=True)
            return loaded[0]

    return CommonStateOfAnyVersion


# Transformer Engine's layer for several experts has one for each, the first without a number.
_EXTRA_STATE = re.compile(r"\._extra_state\d*$")


def leave_experts_scales(state: dict[str, Any]) -> None:
    """Take the scales and histories of experts in delayed scaling out of a sharded state, in place.

    Megatron-core (0.16.1 to 0.19.2) cuts those of a layer of several experts in another order than Transformer Engine
    has them in, and puts them together in the same one: they are right where a rank has as many experts as at the save,
    and elsewhere a weight would get the scale of an activation.
    """
    for chunk in state.values():
        for name in [name for name in chunk if ".mlp.experts." in name and _EXTRA_STATE.search(name)]:
            del chunk[name]


def take_unsaved_states(state: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Take out of a sharded state what the checkpoint lacks because other modules saved it.

    Transformer Engine's norms keep an ``_extra_state``, empty unless they are quantised; torch's norms have none, and a
    run may be resumed with the other modules (``train.transformer_engine``).

    Returns:
        ``(chunk, name)`` of each, to be put back as None after the load: that leaves a module as it is.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    names = [
        (key, name)
        for key, chunk in state.items()
        if key.startswith("model")
        for name, value in chunk.items()
        if _EXTRA_STATE.search(name) and isinstance(value, ShardedObject)
    ]
    if not names:
        return []
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    unsaved = [(key, name) for key, name in names if state[key][name].unique_key not in saved]
    for key, name in unsaved:
        del state[key][name]
    return unsaved


# The norm before experts, by the end of its key: megatron-core's own modules save it by the name that Transformer
# Engine's fused layer gives the norm of a dense MLP; Transformer Engine's modules, which do not fuse it there, by its
# own.
NORM_BEFORE_EXPERTS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def follow_saved_names(state: dict[str, Any], folder: Path) -> None:
    """Look for the norms before experts, and what the optimizer keeps of them, by the names that they were saved by.

    In place: a run may be resumed with the other modules (``train.transformer_engine``), and a converted checkpoint has
    megatron-core's names.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    if not any(".mlp.router." in tensor.key for tensor in tensors):
        return
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    for tensor in tensors:
        for name, other in (NORM_BEFORE_EXPERTS, NORM_BEFORE_EXPERTS[::-1]):
            renamed = tensor.key.removesuffix(name) + other
            if tensor.key.endswith(f".{name}") and tensor.key not in saved and renamed in saved:
                tensor.key = renamed


def merge_in_place(state: dict[str, Any]) -> None:
    """Keep a load of this sharded state from copying what is saved in parts, as both halves of a gated MLP's first
    matrix are: the parts are read to where they lie in the whole, which upstream would put together from them anew."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    for base in nested_values(extract_sharded_tensors_and_factories(state)[0]):
        if isinstance(base, ShardedTensorFactory) and type(base.data) in (torch.Tensor, torch.nn.Parameter):
            base.merge_fn = _merged_in_place(base.merge_fn, base.data)


def _merged_in_place(merge: Callable[[Any], Any], whole: torch.Tensor) -> Callable[[Any], Any]:
    """``merge``, which copies, but for parts that lie in ``whole``."""
    storage = whole.untyped_storage().data_ptr()

    def merged(parts: Any) -> Any:
        within = isinstance(parts, list) and all(
            type(part) is torch.Tensor and part.untyped_storage().data_ptr() == storage for part in parts
        )
        return whole if within else merge(parts)

    return merged


def add_step(optimizer_state: dict[str, Any]) -> None:
    """Record Adam's step for a checkpoint, in place: rank 0 writes it for all, and may be a stage that trains nothing.
    Collective.

    Torch's Adam has told it already where the stage trains; Transformer Engine's and Apex's keep it in their groups,
    and leave it as it was in empty ones. It is not the run's: in ``train.skip_steps`` Adam takes none.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    taken = []  # by each part, 0 where nothing is trained
    for part in _parts(optimizer_state):
        steps = []
        for group in _adam(part)["param_groups"]:
            trained = group["params"]
            if isinstance(trained, LocalNonpersistentObject):
                trained = trained.unwrap()
            if trained and "step" in group:
                steps.append(group["step"])
        taken.append(float(_adam(part)["state"].get("common_step", steps[0] if steps else 0)))
    most = torch.tensor(max(taken, default=0.0), dtype=torch.float64, device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    for part, own in zip(_parts(optimizer_state), taken, strict=True):
        _adam(part)["state"].setdefault("common_step", torch.tensor(own or float(most)))


def keep_empty_masters_local(optimizer_state: dict[str, Any]) -> None:
    """Leave the fp32 masters of a stage that trains nothing out of a checkpoint, saved or loaded; in place.

    They are an empty list. Rank 0's would be written for all, and other stages could not put their own into it.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    for part in _parts(optimizer_state):
        masters = part.get(_MASTERS)
        if masters is not None and not any(masters):
            part[_MASTERS] = LocalNonpersistentObject(masters)


def fit_adam(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Make what a checkpoint has of the optimizer fit the Adam at hand, whichever wrote it; in place.

    Torch's has a step for each parameter, which megatron-core makes of ``common_step``. Transformer Engine's and Apex's
    have an integer for each group; given one for a parameter, the former raises KeyError. The distributed optimizer's
    is in the groups in any case, as a float where torch's Adam wrote it. And the groups of a checkpoint take the place
    of the optimizer's, which looks for settings in them that the other one does not have.
    """
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    defaults: dict[str, Any] = next(
        (part.optimizer.defaults for part in chained(optimizer) if part.optimizer is not None), {}
    )
    for part in map(_adam, _parts(loaded)):
        state, groups = part.get("state", {}), part["param_groups"]
        for group in groups:
            for setting, value in defaults.items():
                group.setdefault(setting, value)
            if "common_step" in state:
                group.pop("step", None)
        if USING_PYTORCH_OPTIMIZER:
            continue
        step = state.pop("common_step", None)
        for group in groups:
            if step is not None or "step" in group:
                group["step"] = int(group["step"] if step is None else step)


def set_learning_rates(loaded: dict[str, Any], lr: float, min_lr: float | None) -> None:
    """Put the run's own bounds into the groups that a checkpoint has of the optimizer, in place.

    The schedule reads them there before it looks at its own, and 0.19 finds the group to load by them: a changed
    learning rate would not be used, or not be found.
    """
    for part in map(_adam, _parts(loaded)):
        for group in part["param_groups"]:
            for key, value in (("max_lr", lr), ("min_lr", min_lr)):
                if key in group:
                    group[key] = value


def chained(optimizer: Any) -> list[Any]:
    """The optimizers that one of megatron-core's is made of; itself, if it is one."""
    found: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return found


_MASTERS = "fp32_from_fp16_params"


def _parts(optimizer_state: dict[str, Any]) -> list[dict[str, Any]]:
    """State of each optimizer: experts have their own."""
    return list(optimizer_state.values()) if 0 in optimizer_state else [optimizer_state]


def _adam(part: dict[str, Any]) -> dict[str, Any]:
    """Adam's own state: one level deeper where fp32 masters are kept beside it."""
    inner: dict[str, Any] = part.get("optimizer", part)
    return inner


def cast_parameters_again(trainable: Any) -> None:
    """Make the model's parameters from the distributed optimizer's fp32 ones, as every step ends. Collective.

    A checkpoint has parameters in FP8 as numbers in bf16, and at a load they are cast before their layers' scales are
    back, or with a scale that bf16 has rounded: the run would go on with other weights than it had.
    """
    for optimizer in chained(trainable.optimizer):
        optimizer._copy_main_params_to_model_params()
    for chunk in trainable.chunks:
        chunk.start_param_sync(force_sync=True)
