"""Which ranks are where: the dumps in ``RUN/stacks``, read and grouped by what the threads were doing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mtp_megatron.ranks import ranges
from mtp_megatron.stack_files import FOLDER, Header, read_header

_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[.*\])? \(most recent call first\):$")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_CUT = "..."  # the line in place of further threads; that of further frames is indented
_PACKAGES = re.compile(r"^.*/(?:site-packages|dist-packages|lib/python3\.\d+)/")
_OWN = re.compile(r"^(?:.*/)?(mtp_megatron/.*)$")  # the last one: a checkout may be in a folder of that name
# What a frame is about, by its file; the innermost of a main thread that is named here says what the rank does.
_ABOUT = (
    (re.compile(r"torch/distributed/distributed_c10d\.py$"), "in the collective {function}"),
    (re.compile(r"megatron/core/pipeline_parallel/p2p_communication\.py$"), "waiting for another pipeline stage"),
    (re.compile(r"torch/utils/data/|mtp_megatron/data/"), "reading data"),
    (re.compile(r"torch/distributed/checkpoint/|megatron/core/dist_checkpointing/"), "in a checkpoint"),
)
_TOGETHER = timedelta(minutes=1)  # what ranks write within it is of one hang
_TELLER = "training/hang_watch.py"  # its thread waits on every node's first rank, and says nothing of a hang


@dataclass(frozen=True)
class Frame:
    """A function of a stack; ``file`` without the folder of its package or interpreter."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


Stack = tuple[Frame, ...]
"""The innermost function first, as in a dump."""


