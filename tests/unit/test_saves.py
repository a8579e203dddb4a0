"""Asynchronous saves without a training: what is copied and written, what waits for what, and what errors leave."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.api import CheckpointException

from mtp_megatron import compat
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training import background_save
from mtp_megatron.training.background_save import BackgroundSave, Written
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder
from mtp_megatron.training.saves import Saves


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """This process alone."""
    compat.prepare()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestHostCopies:
    """:class:`.checkpoint_writer.HostCopies` as torch's save uses it."""

    @staticmethod
    def state() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        whole = torch.randn(6, 8, generator=generator)
        return {
            "a view": whole[2:4],
            "transposed": torch.randn(4, 3, generator=generator).t(),
            "bf16": torch.randn(5, generator=generator).bfloat16(),
            "a parameter": torch.nn.Parameter(torch.randn(2, 2, generator=generator)),
            "an object": {"step": 3, "a list": [1, 2]},
        }

    @pytest.fixture
    def twin(self, tmp_path: Path) -> bytes:
        """What the writer that does not copy makes of it."""
        from mtp_megatron.training.checkpoint_writer import TensorByTensor

        torch.distributed.checkpoint.save(self.state(), storage_writer=TensorByTensor(tmp_path / "twin"))
        return (tmp_path / "twin" / "__0_0.distcp").read_bytes()

    def copies(self, folder: Path, state: dict[str, Any]) -> Any:
        from mtp_megatron.training.checkpoint_writer import HostCopies

        copies = HostCopies(folder)
        torch.distributed.checkpoint.save(state, storage_writer=copies)
        return copies

    def test_the_file_is_that_of_a_save_at_once_whatever_becomes_of_the_tensors(
        self, twin: bytes, tmp_path: Path
    ) -> None:
        state, folder = self.state(), tmp_path / "copies"
        copies = self.copies(folder, state)
        assert not list(folder.iterdir()), "nothing is written yet"
        assert copies.size >= sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.detach().zero_()
            else:
                value["a list"].append(3)
        results = copies.write()
        assert (folder / "__0_0.distcp").read_bytes() == twin
        assert copies.written == 6, "the object's two entries lie there one by one"
        copies.write_index([results])
        loaded = {key: torch.zeros_like(value) for key, value in state.items() if isinstance(value, torch.Tensor)}
        torch.distributed.checkpoint.load(loaded, checkpoint_id=folder)
        for key, tensor in loaded.items():
            assert torch.equal(tensor, self.state()[key]), key

    def test_it_is_given_up_at_the_next_tensor(self, tmp_path: Path) -> None:
        from mtp_megatron.training.checkpoint_writer import Dropped

        copies = self.copies(tmp_path / "copies", self.state())
        copies.drop()
        with pytest.raises(Dropped):
            copies.write()
        assert copies.written == 0

    def test_given_up_at_the_last_tensor_it_is_not_put_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where many GB wait for a slow disk, that takes minutes, in which the rank would not end."""
        from mtp_megatron.training import checkpoint_writer

        copies, save = self.copies(tmp_path / "copies", {"one": torch.ones(2)}), torch.save
        monkeypatch.setattr(torch, "save", lambda *args: (save(*args), copies.drop()))
        monkeypatch.setattr(checkpoint_writer.os, "fsync", lambda descriptor: pytest.fail("put on the disk"))
        with pytest.raises(checkpoint_writer.Dropped):
            copies.write()
        assert copies.written == 1


class Copies:
    """In place of a rank's copies: parts that are written when the test says so."""

    def __init__(self, parts: int = 1) -> None:
        self.size, self.written, self.parts = 7, 0, parts
        self.index: list[Any] | None = None
        self.step = threading.Semaphore(0)
        self.error: Exception | None = None
        self.dropped = False

    def write(self) -> list[Any]:
        while self.written < self.parts and not self.dropped:
            self.step.acquire()
            if self.error is not None:
                raise self.error
            self.written += 1
        return ["results"]

    def write_index(self, results: list[Any]) -> None:
        self.index = results

    def drop(self) -> None:
        self.dropped = True
        self.step.release()


