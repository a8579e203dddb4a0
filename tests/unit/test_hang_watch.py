"""`HangWatch`: what a process writes about itself, when, and what is left of it afterwards."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from mtp_megatron.reporting.stacks import read_report
from mtp_megatron.signals import STACKS_SIGNAL
from mtp_megatron.stack_files import read_header, stack_file
from mtp_megatron.training import hang_watch
from mtp_megatron.training.hang_watch import HangWatch

LONG = 10.0  # minutes, which no test takes


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def where_it_is(watch: HangWatch, folder: Path) -> str:
    watch.write_to(folder)
    os.kill(os.getpid(), STACKS_SIGNAL)
    return stack_file(folder, 0).read_text()


def test_on_the_signal_it_writes_its_stacks_and_goes_on(tmp_path: Path) -> None:
    former = signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # as under torchrun
    try:
        with HangWatch(LONG) as watch:
            where_it_is(watch, tmp_path / "stacks")
            report = read_report(tmp_path)
        assert report is not None
        (group,) = report.groups
        assert group.dump.main[0].function == "where_it_is"
        assert group.ranks == (0,)
        assert hang_watch._is_free(), "ignored again"
        os.kill(os.getpid(), STACKS_SIGNAL)
    finally:
        signal.signal(STACKS_SIGNAL, former)


def test_what_takes_long_is_written_again_and_again_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = stack_file(tmp_path / "stacks", 0)

    def hangs() -> None:
        with HangWatch(0.01) as watch:
            watch.write_to(file.parent)
            watch.begin("step 7")
            until(lambda: file.read_text().count("Timeout (0:00:00.54") >= 2)
            until(lambda: "step 7 has taken" in capfd.readouterr().err)
            raise RuntimeError("a collective failed")

    with pytest.raises(RuntimeError, match="a collective failed") as caught:
        hangs()
    (note,) = caught.value.__notes__
    assert f"'mtp-megatron stacks {tmp_path}' says which ranks were where" in note
    with ExitStack() as files:  # one of them has the number that its file had
        later = [files.enter_context((tmp_path / f"later{number}").open("w")) for number in range(20)]
        time.sleep(0.7)
    assert not any(Path(other.name).read_text() for other in later), "it is over"


def test_what_takes_no_longer_than_usual_writes_nothing_and_arms_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed, begun = [], 0
    arm = faulthandler.dump_traceback_later
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *a, **k: (armed.append(a), arm(*a, **k)))

    def trains() -> None:
        nonlocal begun
        with HangWatch(0.1) as watch:  # 5.4 s, and 54 ms
            watch.write_to(tmp_path / "stacks")
            start = time.monotonic()
            while time.monotonic() < start + 1:
                begun += 1
                watch.begin(f"step {begun}")
                time.sleep(0.001)
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind") as caught:
        trains()
    assert not hasattr(caught.value, "__notes__")
    assert 4 < len(armed) <= 2 + 1 / 0.054 < begun
    assert not (tmp_path / "stacks").exists()


def test_what_no_timeout_ends_may_take_long(tmp_path: Path) -> None:
    """The index of samples; a process that is forked meanwhile arms nothing in its parent either."""
    file = stack_file(tmp_path / "stacks", 0)
    with HangWatch(0.01) as watch:
        watch.write_to(file.parent)
        watch.begin("the index of samples", timed=False)
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(1.5)
        assert "Timeout" not in file.read_text()
        watch.begin("step 1")  # at once, however short the time since
        until(lambda: "Timeout" in file.read_text())


def test_what_earlier_attempts_wrote_stays(tmp_path: Path) -> None:
    file = stack_file(tmp_path / "stacks", 0)
    with HangWatch(LONG) as watch:
        text = where_it_is(watch, file.parent)
    with HangWatch(LONG) as watch:
        watch.write_to(file.parent)
    assert file.read_text().startswith(text)
    first = read_report(tmp_path)
    assert first is not None
    assert first.later is not None
    assert first.attempt < first.later


def test_a_handler_of_someone_elses_stays(tmp_path: Path) -> None:
    with open(tmp_path / "theirs", "w") as theirs:
        faulthandler.register(STACKS_SIGNAL, file=theirs)
        try:
            with HangWatch(LONG) as watch:
                text = where_it_is(watch, tmp_path / "stacks")
            os.kill(os.getpid(), STACKS_SIGNAL)
        finally:
            faulthandler.unregister(STACKS_SIGNAL)
    assert "where_it_is" not in text
    header = read_header(text.strip())
    assert header is not None
    assert not header.asked, "nor does anyone ask"
    assert (tmp_path / "theirs").read_text().count("(most recent call first)") >= 2


@pytest.mark.parametrize("status", ["Name:\tpython\nThreads:\t9\n", None], ids=["gVisor", "macOS"])
def test_a_system_that_does_not_tell_which_signals_are_caught(
    status: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang_watch, "_STATUS", tmp_path / "status")
    if status is not None:
        (tmp_path / "status").write_text(status)
    former = signal.signal(STACKS_SIGNAL, signal.SIG_DFL)
    try:
        assert hang_watch._is_free()
        with HangWatch(LONG) as watch:
            assert "where_it_is" in where_it_is(watch, tmp_path / "stacks")
        signal.signal(STACKS_SIGNAL, lambda number, frame: None)
        assert not hang_watch._is_free()
    finally:
        signal.signal(STACKS_SIGNAL, former)


def test_a_file_into_which_another_job_writes_already_stays(tmp_path: Path) -> None:
    """The next job may have begun: the folder's lock is given back first."""
    file = stack_file(tmp_path / "stacks", 0)
    with HangWatch(LONG) as watch:
        watch.write_to(file.parent)
        other = file.read_text().replace('"process": ', '"process": 1')
        with file.open("a") as stream:
            stream.write(other)
    assert file.read_text().endswith(other)


