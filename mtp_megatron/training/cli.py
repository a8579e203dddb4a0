"""``mtp-megatron train``: check a recipe, then train it in this process or in one process per rank."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mtp_megatron.errors import ConfigError, MTPError
from mtp_megatron.training.recipe_io import describe_fields, dump_recipe, load_recipe

SUMMARY = "train a recipe, or resume it where it stopped"
EXIT_FAILED = 1

_EPILOG = """\
examples:
  mtp-megatron train recipe.yaml
  mtp-megatron train recipe.yaml heads.n=8 data.path=data/bytes run.path=runs/bytes8
  torchrun --nproc-per-node 8 -m mtp_megatron.train recipe.yaml          (the same, ranks started by torchrun)

SIGTERM, SIGUSR1 or Ctrl-C lets the step finish, saves and exits with status 0; the same command continues from there.
Before the first step there is nothing to save: it exits at once, also while the index of samples is written.
A run that diverged: 'mtp-megatron rollback --help', train.skip_steps, run.accept_changes. One that hangs:
'mtp-megatron stacks --help'. One that is slow: train.profile_steps.

keys of a recipe (section.key  type  default  meaning):
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (_EPILOG + describe_fields()).replace("%", "%%")
    parser.add_argument("recipe", nargs="?", help="YAML file with the sections below")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start here (default: the fewest that the layout takes)"
    )
    parser.add_argument("--print-recipe", action="store_true", help="print the whole recipe and exit")
    parser.add_argument("--describe", action="store_true", help="print every key with type, default, meaning and exit")


def run(args: argparse.Namespace) -> int:
    """Train; returns 0 when the run finished or was asked to stop, 1 when a rank failed."""
    if args.describe:
        print(describe_fields())
        return 0
    if args.recipe is None:
        raise ConfigError("recipe", None, "no recipe was given", "Give a YAML file: mtp-megatron train RECIPE.")
    recipe = load_recipe(args.recipe, args.overrides)
    if args.print_recipe:
        print(dump_recipe(recipe.resolved()), end="")
        return 0
    if "RANK" in os.environ:  # under torchrun already
        from mtp_megatron.train import run_rank

        return run_rank(recipe)
    if args.nproc is not None and args.nproc < 1:
        raise ConfigError("--nproc", args.nproc, "must be 1 or more", "Leave it out for the fewest that will do.")
    processes = args.nproc or recipe.smallest_world
    # Checked here once, so that a mistake is reported once and before any rank is started.
    from mtp_megatron.training.preflight import check_launcher, preflight

    check_launcher()
    folder = preflight(recipe, processes).folder
    if processes == 1:
        from mtp_megatron.train import run_rank

        return run_rank(recipe)
    from mtp_megatron.training.launch import launch

    status = launch([args.recipe, *args.overrides], processes)
    if status:
        hint = _continue_hint(folder.checkpoints)
        print(f"error: training failed, see above (exit status {status} of torchrun). {hint}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _continue_hint(checkpoints: Path) -> str:
    from mtp_megatron.training.checkpoint_files import latest_complete

    try:
        latest = latest_complete(checkpoints, warn=False)
    except MTPError as error:
        return str(error)
    return f"The same command continues from {latest}." if latest else "No checkpoint was saved yet."
