"""What the ranks of a job would say to one another over NCCL, from traces of one rank after another on fake tensors,
and whether it fits together.

gloo forgives what NCCL does not: it takes any type and layout, keeps what was sent until somebody asks for it, and
works on every group at once. NCCL's operations are kernels, which wait for their partners in the order in which each
rank has launched them. :func:`problems` plays that through.

A collective counts as waited for at once, also where the code goes on and waits later: the ranks have less freedom here
than they will have. Sends and receives count as waited for where the code does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ProcessGroupNCCL's table of types (`ncclDataType` in NCCLUtils.hpp), without FP8, which it cannot add up.
DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


@dataclass(frozen=True)
class Group:
    """A process group: its name, which tells groups of the same ranks apart, and its global ranks."""

    name: str
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Group:
        group = group or dist.group.WORLD
        assert group is not None
        return cls(group.group_name, tuple(dist.get_process_group_ranks(group)))


Communicator = tuple[Group, tuple[int, ...]]
"""A group's own, or a pair's of it; with its members."""
Place = tuple[int, int]
"""An operation by its rank and its number there."""
_NEVER = 1 << 62


@dataclass(frozen=True)
class Transfer:
    """A send or a receive of one tensor."""

    sends: bool
    peer: int
    what: str


@dataclass
class Operation:
    """What one rank launches at once.

    Attributes:
        group: whose communicator.
        what: of a collective: its name, types, sizes and root; not what it reduces by, which cannot be read here. All
            ranks must say the same.
        transfers: of a batch of sends and receives, or of a single one.
        batched: as ``batch_isend_irecv`` does, on the group's own communicator; a single one has one for each pair.
        awaited: how many of this rank's operations, by their numbers, its stream has waited for before.
        wrong: what NCCL would not take of its tensors.
    """

    group: Group
    what: str = ""
    transfers: tuple[Transfer, ...] = ()
    batched: bool = True
    awaited: frozenset[int] = frozenset()
    wrong: list[str] = field(default_factory=list)

    def communicator(self, rank: int) -> Communicator:
        """Which one it uses on this rank; its operations run one after another."""
        if self.batched:
            return self.group, self.group.ranks
        return self.group, tuple(sorted((rank, self.transfers[0].peer)))

    def __str__(self) -> str:
        said = self.what or ", ".join(
            f"{'send to' if part.sends else 'receive from'} {part.peer} {part.what}" for part in self.transfers
        )
        return f"{said} in group {self.group.name} of {list(self.group.ranks)}"


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class _Request:
    """Stands for the handle of a send or receive."""

    def __init__(self, number: int, waited: Callable[[int], None]) -> None:
        self._number, self._waited = number, waited

    def wait(self, *args: Any) -> bool:
        self._waited(self._number)
        return True


class _Collectives(TorchDispatchMode):
    def __init__(self, record: Callable[[Any, dict[str, Any]], None]) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            self._record(func, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


class Recorder:
    """The operations of the rank that this process is at the moment (:func:`mtp_megatron.compat.fake.fake_rank`)."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._awaited: frozenset[int] = frozenset()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, every operation of torch.distributed is noted; sends and receives are not done."""
        former = {name: getattr(dist, name) for name in ("isend", "irecv", "batch_isend_irecv")}
        instead = {"isend": self._isend, "irecv": self._irecv, "batch_isend_irecv": self._batch}
        for name, function in instead.items():
            setattr(dist, name, function)
            setattr(distributed_c10d, name, function)  # where P2POp compares with it
        try:
            with _Collectives(self._collective):
                yield
        finally:
            for name, function in former.items():
                setattr(dist, name, function)
                setattr(distributed_c10d, name, function)

    def _add(self, operation: Operation, tensors: Sequence[Tensor]) -> int:
        operation.awaited = self._awaited
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                operation.wrong.append(f"NCCL has no {tensor.dtype}")
            if not tensor.is_contiguous():
                operation.wrong.append(f"strides {tensor.stride()} of {tuple(tensor.shape)} are not contiguous")
        self.operations.append(operation)
        return len(self.operations) - 1

    def _wait(self, number: int) -> None:
        self._awaited |= {number}

    def _collective(self, func: Any, arguments: dict[str, Any]) -> None:
        name = func._opname
        assert name not in ("send", "recv_", "recv_any_source_"), f"{name} is not recorded"
        group = Group.of(dist.ProcessGroup.unbox(arguments.pop("process_group")))
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        root = [f"from {arguments['root_rank']}"] if "root_rank" in arguments else []
        self._wait(self._add(Operation(group, " ".join([name, *map(_what, tensors), *root])), tensors))

    def _isend(
        self, tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: int | None = None
    ) -> _Request:
        return self._single(True, tensor, dst, group)

    def _irecv(
        self, tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0, group_src: int | None = None
    ) -> _Request:
        return self._single(False, tensor, src, group)

    def _single(self, sends: bool, tensor: Tensor, peer: int | None, group: Any) -> _Request:
        assert peer is not None, "a peer by its rank in the group is not recorded"
        transfer = Transfer(sends, peer, _what(tensor))
        return _Request(self._add(Operation(Group.of(group), "", (transfer,), batched=False), [tensor]), self._wait)

    def _batch(self, p2p_op_list: list[Any]) -> list[_Request]:
        transfers = tuple(Transfer(part.op == self._isend, part.peer, _what(part.tensor)) for part in p2p_op_list)
        tensors = [part.tensor for part in p2p_op_list]
        return [_Request(self._add(Operation(Group.of(p2p_op_list[0].group), "", transfers), tensors), self._wait)]


