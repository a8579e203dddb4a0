"""The distributed optimizer's state in checkpoints: every parameter's on one of the ranks that hold a part of it.

In megatron-core's format ``fully_reshardable`` (0.16.1 to 0.19.2), the one that loads at another TP x PP x DP, a
parameter has its fp32 weight and Adam's two moments as tensors of its own shape. Upstream gathers them for a whole
stage in the host memory of every data parallel rank, a bucket at a time through its GPU: 30 bytes per parameter at a
save and 20 at a load, and 8 on the GPU where one bucket is the stage, as without ``optimizer.overlap_grad_reduce``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron.compat import patching
from mtp_megatron.compat.versions import EnvironmentUnsupported

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_KEYS = ("param", "exp_avg", "exp_avg_sq")


@contextmanager
def state_stays_on_its_ranks() -> Iterator[None]:
    """Inside, the distributed optimizer's sharded state takes no memory but for parameters that ranks share.

    Data parallel ranks hold equal pieces of a buffer, so that most parameters lie on one rank, which saves and loads
    its own tensors. Of the others the rank with the largest part saves all, gathered over gloo in host memory; each
    rank loads them whole and takes its part. Format and files' contents are upstream's.
    """
    with _replaced("sharded_param_state_fully_reshardable", lambda upstream: _sharded_state, "memory of whole stages"):
        yield


@contextmanager
def padded_checkpoints() -> Iterator[None]:
    """Inside, the sharded state that upstream itself makes (``fully_reshardable``) is right whatever padding its
    buckets have; other formats are left as they are.

    megatron-core (0.16.1 to 0.19.2) leaves the padding at buckets' ends out of the state that it gathers, and then
    takes each parameter's state from where the parameter lies in the padded buffer: after a padded bucket that is
    another parameter's. Buckets are padded to a multiple of the data parallel size and of 128.
    """
    why = "parameters after a padded bucket are saved with others' Adam moments and fp32 weights"

    def gathered(upstream: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: _with_padding(self, upstream(self, *args, **kwargs))

    def padded(upstream: Callable[..., Any]) -> Callable[..., Any]:
        def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _replaced("get_parameter_state_dp_zero", gathered, why):
                return upstream(self, *args, **kwargs)

        return sharded_state

    with _replaced("sharded_param_state_fully_reshardable", padded, why):
        yield


@dataclass(frozen=True)
class Placed:
    """A parameter in the distributed optimizer's buffers.

    Attributes:
        index: its place in upstream's state.
        parameter: the model's.
        parts: data parallel rank -> [start, end) of the flat parameter whose state it holds.
    """

    index: int
    parameter: Tensor
    parts: dict[int, tuple[int, int]]

    @property
    def owner(self) -> int:
        """The rank with the largest part, the first of them."""
        return max(self.parts, key=lambda rank: self.parts[rank][1] - self.parts[rank][0])


def placed_parameters(optimizer: Any) -> list[Placed]:
    """Where the state of each parameter of a ``DistributedOptimizer`` lies, in upstream's order.

    Raises:
        EnvironmentUnsupported: this megatron-core cuts buckets in another way.
    """
    size, here = optimizer.data_parallel_group.size(), optimizer.data_parallel_group.rank()
    found: list[Placed] = []
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (own,) = ranges.values()  # by the buffer's type
        for parameter, (start, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            share = bucket.grad_data.numel() // size
            first, last = start - bucket.offset, end - bucket.offset
            parts = {
                rank: (max(first, rank * share) - first, min(last, (rank + 1) * share) - first)
                for rank in range(first // share, (last - 1) // share + 1)
            }
            upstream = own[number]["param_map"].get(parameter)
            if parts.get(here) != (upstream and (upstream["param"].start, upstream["param"].end)):
                raise EnvironmentUnsupported(
                    f"megatron-core's distributed optimizer holds {upstream} of a parameter on data parallel rank "
                    f"{here}, and not {parts.get(here)}: its state cannot be saved or loaded. Use a megatron-core "
                    "that `mtp-megatron --version` calls supported."
                )
            found.append(Placed(len(found), parameter, parts))
    return found


def _sharded_state(optimizer: Any, model_state: dict[str, Any], is_loading: bool, metadata: Any = None) -> Any:
    """In place of ``sharded_param_state_fully_reshardable``: what this rank saves, or loads. Collective at a save."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    described = {base.data: base for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    parameters, here = placed_parameters(optimizer), optimizer.data_parallel_group.rank()
    flat = _to_load(optimizer, parameters) if is_loading else _to_save(optimizer, parameters)
    state = {}
    for placed in parameters:
        if placed.index in flat:
            replica = optimizer.distributed_optimizer_instance_id if placed.owner == here else 1
            state[placed.index] = {
                key: _described(described[placed.parameter], key, tensor, replica)
                for key, tensor in flat[placed.index].items()
            }
    # An empty table would be in the part of a checkpoint that rank 0 saves for all.
    return state or LocalNonpersistentObject({})


