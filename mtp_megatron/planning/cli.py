"""``mtp-megatron plan``: what a job will take, before it starts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import warnings
from pathlib import Path

from mtp_megatron.data.blend import load_blend
from mtp_megatron.data.manifest import MANIFEST_FILE
from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.estimate import Estimate, Hardware
from mtp_megatron.planning.lines import changed, recipe_lines
from mtp_megatron.planning.presets import PRESETS, read_plan
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.validate import check_recipe

SUMMARY = "Say what a training job will take before it starts. Needs no GPU and no data."

_EPILOG = """\
  mtp-megatron plan 13B --gpus 32 --picture pipeline.svg
  mtp-megatron plan examples/recipes/paper_13b.yaml --gpus 32 --trace 7
  mtp-megatron plan path/to/config.json heads.n=8 parallel.tensor=4 --json
  mtp-megatron plan 70B --gpus 256 --search --recipe found.yaml

Without --trace, formulas say what every pipeline stage takes, and a simulator how long a step lasts; where a plan does
not fit, what is too big and the nearest change that fits. --search finds the fastest layout instead: tensor and
pipeline parallel size, virtual stages, layers and heads of each stage, recomputation; of these, settings given on the
command line stay as they are. --trace builds one rank of the job with the code that trains and takes a training step,
on tensors that have shapes and no memory.
docs/planning.md says what the figures hold and what they do not.
"""
_UNITS = {
    "tflops": "1e12 matrix operations per second of a GPU at its peak",
    "efficiency": "share of them that a layer reaches",
    "link": "GB/s between GPUs of a node",
    "network": "GB/s from a GPU to one of another node",
    "memory": "GB on a GPU",
    "reserve": "GB of them to leave for the CUDA context, NCCL, cuBLAS and fragmentation",
    "gpus_per_node": "GPUs of a node; also the largest tensor parallel size tried",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.replace("%", "%%")
    parser.add_argument("model", help=f"a size ({', '.join(PRESETS)}), a YAML recipe or a Hugging Face config.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (default: the fewest that the layout takes)")
    parser.add_argument("--search", action="store_true", help="find the fastest layout that fits, and print its recipe")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="write the planned or found recipe as YAML for mtp-megatron train"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, operations")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the pipeline: .png, .svg or .pdf")
    for field in dataclasses.fields(Hardware):
        meaning = f"{_UNITS[field.name]} (default: {field.default})"
        kind = type(field.default)
        parser.add_argument(_option(field.name), type=kind, default=field.default, metavar="X", help=meaning)
    parser.add_argument(
        "--trace", type=int, metavar="RANK", help="the memory of this rank, from the code that trains, instead"
    )
    parser.add_argument(
        "--kernels",
        choices=("own", "fused"),
        help="with --trace: attention, norms and SwiGLU are megatron-core's own, as on a CPU, or a GPU's fused ones "
        "(default: fused where train.transformer_engine is set)",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="with --trace: how many tensors to show")


def run(args: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for one: a plan is the same on every machine
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError("--gpus", args.gpus, "a job has at least one rank", "Give a positive number.")
    if args.search and args.trace is not None:
        raise ConfigError("--trace", args.trace, "a search costs layouts and traces none", "Leave --search out.")
    if args.search:
        return _search(args)
    recipe = checked(read_plan(args.model, args.overrides), args.gpus)
    world_size = args.gpus or recipe.smallest_world
    if args.trace is not None:
        return _trace(args, recipe, world_size)
    from mtp_megatron.planning import report
    from mtp_megatron.planning.advice import advise
    from mtp_megatron.planning.estimate import estimate

    hardware = _hardware(args)
    plan = estimate(recipe, world_size, hardware)
    advice = advise(recipe, world_size, hardware)
    _keep(args, recipe, plan)
    if args.json:
        print(json.dumps(report.as_json(recipe, world_size, hardware, plan, advice), indent=2))
    else:
        print(report.table(recipe, world_size, hardware, plan, advice))
    return 0


def _search(args: argparse.Namespace) -> int:
    from mtp_megatron.planning import search_report
    from mtp_megatron.planning.search import search

    recipe = read_plan(args.model, args.overrides)
    recipe = changed(recipe, {"model.vocab_size": vocabulary(recipe)})
    hardware, world_size = _hardware(args), args.gpus or recipe.smallest_world
    fixed = [override.partition("=")[0].strip() for override in args.overrides]
    found = search(recipe, world_size, hardware, fixed=fixed, progress=True)
    best = found.best[0]
    _keep(args, best.candidate.recipe, best.plan)
    if args.json:
        print(json.dumps(search_report.as_json(found, world_size, hardware), indent=2))
    else:
        print(search_report.table(found, world_size, hardware))
    return 0


def _hardware(args: argparse.Namespace) -> Hardware:
    figures = {field.name: getattr(args, field.name) for field in dataclasses.fields(Hardware)}
    for name, value in figures.items():
        if not value > 0 and not (name == "reserve" and value == 0):
            raise ConfigError(_option(name), value, "not a positive number", f"Give {_UNITS[name]}.")
    if figures["reserve"] >= figures["memory"]:
        raise ConfigError("--reserve", figures["reserve"], "leaves nothing of --memory", "Give less of it, or 0.")
    return Hardware(**figures)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _keep(args: argparse.Namespace, recipe: Recipe, plan: Estimate) -> None:
    """Write the files that were asked for."""
    from mtp_megatron.planning.picture import save_picture

    if args.picture is not None:
        save_picture(args.picture, plan.schedule, args.model, head_seconds=plan.head_seconds)
    if args.recipe is not None:
        args.recipe.write_text(recipe_lines(recipe), encoding="utf-8")


def _trace(args: argparse.Namespace, recipe: Recipe, world_size: int) -> int:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from mtp_megatron.planning import trace_report
    from mtp_megatron.planning.trace import trace_rank

    if args.picture is not None:
        raise ConfigError("--picture", str(args.picture), "a trace has no times to draw", "Leave --trace out.")
    if args.recipe is not None:
        args.recipe.write_text(recipe_lines(recipe), encoding="utf-8")
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
    world_size = gpus or recipe.smallest_world
    return check_recipe(recipe, world_size=world_size, tokenizer_vocab_size=vocabulary(recipe))


def vocabulary(recipe: Recipe) -> int:
    """Entries of the recipe's vocabulary, or of its data set's.

    Raises:
        ConfigError: neither says it.
    """
    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size
    absent = [folder for _, folder in recipe.data.parts if not (Path(folder) / MANIFEST_FILE).is_file()]
    if absent:
        raise ConfigError(
            "model.vocab_size",
            None,
            f"a plan needs it, and {absent[0]} ({recipe.data.setting}) holds no data set that says it",
            "Give model.vocab_size=32000, for example, or preprocess the data first.",
        )
    return load_blend(recipe.data.parts).first.vocab_size
