"""Every check that can be made before a process group exists or anything is allocated. Imports neither torch nor
megatron, unless the recipe asks for FP8 or memory snapshots: then torch, to look at the device, and for FP8 Transformer
Engine on a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_megatron.data import blend
from mtp_megatron.data.blend import Blend
from mtp_megatron.data.huggingface import NO_FILES, HuggingFaceTokenizer
from mtp_megatron.data.manifest import Manifest
from mtp_megatron.data.tokenizer_store import stored_tokenizer
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.training.architecture import check_architecture
from mtp_megatron.training.checkpoint_files import find_checkpoint, latest_complete, read_mtp_config
from mtp_megatron.training.divergence import refuse_repetition
from mtp_megatron.training.low_precision import check_machine
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_folder import RunFolder, check_run_folder
from mtp_megatron.training.validate import check_recipe, data_parallel_size


@dataclass(frozen=True)
class Plan:
    """A job that passed every check.

    Attributes:
        recipe: resolved: every derived value is filled in.
        data: one data set, or several blended.
        folder: where the run lives.
        initial: checkpoint folder that gives the initial weights of a new run; None: draw them.
        world_size: ranks of the job.
        changes: what ``run.accept_changes`` has let differ from the run so far, in words.
    """

    recipe: Recipe
    data: Blend
    folder: RunFolder
    initial: Path | None
    world_size: int
    changes: tuple[str, ...] = ()


def preflight(recipe: Recipe, world_size: int, *, warn: bool = True) -> Plan:
    """Check recipe, data, run folder and named checkpoints against one another; changes nothing on disk.

    Args:
        warn: say which damaged checkpoints of ``run.load`` are passed over.

    Raises:
        ConfigError: a setting that cannot work, or a run folder that belongs to something else.
        DataError: a missing or damaged data set or tokenizer.
        CheckpointError: a checkpoint of another architecture, or only damaged ones.
    """
    data = blend.load_blend(recipe.data.parts)
    if recipe.data.cache is not None and Path(recipe.data.cache).is_file():
        raise ConfigError("data.cache", recipe.data.cache, "it is a file", "Choose a folder.")
    recipe = _merged(recipe, world_size)
    recipe = check_recipe(
        recipe, world_size=world_size, tokenizer_vocab_size=data.first.vocab_size, done=_steps_done(recipe)
    )
    _check_profile_ranks(recipe, world_size)
    check_machine(recipe)
    if recipe.train.memory_snapshot:
        from mtp_megatron.training.out_of_memory import check_memory_snapshot  # imports torch, which takes seconds

        check_memory_snapshot(recipe)
    folder, accepted = check_run_folder(recipe)
    changes = tuple(accepted.values())
    resumed = latest_complete(folder.checkpoints, warn=False)
    refuse_repetition(folder, recipe, resumed)
    if resumed is not None:
        check_architecture(resumed, recipe)
        _check_same_host(resumed, recipe)
        data, changed = _resumed_data(resumed, data, recipe)
        return Plan(recipe, data, folder, None, world_size, (*changes, *changed))
    initial = find_checkpoint(recipe.run.load, warn=warn) if recipe.run.load else None
    if initial is not None:
        check_architecture(initial, recipe, initial=True)
        changes += _other_tokenizer(initial, data.first, recipe)
    return Plan(recipe, data, folder, initial, world_size, changes)


def _other_tokenizer(checkpoint: Path, manifest: Manifest, recipe: Recipe) -> tuple[str, ...]:
    """In words, that the model whose weights are taken has another tokenizer than the data; nothing where it has not.

    A model from elsewhere may have come without one, as a plain GPT checkpoint does: it is not known then.

    Raises:
        ConfigError: it has, and ``run.accept_changes`` does not allow it.
    """
    description = read_mtp_config(checkpoint)
    entry, info = description.get("tokenizer"), manifest.tokenizer
    if entry is None or entry["sha256"] in (info.sha256, NO_FILES) or _same_ids(checkpoint, description, manifest):
        return ()
    difference = (
        f"its tokenizer ({info.kind}, sha256 {info.sha256[:12]}) is not that of the model in run.load="
        f"{recipe.run.load} ({entry['kind']}, sha256 {entry['sha256'][:12]}): the same ids mean other text"
    )
    if recipe.run.accept_changes:
        return (f"{recipe.data.setting}: {difference}",)
    raise ConfigError(
        *recipe.data.named,
        difference,
        f"Make the data with the model's own: mtp-megatron preprocess --tokenizer {checkpoint}. Or set "
        "run.accept_changes=true to train the model on other ids than it knows.",
    )


def _same_ids(checkpoint: Path, description: dict[str, Any], manifest: Manifest) -> bool:
    """Whether tokenizers with other files, at least one of Hugging Face's, give the same ids all the same."""
    entry = description["tokenizer"]
    if "huggingface" not in (entry["kind"], manifest.tokenizer.kind):
        return False
    theirs, ours = stored_tokenizer(checkpoint, entry, int(description["vocab_size"])), manifest.load_tokenizer()
    one, other = (theirs, ours) if isinstance(theirs, HuggingFaceTokenizer) else (ours, theirs)
    return isinstance(one, HuggingFaceTokenizer) and one.same_ids(other)