@dataclass(frozen=True)
class Dump:
    """What one rank wrote at one time: the stack of its main thread, and those of others that run this package's code
    (the autograd engine's, where heads run on a GPU).

    Attributes:
        cut: the main thread's is missing: faulthandler writes 100 threads and no more, the newest first.
    """

    main: Stack
    others: tuple[Stack, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class RankStacks:
    """The last dump of a rank in an attempt, None without one, and when its file was written last."""

    header: Header
    dump: Dump | None
    written: datetime


@dataclass(frozen=True)
class Group:
    """Ranks with equal stacks; ``old`` is when they were written, where that was long before others were."""

    ranks: tuple[int, ...]
    dump: Dump
    old: datetime | None = None


@dataclass(frozen=True)
class Report:
    """The newest attempt in which a rank wrote its stacks.

    Attributes:
        attempt: when it started (UTC).
        size: its ranks.
        groups: the smallest first: in a hang the odd one out is the cause.
        silent: ranks whose files hold no stacks of that attempt, with their hosts.
        written: when the last of these files was, be it by a later attempt.
        later: the newest attempt since, if none of its ranks wrote any.
    """

    attempt: str
    size: int
    groups: tuple[Group, ...]
    silent: tuple[tuple[int, str], ...]
    written: datetime
    later: str | None = None


def headers(run: Path) -> list[tuple[Path, Header]]:
    """The last header of each file in the run's folder: which process may still write there."""
    found = []
    for file, text, _ in _files(run):
        parts = _attempts(text)
        if parts:
            found.append((file, parts[-1][0]))
    return found


def read_report(run: Path) -> Report | None:
    """The stacks of a run; None where no rank wrote any."""
    attempts: dict[str, list[RankStacks]] = {}
    for _, text, written in _files(run):
        for header, lines in _attempts(text):
            stacks = RankStacks(header, _last_dump(lines, header.main), written)
            attempts.setdefault(header.attempt, []).append(stacks)
    told = [name for name, ranks in attempts.items() if any(rank.dump for rank in ranks)]
    if not told:
        return None
    attempt, newest = max(told), max(attempts)
    ranks = sorted(attempts[attempt], key=lambda rank: rank.header.rank)
    known = {rank.header.rank for rank in ranks if rank.dump}
    hosts = {rank.header.rank: rank.header.host for rank in ranks}
    size = max(rank.header.size for rank in ranks)
    return Report(
        attempt=attempt,
        size=size,
        groups=_grouped(ranks),
        silent=tuple((rank, hosts.get(rank, "a host that wrote no file")) for rank in range(size) if rank not in known),
        written=max(rank.written for rank in ranks if rank.dump),
        later=None if newest == attempt else newest,
    )


def text_of(report: Report) -> str:
    """The report for people: a line for each group, then its stacks, outermost function first."""
    lines = [f"attempt of {_time(report.attempt)}, {report.size} ranks"]
    if report.later is None:
        lines[0] += f"; stacks written {_time(report.written.isoformat())}"
    else:  # which has written its header into the same files since
        lines.append(f"(the attempt of {_time(report.later)} has written none)")
    lines += [f"{_named(group.ranks)}: {_in_words(group.dump)}{_age(group)}" for group in report.groups]
    by_host: dict[str, list[int]] = {}
    for rank, host in report.silent:
        by_host.setdefault(host, []).append(rank)
    lines += [f"{_named(ranks)} on {host}: no stacks" for host, ranks in by_host.items()]
    for group in report.groups:
        lines += ["", f"--- {_named(group.ranks)}"]
        lines += [] if group.dump.cut else _stack_lines(group.dump.main)
        for other in group.dump.others:
            lines += ["  another thread:", *_stack_lines(other)]
    return "\n".join(lines)


def summary(stack: Stack) -> str:
    """What a main thread is doing, in a few words: the innermost thing that is known, and who of this package asked."""
    own = next((frame for frame in stack if _is_own(frame)), None)
    inner = stack[0] if stack else None
    about = f"in {inner.function} ({inner.file}:{inner.line})" if inner else "no Python function"
    for frame in stack:
        words = next((words for pattern, words in _ABOUT if pattern.search(frame.file)), None)
        if words is not None:
            about = words.format(function=frame.function)
            break
    if own is None or (own is inner and about.startswith("in ")):
        return about
    return f"{about}, from {own.function} ({own.file}:{own.line})"


def _in_words(dump: Dump) -> str:
    return "too many threads: the main one is not among the 100 that are written" if dump.cut else summary(dump.main)


def _files(run: Path) -> Iterator[tuple[Path, str, datetime]]:
    """The files of ranks, what they hold and when they were written last."""
    for file in sorted((run / FOLDER).glob("rank*.txt")):
        try:
            written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
            yield file, file.read_text(encoding="utf-8", errors="replace"), written
        except FileNotFoundError:  # a run that ends takes files without stacks away
            continue


@dataclass
class _Part:
    header: Header
    lines: list[str] = field(default_factory=list)


def _attempts(text: str) -> list[tuple[Header, list[str]]]:
    """Header and lines of each attempt in a file."""
    parts: list[_Part] = []
    for line in text.splitlines():
        header = read_header(line)
        if header is not None:
            parts.append(_Part(header))
        elif parts:
            parts[-1].lines.append(line)
    return [(part.header, part.lines) for part in parts]


def _last_dump(lines: Iterable[str], main: str) -> Dump | None:
    """The last whole dump: it ends with the main thread, the oldest one, or where there are too many."""
    dump: Dump | None = None
    others: list[Stack] = []
    for thread, stack in _threads(lines):
        if thread in (main, _CUT):
            dump, others = Dump(stack, tuple(others), cut=thread == _CUT), []
        elif any(_is_own(frame) and _TELLER not in frame.file for frame in stack):
            others.append(stack)
    return dump


def _threads(lines: Iterable[str]) -> Iterator[tuple[str, Stack]]:
    """Names and stacks of the threads in the order of a file."""
    name, frames = "", list[Frame]()
    for line in lines:
        thread, frame = _THREAD.match(line), _FRAME.match(line)
        if thread:
            if name:
                yield name, tuple(frames)
            name, frames = thread[1], []
        elif frame:
            frames.append(Frame(_short(frame[1]), int(frame[2]), frame[3]))
        elif line == _CUT:
            if name:
                yield name, tuple(frames)
            yield _CUT, ()
            name = ""
    if name:
        yield name, tuple(frames)


def _short(file: str) -> str:
    short = _PACKAGES.sub("", file)  # first: the environment may be in the checkout
    own = _OWN.match(short)
    return own[1] if own else short


def _is_own(frame: Frame) -> bool:
    return frame.file.startswith("mtp_megatron/")


def _grouped(ranks: Sequence[RankStacks]) -> tuple[Group, ...]:
    hangs = _hangs([rank.written for rank in ranks if rank.dump])
    groups: dict[tuple[Dump, datetime | None], list[int]] = {}
    for rank in ranks:
        if rank.dump is not None:
            groups.setdefault((rank.dump, hangs[rank.written]), []).append(rank.header.rank)
    found = sorted(groups.items(), key=lambda item: len(item[1]))
    return tuple(Group(tuple(numbers), dump, old) for (dump, old), numbers in found)


def _hangs(times: Iterable[datetime]) -> dict[datetime, datetime | None]:
    """For each time the last one of the same hang; None for those of the newest."""
    found: dict[datetime, datetime | None] = {}
    last: datetime | None = None
    before: datetime | None = None
    for time in sorted(times, reverse=True):
        if before is not None and before - time > _TOGETHER:
            last = time
        found[time], before = last, time
    return found


def _named(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)}"


def _stack_lines(stack: Stack) -> list[str]:
    return [f"  {frame}" for frame in reversed(stack)] or ["  (no Python function)"]


def _time(attempt: str) -> str:
    return f"{attempt[:19].replace('T', ' ')} UTC"


def _age(group: Group) -> str:
    return "" if group.old is None else f" (at {_time(group.old.isoformat())}, not since)"
