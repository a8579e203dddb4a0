"""The arguments that Megatron-LM stores in its checkpoints, read without running anything that is in them.

They are pickled: into ``common.pt`` up to 0.18, as the object ``common_state`` beside the tensors from 0.19 on. The
unpickler makes an inert record of every object it meets.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_megatron.checkpoint.torch_dist import METADATA, read_object
from mtp_megatron.errors import CheckpointError

COMMON = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"


@dataclass(frozen=True)
class StoredArguments:
    """Megatron-LM's arguments by name (empty where a checkpoint has none), its step, and the file they are in."""

    values: dict[str, Any]
    step: int
    path: Path


def read_arguments(folder: Path) -> StoredArguments:
    """What Megatron-LM stored beside the tensors.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / COMMON
    try:
        content: Any = path.read_bytes() if path.exists() else None
        if content is None:
            path = folder / METADATA
            content = read_object(folder, _COMMON_OBJECT)
        if content is None:
            raise FileNotFoundError(f"neither {COMMON} nor {_COMMON_OBJECT}")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            common = _InertUnpickler(io.BytesIO(archive.read(name))).load()
        if isinstance(common, list):  # objects are stored in lists
            (common,) = common
        values = vars(common.get("args") or _Inert())
        step = common.get("iteration") or 0
        return StoredArguments(values, step if isinstance(step, int) else 0, path)
    except (
        *(OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError),
        *(EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError),
    ) as error:
        raise CheckpointError(
            f"{path}: missing or damaged ({error}). Copy the checkpoint again, or describe it with --model RECIPE.yaml."
        ) from error


class _Inert:
    """Stands for any object of the pickle."""

    def __init__(self, *arguments: Any, **settings: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def __call__(self, *arguments: Any) -> _Inert:
        return self


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return None
