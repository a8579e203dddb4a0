"""Errors that a user of the package can cause: each names what was wrong, the value received and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class MTPError(Exception):
    """Base of all errors that this package raises on purpose; the command line prints them without a traceback."""


class ConfigError(MTPError, ValueError):
    """A setting, or a combination of settings, that cannot work.

    Args:
        field: dotted name of the setting as the user wrote it, for example ``heads.n``.
        value: the value received.
        problem: what is wrong with it.
        remedy: what to set instead.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field}={value!r}: {problem}. {remedy}")


class DataError(MTPError):
    """A data set, tokenizer or corpus that is missing, damaged or does not fit the model."""


class CheckpointError(MTPError):
    """A checkpoint or export that is missing, damaged or of another architecture."""


class PathError(MTPError):
    """A path that the file system does not let this user use."""


@contextmanager
def paths_explained() -> Iterator[None]:
    """Around what a user's command does with paths: even to ask whether a file is there raises PermissionError below a
    folder that may not be entered, so it is caught here and not at each question.

    Raises:
        PathError: in place of such an error, or of a name that is too long.
    """
    try:
        yield
    except OSError as error:
        path = error.filename
        if path is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        remedy = "Choose a shorter one."
        if error.errno != errno.ENAMETOOLONG:
            remedy = (
                f"Choose another path, or let user {os.geteuid()} use this one: it takes the right to enter each "
                f"folder on the way, which 'namei -l {path}' shows."
            )
        raise PathError(f"{path}: {error.strerror}. {remedy}") from error
