"""The tests of all lanes, in groups that the machine's cores take from a queue. `tools/test.sh` runs it.

    python tools/run_groups.py main=.venv py312=.venv-py312 [-- PYTEST-ARGUMENTS]

names the lanes and their environments; with arguments for pytest each lane runs these in place of its groups. Each
group is a pytest of its own, two run at a time, and what one printed follows when it has ended. At the end come the
failed tests of all groups and, as the last line, all their numbers, in pytest's words. The exit status is 1 if any
group failed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

AT_ONCE = int(os.environ.get("MTP_GROUPS_AT_ONCE", "2"))

# What each lane runs. On both: everything that drives megatron-core (schedules, layouts, optimizers, checkpoints,
# conversion), the training command with its resumption, and Megatron-LM's loop, which is in the newer wheel alone. Left
# to the main lane: units that need torch at most, the long runs of the quickstart and the README, which go through the
# same commands again, and DeepSpeed.
LANES: dict[str, tuple[str, ...]] = {
    "main": ("tests",),
    "py312": (
        "tests/distributed",
        "tests/unit/test_compat.py",
        "tests/unit/test_compat_training_loop.py",
        "tests/unit/test_megatron_lm_arguments.py",
        "tests/unit/test_fp8.py",
        "tests/unit/test_fp8_contexts.py",
        "tests/e2e/test_export.py",
        "tests/e2e/test_train_robustness.py::test_kill_9_in_the_middle_of_a_step_then_the_same_command",
        "tests/e2e/test_megatron_lm.py",
        "tests/e2e/test_megatron_lm_scripts.py",
    ),
}
REST = "rest"  # of a lane: what none of its other groups names
QUEUE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("main", "serving", ("tests/serving", "tests/e2e/test_quickstart.py")),
    ("py312", REST, ()),
    ("main", "distributed", ("tests/distributed",)),
    ("main", REST, ()),
)
OUTCOMES = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")


@dataclass
class Group:
    lane: str
    name: str
    arguments: list[str]
    log: Path = Path()
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return f"lane {self.lane}, {self.name}"

    def start(self, environment: Path, logs: Path) -> None:
        self.log, self.started = logs / f"{self.lane}-{self.name}", time.monotonic()
        binaries = (environment / "bin").absolute()
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        command = [str(binaries / "python"), "-m", "pytest", "-rs", "-p", "no:cacheprovider", *self.arguments]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VIRTUAL_ENV": str(binaries.parent), "PATH": path},
            )

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return None if self.process is None else self.process.poll()

    def result(self) -> tuple[list[str], Counter[str]]:
        """What it printed, and its numbers; a failure without a number is an error."""
        lines = self.log.read_text(errors="replace").splitlines()
        found = numbers(lines[-1]) if lines else Counter()
        if self.status() and not found["failed"] + found["error"]:
            found["error"] = 1
            lines.append(f"ERROR {self}: pytest ended with status {self.status()}")
        return lines, found


def groups(lanes: Collection[str]) -> list[Group]:
    """The queue, without what other lanes run."""
    made = []
    for lane, name, paths in QUEUE:
        arguments = list(paths)
        if name == REST:
            named = [path for other, _, some in QUEUE if other == lane for path in some]
            arguments = [*LANES[lane], *(f"--{'deselect' if '::' in path else 'ignore'}={path}" for path in named)]
        if lane in lanes:
            made.append(Group(lane, name, arguments))
    return made


def numbers(line: str) -> Counter[str]:
    """Of pytest's last line: '2 failed, 5 passed in 3.2s'. Warnings, and tests left to other groups, do not count."""
    found = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})", line)
    return Counter({word: int(number) for number, word in found})


def summary(total: Counter[str], seconds: float) -> str:
    counts = [f"{total[word]} {word}" for word in OUTCOMES if total[word]]
    return f"{', '.join(counts) or 'no tests ran'} in {seconds:.2f}s ({seconds / 60:.1f} minutes)"


def run(queue: list[Group], environments: dict[str, Path], logs: Path) -> int:
    began = time.monotonic()
    running: list[Group] = []
    total: Counter[str] = Counter()
    failures: list[str] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        """As after Ctrl-C, which the terminal sends to every process: pytest ends what its tests have started."""
        for group in running:
            group.process.send_signal(signal.SIGINT)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        while queue or running:
            while queue and len(running) < AT_ONCE:
                group = queue.pop(0)
                group.start(environments[group.lane], logs)
                running.append(group)
                print(f"== {group}: started", flush=True)
            time.sleep(0.1)
            for group in [group for group in running if group.status() is not None]:
                running.remove(group)
                lines, found = group.result()
                print(f"== {group}: {time.monotonic() - group.started:.0f} s", *lines, sep="\n", flush=True)
                total += found
                failures += [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    except KeyboardInterrupt:
        for group in running:
            try:
                group.process.wait(60)
            except subprocess.TimeoutExpired:
                group.process.kill()
        failures.append(f"ERROR interrupted before the end of {', '.join(map(str, [*running, *queue]))}")
        total["error"] += 1
    print("== all groups", *failures, summary(total, time.monotonic() - began), sep="\n", flush=True)
    return 1 if total["failed"] + total["error"] else 0


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    environments = {lane: Path(folder) for lane, folder in (argument.split("=") for argument in arguments[:split])}
    chosen = arguments[split + 1 :]
    queue = [Group(lane, "chosen", chosen) for lane in environments] if chosen else groups(environments)
    with tempfile.TemporaryDirectory(prefix="mtp-tests-") as logs:
        return run(queue, environments, Path(logs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
