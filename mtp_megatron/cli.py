"""The command line ``mtp-megatron``: a table of subcommands, each imported only when asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mtp_megatron import __version__
from mtp_megatron.errors import MTPError, paths_explained

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # as of SIGPIPE


class Subcommand(NamedTuple):
    """One row of the table: the module offers ``add_arguments(parser)`` and ``run(args) -> int``."""

    module: str
    summary: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "preprocess": Subcommand(
        "mtp_megatron.data.cli", "turn files and folders into a tokenizer and an indexed training set"
    ),
    "adopt": Subcommand(
        "mtp_megatron.data.adopt_cli",
        "make a data set of a .bin and .idx that Megatron-LM's preprocess_data.py wrote, without copying it",
    ),
    "train": Subcommand("mtp_megatron.training.cli", "train a recipe, or resume it where it stopped"),
    "rollback": Subcommand(
        "mtp_megatron.training.rollback", "let a run go on from an older checkpoint, with its optimizer's state"
    ),
    "stacks": Subcommand("mtp_megatron.reporting.stacks_cli", "say which ranks of a run are where, when it hangs"),
    "convert": Subcommand(
        "mtp_megatron.checkpoint.cli",
        "convert a model between Megatron, DeepSpeed, Hugging Face and Meta's layout, or bundle it for serving",
    ),
    "generate": Subcommand("mtp_megatron.serving.cli", "decode an export speculatively, beside plain greedy decoding"),
    "verify": Subcommand(
        "mtp_megatron.serving.verify_cli",
        "check a serving bundle: files, tensors, what torch and vLLM decode",
    ),
    "serve": Subcommand("mtp_megatron.serving.serve_cli", "serve a bundle with vLLM, its heads drafting"),
    "plan": Subcommand("mtp_megatron.planning.cli", "say what a job will take, before it starts"),
    "report": Subcommand("mtp_megatron.reporting.cli", "summarise a run as report.json and report.png"),
}

_HELP_FLAGS = ("-h", "--help")


def _top_level_parser() -> argparse.ArgumentParser:
    width = max(map(len, SUBCOMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {row.summary}" for name, row in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mtp-megatron",
        description="Multi-token prediction heads for Megatron.",
        epilog=f"commands:\n{listing}\n\n'mtp-megatron COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mtp-megatron {__version__}")
    parser.add_argument("command", choices=tuple(SUBCOMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` when None.

    Returns:
        The subcommand's status; 2 for an :class:`MTPError` (printed without a traceback), 130 after Ctrl-C, 141 where
        whoever read the output has ended, as ``| head`` does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the first word is the top level's: everything after it belongs to the subcommand, `--help` included.
    name = _top_level_parser().parse_args(arguments[:1] or list(_HELP_FLAGS[1:])).command
    try:
        module = importlib.import_module(SUBCOMMANDS[name].module)
        parser = argparse.ArgumentParser(prog=f"mtp-megatron {name}", description=module.SUMMARY)
        module.add_arguments(parser)
        with paths_explained():
            status = int(module.run(parser.parse_intermixed_args(arguments[1:])))
        if sys.stdout is not None:
            sys.stdout.flush()  # or the interpreter would find out at its end that nobody reads
        return status
    except MTPError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _stdout_is_unread():  # a pipe to a process of the command's own
            raise
        return EXIT_UNREAD


def _stdout_is_unread() -> bool:
    """Whether standard output is a pipe that has lost its reader; if so, nothing more goes there."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):  # it is closed, or no file
        return False
    state = select.poll()
    state.register(descriptor, 0)  # errors are always told
    if not state.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


if __name__ == "__main__":
    sys.exit(main())
