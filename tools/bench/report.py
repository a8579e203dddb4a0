"""A benchmark's result: what was run where, a table, the limits that must hold; printed and written as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mtp_megatron import __version__

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Column:
    """One column: ``key`` in the rows, ``title``, and the format of its numbers."""

    key: str
    title: str
    format: str = ""

    def text(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value, self.format)


@dataclass(frozen=True)
class Limit:
    """``value`` must not exceed ``bound``."""

    what: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'BROKEN'}: {self.what} = {self.value:.3f} (at most {self.bound:g})"


@dataclass
class Result:
    """Everything that one benchmark has to say."""

    title: str
    setting: dict[str, Any]
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    header: dict[str, str] = field(default_factory=lambda: header())

    def table(self) -> str:
        """The rows as a Markdown table, padded so that it reads well in a terminal too."""
        cells = [[column.title for column in self.columns]]
        cells += [[column.text(row) for column in self.columns] for row in self.rows]
        widths = [max(3, *(len(line[place]) for line in cells)) for place in range(len(self.columns))]
        numeric = [
            all(isinstance(row.get(column.key), int | float | None) for row in self.rows) for column in self.columns
        ]
        rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
        lines = [cells[0], rule, *cells[1:]]
        padded = [
            [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(*row, strict=True)]
            for row in ((line, widths, numeric) for line in lines)
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)

    def __str__(self) -> str:
        head = [f"# {self.title}", "", *(f"{key}: {value}" for key, value in self.header.items())]
        setting = ", ".join(f"{key} {value}" for key, value in self.setting.items())
        parts = ["\n".join([*head, f"setting: {setting}"]), self.table()]
        if self.notes:
            parts.append("\n".join(self.notes))
        if self.limits:
            parts.append("\n".join(str(limit) for limit in self.limits))
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "header": self.header,
            "setting": self.setting,
            "rows": self.rows,
            "limits": [{**asdict(limit), "holds": limit.holds} for limit in self.limits],
            "notes": self.notes,
        }

    def finish(self, args: argparse.Namespace) -> int:
        """Print the table, then the JSON where ``--json`` says; the exit status is 1 if a limit is broken."""
        print(self)
        text = json.dumps(self.as_dict(), indent=2)
        if args.json == "-":
            print(f"\n{text}")
        elif args.json:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        return 0 if all(limit.holds for limit in self.limits) else 1


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, proves no limit")
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help="also as JSON: to PATH, or printed")
    parser.add_argument("--threads", type=int, help="threads of each process (default: PyTorch's choice)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of parameters and activations")


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]


def header() -> dict[str, str]:
    """Command, versions, device, threads, load and date of this run."""
    versions = {"mtp-megatron": __version__, **{name: metadata.version(name) for name in ("megatron-core", "torch")}}
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", Python {platform.python_version()}, commit {_commit()}",
        "device": _device(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU, {model}, {os.cpu_count()} cores"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        return "unknown"
