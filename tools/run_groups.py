"""The tests of all lanes, in groups that the machine's cores take from a queue. `tools/test.sh` runs it.

    python tools/run_groups.py main=.venv py312=.venv-py312 [-- PYTEST-ARGUMENTS]

names the lanes and their environments; with arguments for pytest each lane runs these in place of its groups. Each
group is a pytest of its own, some run at a time, and what one printed follows when it has ended. At the end come the
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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtp_megatron.signals import caught_signals  # tools/setup.sh has installed it, and it imports nothing more

# One more than there are cores: a group waits often, for imports, for other ranks, for time to pass.
AT_ONCE = int(os.environ.get("MTP_GROUPS_AT_ONCE") or min(4, len(os.sched_getaffinity(0)) + 1))

# What each lane runs. On both: everything that drives megatron-core (schedules, layouts, optimizers, checkpoints,
# conversion), and Megatron-LM's loop, which is in the newer wheel alone. Left to the main lane: units that need torch
# at most, the training command killed and resumed, the long runs of the quickstart and the README, which go through the
# same commands again, DeepSpeed and Triton, and what is in LEFT_OUT.
LANES: dict[str, tuple[str, ...]] = {
    "main": ("tests",),
    "py312": (
        "tests/distributed",
        "tests/unit/test_adam_state.py",
        "tests/unit/test_apply_patches.py",
        "tests/unit/test_compat.py",
        "tests/unit/test_compat_training_loop.py",
        "tests/unit/test_devices.py",
        "tests/unit/test_documents.py",
        "tests/unit/test_megatron_lm_arguments.py",
        "tests/unit/test_fp8.py",
        "tests/unit/test_fp8_contexts.py",
        "tests/unit/test_schedule.py",
        "tests/e2e/test_export.py",
        "tests/e2e/test_megatron_lm.py",
        "tests/e2e/test_megatron_lm_scripts.py",
    ),
}
# Of the folders above, what another megatron-core cannot change: files, locks, signals, profiles, which data comes
# when, messages between hosts before there is a model, losses and decoding that need torch alone; and tests that show
# that other tests can fail.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "main": (),
    "py312": tuple(
        f"tests/{name}"
        for name in (
            "distributed/test_agreement.py",
            "distributed/test_async_save.py"
            "::test_a_rank_that_is_killed_leaves_the_checkpoint_before_it_and_the_next_save_clears_up",
            "distributed/test_async_save.py::test_readers_that_are_forked_on_the_way_hold_no_copies",
            "distributed/test_batch_sizes.py",
            "distributed/test_blend.py",
            "distributed/test_communication.py::test_a_rank_that_does_otherwise_is_noticed",
            "distributed/test_divergence.py",
            "distributed/test_gradient_accumulation_fusion.py::test_double_counting_is_noticed",
            "distributed/test_harness.py",
            "distributed/test_loss_parallel.py",
            "distributed/test_optimizer_state.py::test_it_would_be_noticed_if_they_took_more",
            "distributed/test_profile.py",
            "distributed/test_shared_index.py",
            "distributed/test_skipped_steps.py",
            "distributed/test_stopping.py",
            "distributed/test_trace.py::test_a_tensor_that_only_the_real_run_holds_would_be_noticed",
            "e2e/test_export.py::test_a_decoder_that_does_not_roll_back_is_found_out",
            "e2e/test_export.py::test_fifty_held_out_prompts_decode_alike",
        )
    ),
}
# The queue, in this order; long ones first, so that the cores end together. What a group holds because it is inside one
# of its folders, another one of the lane may name: then that one runs it. A lane's "rest" is all that no other names.
DEEPSPEED = (
    "tests/e2e/test_deepspeed.py",
    "tests/unit/test_bench_deepspeed.py",
    "tests/unit/test_deepspeed_settings.py",
)
TRAINING = ("tests/distributed/test_training.py", "tests/distributed/test_heads_on_stages.py")
QUEUE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("main", "serving", ("tests/serving", "tests/e2e/test_quickstart.py")),
    ("main", "e2e", ("tests/e2e",)),
    ("py312", "rest", ()),
    ("main", "distributed", ("tests/distributed",)),
    ("main", "rest", ()),
    # Together, as the first of these tests compiles what all of them use.
    (
        "main",
        "deepspeed",
        (*DEEPSPEED, *(f"tests/distributed/test_deepspeed{name}.py" for name in ("", "_checkpoints"))),
    ),
    ("main", "training", TRAINING),
    ("py312", "training", TRAINING),
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
                # Out of the terminal's reach: it would send Ctrl-C to those that run, and not to one about to start.
                start_new_session=True,
            )

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return None if self.process is None else self.process.poll()

    def result(self) -> tuple[list[str], Counter[str]]:
        """What it printed, and its numbers; a failure without a number is an error."""
        lines = self.log.read_text(errors="replace").splitlines()
        found = numbers(lines)
        if self.status() and not found["failed"] + found["error"]:
            found["error"] = 1
            lines.append(f"ERROR {self}: pytest ended with status {self.status()}")
        return lines, found


def groups(lanes: Collection[str]) -> list[Group]:
    """The queue, without what other lanes run."""
    return [Group(lane, name, arguments(lane, paths)) for lane, name, paths in QUEUE if lane in lanes]


def arguments(lane: str, paths: Sequence[str]) -> list[str]:
    """For pytest: these paths, or the rest of the lane, without what other groups of the lane name or it leaves out."""
    others = {path for other, _, some in QUEUE if other == lane for path in some} - set(paths)
    others.update(LEFT_OUT[lane])
    paths = paths or [path for path in LANES[lane] if path not in others]
    inside = [other for other in sorted(others) if any(other.startswith((f"{path}/", f"{path}::")) for path in paths)]
    return [*paths, *(f"--{'deselect' if '::' in other else 'ignore'}={other}" for other in inside)]


def numbers(lines: Sequence[str]) -> Counter[str]:
    """Of pytest's summary: '2 failed, 5 passed in 3.2s'. Warnings, and tests left to other groups, do not count.

    A process that outlives pytest may print lines after it.
    """
    for line in reversed(lines):
        found = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})", line)
        if found and re.search(r" in \d[\d.]*s\b", line):
            return Counter({word: int(number) for number, word in found})
    return Counter()


def summary(total: Counter[str], seconds: float) -> str:
    counts = [f"{total[word]} {word}" for word in OUTCOMES if total[word]]
    return f"{', '.join(counts) or 'no tests ran'} in {seconds:.2f}s ({seconds / 60:.1f} minutes)"


def run(queue: list[Group], environments: dict[str, Path], logs: Path) -> int:
    began = time.monotonic()
    running: list[Group] = []
    total: Counter[str] = Counter()
    failures: list[str] = []
    stops: list[int] = []
    for number in caught_signals():
        signal.signal(number, lambda number, frame: stops.append(number))
    while (queue or running) and not stops:
        while queue and len(running) < AT_ONCE and not stops:
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
            failures += [line for line in lines if line.startswith(("FAILED tests", "ERROR tests", "ERROR lane"))]
    if stops:
        stop(running)
        failures.append(f"ERROR interrupted before the end of {', '.join(map(str, [*running, *queue]))}")
        total["error"] += 1
    print("== all groups", *failures, summary(total, time.monotonic() - began), sep="\n", flush=True)
    return 1 if total["failed"] + total["error"] else 0


def stop(running: list[Group]) -> None:
    """Let each pytest end what its tests have started, as it does after Ctrl-C, and wait for that."""
    for group in running:
        if group.process is not None:
            group.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while any(group.status() is None for group in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    for group in running:
        if group.process is not None:
            group.process.kill()


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    environments = {lane: Path(folder) for lane, folder in (argument.split("=") for argument in arguments[:split])}
    chosen = arguments[split + 1 :]
    queue = [Group(lane, "chosen", chosen) for lane in environments] if chosen else groups(environments)
    with tempfile.TemporaryDirectory(prefix="mtp-tests-") as logs:
        return run(queue, environments, Path(logs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