def problems(ranks: Sequence[Sequence[Operation]]) -> list[str]:
    """What keeps these ranks' operations from fitting together; empty where all of them come to their end.

    On each rank an operation starts when those before it in its queue, and those that its stream has waited for, have
    ended, and no earlier one has yet to start: with CUDA_DEVICE_MAX_CONNECTIONS=1 a GPU starts kernels in the order of
    their launches. It ends when its partners have started. The first one of a communicator makes it, and holds the
    rank up until all its members have come to theirs.
    """
    found = [f"rank {rank}: {said}: {each}" for rank, part in enumerate(ranks) for each in part for said in each.wrong]
    partners, unmatched = _matched(ranks)
    before, makers = _queues(ranks)
    started = [0] * len(ranks)  # so many of each rank's
    waiting: list[set[int]] = [set() for _ in ranks]  # of those, for their partners
    ended: list[set[int]] = [set() for _ in ranks]

    def may_start(rank: int, number: int) -> bool:
        previous = before[rank, number]
        if previous is not None and previous not in ended[rank]:
            return False
        made = all(started[member] > first for member, first in makers.get((rank, number - 1), ()))
        return made and ranks[rank][number].awaited <= ended[rank]

    moved = True
    while moved:
        moved = False
        for rank, operations in enumerate(ranks):
            while started[rank] < len(operations) and may_start(rank, started[rank]):
                waiting[rank].add(started[rank])
                started[rank] += 1
                moved = True
            over = {
                number for number in waiting[rank] if all(started[peer] > its for peer, its in partners[rank, number])
            }
            waiting[rank] -= over
            ended[rank] |= over
            moved |= bool(over)
    for rank, operations in enumerate(ranks):
        if len(ended[rank]) < len(operations):
            first = min(set(range(len(operations))) - ended[rank])
            unmatched.append(f"rank {rank} waits for ever in its operation {first}: {operations[first]}")
    return found + unmatched


def _queues(ranks: Sequence[Sequence[Operation]]) -> tuple[dict[Place, int | None], dict[Place, list[Place]]]:
    """Each operation's predecessor in its queue; and of the first ones the first ones of the communicator's members."""
    before: dict[Place, int | None] = {}
    first: dict[Communicator, dict[int, int]] = defaultdict(dict)
    for rank, operations in enumerate(ranks):
        last: dict[Communicator, int] = {}
        for number, operation in enumerate(operations):
            communicator = operation.communicator(rank)
            before[rank, number] = last.get(communicator)
            last[communicator] = number
            first[communicator].setdefault(rank, number)
    makers = {
        (rank, number): [(member, there.get(member, _NEVER)) for member in members]
        for (_, members), there in first.items()
        for rank, number in there.items()
    }
    return before, makers


def _matched(ranks: Sequence[Sequence[Operation]]) -> tuple[dict[Place, list[Place]], list[str]]:
    """Every operation's partners, and what has none or does not fit its partner.

    What has no partner gets one that never starts.
    """
    found: list[str] = []
    collectives: dict[tuple[Group, int], dict[int, int]] = defaultdict(dict)
    sides: dict[tuple[Any, int, int], tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for rank, operations in enumerate(ranks):
        counts: dict[Group, int] = defaultdict(int)
        for number, operation in enumerate(operations):
            if not operation.transfers:
                collectives[operation.group, counts[operation.group]][rank] = number
                counts[operation.group] += 1
            for part in operation.transfers:
                ends = (rank, part.peer) if part.sends else (part.peer, rank)
                sides[(operation.group, operation.batched), *ends][not part.sends].append((rank, number, part.what))
    partners: dict[Place, list[Place]] = defaultdict(list)
    never = (0, _NEVER)
    for (group, count), there in collectives.items():
        said = {rank: str(ranks[rank][number]) for rank, number in there.items()}
        if len(set(said.values())) > 1:
            found.append(f"collective {count} of group {group.name} differs: {said}")
        for rank, number in there.items():
            partners[rank, number] += [(other, there[other]) if other in there else never for other in group.ranks]
    for (_, source, target), (sent, received) in sides.items():
        if len(sent) != len(received):
            found.append(f"{len(sent)} sends and {len(received)} receives from rank {source} to rank {target}")
        for index in range(max(len(sent), len(received))):
            pair = [side[index] if index < len(side) else None for side in (sent, received)]
            for one, other in (pair, pair[::-1]):
                if one is not None:
                    partners[one[0], one[1]].append(never if other is None else (other[0], other[1]))
            if pair[0] is not None and pair[1] is not None and pair[0][2] != pair[1][2]:
                found.append(f"rank {source} sends {pair[0][2]}, and rank {target} receives {pair[1][2]}")
    return partners, found
