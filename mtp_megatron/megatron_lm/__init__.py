"""Megatron-LM's ``pretrain`` as host: what its ``pretrain_gpt.py`` gives to it, with future-token heads.

    from mtp_megatron.megatron_lm import pretrain_mtp

    pretrain_mtp()                # a whole pretrain_gpt.py: arguments of the command line, Megatron-LM's loop

Or take the parts: ``add_mtp_args`` (Megatron-LM's ``extra_args_provider``), ``model_provider``, ``forward_step``,
``train_valid_test_datasets_provider`` and ``get_embedding_ranks``. Importing this package is cheap; its modules import
``megatron.training``, so they need Megatron-LM on the path (``compat.megatron_lm``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_megatron.megatron_lm.arguments import add_mtp_args
    from mtp_megatron.megatron_lm.datasets import train_valid_test_datasets_provider
    from mtp_megatron.megatron_lm.model import get_embedding_ranks, model_provider
    from mtp_megatron.megatron_lm.run import pretrain_mtp
    from mtp_megatron.megatron_lm.step import forward_step, loss_func

# name -> module that defines it, imported at first use
_LAZY = {
    "add_mtp_args": "arguments",
    "forward_step": "step",
    "get_embedding_ranks": "model",
    "loss_func": "step",
    "model_provider": "model",
    "pretrain_mtp": "run",
    "train_valid_test_datasets_provider": "datasets",
}

__all__ = [
    "add_mtp_args",
    "forward_step",
    "get_embedding_ranks",
    "loss_func",
    "model_provider",
    "pretrain_mtp",
    "train_valid_test_datasets_provider",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
