"""Compiled extensions: each fits one build of torch, and only an import tells whether it is this one."""

from __future__ import annotations

import functools
import importlib
import warnings

from mtp_megatron.imports import imports_that_stay


@functools.cache
def why_not_importable(module: str) -> str | None:
    """Why a module that was found cannot be imported, in one line; None where it can.

    It is imported, and stays: only to be asked where there is a GPU for it, and where a model shall be built with it.
    """
    import torch  # noqa: F401 - brings the libraries that extensions are linked against

    with imports_that_stay(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - undefined symbols, missing libraries, asserted versions, torch's names
            said = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {said[0]}"
    return None


def why_none_importable(*modules: str) -> str | None:
    """:func:`why_not_importable` of the first of these modules that cannot be imported."""
    return next((reason for module in modules if (reason := why_not_importable(module)) is not None), None)
