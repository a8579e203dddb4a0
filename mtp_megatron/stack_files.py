"""The files into which ranks write the stacks of their threads (``RUN/stacks/rank00012.txt``): names and headers.

Each attempt of a run adds a header to its ranks' files; what follows it are dumps of :mod:`faulthandler`, if any.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "stacks"
_HEADER = "attempt "


@dataclass(frozen=True)
class Header:
    """Which process wrote what follows.

    Attributes:
        attempt: when the job started, as its rank 0 saw it; the same on all of its ranks. Sorts by time.
        rank, size: of the job.
        host, process: where it ran.
        main: its main thread as dumps name it. It is the oldest one, the last of a dump.
        asked: whether it writes at SIGUSR2. Else the signal is someone else's there, and may mean anything.
    """

    attempt: str
    rank: int
    size: int
    host: str
    process: int
    main: str
    asked: bool = True

    def line(self) -> str:
        return f"{_HEADER}{json.dumps(asdict(self))}\n"


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.txt"


def thread_name(identifier: int) -> str:
    """A thread as :mod:`faulthandler` names it: the digits of a C ``unsigned long``."""
    return f"0x{identifier:016x}"


def read_header(line: str) -> Header | None:
    """The header in ``line``; None where it is none."""
    if not line.startswith(_HEADER):
        return None
    try:
        return Header(**json.loads(line.removeprefix(_HEADER)))
    except (ValueError, TypeError):  # cut short by a full disk
        return None
