"""Waits until a training run has come a given part of its way; fails when the training ends before that.

python tools/wait_for_step.py RUN --fraction 0.4 --pid 1234
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import yaml


def last_step(metrics: Path) -> int:
    """The last step in ``metrics.jsonl``; 0 before there is one."""
    if not metrics.is_file():
        return 0
    complete = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return int(json.loads(complete[-1])["step"]) if complete else 0


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Wait until a training run has come a given part of its way.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--fraction", type=float, required=True, help="part of the steps of the run, 0 to 1")
    parser.add_argument("--pid", type=int, required=True, help="process of the training")
    args = parser.parse_args()
    recipe = args.run / "recipe.yaml"
    while is_running(args.pid):
        if recipe.is_file():
            steps = yaml.safe_load(recipe.read_text(encoding="utf-8"))["train"]["steps"]
            if last_step(args.run / "metrics.jsonl") >= args.fraction * steps:
                return 0
        time.sleep(0.2)
    return 1


if __name__ == "__main__":
    sys.exit(main())
