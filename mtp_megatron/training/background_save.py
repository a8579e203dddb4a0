"""One checkpoint that a thread of each rank writes from copies in host memory while the training goes on.

The thread calls no collective and touches nothing that the training does: what ranks have to agree on, and the index of
the checkpoint, are for the thread of the training. It ends with its process, however that dies, and then what it wrote
is a folder that no resumption looks at and the next save removes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from mtp_megatron import compat
from mtp_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from mtp_megatron.training.checkpoint_writer import HostCopies

_LONGEST_LOOK = 1.0  # seconds between two questions whether all have written, while the training waits for that
_ENDS_WITHIN = 60.0  # seconds that a thread whose checkpoint is given up gets to finish the tensor that it is at


@dataclass(frozen=True)
class Written:
    """What a checkpoint took.

    Attributes:
        largest: bytes that the rank with most of it has copied and written.
        seconds: of the slowest rank's writing.
    """

    largest: int
    seconds: float


class BackgroundSave:
    """Begins to write as it is made; then :meth:`publish` or :meth:`drop`, once.

    Args:
        step: of the run, after which the copies were taken.
        folder: of the checkpoint when it is published.
        copies: this rank's.
        publish: makes it the latest checkpoint, on rank 0, when all ranks have written.
    """

    def __init__(self, step: int, folder: Path, copies: HostCopies, publish: Callable[[], None]) -> None:
        self.step, self.folder, self._copies, self._publish = step, folder, copies, publish
        self._results: list[WriteResult] = []
        self._error: BaseException | None = None
        self._began, self._seconds = time.perf_counter(), 0.0
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether this rank has not written all of its copies yet. An error ends that as well."""
        return self._thread.is_alive()

    def wait(self, minutes: float, heard: Callable[[], None]) -> None:
        """Return when no rank writes any more; collective. No collective waits for a disk: each is over at once.

        Args:
            minutes: how long all ranks together may write nothing.
            heard: called whenever some rank has written something.

        Raises:
            CheckpointError: on every rank, when that has passed.
        """
        known, since, look = -1, time.monotonic(), 0.01
        while True:
            late = time.monotonic() - since > 60 * minutes
            told = [self.writing, self._copies.written, late]
            agreed = torch.tensor(told, dtype=torch.int64, device=compat.device())
            dist.all_reduce(agreed)
            writing, written, any_late = agreed.tolist()
            if not writing:
                return
            if written > known:
                known, since = written, time.monotonic()
                heard()
            elif any_late:
                raise CheckpointError(
                    f"{self.folder}: {writing} of {dist.get_world_size()} ranks have not written their share of it, "
                    f"and nothing more of it within train.timeout_minutes={minutes:g}. Look at the disk or network "
                    "file system; where it is only slow, set train.timeout_minutes higher."
                )
            self._thread.join(look)
            look = min(2 * look, _LONGEST_LOOK)

    def publish(self) -> Written:
        """Make it the latest checkpoint, when no rank writes any more; collective.

        Raises:
            CheckpointException: on every rank, where any could not write, or rank 0 not publish; torch's, as of
                :func:`.checkpointing.save_checkpoint`.
        """
        return _DistWrapper(None, True, 0).all_reduce("write", self._own, self._put_together)

    def drop(self) -> None:
        """Give it up: this rank writes no further tensor."""
        self._copies.drop()
        self._thread.join(_ENDS_WITHIN)

    def _write(self) -> None:
        try:
            self._results = self._copies.write()
        except BaseException as error:  # noqa: BLE001 - it is raised where the training asks
            self._error = error
        self._seconds = time.perf_counter() - self._began

    def _own(self) -> tuple[list[WriteResult], int, float]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results, self._copies.size, self._seconds

    def _put_together(self, told: list[tuple[list[WriteResult], int, float]]) -> Written:
        self._copies.write_index([results for results, _, _ in told])
        self._publish()
        return Written(max(size for _, size, _ in told), max(seconds for _, _, seconds in told))
