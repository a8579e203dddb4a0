"""For upstream's own ``pretrain_gpt.py`` (patches/): its parts, or with ``--mtp-heads`` this package's."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mtp_megatron.compat import megatron_lm
from mtp_megatron.megatron_lm.arguments import add_mtp_args

ArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def extra_args(provider: ArgsProvider | None) -> ArgsProvider:
    """The arguments that ``provider`` adds, and the heads'; makes this process ready for them."""
    megatron_lm.prepare()

    def both(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_mtp_args(provider(parser) if provider is not None else parser)

    return both


def model_provider_or(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``upstream``, the model provider without heads."""

    def provide(*args: Any, **kwargs: Any) -> Any:
        if not _wants_heads():
            return upstream(*args, **kwargs)
        from mtp_megatron.megatron_lm.model import model_provider

        return model_provider(*args, **kwargs)

    return provide


def forward_step_or(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """``upstream``, the forward step without heads."""

    def step(*args: Any, **kwargs: Any) -> Any:
        if not _wants_heads():
            return upstream(*args, **kwargs)
        from mtp_megatron.megatron_lm.step import forward_step

        return forward_step(*args, **kwargs)

    return step


def _wants_heads() -> bool:
    from megatron.training import get_args

    return get_args().mtp_heads is not None
