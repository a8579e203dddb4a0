"""One rank of a training job: ``torchrun --nproc-per-node N -m mtp_megatron.train RECIPE [section.key=value ...]``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from mtp_megatron.errors import ConfigError, MTPError, paths_explained
from mtp_megatron.imports import imports_that_stay
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe

EXIT_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Train one rank; returns 0, or 2 after an error that the package explains."""
    parser = argparse.ArgumentParser(prog="python -m mtp_megatron.train", description=__doc__)
    parser.add_argument("recipe", help="YAML recipe; 'mtp-megatron train --describe' lists its keys")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher; LOCAL_RANK says it too
    args = parser.parse_args(argv)
    try:
        with paths_explained():
            recipe = load_recipe(args.recipe, args.overrides)
        return run_rank(recipe)
    except MTPError as error:
        _report(error)
        return EXIT_ERROR


def run_rank(recipe: Recipe) -> int:
    """Train ``recipe`` as the rank that the environment names; returns 0 when done or asked to stop."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # Both warn, on every rank, about how they use each other; nothing in it is the user's to change.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    # Megatron's tensor parallel layers need one queue per GPU to overlap in the order of their launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with imports_that_stay():
        from mtp_megatron.training.loop import train

    train(recipe)
    return 0


def _report(error: MTPError) -> None:
    """Once per node where all its ranks meet the same error, else from every rank that does."""
    from mtp_megatron.compat.versions import UnusableGPUs
    from mtp_megatron.training.agreement import JobError
    from mtp_megatron.training.step import TrainingDiverged

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # In one write each, line end included: the ranks share a log, and print() would write the line end by itself.
    if local_rank == 0:
        sys.stderr.write(f"error: {error}\n")
    elif not isinstance(error, ConfigError | JobError | TrainingDiverged | UnusableGPUs):
        sys.stderr.write(f"[rank {os.environ.get('RANK')}] error: {error}\n")
    sys.stderr.flush()


def end(rank: Callable[[], int]) -> NoReturn:
    """Run a rank and end its process with what it returns, or with 1 after an exception that nobody explains."""
    try:
        status = rank()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:  # noqa: BLE001 - printed as the interpreter would, before it may be too late; among
        # them torch's CheckpointException, which is no Exception
        traceback.print_exc()
        status = 1
    if status and "torch.distributed" in sys.modules:
        from mtp_megatron.training.world import waits_for_others

        if waits_for_others():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    end(main)
