"""``mtp-megatron stacks``: ask the ranks of a run on this host where they are, and say which ranks are where."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from mtp_megatron.errors import ConfigError
from mtp_megatron.ranks import ranges
from mtp_megatron.reporting.stacks import headers, read_report, text_of
from mtp_megatron.signals import STACKS_SIGNAL
from mtp_megatron.stack_files import FOLDER, Header

SUMMARY = (
    "Say what the ranks of a run are doing, without stopping them: each rank on this host is asked to write the stacks "
    "of its threads into RUN/stacks, and ranks with equal stacks are put together, the smallest group first."
)
_PATIENCE, _QUIET = 10.0, 0.5  # seconds for ranks to write; without a change for the latter they have

_EPILOG = """\
examples:
  mtp-megatron stacks runs/7b                       of a run on this host, or whose other hosts have written theirs
  srun --overlap --ntasks-per-node 1 mtp-megatron stacks runs/7b    ask on every node of the SLURM job whose shell it is
  mtp-megatron stacks runs/7b --read                ask nobody: what a job wrote before it ended

A rank writes its stacks by itself, too, when a step, a save or an evaluation is not over after 0.9 of
train.timeout_minutes. They are kept through restarts; the newest attempt that wrote any is shown.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--read", action="store_true", help="ask no rank, only read what is there")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 where there is nothing to report."""
    run: Path = args.run
    if not run.is_dir():
        raise ConfigError("RUN", str(run), "there is no such folder", "Give the folder of a run (run.path).")
    if not args.read:
        here = [(file, header) for file, header in headers(run) if _writes(header, file)]
        asked = _ask(here)
        _wait(asked)
        print(f"asked {len(asked)} ranks on {platform.node()}" if here else f"no rank of it runs on {platform.node()}")
        if others := [header.rank for _, header in here if not header.asked]:
            print(f"not asked, as SIGUSR2 has another handler there: ranks {ranges(others)}")
    report = read_report(run)
    if report is None:
        print(f"no rank has written its stacks to {run / FOLDER}", file=sys.stderr)
        return 1
    print(text_of(report))
    return 0


def _ask(here: list[tuple[Path, Header]]) -> list[tuple[Path, int]]:
    """Send the signal to those who would write: files, and their sizes before."""
    asked = []
    for file, header in here:
        if not header.asked:
            continue
        try:
            size = file.stat().st_size
            os.kill(header.process, STACKS_SIGNAL)
        except OSError:  # it has just ended, or is another user's
            continue
        asked.append((file, size))
    return asked


def _writes(header: Header, file: Path) -> bool:
    """Whether that process is on this host and has the file open: a number is given again to other processes, which may
    die of a signal."""
    if header.host != platform.node():
        return False
    try:
        for descriptor in Path(f"/proc/{header.process}/fd").iterdir():
            try:
                # By name first: the rank may hang in a file system that would have this process wait, too.
                if descriptor.readlink().name == file.name and descriptor.samefile(file):
                    return True
            except OSError:  # closed meanwhile
                continue
    except OSError:
        return False
    return False


def _wait(asked: list[tuple[Path, int]]) -> None:
    """Until all files have grown, and grow no more."""
    until, quiet = time.monotonic() + _PATIENCE, time.monotonic()
    before: list[int] = []
    while asked and time.monotonic() < until:
        try:
            sizes = [file.stat().st_size for file, _ in asked]
        except FileNotFoundError:  # a run that ends takes files without stacks away
            return
        if sizes != before:
            before, quiet = sizes, time.monotonic()
        grown = all(now > then for now, (_, then) in zip(sizes, asked, strict=True))
        if grown and time.monotonic() - quiet > _QUIET:
            return
        time.sleep(0.05)