def _to_load(optimizer: Any, parameters: Sequence[Placed]) -> dict[int, dict[str, Tensor]]:
    """Where the state goes of each parameter of which this rank holds a part: the optimizer's own tensors if it holds
    all, or host memory."""
    here = optimizer.data_parallel_group.rank()
    flat = {}
    for placed in parameters:
        if here in placed.parts:
            held = _held(optimizer, placed)
            if len(placed.parts) > 1:
                held = {k: torch.empty(placed.parameter.numel(), dtype=t.dtype, device="cpu") for k, t in held.items()}
            flat[placed.index] = held
    return flat


def _to_save(optimizer: Any, parameters: Sequence[Placed]) -> dict[int, dict[str, Tensor]]:
    """State of each parameter that this rank saves: the optimizer's own tensors if it holds all, or gathered in host
    memory. Collective over the data parallel ranks."""
    group = optimizer.data_parallel_group_gloo
    here = optimizer.data_parallel_group.rank()
    flat = {p.index: _held(optimizer, p) for p in parameters if list(p.parts) == [here]}
    shared = [placed for placed in parameters if len(placed.parts) > 1 and here in placed.parts]
    if shared and group is None:
        raise EnvironmentUnsupported(
            "the distributed optimizer's state is gathered over gloo, and there are no gloo groups: initialize "
            "megatron's model parallel groups with create_gloo_process_groups=True."
        )
    for key in _KEYS:
        waiting = []
        for placed in shared:
            own = _held(optimizer, placed)[key]
            if placed.owner != here:
                owner = dist.get_global_rank(group, placed.owner)
                waiting.append(dist.isend(own.cpu(), owner, group=group, tag=placed.index))
                continue
            whole = torch.empty(placed.parameter.numel(), dtype=own.dtype, device="cpu")
            flat.setdefault(placed.index, {})[key] = whole
            for rank, (start, end) in placed.parts.items():
                if rank == here:
                    whole[start:end].copy_(own)
                else:
                    source = dist.get_global_rank(group, rank)
                    waiting.append(dist.irecv(whole[start:end], source, group=group, tag=placed.index))
        for work in waiting:
            work.wait()  # type: ignore[union-attr]  # None is for ranks outside of the group
    return flat


def _held(optimizer: Any, placed: Placed) -> dict[str, Tensor]:
    """This rank's own part of a parameter's state, flat; each of the optimizer's own tensors where it is fp32."""
    held = optimizer._get_main_param_and_optimizer_states(placed.parameter)
    return {key: held[key].detach() for key in _KEYS}


def _described(base: Any, key: str, flat: Tensor, replica: int) -> Any:
    """A parameter's state as part of a checkpoint, sharded as the parameter (``base``) is.

    Args:
        replica: 0 on the rank that saves it, and counts for the others as the one that loads it.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    settings: dict[str, Any] = {} if isinstance(base, ShardedTensorFactory) else {"dtype": flat.dtype}
    described = replace(
        base,
        key=f"optimizer.state.{key}.{base.key}",
        data=flat.view(base.data.shape),
        replica_id=(*base.replica_id[:2], replica),
        **settings,
    )
    described.validate_metadata_integrity()
    return described


@contextmanager
def _replaced(method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], why: str) -> Iterator[None]:
    undo: list[Callable[[], None]] = []
    patching.replace(patching.Replacement(_OPTIMIZER, method, make, why), undo)
    try:
        yield
    finally:
        undo[0]()


def _with_padding(optimizer: Any, state: dict[Any, Any] | None) -> dict[Any, Any] | None:
    """``state`` with its flat tensors as long as the buffers, each bucket where it lies there."""
    for index, by_dtype in (state or {}).items():
        if not isinstance(index, int):
            continue
        buffer = optimizer.buffers[index]
        for tensors in by_dtype.values():
            for key, compact in tensors.items():
                if isinstance(compact, torch.Tensor):
                    whole, taken = compact.new_zeros(buffer.numel), 0
                    for bucket in buffer.buckets:
                        part = compact[taken : taken + bucket.numel_unpadded]
                        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = part
                        taken += bucket.numel_unpadded
                    tensors[key] = whole
    return state
