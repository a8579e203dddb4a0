"""A file that one process at a time holds: the lock ends with the process, so a killed one never blocks the next."""

from __future__ import annotations

import errno
import fcntl

# What flock says on a file system without locks, as Lustre mounted without its option `flock`.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})


def try_lock(descriptor: int) -> OSError | None:
    """Lock an open file without waiting; over NFS it must be open for writing.

    Returns:
        None, or what its file system said where that has no locks: nobody notices a second process then.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return error
    return None
