"""The index of samples where hosts share no disk, where writing it takes long, and where that ends badly."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mtp_megatron.data import shared_index
from mtp_megatron.data.manifest import load_manifest
from mtp_megatron.data.sample_index import SampleIndex
from mtp_megatron.errors import DataError
from mtp_megatron.signals import STOP_SIGNALS
from tests.harness import run_world


def index_of(data: Path, cache: Path | None = None) -> SampleIndex:
    return SampleIndex(load_manifest(data), 32, 1, cache or data / "cache")


@contextmanager
def written_by_a_child(before: str) -> Iterator[None]:
    """However small the index is, and after a shell command."""
    command = SampleIndex.command

    def after(index: SampleIndex, room: Path) -> list[str]:
        return ["sh", "-c", f'{before} && exec "$@"', "sh", *command(index, room)]

    with mock.patch.object(SampleIndex, "small", False), mock.patch.object(SampleIndex, "command", after):
        yield


def read_body(rank: int, world_size: int, folders: list[Path]) -> list[list[int]]:
    train, valid = shared_index.open_together(index_of(folders[rank]))
    return [split[i]["tokens"].tolist() for split in (train, valid) for i in range(len(split))]


def test_every_disk_gets_an_index(data: Path, tmp_path: Path) -> None:
    """Ranks 0 and 2 have one copy of the data, ranks 1 and 3 another."""
    copies = [tmp_path / "one", tmp_path / "other"]
    for copy in copies:
        shutil.copytree(data, copy)
    first, *others = run_world(read_body, 4, copies * 2)
    assert len(first) > 10
    assert others == [first] * 3
    (one,), (other,) = (list((copy / "cache").iterdir()) for copy in copies)
    assert one.name == other.name
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert {path.name: path.read_bytes() for path in other.iterdir()} == files


def slow_body(rank: int, world_size: int, data: Path, gate: Path) -> tuple[int, list[int]]:
    """The index is written only when rank 1 has come out of a few collectives."""
    counted, reports, whole = [], [], shared_index._sums

    def counting(*flags: bool) -> list[int]:
        counted.append(flags)
        if rank == 1 and len(counted) == 5:
            gate.write_text("")
        return whole(*flags)

    with (
        written_by_a_child(f"until [ -e {gate} ]; do sleep 0.1; done"),
        mock.patch.object(shared_index, "_sums", counting),
        mock.patch.object(shared_index, "_REPORT", 0.0),
        mock.patch.object(shared_index, "_report", lambda count, seconds: reports.append(count)),
    ):
        train, _ = shared_index.open_together(index_of(data))
    return len(train), reports


def test_no_rank_waits_in_one_collective_for_a_long_one(data: Path, tmp_path: Path) -> None:
    """Whatever ``train.timeout_minutes`` is; and rank 0 says what they wait for."""
    shutil.copytree(data, tmp_path / "data")
    (length, reports), (other, silent) = run_world(slow_body, 2, tmp_path / "data", tmp_path / "gate", timeout=120)
    assert length == other > 0
    assert len(reports) >= 4
    assert set(reports) == {1}
    assert not silent


def killed_body(rank: int, world_size: int, data: Path) -> str:
    with written_by_a_child("kill -9 $$"):
        try:
            shared_index.open_together(index_of(data))
        except DataError as error:
            return str(error)
    return ""


def test_a_writer_that_is_killed_is_an_error_on_every_rank(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    first, second = run_world(killed_body, 2, tmp_path / "data")
    assert first == second
    assert first.startswith("rank 0 on ")
    assert "was ended by SIGKILL, perhaps for want of memory" in first
    assert not list((tmp_path / "data" / "cache").iterdir())


def test_a_writer_whose_rank_leaves_is_ended_and_its_folder_removed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank died: the collective fails here."""
    started: list[Any] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    def lost(*flags: bool) -> list[int]:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(shared_index.subprocess, "Popen", Popen)
    monkeypatch.setattr(shared_index, "_sums", lost)
    with written_by_a_child("exec sleep 600"), pytest.raises(RuntimeError, match="Connection closed"):
        shared_index.open_together(index_of(data, tmp_path / "cache"))
    (writer,) = (process for process in started if "mtp_megatron.data.sample_index" in process.args)
    assert writer.returncode == -signal.SIGKILL
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2"])
def test_requests_to_stop_do_not_end_a_writer(name: str, data: Path, tmp_path: Path) -> None:
    """From its first moment: torchrun, SLURM and terminals send them to all processes of a rank. Nor does SIGUSR2,
    which asks the rank for its stacks."""
    index = index_of(data, tmp_path)
    with written_by_a_child(f"kill -{name} $$"):
        shared_index.open_together(index)
    assert index.there()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS), "they still reach this process"


def test_an_index_with_missing_files_is_put_aside_for_those_who_read_it(data: Path, tmp_path: Path) -> None:
    index = index_of(data, tmp_path)
    shared_index.open_together(index)
    taken = sorted(index.folder.iterdir())[0]
    taken.unlink()
    shared_index.open_together(index)
    assert index.there()
    (aside,) = tmp_path.glob(f".{index.folder.name}.*")
    assert len(list(aside.iterdir())) == len(list(index.folder.iterdir())) - 1
    with index.room():
        assert aside.exists(), "another job may still read it"


def test_what_the_writer_says_last_is_in_the_error(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        written_by_a_child("echo Traceback >&2; echo ValueError: odd >&2; false"),
        pytest.raises(DataError, match=f"^{tmp_path}: the process that writes the index of samples failed: ValueError"),
    ):
        shared_index.open_together(index_of(data, tmp_path))
    assert "Traceback\nValueError: odd\n" in capfd.readouterr().err


def test_what_the_writer_complains_of_is_the_error(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    index = index_of(tmp_path / "data")
    (tmp_path / "data" / "train.bin").write_bytes(b"")
    with written_by_a_child("true"), pytest.raises(DataError, match=r"^\S*train\.bin: truncated"):
        shared_index.open_together(index)
