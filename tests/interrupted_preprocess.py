"""A preprocess that is killed at one place after another until it is done: ``python -m tests.interrupted_preprocess
FILE``, where FILE has the options as JSON, the most events before a kill, a seed, and prints how often it was killed.

Events are what a record is made of (fsync, rename, removal, cut) and each document written. The process kills itself
(SIGKILL) right before or right after one of them, the number of which is drawn: no cleaning up, and buffers are lost.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtp_megatron.data import journal
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.data.writer import SplitWriter, optimal_dtype

EVENTS = [
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (journal, "open_at"),
    (journal.Pace, "tick"),
    (SplitWriter, "add"),
    (SplitWriter, "finish"),
]


def counted(real: Callable[..., Any], before_each: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before_each()
        result = real(*args, **kwargs)
        before_each()
        return result

    return call


def until_killed(options: PreprocessOptions, events: int) -> None:
    left = events

    def one_less() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: None  # what a killed process wrote, the system has
    for owner, name in EVENTS:
        setattr(owner, name, counted(getattr(owner, name), one_less))
    preprocess(options)


def main(file: str) -> None:
    setting = json.loads(Path(file).read_text())
    options = setting["options"]
    options["output"] = Path(options["output"])
    options["paths"] = tuple(map(Path, options["paths"]))
    draw = random.Random(setting["seed"])
    journal.EVERY = journal._SHARE = 0
    optimal_dtype(257)  # imports megatron-core once for all the processes
    importlib.import_module("pyarrow.parquet")
    for kills in range(1000):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                until_killed(PreprocessOptions(**options), draw.randint(0, setting["most_events"]))
                status = 0
            finally:
                os._exit(status)
        draw.random()
        _, status = os.waitpid(child, 0)
        if status == 0:
            print(kills)
            return
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"after {kills} kills: status {status}")
    sys.exit("killed 1000 times, and not done")


if __name__ == "__main__":
    main(sys.argv[1])
