"""A whole ``pretrain_gpt.py`` with heads, for every supported release of Megatron-LM."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from mtp_megatron.compat import devices, kernels, megatron_lm
from mtp_megatron.errors import MTPError
from mtp_megatron.megatron_lm.arguments import add_mtp_args, check_args


def pretrain_mtp(args_defaults: dict[str, Any] | None = None) -> None:
    """Train with Megatron-LM's loop and arguments (``sys.argv``) and the heads' (``--mtp-heads`` and so on).

    Args:
        args_defaults: values of arguments that the command line leaves out.

    Raises:
        EnvironmentUnsupported: no Megatron-LM on the path, or none of the supported releases; GPUs that torch cannot
            use.
        ConfigError: an argument that cannot work with heads.
    """
    megatron_lm.prepare()
    from mtp_megatron.megatron_lm.datasets import train_valid_test_datasets_provider
    from mtp_megatron.megatron_lm.model import get_embedding_ranks, model_provider
    from mtp_megatron.megatron_lm.step import forward_step

    for slower in (devices.gpus_left_out(), kernels.slower_without_apex(), kernels.slower_without_triton()):
        if slower is not None and os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{slower}\n")
    megatron_lm.pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        forward_step,
        check_args=check_args,
        extra_args_provider=add_mtp_args,
        args_defaults=args_defaults,
        get_embedding_ranks=get_embedding_ranks,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m mtp_megatron.megatron_lm``: :func:`pretrain_mtp`, with the user's own errors as one line."""
    if argv is not None:
        sys.argv[1:] = list(argv)
    try:
        pretrain_mtp()
    except MTPError as error:
        sys.stderr.write(f"error: {error}\n")  # in one write: the ranks share a log
        return 2
    return 0