def check_launcher() -> None:
    """Refuse to be one of several tasks of srun that no launcher has told apart: each would be a whole job of its own.

    srun sets SLURM_STEP_NUM_TASKS for its tasks, sbatch's script has none. The shell of an interactive job inherits it,
    together with SLURM_PTY_PORT: there only task 0 has the terminal, and may start what it likes.

    Raises:
        ConfigError: with the way to start the ranks.
    """
    tasks, task = os.environ.get("SLURM_STEP_NUM_TASKS", ""), os.environ.get("SLURM_PROCID")
    if "RANK" in os.environ or task is None or not tasks.isdigit() or int(tasks) < 2:
        return
    if task == "0" and "SLURM_PTY_PORT" in os.environ:
        return
    raise ConfigError(
        "SLURM_STEP_NUM_TASKS",
        int(tasks),
        f"srun has started {tasks} tasks and no launcher has set RANK: each of them would train the whole job alone",
        "Start one torchrun on each node (examples/torchrun/slurm.sbatch does), or a single task: srun --ntasks=1. "
        "Where each task shall be a job of its own: env -u SLURM_STEP_NUM_TASKS mtp-megatron train ...",
    )


def _check_profile_ranks(recipe: Recipe, world_size: int) -> None:
    """Refuse ranks that this job has not. Not in :func:`.check_recipe`: a plan may be of another number of GPUs."""
    ranks = recipe.train.profile_ranks
    if recipe.train.profile_steps is None:
        return
    if not ranks or len(set(ranks)) < len(ranks) or not all(0 <= rank < world_size for rank in ranks):
        raise ConfigError(
            "train.profile_ranks",
            ranks,
            f"not different ranks of 0 to {world_size - 1}",
            "Give those that shall record train.profile_steps, for example [0].",
        )


def _merged(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe together with the DeepSpeed configuration that it names."""
    if recipe.run.deepspeed is None:
        return recipe
    from mtp_megatron.compat.packages import require_deepspeed
    from mtp_megatron.deepspeed.settings import merged_recipe, read_config

    require_deepspeed()
    return merged_recipe(recipe, read_config(recipe.run.deepspeed), data_parallel_size(recipe, world_size))


def _steps_done(recipe: Recipe) -> int:
    """Of the run that is resumed, where it matters: batches of these steps may be too small for more ranks."""
    if recipe.train.batch_size_schedule is None:
        return 0
    return RunFolder(Path(recipe.run.path)).steps_done()


def _check_same_host(checkpoint: Path, recipe: Recipe) -> None:
    by_deepspeed = "engine" in read_mtp_config(checkpoint)
    if by_deepspeed == (recipe.run.deepspeed is not None):
        return
    saved = "a DeepSpeed engine" if by_deepspeed else "megatron-core's own loop"
    raise CheckpointError(
        f"{checkpoint}: saved by {saved}, and run.deepspeed={recipe.run.deepspeed!r} asks for the other. "
        f"{'Give the DeepSpeed configuration' if by_deepspeed else 'Leave run.deepspeed out'} to resume, or start "
        "another run (a new run.path) from these weights with run.load."
    )


def _resumed_data(checkpoint: Path, data: Blend, recipe: Recipe) -> tuple[Blend, list[str]]:
    """The data as the run goes on with it, and what ``run.accept_changes`` has let differ from what it was.

    Every folder goes on where it was, so no sample comes again before its folder's next pass.

    Raises:
        ConfigError: it differs, and that is not accepted; or its ids are another tokenizer's, which cannot be.
        CheckpointError: it was saved elsewhere in the data than the recipe's batch sizes say.
    """
    saved = read_mtp_config(checkpoint)
    step = saved.get("step", 0)
    samples = recipe.train.batch_sizes.samples(step)
    if "data" not in saved:  # of a release that had no blends: one folder from the start
        folder = {
            "folder": "the former folder",
            "fingerprint": saved.get("data_fingerprint"),
            "weight": 1.0,
            "before": 0,
        }
        saved["data"] = {"since": 0, "folders": [{**folder, "samples": samples}], "left": []}
    used = sum(folder["samples"] for folder in (*saved["data"]["folders"], *saved["data"]["left"]))
    if used != samples:  # the run's recipe.yaml was edited, or comes from another run
        raise CheckpointError(
            f"{checkpoint}: saved when {used} sequences were used, and by train.batch_size_schedule and "
            f"train.global_batch_size the {step} steps until then took {samples}. Set them to what these steps took."
        )
    data, changes = blend.resumed(saved["data"], data)
    if not changes:
        return data, []
    entry = saved.get("tokenizer") or {}
    same_ids = entry.get("sha256") == data.first.tokenizer.sha256 or (
        bool(entry) and _same_ids(checkpoint, saved, data.first)
    )
    if same_ids and entry["eod"] != data.eod:
        changes.append(f"documents ended with id {entry['eod']}, and end with {data.eod}")
    if recipe.run.accept_changes and same_ids:
        return data, [f"data: {text}" for text in changes]
    also = "" if same_ids else "; another tokenizer"
    go_on = " Or set run.accept_changes=true to go on with this data, each folder from where the run is in it."
    raise ConfigError(
        *recipe.data.named,
        f"not the data that the run in run.path={recipe.run.path} was trained on so far ({'; '.join(changes)}{also})",
        "Give that data as it was, with folders and weights in the same order, or choose another run.path (with "
        f"run.load to keep the weights).{go_on if same_ids else ''}",
    )