@pytest.mark.parametrize("obstacle", ["no folder", "a full disk"])
def test_without_a_file_stderr_gets_them(
    obstacle: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "no folder":
        (tmp_path / "stacks").write_text(obstacle)
    else:
        (tmp_path / "stacks").mkdir()
        stack_file(tmp_path / "stacks", 0).symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING), HangWatch(LONG) as watch:
        watch.write_to(tmp_path / "stacks")
        os.kill(os.getpid(), STACKS_SIGNAL)
    assert "stacks of hung ranks go to stderr" in caplog.text
    assert "test_without_a_file" in capfd.readouterr().err


class Odd:
    """What stands for stderr in notebooks and tests."""

    def __init__(self, number: object) -> None:
        self.number = number

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def fileno(self) -> object:
        return self.number


@pytest.mark.parametrize("stderr", [None, Odd(-1), Odd(None), Odd(12345)], ids=["none", "-1", "no number", "closed"])
def test_a_stderr_that_is_no_file_is_left_alone(
    stderr: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    with HangWatch(LONG) as watch:
        watch.begin("a start")
        assert "where_it_is" in where_it_is(watch, tmp_path / "stacks")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_begin_to_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []

    def arm(seconds: float, **options: object) -> None:
        counted.append(seconds)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    with HangWatch(LONG) as watch:  # 540 s
        watch.begin("step 1")
        for passed in (200, 539, 540 + 300):
            watch._began = time.monotonic() - passed
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
        watch.begin("step 2")  # at once, however short the time since the fork
    assert counted == pytest.approx([540, 340, 54, 240, 540], abs=1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_fork_ends_and_writes_nothing(tmp_path: Path) -> None:
    """Without care its interpreter waits forever for a thread of faulthandler's that only its parent has."""
    file = stack_file(tmp_path / "stacks", 0)
    with HangWatch(0.01) as watch:
        watch.write_to(file.parent)
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), STACKS_SIGNAL)
            faulthandler.cancel_dump_traceback_later()  # what the interpreter does at its end
            os._exit(b"most recent call" in file.read_bytes())
        ended = (0, 0)

        def over() -> bool:
            nonlocal ended
            ended = os.waitpid(child, os.WNOHANG)
            return ended[0] == child

        try:
            until(over, 10)
        except AssertionError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        assert ended[1] == 0
        until(lambda: "Timeout" in file.read_text())  # the parent's goes on


def test_the_share_of_the_timeout_leaves_time_to_write() -> None:
    assert 0.5 < hang_watch.LATE * (1 + hang_watch._REARM) < 0.95
