"""``mtp-megatron plan``: what a job will take, before it starts."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

from mtp_megatron.data.manifest import MANIFEST_FILE, load_manifest
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe
from mtp_megatron.training.validate import check_recipe

SUMMARY = "Say what a training job will take before it starts. Needs no GPU and no data."

_EPILOG = """\
  mtp-megatron plan examples/recipes/paper_13b.yaml --trace 7 --gpus 32
  mtp-megatron plan recipe.yaml heads.n=8 parallel.pipeline=4 --trace 3 --json

--trace builds one rank of the job with the code that trains and takes a training step, on tensors that have shapes and
no memory. docs/planning.md says what the figure holds and what it does not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("recipe", help="YAML recipe; 'mtp-megatron train --describe' lists its keys")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--trace", type=int, required=True, metavar="RANK", help="the rank whose memory is wanted")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="ranks of the job (default: the fewest that the layout takes)"
    )
    parser.add_argument(
        "--kernels",
        choices=("own", "fused"),
        help="attention, norms and SwiGLU: megatron-core's own, as on a CPU, or a GPU's fused ones (default: fused "
        "where train.transformer_engine is set)",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many of the largest tensors to show")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for one: a plan is the same on every machine
    recipe = checked(load_recipe(args.recipe, args.overrides), args.gpus)
    world_size = args.gpus or recipe.smallest_world
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from mtp_megatron.planning import trace_report
    from mtp_megatron.planning.trace import trace_rank

    fused = None if args.kernels is None else args.kernels == "fused"
    trace = trace_rank(recipe, args.trace, world_size, fused_kernels=fused)
    if args.json:
        print(json.dumps(trace_report.as_json(trace, args.top), indent=2))
    else:
        print(trace_report.table(trace, args.top))
    return 0


def checked(recipe: Recipe, gpus: int | None) -> Recipe:
    """The recipe resolved and checked as before a training, with the data set's vocabulary where it names none.

    Raises:
        ConfigError: a setting that cannot work, or no vocabulary.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError("--gpus", gpus, "a job has at least one rank", "Give a positive number.")
    vocab_size = recipe.model.vocab_size
    if vocab_size is None:
        if not (Path(recipe.data.path) / MANIFEST_FILE).is_file():
            raise ConfigError(
                "model.vocab_size",
                None,
                f"a plan needs it, and data.path={recipe.data.path} holds no data set that says it",
                "Give model.vocab_size=32000, for example, or preprocess the data first.",
            )
        vocab_size = load_manifest(recipe.data.path).vocab_size
    return check_recipe(recipe, world_size=gpus or recipe.smallest_world, tokenizer_vocab_size=vocab_size)
