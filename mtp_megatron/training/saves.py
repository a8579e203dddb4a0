"""The checkpoints that a training leaves on its way: saved while it waits or, with ``train.async_save``, while it goes
on; what the person who watches is told of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from mtp_megatron.data.blend import Blend
from mtp_megatron.training.checkpoint_files import temporary_folder
from mtp_megatron.training.hang_watch import HangWatch
from mtp_megatron.training.host import Host
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_folder import RunFolder
from mtp_megatron.training.run_log import RunLog
from mtp_megatron.training.step import Trainer

if TYPE_CHECKING:
    from mtp_megatron.training.background_save import BackgroundSave


class Saves:
    """Of one attempt, all ranks alike; at most one checkpoint is being written while the training goes on.

    Every method is collective, but for :attr:`writing` and for what happens after an error of one rank.
    """

    def __init__(
        self, recipe: Recipe, data: Blend, folder: RunFolder, host: Host, trainable: Trainer, watch: HangWatch
    ) -> None:
        self._recipe, self._data, self._folder, self._watch = recipe, data, folder, watch
        self._host, self._trainable = host, trainable
        self._pending: BackgroundSave | None = None
        self._stood = 0.0  # seconds that the training has stood still for it

    @property
    def writing(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self._pending is not None and self._pending.writing

    def save(self, log: RunLog, step: int, *, last: bool) -> None:
        """Save ``step``, after the checkpoint before it.

        Args:
            last: nothing is trained afterwards, so that nothing is gained by copies.
        """
        self.settle(log, f"the save of step {step}")
        self._watch.begin(f"the save of step {step}")
        start, what = time.perf_counter(), (self._recipe, self._data, self._trainable, self._folder.checkpoints, step)
        begin = self._host.begin_save if self._recipe.train.async_save and not last else None
        with self._explained(log, step):
            if begin is None:
                saved = self._host.save(*what)
            else:
                self._pending = begin(*what)
        seconds = time.perf_counter() - start
        if begin is None:
            log.message(f"saved {self._name(saved)} in {seconds:.1f} s")
        else:
            self._stood = seconds
            log.message(f"step {step} was copied to host memory in {seconds:.1f} s, and is written from there")

    def publish_if_written(self, log: RunLog, writing: bool) -> None:
        """After a step: make the checkpoint that was being written the latest.

        Args:
            writing: whether any rank still wrote it.
        """
        if self._pending is not None and not writing:
            with log.paused():
                self._publish(log, self._pending)

    def settle(self, log: RunLog, waiting: str) -> None:
        """Wait for the checkpoint that is being written, and make it the latest.

        Args:
            waiting: what waits for it.
        """
        pending = self._pending
        if pending is None:
            return
        start = time.perf_counter()
        what = f"the writing of step {pending.step}"
        self._watch.begin(what)
        with self._explained(log, pending.step):
            pending.wait(self._recipe.train.timeout_minutes, lambda: self._watch.begin(what))
        seconds = time.perf_counter() - start
        self._stood += seconds
        log.message(f"{waiting} waited {seconds:.1f} s for step {pending.step} to be written")
        self._publish(log, pending)

    def settle_before_error(self, log: RunLog, error: BaseException) -> None:
        """The same before all ranks end with ``error``, which is the news even where this fails, too."""
        what = self._watch.what
        try:
            self.settle(log, f"the end by {type(error).__name__}")
        except BaseException as another:  # noqa: BLE001 - torch's CheckpointException is no Exception
            error.add_note(f"besides, the checkpoint before it could not be saved: {_what(another)}")
        self._watch.begin(what)  # where the error came from: a GPU that is full names it

    @contextmanager
    def settled_at_the_end(self, log: RunLog) -> Iterator[None]:
        """Around the training: nothing is being written afterwards.

        After an error the other ranks may be in a collective that this one will never join, and then the checkpoint is
        given up.
        """
        try:
            yield
        except BaseException as error:
            pending = self._pending
            if pending is not None and dist.get_world_size() == 1:
                self.settle_before_error(log, error)
            elif pending is not None:
                self._pending = None
                log.message(f"step {pending.step} was still being written, and is given up")
                pending.drop()
            raise
        self.settle(log, "the end")

    def _publish(self, log: RunLog, pending: BackgroundSave) -> None:
        self._watch.begin(f"the save of step {pending.step}")
        start = time.perf_counter()
        with self._explained(log, pending.step):
            written = pending.publish()
        self._pending = None
        self._stood += time.perf_counter() - start
        log.message(
            f"saved {self._name(pending.folder)}, written in {written.seconds:.1f} s ({written.largest / 1e9:.2f} GB "
            f"by the rank with most); the training stood still for {self._stood:.1f} s"
        )

    @contextmanager
    def _explained(self, log: RunLog, step: int) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # torch's CheckpointException is no Exception
            if self._pending is not None:
                self._pending.drop()
                self._pending = None
            if dist.get_rank() == 0:  # the disk may be full of it, and the next start writes small files first
                shutil.rmtree(temporary_folder(self._folder.checkpoints, step), ignore_errors=True)
            log.message(
                f"step {step} could not be saved ({_what(error)}); {_free(self._folder.path)}. Checkpoints that were "
                "there are as they were, and the same command continues from the latest."
            )
            raise

    def _name(self, checkpoint: Path) -> Path:
        return checkpoint.relative_to(self._folder.path)


def _what(error: BaseException) -> str:
    """An error in a line; of torch's, which has those of the ranks, the first."""
    where = ""
    with suppress(AttributeError, ValueError, TypeError):
        rank, (error, _) = min(error.failures.items(), key=lambda failed: failed[0])  # type: ignore[attr-defined]
        where = f"rank {rank}: "
    return f"{where}{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e9:.1f} GB are free in {path}"
    except OSError as error:
        return f"{path} cannot be read ({error})"
