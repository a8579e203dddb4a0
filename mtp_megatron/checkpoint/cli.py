"""``mtp-megatron convert``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mtp_megatron.checkpoint.layouts import SOURCES, TARGETS

SUMMARY = "convert a model between Megatron, DeepSpeed, Hugging Face and Meta's layout, or bundle it for serving"
_LAYOUTS = {"hf": "a Hugging Face folder", "meta": "Meta's layout", "megatron": "a Megatron checkpoint"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="; ".join(SOURCES.values()),
    )
    parser.add_argument(
        "--from",
        dest="kind",
        choices=("auto", *SOURCES),
        default="auto",
        help="layout of SRC (default: auto, told by its files)",
    )
    parser.add_argument(
        "--to",
        choices=tuple(TARGETS),
        default="hf",
        help="; ".join(f"{name}: {what}" for name, what in TARGETS.items()) + " (default: %(default)s)",
    )
    parser.add_argument("--heads", type=int, metavar="N", help="heads of the result (default: as many as SRC has)")
    parser.add_argument(
        "--new-heads",
        choices=("copy", "fresh"),
        default="fresh",
        help="heads that SRC lacks: copies of head 1, the last layer, or random (default: fresh)",
    )
    parser.add_argument(
        "--model",
        metavar="RECIPE",
        help="recipe whose section `model` describes a plain GPT checkpoint that holds no arguments of Megatron-LM",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to make; must not exist, unless it is empty"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="type of the tensors written (default: as they are stored)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="begin a new safetensors file at this size, for example 500MB (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Convert and say what was made."""
    if args.to == "bundle":
        return _bundle(args)
    from mtp_megatron.checkpoint.convert import convert

    result = convert(args.source, args.output, to=args.to, **_common(args))
    if not result.fresh:
        print(f"{result.output} holds {result.source.name} (step {result.step}) already: nothing to do")
        return 0
    for notice in result.notices:
        print(f"note: {notice}", file=sys.stderr)
    further = f" and heads 2 to {result.num_heads}" if result.num_heads > 1 else ", no further heads"
    print(
        f"{result.source.name} (step {result.step}) -> {result.output}: {_LAYOUTS[args.to]}, trunk and head 1"
        f"{further}, {result.total_bytes / 1e6:.1f} MB"
    )
    return 0


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": args.kind,
        "heads": args.heads,
        "new_heads": args.new_heads,
        "model_recipe": args.model,
        "dtype": args.dtype,
        "max_shard_bytes": args.max_shard_size,
        "progress": not args.quiet,
    }


def _bundle(args: argparse.Namespace) -> int:
    from mtp_megatron.serving.bundle import write_bundle

    bundle = write_bundle(args.source, args.output, **_common(args))
    for notice in bundle.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(
        f"{args.source} -> {bundle.output}: a Hugging Face folder with drafts in {', '.join(bundle.drafts)}; "
        f"{bundle.total_bytes / 1e6:.1f} MB. Serve it with `mtp-megatron serve {bundle.output}`, check it with "
        f"`mtp-megatron verify {bundle.output}`"
    )
    return 0


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB`` or a plain number.

    Raises:
        argparse.ArgumentTypeError: not a size, or not positive.
    """
    number, factor = text.strip().upper(), 1
    for unit, bytes_per_unit in _UNITS.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), bytes_per_unit
            break
    try:
        size = int(float(number) * factor)
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Write it like 500MB or 5GB.")
    return size
