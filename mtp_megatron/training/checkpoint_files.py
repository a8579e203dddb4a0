"""The files of checkpoints: names, completeness, the tracker, pruning. No tensors and no megatron here.

Layout (Megatron-LM's)::

    checkpoints/iter_0000100/                        one complete checkpoint, written as iter_0000100.tmp and renamed
    checkpoints/latest_checkpointed_iteration.txt    the step of the latest one, replaced last

Each checkpoint folder holds megatron-core's files, ``mtp_config.json`` (what the model is), ``files.json`` (every
file's size, so that truncation is noticed before a load) and the tokenizer's model file, or a folder of its files,
whose chat template and settings of generation people may change.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_megatron.data.atomic import sync
from mtp_megatron.data.huggingface import MAY_CHANGE
from mtp_megatron.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
DEEPSPEED_LATEST = "latest"  # where DeepSpeed's own tools look for the newest checkpoint
CONFIG = "mtp_config.json"
SIZES = "files.json"
TEMPORARY_SUFFIX = ".tmp"
_NAME = re.compile(r"iter_(\d{7,})")

logger = logging.getLogger(__name__)


def iteration_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint taken after the run's ``step``, whose count includes steps that were passed over."""
    return checkpoints / f"iter_{step:07d}"


def temporary_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is complete."""
    final = iteration_folder(checkpoints, step)
    return final.with_name(final.name + TEMPORARY_SUFFIX)


def list_iterations(checkpoints: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint under its final name, oldest first; says nothing about completeness."""
    if not checkpoints.is_dir():
        return {}
    found = {}
    for folder in checkpoints.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            found[int(match.group(1))] = folder
    return dict(sorted(found.items()))