def background(copies: Any, published: list[str], folder: Path = Path("iter_0000004")) -> BackgroundSave:
    return BackgroundSave(4, folder, copies, lambda: published.append("published"))


class TestBackgroundSave:
    def test_it_is_published_with_what_every_rank_wrote(self) -> None:
        copies, published = Copies(), list[str]()
        save = background(copies, published)
        assert save.writing
        assert copies.index is None
        copies.step.release()
        save.wait(1.0, lambda: None)
        assert not save.writing
        assert not published
        written = save.publish()
        assert (copies.index, published, written.largest) == ([["results"]], ["published"], 7)
        assert written.seconds > 0

    def test_waiting_takes_as_long_as_something_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each part within the limit of a minute, all of them in more."""
        copies = Copies(parts=4)
        looks: list[int] = []

        def monotonic() -> float:
            """Ten seconds pass between two looks at it, and in every fourth of these spans a part is written."""
            looks.append(copies.written)
            if len(looks) % 4 == 0 and looks[-1] < copies.parts:
                copies.step.release()
                while copies.written == looks[-1]:
                    time.sleep(0.001)
            return 10.0 * len(looks)

        clock = SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter)
        monkeypatch.setattr(background_save, "time", clock)
        heard: list[int] = []
        background(copies, []).wait(1.0, lambda: heard.append(copies.written))
        assert len(looks) >= 16
        assert heard[-1] >= 3

    def test_a_disk_that_takes_nothing_more_is_an_error(self) -> None:
        copies = Copies()
        save = background(copies, [], Path("run/iter_0000004"))
        with pytest.raises(CheckpointError, match=r"iter_0000004: 1 of 1 ranks .* train\.timeout_minutes=0\.002"):
            save.wait(0.002, lambda: None)
        save.drop()
        assert not save.writing

    def test_an_error_of_the_thread_is_raised_where_the_training_asks(self) -> None:
        copies, published = Copies(), list[str]()
        copies.error = OSError(errno.ENOSPC, "No space left on device")
        save = background(copies, published)
        copies.step.release()
        save.wait(1.0, lambda: None)
        with pytest.raises(CheckpointException, match="No space left on device"):
            save.publish()
        assert copies.index is None
        assert not published


class Pending:
    """In place of a :class:`BackgroundSave`, on a rank that has written."""

    def __init__(self, events: list[str], step: int, checkpoints: Path) -> None:
        self.events, self.step, self.folder = events, step, checkpoints / f"iter_{step:07d}"
        self.writing = True
        self.error: BaseException | None = None

    def wait(self, minutes: float, heard: Any) -> None:
        self.events.append(f"wait {self.step}")

    def publish(self) -> Written:
        self.events.append(f"publish {self.step}")
        if self.error is not None:
            raise self.error
        return Written(2_000_000_000, 3.0)

    def drop(self) -> None:
        self.events.append(f"drop {self.step}")


class Watch:
    """In place of a :class:`.HangWatch`."""

    what = ""

    def begin(self, what: str) -> None:
        self.what = what


class Run:
    """A :class:`Saves` whose host, log and watch note what they are asked for."""

    def __init__(self, path: Path, **train: Any) -> None:
        self.events: list[str] = []
        self.said: list[str] = []
        self.pending: list[Pending] = []
        self.folder = RunFolder(path)
        self.log: Any = SimpleNamespace(message=self.said.append, paused=self._paused)
        self.watch = watch = Watch()
        host: Any = SimpleNamespace(save=self._save, begin_save=self._begin)
        trainer: Any = None
        data: Any = None
        recipe: Recipe = parse_recipe({"train": {"async_save": True, **train}})
        self.saves = Saves(recipe, data, self.folder, host, trainer, cast(Any, watch))

    def save(self, step: int, last: bool = False) -> None:
        self.saves.save(self.log, step, last=last)

    def ends_by_error(self, failure: BaseException | None = None) -> None:
        """A training whose first save is under way, and fails with ``failure``."""
        with self.saves.settled_at_the_end(self.log):
            self.save(4)
            self.pending[0].error = failure
            self.watch.begin("step 5")
            raise ValueError("no data")

    def cannot_publish(self, failure: BaseException) -> None:
        with self.saves.settled_at_the_end(self.log):
            self.save(4)
            self.pending[0].error = failure
            self.saves.publish_if_written(self.log, False)

    def _save(self, recipe: Any, data: Any, trainer: Any, checkpoints: Path, step: int) -> Path:
        self.events.append(f"save {step}")
        return checkpoints / f"iter_{step:07d}"

    def _begin(self, recipe: Any, data: Any, trainer: Any, checkpoints: Path, step: int) -> Pending:
        self.events.append(f"begin {step}")
        (checkpoints / f"iter_{step:07d}.tmp").mkdir(parents=True)
        self.pending.append(Pending(self.events, step, checkpoints))
        return self.pending[-1]

    def _paused(self) -> Any:
        return contextlib.nullcontext()


class TestSaves:
    def test_it_is_published_when_no_rank_writes_any_more(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        assert not run.saves.writing
        run.save(4)
        assert run.saves.writing
        run.pending[0].writing = False  # this rank has; another has not
        run.saves.publish_if_written(run.log, True)
        assert run.events == ["begin 4"]
        run.saves.publish_if_written(run.log, False)
        run.saves.publish_if_written(run.log, False)
        assert run.events == ["begin 4", "publish 4"]
        assert run.said[-1].startswith(
            "saved checkpoints/iter_0000004, written in 3.0 s (2.00 GB by the rank with most); the training stood "
        )

    def test_one_is_written_at_a_time_and_the_last_one_at_once(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        with run.saves.settled_at_the_end(run.log):
            run.save(4)
            run.save(8)
            run.save(9, last=True)
        assert run.events == [*("begin 4", "wait 4", "publish 4", "begin 8"), *("wait 8", "publish 8", "save 9")]
        assert [line for line in run.said if "waited" in line] == [
            "the save of step 8 waited 0.0 s for step 4 to be written",
            "the save of step 9 waited 0.0 s for step 8 to be written",
        ]

    def test_without_the_setting_nothing_is_copied(self, tmp_path: Path) -> None:
        run = Run(tmp_path, async_save=False)
        run.save(4)
        assert run.events == ["save 4"]

    def test_nothing_is_being_written_at_the_end(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        with run.saves.settled_at_the_end(run.log):
            run.save(4)
        assert run.events == ["begin 4", "wait 4", "publish 4"]

    def test_an_error_of_a_process_alone_waits_for_it(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        with pytest.raises(ValueError, match="no data"):
            run.ends_by_error()
        assert run.events == ["begin 4", "wait 4", "publish 4"]
        assert run.watch.what == "step 5", "whoever explains the error says where it happened"

    def test_the_error_is_the_news_even_where_the_save_fails_too(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        with pytest.raises(ValueError, match="no data") as raised:
            run.ends_by_error(OSError(errno.ENOSPC, "No space left on device"))
        (note,) = raised.value.__notes__
        assert "could not be saved: OSError: [Errno 28] No space left on device" in note

    def test_an_error_of_one_rank_of_several_waits_for_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Run(tmp_path)
        monkeypatch.setattr(dist, "get_world_size", lambda: 4)
        with pytest.raises(ValueError, match="no data"):
            run.ends_by_error()
        assert run.events == ["begin 4", "drop 4"]
        assert run.said[-1] == "step 4 was still being written, and is given up"

    def test_a_failure_says_so_once_and_leaves_nothing_on_the_disk(self, tmp_path: Path) -> None:
        run = Run(tmp_path)
        cause: Any = (OSError(errno.ENOSPC, "No space left on device"), None)
        with pytest.raises(CheckpointException):
            run.cannot_publish(CheckpointException("write", {2: cause}))
        assert run.events == ["begin 4", "publish 4", "drop 4"]
        assert run.said[-1].startswith(
            "step 4 could not be saved (rank 2: OSError: [Errno 28] No space left on device); "
        )
        assert not list(run.folder.checkpoints.iterdir())
