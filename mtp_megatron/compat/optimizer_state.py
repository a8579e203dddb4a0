"""The distributed optimizer's state in checkpoints: each parameter's saved and loaded by one of the ranks that hold it.

In megatron-core's format ``fully_reshardable`` (0.16.1 to 0.19.2), the one that loads at another TP x PP x DP, a
parameter has its fp32 weight and Adam's two moments as tensors of its own shape. Upstream gathers them for a whole
stage in the host memory of every data parallel rank, a bucket at a time through its GPU. Per parameter of the stage
that is 24 to 30 bytes at a save, 20 at a load, and 8 on the GPU where one bucket is the stage, as it is without
``optimizer.overlap_grad_reduce``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron.compat import patching
from mtp_megatron.compat.versions import SUPPORTED, EnvironmentUnsupported

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_KEYS = ("param", "exp_avg", "exp_avg_sq")
ROUND = 2**26  # elements of shared parameters that are exchanged together


@contextmanager
def state_stays_on_its_ranks(timeout: timedelta) -> Iterator[None]:
    """Inside, the distributed optimizer's sharded state takes memory for no more than a rank's share of a stage.

    Data parallel ranks hold equal pieces of each bucket. A parameter that lies on one rank is saved from, and loaded
    to, that rank's own tensors. One that ranks share has an owner among them, which has it whole in host memory: it
    gathers it over gloo before a save and scatters it after a load. The format is upstream's.

    Args:
        timeout: longest wait for another rank; upstream gives experts' gloo groups none (0.16.1 to 0.19.2), and they
            would wait for torch's 30 minutes.
    """
    why = "each data parallel rank takes host memory for the whole state of its stage"
    with (
        _replaced(
            "sharded_param_state_fully_reshardable",
            lambda upstream: partialmethod(_sharded_state, timeout=timeout),
            why,
        ),
        _replaced(
            "load_parameter_state_from_fully_reshardable",
            lambda upstream: partialmethod(_take_loaded, timeout=timeout),
            why,
        ),
    ):
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
        owner: the one of them that saves and loads all of it.
    """

    index: int
    parameter: Tensor
    parts: dict[int, tuple[int, int]]
    owner: int


def placed_parameters(optimizer: Any) -> list[Placed]:
    """Where the state of each parameter of a ``DistributedOptimizer`` lies, in upstream's order; alike on all ranks.

    Raises:
        EnvironmentUnsupported: this megatron-core cuts buckets in another way.
    """
    size, here = optimizer.data_parallel_group.size(), optimizer.data_parallel_group.rank()
    found: list[Placed] = []
    owned = [0] * size  # elements of shared parameters
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
                    f"{here}, and not {parts.get(here)}: its state cannot be saved or loaded. Use a released "
                    f"megatron-core ({SUPPORTED})."
                )
            # Of them the one that owns least so far; of such, the one with the largest part.
            owner = min(parts, key=lambda rank: (owned[rank], parts[rank][0] - parts[rank][1]))
            if len(parts) > 1:
                owned[owner] += end - start
            found.append(Placed(len(found), parameter, parts, owner))
    return found


