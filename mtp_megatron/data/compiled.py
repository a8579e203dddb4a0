"""megatron-core's compiled data set helpers, or an error that says how to get them."""

from __future__ import annotations

from types import ModuleType

from mtp_megatron import compat
from mtp_megatron.errors import DataError


def compiled_helpers() -> ModuleType:
    """``megatron.core.datasets.helpers_cpp``.

    Raises:
        DataError: megatron-core was installed without it.
    """
    compat.prepare()
    try:
        from megatron.core.datasets import helpers_cpp
    except ImportError as error:
        raise DataError(
            f"megatron-core was installed without its compiled data set helpers ({error}). Install the wheel for "
            "this Python and platform, or build it here: pip install --no-binary megatron-core megatron-core"
        ) from error
    helpers: ModuleType = helpers_cpp
    return helpers
