"""``mtp-megatron report``: summarise a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mtp_megatron.errors import ConfigError
from mtp_megatron.reporting.figure import save_figure
from mtp_megatron.reporting.metrics import SPECULATIVE_FILE, read_metrics, read_speculative
from mtp_megatron.reporting.summary import summarise, table

SUMMARY = (
    "Summarise a run: print validation loss and accuracy of every head and what speculative decoding gains, and write "
    "report.json and report.png."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUN)")
    parser.add_argument(
        "--speculative",
        type=Path,
        metavar="FILE",
        help=f"table written by `mtp-megatron generate --json` (default: RUN/{SPECULATIVE_FILE}, where it exists)",
    )


def run(args: argparse.Namespace) -> int:
    metrics = read_metrics(args.run)
    if args.speculative and not args.speculative.is_file():
        problem = "there is no such file"
        raise ConfigError("--speculative", str(args.speculative), problem, "Give what `generate --json` wrote.")
    speculative = read_speculative(args.speculative or args.run / SPECULATIVE_FILE)
    output: Path = args.output or args.run
    report = summarise(args.run, metrics, speculative)
    training = report["training"]
    title = f"{args.run.resolve().name}: {metrics.num_heads} heads, {training['steps']} steps"
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        save_figure(output / "report.png", metrics, speculative, title)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigError("--output", str(output), problem, "Choose a folder that can be.") from error
    print(table(report))
    print(f"\nwritten: {output / 'report.json'}, {output / 'report.png'}")
    return 0