def prepare_temporary(checkpoints: Path, step: int) -> Path:
    """Create the empty folder that a save writes to, and remove what interrupted saves left behind."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in checkpoints.glob(f"iter_*{TEMPORARY_SUFFIX}"):
        _discard(leftover)
    folder = temporary_folder(checkpoints, step)
    folder.mkdir()
    return folder


def publish(checkpoints: Path, step: int) -> Path:
    """Make a fully written temporary folder the latest checkpoint; atomic at each of its steps, the tracker last."""
    temporary, final = temporary_folder(checkpoints, step), iteration_folder(checkpoints, step)
    written = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
    for file in written:
        sync(file)  # not every engine does; a power cut must not leave names without contents
    lasting = [file for file in written if file.parent == temporary or file.name not in MAY_CHANGE]
    sizes = {file.relative_to(temporary).as_posix(): file.stat().st_size for file in lasting}
    write_atomically(temporary / SIZES, json.dumps(sizes, indent=1))
    sync(temporary)
    if final.exists():  # the same step saved again, for example after a damaged copy was passed over
        _discard(final)
    temporary.rename(final)
    write_atomically(checkpoints / TRACKER, str(step))
    return final


def prune(checkpoints: Path, keep_last: int | None, step: int, keep_every: int | None = None) -> None:
    """Delete what is older than the ``keep_last`` newest usable checkpoints up to that of ``step``, the one just
    published; None keeps all.

    Multiples of ``keep_every`` are kept whatever they are, and do not count. Nor do damaged ones: a run that goes on
    from an older checkpoint than the newest is left with what it saves. Nothing newer than ``step`` is deleted.
    """
    if keep_last is None:
        return
    kept = 0
    for saved, folder in reversed(list_iterations(checkpoints).items()):
        if keep_every is not None and saved % keep_every == 0:
            continue
        if kept == keep_last:
            _discard(folder)
        elif saved <= step and problem_of(folder) is None:
            kept += 1


def _discard(folder: Path) -> None:
    """Delete a folder, at once out of the way: training does not end of a file that another process still holds."""
    number = folder.name.partition(".")[0]
    hidden = folder.with_name(f"{number}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        folder.rename(hidden)
        shutil.rmtree(hidden)
    except FileNotFoundError:
        return  # another process deletes it as well
    except OSError as error:
        logger.warning("%s cannot be deleted (%s): the next save tries again", hidden, error)


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None: a file of :data:`SIZES` is missing or has another size."""
    try:
        sizes: dict[str, int] = json.loads((folder / SIZES).read_text())
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
    except FileNotFoundError:
        return f"{SIZES} is missing: the save was not finished"
    except (ValueError, AttributeError) as error:  # no JSON, no text, no table
        return f"{SIZES} is damaged ({error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def latest_complete(checkpoints: Path, *, warn: bool = True) -> Path | None:
    """Folder of the newest usable checkpoint, None if none was ever published; damaged ones are passed over, with a
    warning.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    problems: list[str] = []
    for folder in reversed(list_iterations(checkpoints).values()):
        problem = problem_of(folder)
        if problem is None:
            for line in problems if warn else []:
                logger.warning("checkpoint %s is passed over; continuing from %s", line, folder.name)
            return folder
        problems.append(f"{folder}: {problem}")
    if problems:
        raise CheckpointError(
            f"no usable checkpoint: {'; '.join(problems)}. Restore one, or delete {checkpoints} to start from step 0."
        )
    return None


def warn_of_older_tracker(checkpoints: Path, used: Path) -> None:
    """Say that the tracker does not choose the checkpoint, to whoever edited it as one does in Megatron-LM.

    A crash between a checkpoint's last rename and the tracker's leaves the same two files, so this is no error.
    """
    try:
        named = int((checkpoints / TRACKER).read_text())
    except (OSError, ValueError):
        return
    folder = list_iterations(checkpoints).get(named)
    if folder is None or named >= step_of(used) or problem_of(folder) is not None:
        return
    run = checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints
    logger.warning(
        "%s names step %d, but the newest complete checkpoint is %s and is used; to go back: "
        "mtp-megatron rollback %s %d",
        *(checkpoints / TRACKER, named, used.name, run, named),
    )


def find_checkpoint(path: str | Path, *, warn: bool = True) -> Path:
    """The complete checkpoint folder meant by a run, a checkpoints folder or a checkpoint folder itself.

    Args:
        warn: say which damaged ones are passed over.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    path = Path(path)
    if _NAME.fullmatch(path.name):
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such checkpoint folder. Name an existing one, or its run.")
        problem = problem_of(path)
        if problem:
            raise CheckpointError(f"{path}: {problem}. Name another checkpoint of the run.")
        return path
    for folder in (path / "checkpoints", path):
        found = latest_complete(folder, warn=warn)
        if found:
            return found
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no checkpoint (iter_*) in it, but a Hugging Face config.json. Convert it: "
            f"mtp-megatron convert {shlex.quote(str(path))} --to megatron --output START; then name START."
        )
    raise CheckpointError(
        f"{path}: no checkpoint (iter_*) in it. Give a run folder, its checkpoints folder or an iter_ folder."
    )


def step_of(folder: Path) -> int:
    """The run's step after which the checkpoint in ``folder`` was taken."""
    match = _NAME.fullmatch(folder.name)
    if not match:
        raise CheckpointError(f"{folder}: a checkpoint folder is named iter_ and seven digits or more.")
    return int(match.group(1))


def read_mtp_config(folder: Path) -> dict[str, Any]:
    """What the model of a checkpoint is, from its ``mtp_config.json``.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: missing, so what the checkpoint holds is unknown. Give a folder that training wrote."
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: damaged ({error}). Give another checkpoint of the run.") from error
    return config


def differences(there: Any, here: Any, prefix: str = "") -> Iterator[str]:
    """Dotted fields in which two nested settings differ, as ``field: there -> here`` texts."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from differences(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key)
    elif there != here:
        yield f"{prefix} is {there!r} there and {here!r} here"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, meets either the old text or the new one.

    Raises:
        OSError: it cannot be written; then nothing is left of the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)
