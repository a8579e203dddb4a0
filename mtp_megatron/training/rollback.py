"""``mtp-megatron rollback``: let a run go on from an older checkpoint than its newest. Imports neither torch nor
megatron."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.training import checkpoint_files as files
from mtp_megatron.training.run_folder import RunFolder
from mtp_megatron.training.run_lock import take_lock

SUMMARY = "let a run go on from an older checkpoint, with its optimizer's state"

_EPILOG = """\
example, for a run that diverged some time after step 19000:
  mtp-megatron rollback runs/7b 19000
  mtp-megatron train recipe.yaml run.path=runs/7b 'train.skip_steps=[[19500, 19700]]'

Newer checkpoints and a copy of metrics.jsonl go to RUN/rolled_back/TIME; nothing is deleted. The command that trained
the run then continues from STEP: weights, optimizer, schedule, generators and position in the data are those of that
checkpoint, so without a change it trains the same steps again. What may change:
  train.skip_steps='[[FIRST, LAST]]'            passes over the data of these steps
  run.accept_changes=true optimizer.lr=LOWER    another learning rate, warm-up, decay, clipping, weights of the heads,
                                                batch sizes from here on or other data
run.load=CHECKPOINT starts another run from a checkpoint's weights alone, moved ones included.
"""


@dataclass(frozen=True)
class Rollback:
    """What a rollback did.

    Attributes:
        checkpoint: the one that the run goes on from.
        target: where newer ones lie now; None where there was none.
        moved: names of what was moved there, the newest checkpoint first.
    """

    checkpoint: Path
    target: Path | None
    moved: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run (run.path); no job may write to it")
    parser.add_argument("step", type=int, metavar="STEP", help="step of the checkpoint to go on from")


def run(args: argparse.Namespace) -> int:
    """Roll a run back and say what was moved; returns 0."""
    done = roll_back(args.run, args.step)
    if done.target is None:
        print(f"{done.checkpoint.name} is the newest checkpoint of {args.run}: nothing was moved.")
    else:
        print(f"moved to {done.target}: {', '.join(done.moved)}, with a copy of the metrics.")
    print(
        f"The same command continues from step {args.step}, with the optimizer as it was there, on the same data.\n"
        "To pass over the data of some steps: train.skip_steps='[[FIRST, LAST]]'. "
        "To go on with a lower learning rate: optimizer.lr=LOWER run.accept_changes=true."
    )
    return 0


def roll_back(run: Path, step: int) -> Rollback:
    """Make the checkpoint of ``step`` the newest one of a run; what is newer is moved away. May be repeated.

    Raises:
        ConfigError: no run, or a job is writing to it.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = RunFolder(run)
    if not folder.checkpoints.is_dir():
        raise ConfigError("RUN", str(run), "there is no run with checkpoints in it", "Give the run.path of a training.")
    with take_lock(folder, token=""):
        saved = files.list_iterations(folder.checkpoints)
        if step not in saved:
            there = ", ".join(map(str, saved)) or "none"
            raise CheckpointError(
                f"{folder.checkpoints}: no checkpoint of step {step}. There are {there}; name one of them."
            )
        problem = files.problem_of(saved[step])
        if problem:
            raise CheckpointError(f"{saved[step]}: {problem}. Name another checkpoint of the run.")
        newer = [path for number, path in reversed(saved.items()) if number > step]
        target = _move(folder, newer) if newer else None
        # Last, and also where nothing was newer: a rollback that a crash ended is completed by the same command.
        files.write_atomically(folder.checkpoints / files.TRACKER, str(step))
        if (folder.checkpoints / files.DEEPSPEED_LATEST).exists():
            files.write_atomically(folder.checkpoints / files.DEEPSPEED_LATEST, saved[step].name)
    return Rollback(saved[step], target, tuple(path.name for path in newer))


def _move(folder: RunFolder, newer: list[Path]) -> Path:
    """Move checkpoints, the newest first: wherever this ends, those left are the run's up to some step."""
    target = folder.path / "rolled_back" / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
    target.mkdir(parents=True)
    if folder.metrics.is_file():  # the next start drops later steps from it
        shutil.copy2(folder.metrics, target)
    for path in newer:
        shutil.move(path, target / path.name)
    return target
