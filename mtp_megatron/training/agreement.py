"""Starting together: the ranks of a job, perhaps on several hosts, tell one another how their checks went, and all of
them go on or none does.

Each rank checks what its own host shows it (:mod:`.preflight`). Without this step a host on which a check fails would
leave the others waiting for it until ``train.timeout_minutes``, and hosts with different recipes, data or versions
would train something that nobody asked for. No model is allocated before the ranks agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from mtp_megatron import __version__, compat
from mtp_megatron.compat.devices import require_usable_gpu, take_own_gpu
from mtp_megatron.data.blend import Blend
from mtp_megatron.errors import ConfigError, MTPError, paths_explained
from mtp_megatron.loss import cuda_memory
from mtp_megatron.ranks import ranges
from mtp_megatron.training.checkpoint_files import differences
from mtp_megatron.training.preflight import Plan, check_launcher, preflight
from mtp_megatron.training.recipe import Recipe

# May differ from host to host: where folders are mounted, and how many processes read.
_LOCAL_KEYS = {"data": {"path", "blend", "cache", "workers"}, "run": {"path"}}
_GPU = "GPU"
SEEN_WITHIN = 30.0  # seconds; network file systems show other hosts' writes late
_READ_WITHIN = timedelta(seconds=30)

Exchange = Callable[[str], list[str]]


class JobError(MTPError):
    """This rank could start, but the job cannot: the message names the ranks and hosts that are the reason."""


@dataclass(frozen=True)
class Statement:
    """What one rank says after its checks.

    Attributes:
        rank, host: who says it.
        error: why it cannot start; empty where it can.
        facts: what all ranks must have in common, by the name of the setting.
    """

    rank: int
    host: str
    error: str
    facts: dict[str, Any]


def job_store(recipe: Recipe) -> Store | None:
    """The key-value store of the launcher, through which the ranks meet; None for a process alone, or where a process
    group exists already.

    Raises:
        ConfigError: this process is one of several that no launcher has told apart.
    """
    if dist.is_initialized():
        return None
    check_launcher()
    if "RANK" not in os.environ:
        return None
    timeout = timedelta(minutes=recipe.train.timeout_minutes)
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return store


def preflight_together(recipe: Recipe, world_size: int, store: Store | None) -> Plan:
    """:func:`.preflight.preflight` on every rank, and its GPU taken; collective.

    Raises:
        ConfigError, DataError, CheckpointError, PathError: this rank's own complaint; or, on all ranks, a setting in
            which they differ.
        EnvironmentUnsupported: torch cannot use this rank's GPU.
        JobError: another rank has a complaint, or did not report within ``train.timeout_minutes``.
    """
    if store is None and not dist.is_initialized():
        return _preflight_with_gpu(recipe, world_size)
    tell = _exchange(store, "preflight", world_size, recipe.train.timeout_minutes)
    try:
        # Rank 0 warns for all: they must have chosen the same.
        plan = _preflight_with_gpu(recipe, world_size, warn=_rank() == 0)
    except MTPError as error:
        with contextlib.suppress(JobError):  # also without an answer, its own complaint is what this rank has to say
            tell(_statement(str(error), {}))
        raise
    compare([Statement(**json.loads(text)) for text in tell(_statement("", _facts(plan)))])
    return plan


def _preflight_with_gpu(recipe: Recipe, world_size: int, *, warn: bool = True) -> Plan:
    require_usable_gpu()
    take_own_gpu()
    with paths_explained():  # a rank that ended by anything else would leave the others waiting
        return preflight(recipe, world_size, warn=warn)


def compare(statements: Sequence[Statement]) -> None:
    """Accept the statements of all ranks, or raise on every rank alike.

    Raises:
        JobError: a rank has an error.
        ConfigError: a rank has other settings, data or versions than rank 0.
    """
    failed = [statement for statement in statements if statement.error]
    if failed:
        first = failed[0]
        more = f" ({len(failed)} of {len(statements)} ranks have errors)" if len(failed) > 1 else ""
        raise JobError(f"rank {first.rank} on {first.host} cannot start: {first.error}{more}")
    zero = statements[0]
    for other in statements[1:]:
        for field, value in zero.facts.items():
            theirs = other.facts.get(field)
            if theirs == value:
                continue
            shown = "; ".join(differences(value, theirs)) if isinstance(value, dict) else f"{theirs!r} here"
            raise ConfigError(
                field,
                value if not isinstance(value, dict) else "...",
                f"rank {other.rank} on {other.host} has another one than rank 0 on {zero.host} ({shown})",
                "Give the job nodes with GPUs of one kind."
                if field == _GPU
                else "Start every host with the same command, data and environment.",
            )


def require_shared(path: Path, proof: Path, patience: float, *, token: str = "", complaint: str = "") -> None:
    """Check that every rank finds in ``proof`` what rank 0 wrote there; collective, the process group must be up.

    Args:
        path: the folder that must be shared, for the message.
        proof: a file in it, written by rank 0.
        patience: seconds after which the process group gives up a collective; at most half of them are waited here,
            while ranks that see the file already are in the next collective.
        token: what rank 0 wrote; of no meaning on other ranks.
        complaint: why rank 0 did not, and will raise by itself; of no meaning on other ranks.

    Raises:
        ConfigError: on every rank; names the hosts that see another folder.
        JobError: on the other ranks, when rank 0 has a complaint.
    """
    said: list[Any] = [token, complaint]
    dist.broadcast_object_list(said, src=0, device=compat.device())
    if said[1]:
        if dist.get_rank() == 0:
            return
        raise JobError(f"rank 0 cannot start: {said[1]}")
    deadline = time.monotonic() + min(SEEN_WITHIN, patience / 2)
    while not (seen := _read(proof) == said[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (platform.node(), seen))
    blind = sorted({host for host, saw in everyone if not saw})
    if blind:
        raise ConfigError(
            "run.path",
            str(path),
            f"it is not one shared folder: {', '.join(blind)} cannot see what {everyone[0][0]} wrote in it",
            "Mount the same folder there on every host.",
        )


def _statement(error: str, facts: dict[str, Any]) -> str:
    return json.dumps(asdict(Statement(_rank(), platform.node(), error, facts)))


def _facts(plan: Plan) -> dict[str, Any]:
    tree = plan.recipe.model_dump(mode="json")
    kept = {
        section: {key: value for key, value in values.items() if key not in _LOCAL_KEYS.get(section, ())}
        for section, values in tree.items()
    }
    return {
        "recipe": kept,
        "data": _data_facts(plan.data),
        "mtp_megatron version": __version__,
        "megatron-core version": str(compat.MCORE_VERSION),
        "torch version": torch.__version__.partition("+")[0],
        "fused kernels": compat.fusions(),  # where a host lacks a compiler, say, all would wait for it in every step
        # Not where rank 0 resumes: the others follow it, and may not see yet what it saved.
        **({} if plan.initial is None else {"checkpoint of run.load": plan.initial.name}),
        _GPU: _gpu(plan.recipe),
    }


def _data_facts(data: Blend) -> dict[str, Any]:
    """Folders may be mounted elsewhere on other hosts; their content, weights and order must be the same."""
    rows = zip(data.parts, data.weights, data.before, strict=True)
    return {"since": data.since} | {
        f"folder {number}": {"weight": weight, "fingerprint": part.fingerprint, "before": before}
        for number, (part, weight, before) in enumerate(rows, start=1)
    }


def _gpu(recipe: Recipe) -> dict[str, Any]:
    """What the GPUs of a job must have in common; empty without.

    Which random numbers torch draws depends on how many multiprocessors draw them (``calc_execution_policy`` in its
    DistributionTemplates.h): data parallel ranks would start with other weights each, and without the distributed
    optimizer keep them. The memory decides in how many chunks the loss is taken
    (:func:`mtp_megatron.loss.chunk_tokens_for`), and tensor parallel ranks wait for one another in each.
    """
    if not torch.cuda.is_available():
        return {}
    own = compat.device()
    properties = torch.cuda.get_device_properties(own)
    common: dict[str, Any] = {
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }
    if recipe.parallel.tensor > 1 and recipe.heads.loss_chunk_tokens is None:
        common["memory at least, GiB"] = cuda_memory(own) >> 30
    return common


def _exchange(store: Store | None, name: str, world_size: int, minutes: float) -> Exchange:
    if store is None:
        return _through_group
    return partial(through_store, store, name, _rank(), world_size, timeout=timedelta(minutes=minutes))


def _through_group(text: str) -> list[str]:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, text)
    return told


def through_store(store: Store, name: str, rank: int, world_size: int, text: str, timeout: timedelta) -> list[str]:
    """Every rank's text, by rank.

    Raises:
        JobError: names the ranks that did not report in time.
    """
    keys = [f"mtp_megatron/{name}/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], text)
        store.wait(keys, timeout)
        told = [store.get(key).decode() for key in keys]
        store.set(f"{keys[rank]}/read", "")
    except dist.DistNetworkError as error:
        raise JobError("rank 0 has ended, and with it the job: look for its error in the log of its host.") from error
    except dist.DistStoreError as error:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise JobError(
            f"{len(missing)} of {world_size} ranks did not report within {timeout.total_seconds():g} s: "
            f"{ranges(missing)}. Look for their errors in the logs of their hosts."
        ) from error
    if rank == 0:  # its process may host the store, and may end now: not before the others have read
        with contextlib.suppress(dist.DistError):
            store.wait([f"{key}/read" for key in keys], min(timeout, _READ_WITHIN))
    return told


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])


def _read(file: Path) -> str | None:
    """Its text; None if it is not there, looked up anew (NFS remembers that a name was absent until it is listed)."""
    try:
        list(file.parent.parent.iterdir())
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
