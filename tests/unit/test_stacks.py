"""`mtp-megatron stacks`: dumps of ranks, read and grouped."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mtp_megatron.cli import main
from mtp_megatron.reporting import stacks_cli
from mtp_megatron.reporting.stacks import headers, read_report, summary, text_of
from mtp_megatron.stack_files import FOLDER, Header, stack_file, thread_name

MAIN, OTHER = thread_name(7), thread_name(8)
C10D = "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
STEP = '  File "/home/me/mtp_megatron/training/step.py", line 231 in sum_over_world'
TRAIN = '  File "/home/me/mtp_megatron/training/loop.py", line 160 in _train'
WAITING = [f'  File "{C10D}", line 3209 in all_reduce', f'  File "{C10D}", line 83 in wrapper', STEP, TRAIN]
SLEEPING = ['  File "<string>", line 1 in slow', TRAIN]
IDLE = ['  File "/usr/lib/python3.11/threading.py", line 324 in wait', '  File "tqdm/_monitor.py", line 60 in run']
TELLER = ['  File "/home/me/mtp_megatron/training/hang_watch.py", line 170 in _tell']


def dump(frames: list[str], *others: list[str], first: str = "", named: str = "") -> str:
    """As faulthandler writes it: the newest thread first, the main one last."""
    parts = [[f"Thread {OTHER}{named} (most recent call first):", *other, ""] for other in others]
    parts.append([f"Current thread {MAIN}{named} (most recent call first):", *frames, ""])
    return first + "\n".join(line for part in parts for line in part) + "\n"


def write(run: Path, rank: int, text: str, *, attempt: str = "2026-11-28T03:20:11.000000+00:00", size: int = 4) -> None:
    file = stack_file(run / FOLDER, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    header = Header(attempt, rank, size, f"node{rank // 2}", 1, MAIN)
    with file.open("a") as stream:
        stream.write(header.line() + text)


def test_ranks_with_equal_stacks_are_put_together_and_the_odd_one_comes_first(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        # Rank 0 has threads of its own, which say nothing of the hang.
        write(tmp_path, rank, dump(WAITING, IDLE, TELLER) if rank == 0 else dump(WAITING))
    write(tmp_path, 2, dump(SLEEPING, first="Timeout (0:09:00)!\n"))
    report = read_report(tmp_path)
    assert report is not None
    assert [group.ranks for group in report.groups] == [(2,), (0, 1, 3)]
    assert report.silent == ()
    lines = text_of(report).splitlines()
    assert lines[0].startswith("attempt of 2026-11-28 03:20:11 UTC, 4 ranks; stacks written ")
    assert lines[1] == "rank 2: in slow (<string>:1), from _train (mtp_megatron/training/loop.py:160)"
    assert lines[2] == (
        "ranks 0-1, 3: in the collective all_reduce, from sum_over_world (mtp_megatron/training/step.py:231)"
    )
    assert lines[-5:] == [
        "--- ranks 0-1, 3",
        "  mtp_megatron/training/loop.py:160 _train",
        "  mtp_megatron/training/step.py:231 sum_over_world",
        "  torch/distributed/distributed_c10d.py:83 wrapper",
        "  torch/distributed/distributed_c10d.py:3209 all_reduce",
    ]


def test_a_thread_that_runs_heads_for_the_main_one_is_shown_and_tells_ranks_apart(tmp_path: Path) -> None:
    """Under CUDA autograd runs them in a thread of its own, and every main thread waits for that."""
    backward = ['  File "/x/torch/autograd/graph.py", line 824 in _engine_run_backward', TRAIN]
    head = ['  File "/home/me/mtp_megatron/sequential.py", line 215 in _run_chain']
    write(tmp_path, 0, dump(backward, WAITING[:2] + head), size=2)
    write(tmp_path, 1, dump(backward, head), size=2)
    report = read_report(tmp_path)
    assert report is not None
    assert sorted(group.ranks for group in report.groups) == [(0,), (1,)]
    assert "  another thread:\n  mtp_megatron/sequential.py:215 _run_chain" in text_of(report)


def test_the_last_whole_dump_counts(tmp_path: Path) -> None:
    cut = dump(WAITING, IDLE)
    write(tmp_path, 0, dump(SLEEPING) + dump(WAITING) + cut[: cut.index("Current")], size=1)
    report = read_report(tmp_path)
    assert report is not None
    assert report.groups[0].dump.main[0].function == "all_reduce"


def test_a_rank_with_too_many_threads_says_so(tmp_path: Path) -> None:
    """As faulthandler itself writes them, from a process of its own: the main thread is the oldest one."""
    script = """import faulthandler, sys, threading
