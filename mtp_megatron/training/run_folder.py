"""The run's folder: which files it holds, and whether a recipe may use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_megatron import stack_files
from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.checkpoint_files import (
    differences,
    latest_complete,
    list_iterations,
    step_of,
    write_atomically,
)
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import dump_recipe, load_recipe

LOCK = ".lock"
# What may change between the start of a run and its resumption: how it is cut, how long it is, what is reported.
FREE_KEYS = frozenset(
    {
        *("parallel", "run"),
        *("heads.execution", "heads.loss_chunk_tokens", "heads.new_heads"),
        *("data.path", "data.blend", "data.cache", "data.workers"),  # what the data is: preflight compares it
        *("optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather"),
        *(f"train.{key}" for key in ("steps", "micro_batch_size", "eval_interval", "eval_batches", "save_interval")),
        *(
            f"train.{key}"
            for key in ("log_interval", "recompute", "timeout_minutes", "transformer_engine", "skip_steps")
        ),
        *("train.profile_steps", "train.profile_ranks", "train.memory_snapshot", "train.async_save"),
    }
)
# What may change besides where run.accept_changes says so: what a run is steered with. Losses before and after differ.
STEERED_KEYS = frozenset(
    {
        *(f"optimizer.{key}" for key in ("lr", "min_lr", "schedule", "warmup_steps", "decay_steps")),
        *(f"optimizer.{key}" for key in ("wsd_decay_steps", "wsd_decay_style", "weight_decay", "clip_grad")),
        *(f"heads.{key}" for key in ("loss_weights", "loss_decay", "z_loss", "curriculum_steps")),
        *(f"train.{key}" for key in ("global_batch_size", "batch_size_schedule")),  # of steps to come
    }
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def diverged(self) -> Path:
        return self.path / "diverged.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    @property
    def stacks(self) -> Path:
        return self.path / stack_files.FOLDER

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def memory(self) -> Path:
        return self.path / "memory"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def steps_done(self) -> int:
        """The step of the latest usable checkpoint; 0 where there is none."""
        latest = latest_complete(self.checkpoints, warn=False)
        return 0 if latest is None else step_of(latest)

    def write_recipe(self, recipe: Recipe) -> None:
        """Record the resolved recipe of the run, with changes that were accepted: that was for one resumption."""
        run = recipe.run.model_copy(update={"accept_changes": False})
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe, dump_recipe(recipe.model_copy(update={"run": run})))


def check_run_folder(recipe: Recipe) -> tuple[RunFolder, dict[str, str]]:
    """Refuse a folder that belongs to something else; changes nothing on disk.

    Args:
        recipe: the resolved recipe.

    Returns:
        The folder; and what of :data:`STEERED_KEYS` the recipe has otherwise than the run so far, which
        ``run.accept_changes`` allows: dotted key -> a text with both values.

    Raises:
        ConfigError: ``run.path`` is no folder, holds foreign files or another run, or ``run.resume`` rules it out; or
            the batch sizes of steps that are over are other ones.
        CheckpointError: it holds checkpoints of this run, all of them damaged.
    """
    folder = RunFolder(Path(recipe.run.path))
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError("run.path", recipe.run.path, "it is a file", "Choose a folder.")
    if not folder.recipe.is_file():
        entries = sorted(entry.name for entry in folder.path.iterdir()) if folder.path.is_dir() else []
        unfinished = f".{folder.recipe.name}."  # of a start that was killed while it wrote that
        ours = (LOCK, stack_files.FOLDER, folder.memory.name)  # of one that hung, or whose model did not fit
        strangers = [name for name in entries if name not in ours and not name.startswith(unfinished)][:3]
        if strangers:
            raise ConfigError(
                "run.path",
                recipe.run.path,
                f"it holds files that are no run's ({', '.join(strangers)})",
                "Choose a new or empty folder.",
            )
        if recipe.run.resume == "must":
            raise ConfigError(
                "run.resume", "must", f"run.path={recipe.run.path} holds no run", "Set run.path to a run."
            )
        return folder, {}
    so_far = load_recipe(folder.recipe)
    texts = differences(_identity(so_far), _identity(recipe))
    changes = {text.partition(" ")[0]: text for text in texts}
    accepted = STEERED_KEYS if recipe.run.accept_changes else frozenset()
    if changes.keys() <= STEERED_KEYS:
        _check_past(recipe, so_far, folder)
    if changes.keys() - accepted:
        raise _another_run(recipe, changes, so_far.optimizer.decay_steps)
    saved = list_iterations(folder.checkpoints)
    if recipe.run.resume == "never" and saved:
        raise ConfigError(
            "run.resume",
            "never",
            f"run.path={recipe.run.path} holds this run at step {max(saved)}",
            "Set run.resume to auto to continue it, or choose another run.path.",
        )
    if latest_complete(folder.checkpoints, warn=False) is None and recipe.run.resume == "must":
        raise ConfigError("run.resume", "must", f"{folder.checkpoints} holds no checkpoint", "Set run.resume to auto.")
    return folder, changes


def _check_past(recipe: Recipe, so_far: Recipe, folder: RunFolder) -> None:
    """Refuse batch sizes by which the steps that are over would have read other samples: where the run is in the data
    follows from them."""
    there, here = so_far.train.batch_sizes, recipe.train.batch_sizes
    if there == here:
        return
    done = folder.steps_done()
    if there.until(done) == here.until(done):
        return
    wanted = there.joined(done, here)
    name = "global_batch_size" if recipe.train.batch_size_schedule is None else "batch_size_schedule"
    flag = "" if recipe.run.accept_changes else " run.accept_changes=true"
    sizes = f"train.batch_size_schedule='{wanted}' train.global_batch_size={wanted.last}{flag}"
    remedy = f"Set {sizes} to go on with other sizes"
    if recipe.run.deepspeed is not None:  # whose engine follows no schedule
        remedy = f"Set it to {there.last}, also by what {recipe.run.deepspeed} says of batches"
    raise ConfigError(
        f"train.{name}",
        getattr(recipe.train, name),
        f"the run in run.path={recipe.run.path} is at step {done}, and its steps took {BatchSizes(there.until(done))} "
        "([first step, sequences]): that cannot change any more",
        f"{remedy}, or choose another run.path (with run.load to start from that run's weights).",
    )


def _another_run(recipe: Recipe, changes: dict[str, str], decay_steps: int | None) -> ConfigError:
    restore = "restore these values"
    if "optimizer.decay_steps" in changes and decay_steps is not None:  # null is train.steps, which may change
        restore += f": set optimizer.decay_steps={decay_steps} to train longer on its schedule"
    remedy = f"Choose another run.path (with run.load to start from that run's weights), or {restore}."
    if changes.keys() <= STEERED_KEYS:
        remedy += " Or set run.accept_changes=true to go on with the new ones."
    elif recipe.run.accept_changes:
        remedy += f" run.accept_changes is for {', '.join(sorted(STEERED_KEYS))}."
    return ConfigError("run.path", recipe.run.path, f"it holds another run ({'; '.join(changes.values())})", remedy)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes a run this run: the recipe without :data:`FREE_KEYS`. Equal batch sizes are one schedule, however they
    are written."""
    tree = recipe.model_dump(mode="json")
    sizes = recipe.train.batch_sizes.merged
    tree["train"]["batch_size_schedule"] = None if len(sizes) == 1 else [list(entry) for entry in sizes]
    kept: dict[str, Any] = {}
    for section, values in tree.items():
        if section not in FREE_KEYS:
            kept[section] = {key: value for key, value in values.items() if f"{section}.{key}" not in FREE_KEYS}
    return kept


def unused_file(folder: Path, name: str, suffix: str) -> Path:
    """A file that no earlier attempt has written."""
    path, number = folder / f"{name}{suffix}", 1
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}{suffix}"
    return path


def without_nan(value: Any) -> Any:
    """NaN and infinity have no place in JSON: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return value
