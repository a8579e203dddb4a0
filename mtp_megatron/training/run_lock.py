"""The lock of a run's folder: one job at a time. Imports neither torch nor megatron."""

from __future__ import annotations

import logging
import os
from io import FileIO

from mtp_megatron.errors import ConfigError
from mtp_megatron.file_lock import try_lock
from mtp_megatron.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def take_lock(folder: RunFolder, token: str) -> FileIO:
    """Lock the run's folder and write ``token`` into the lock's file, which holds until it is closed.

    Raises:
        ConfigError: another job holds it, or the file system does not let it be made, locked or written.
    """
    path = str(folder.path)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = folder.lock.open("ab", buffering=0)
        if none := try_lock(lock.fileno()):
            logger.warning(
                "run.path=%r: its file system has no locks (%s), so nobody notices a second job that is started in it. "
                "Mount it with them (Lustre: -o flock), or take care: two jobs in one folder damage the run.",
                path,
                none,
            )
        lock.truncate(0)
        lock.write(token.encode())
    except BlockingIOError as error:
        raise ConfigError(
            "run.path", path, "another job is writing to it", "Wait for it to end, or choose another."
        ) from error
    except OSError as error:
        raise ConfigError(
            "run.path", path, f"it cannot be written ({error})", "Choose a folder that can be."
        ) from error
    # A process that reads data would hold it on when this one is killed, until it has noticed.
    os.register_at_fork(after_in_child=lock.close)
    return lock