def _sharded_state(
    optimizer: Any, model_state: dict[str, Any], is_loading: bool, metadata: Any = None, *, timeout: timedelta
) -> Any:
    """In place of ``sharded_param_state_fully_reshardable``: what this rank saves, or loads. Collective at a save."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    described = {base.data: base for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    parameters, here = placed_parameters(optimizer), optimizer.data_parallel_group.rank()
    state: dict[int, dict[str, Tensor]] = {}
    for placed in parameters:
        if placed.owner == here:
            held = _held(optimizer, placed)
            if len(placed.parts) > 1:
                held = {k: torch.empty(placed.parameter.numel(), dtype=t.dtype, device="cpu") for k, t in held.items()}
            state[placed.index] = held
    if not is_loading:
        _exchange(optimizer, parameters, state, gather=True, timeout=timeout)
    replica = optimizer.distributed_optimizer_instance_id
    sharded = {
        placed.index: {
            key: _described(described[placed.parameter], key, tensor, replica)
            for key, tensor in state[placed.index].items()
        }
        for placed in parameters
        if placed.owner == here
    }
    # An empty table would be in the part of a checkpoint that rank 0 saves for all.
    return sharded or LocalNonpersistentObject({})


@torch.no_grad()
def _take_loaded(optimizer: Any, state: dict[int, dict[str, Tensor]], *, timeout: timedelta) -> None:
    """In place of ``load_parameter_state_from_fully_reshardable``: what owners have loaded, to all. Collective."""
    parameters, here = placed_parameters(optimizer), optimizer.data_parallel_group.rank()
    for placed in parameters:
        if list(placed.parts) == [here]:  # mostly there already: it was loaded in place
            flat = {key: tensor.flatten() for key, tensor in state[placed.index].items()}
            optimizer._set_main_param_and_optimizer_states(placed.parameter, flat)
    _exchange(optimizer, parameters, state, gather=False, timeout=timeout)


def _exchange(
    optimizer: Any,
    parameters: Sequence[Placed],
    whole: dict[int, dict[str, Tensor]],
    *,
    gather: bool,
    timeout: timedelta,
) -> None:
    """Gather the parts of shared parameters into ``whole`` on their owners, or scatter them from there to the
    optimizers of the data parallel ranks. Collective over these."""
    group, here = optimizer.data_parallel_group_gloo, optimizer.data_parallel_group.rank()
    shared = [placed for placed in parameters if len(placed.parts) > 1 and here in placed.parts]
    if shared and group is None:
        raise EnvironmentUnsupported(
            "the distributed optimizer's state is exchanged over gloo, and there are no gloo groups: initialize "
            "megatron's model parallel groups with create_gloo_process_groups=True."
        )
    for few in _rounds(shared):
        waiting, parts = [], []
        for placed in few:
            held, owns = _held(optimizer, placed), placed.owner == here
            send_or_receive = dist.irecv if owns == gather else dist.isend
            own: dict[str, Tensor] = {}
            for number, (key, part) in enumerate(held.items()):
                if owns:
                    flat = whole[placed.index][key].flatten()
                    pieces = {rank: flat[start:end] for rank, (start, end) in placed.parts.items()}
                    own[key] = pieces.pop(here)
                    if gather:
                        own[key].copy_(part)
                else:
                    own[key] = part.cpu() if gather else torch.empty_like(part, device="cpu")
                    pieces = {placed.owner: own[key]}
                for rank, piece in pieces.items():
                    other = dist.get_global_rank(group, rank)
                    tag = len(held) * placed.index + number
                    waiting.append(send_or_receive(piece, other, group=group, tag=tag))
            parts.append(own)
        for work in waiting:
            work.wait(timeout)  # type: ignore[union-attr]  # None is for ranks outside of the group
        if not gather:
            for placed, own in zip(few, parts, strict=True):
                optimizer._set_main_param_and_optimizer_states(placed.parameter, own)


def _rounds(shared: Sequence[Placed]) -> Iterator[list[Placed]]:
    """The same parameters a few at a time, which bounds what is under way."""
    few: list[Placed] = []
    for placed in shared:
        if few and sum(each.parameter.numel() for each in [*few, placed]) > ROUND:
            yield few
            few = []
        few.append(placed)
    if few:
        yield few


def _held(optimizer: Any, placed: Placed) -> dict[str, Tensor]:
    """This rank's own part of a parameter's state, flat; each of the optimizer's own tensors where it is fp32."""
    held = optimizer._get_main_param_and_optimizer_states(placed.parameter)
    return {key: held[key].detach() for key in _KEYS}


def _described(base: Any, key: str, flat: Tensor, replica: int) -> Any:
    """A parameter's state as part of a checkpoint, sharded as the parameter (``base``) is.

    Args:
        replica: 0, or the number of a further copy of the optimizer, which does not save it.
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
def _replaced(method: str, make: Callable[[Callable[..., Any]], Any], why: str) -> Iterator[None]:
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
