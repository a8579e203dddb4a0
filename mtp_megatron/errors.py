"""Errors that a user of the package can cause: each names what was wrong, the value received and the remedy."""

from __future__ import annotations


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