stop = threading.Event()
for _ in range(105):
    threading.Thread(target=stop.wait).start()
faulthandler.dump_traceback(sys.stdout)
stop.set()"""
    text = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    head = ['  File "/home/me/mtp_megatron/sequential.py", line 215 in _run_chain']
    own = dump([], head)
    write(tmp_path, 0, own[: own.index("Current")] + text, size=2)
    write(tmp_path, 1, text + dump(WAITING), size=2)
    report = read_report(tmp_path)
    assert report is not None
    assert report.silent == ()
    said = text_of(report)
    assert "rank 0: too many threads: the main one is not among the 100 that are written\n" in said
    assert "--- rank 0\n  another thread:\n  mtp_megatron/sequential.py:215 _run_chain" in said
    assert "rank 1: in the collective all_reduce" in said


def test_threads_may_have_names(tmp_path: Path) -> None:
    """Python 3.14 writes them."""
    write(tmp_path, 0, dump(WAITING, IDLE, named=" [python]"), size=1)
    report = read_report(tmp_path)
    assert report is not None
    assert len(report.groups[0].dump.main) == 4


def test_a_restart_does_not_hide_what_the_attempt_before_wrote(tmp_path: Path) -> None:
    later = "2026-11-28T04:00:00.000000+00:00"
    write(tmp_path, 0, dump(WAITING), size=2)
    write(tmp_path, 1, "", size=2)
    for rank in range(2):
        write(tmp_path, rank, "", attempt=later, size=2)
    report = read_report(tmp_path)
    assert report is not None
    assert (report.attempt[11:19], report.later) == ("03:20:11", later)
    assert report.silent == ((1, "node0"),)
    text = text_of(report)
    assert text.startswith("attempt of 2026-11-28 03:20:11 UTC, 2 ranks\n"), "its files were written again since"
    assert "(the attempt of 2026-11-28 04:00:00 UTC has written none)" in text
    assert "rank 1 on node0: no stacks" in text
    assert [header.attempt for _, header in headers(tmp_path)] == [later] * 2
    write(tmp_path, 1, dump(SLEEPING), attempt=later, size=2)
    report = read_report(tmp_path)
    assert report is not None
    assert (report.attempt, report.later, report.silent) == (later, None, ((0, "node0"),))


def test_what_was_written_long_before_says_so(tmp_path: Path) -> None:
    for rank in range(5):
        write(tmp_path, rank, dump(WAITING), size=5)
    # Ranks never write at the very same time, and those of one hang are one group all the same.
    for rank, seconds in ((1, 0), (2, 1.5), (3, 3), (4, -7200)):
        os.utime(stack_file(tmp_path / FOLDER, rank), (946684800 + seconds,) * 2)
    report = read_report(tmp_path)
    assert report is not None
    assert {group.ranks: group.old for group in report.groups} == {
        (0,): None,
        (1, 2, 3): datetime(2000, 1, 1, 0, 0, 3, tzinfo=UTC),
        (4,): datetime(1999, 12, 31, 22, tzinfo=UTC),
    }
    assert "(at 2000-01-01 00:00:03 UTC, not since)" in text_of(report)


def test_a_checkout_named_like_the_package_does_not_make_all_code_its_own(tmp_path: Path) -> None:
    """With the environment in it, as tools/setup.sh makes it."""
    checkout = "/home/me/mtp_megatron"
    packages = f"{checkout}/.venv/lib/python3.11/site-packages"
    waiting = [
        f'  File "{packages}/torch/distributed/distributed_c10d.py", line 3209 in all_reduce',
        f'  File "{checkout}/mtp_megatron/training/step.py", line 231 in sum_over_world',
    ]
    monitor = [f'  File "{packages}/tqdm/_monitor.py", line 60 in run']
    write(tmp_path, 0, dump(waiting, monitor), size=2)
    write(tmp_path, 1, dump(waiting), size=2)
    report = read_report(tmp_path)
    assert report is not None
    (group,) = report.groups
    assert group.ranks == (0, 1)
    assert summary(group.dump.main) == (
        "in the collective all_reduce, from sum_over_world (mtp_megatron/training/step.py:231)"
    )


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (["/x/torch/utils/data/dataloader.py:1295 _try_get_data"], "reading data"),
        (
            ["/x/megatron/core/pipeline_parallel/p2p_communication.py:300 _p2p_ops"],
            "waiting for another pipeline stage",
        ),
        (["/x/torch/distributed/checkpoint/filesystem.py:5 write_data"], "in a checkpoint"),
        (["/x/a.py:1 f", "/x/mtp_megatron/data/blend.py:9 g"], "reading data, from g (mtp_megatron/data/blend.py:9)"),
        (["/x/mtp_megatron/loss.py:8 f"], "in f (mtp_megatron/loss.py:8)"),
        ([], "no Python function"),
    ],
)
def test_in_a_few_words(frames: list[str], words: str, tmp_path: Path) -> None:
    places = [frame.replace(":", " ").split() for frame in frames]
    write(tmp_path, 0, dump([f'  File "{file}", line {line} in {function}' for file, line, function in places]), size=1)
    report = read_report(tmp_path)
    assert report is not None
    assert summary(report.groups[0].dump.main) == words


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stacks", str(tmp_path)]) == 1
    assert "no rank has written its stacks" in capsys.readouterr().err
    assert main(["stacks", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_process_that_has_not_opened_the_file_is_not_signalled(tmp_path: Path) -> None:
    """Its number may have become another process's, which would die of the signal."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        file = stack_file(tmp_path / FOLDER, 0)
        file.parent.mkdir()
        file.write_text(Header("2026", 0, 1, platform.node(), stranger.pid, MAIN).line())
        assert main(["stacks", str(tmp_path)]) == 1
        with pytest.raises(subprocess.TimeoutExpired):
            stranger.wait(1)
    finally:
        stranger.kill()
        stranger.wait()


def test_where_the_signal_is_someone_elses_it_is_not_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To submitit, say, it means to save and end. This process would die of it."""
    file = stack_file(tmp_path / FOLDER, 0)
    file.parent.mkdir()
    with file.open("w") as stream:
        stream.write(Header("2026", 0, 1, platform.node(), os.getpid(), MAIN, asked=False).line() + dump(WAITING))
        stream.flush()
        assert main(["stacks", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("asked 0 ranks on ")
    assert told[1] == "not asked, as SIGUSR2 has another handler there: ranks 0"
    assert any(line.startswith("rank 0: in the collective all_reduce") for line in told)


def test_a_run_that_ends_while_its_ranks_are_asked(tmp_path: Path) -> None:
    """It takes a file without stacks away."""
    stacks_cli._wait([(tmp_path / "gone", 0)])
    (tmp_path / FOLDER).mkdir()
    stack_file(tmp_path / FOLDER, 0).symlink_to("gone")
    assert headers(tmp_path) == []
    assert read_report(tmp_path) is None
