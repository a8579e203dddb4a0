"""Expert layers (mixture of experts): what differs between megatron-core's versions, and what a CPU needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtp_megatron.compat import versions

_LOSS = "load_balancing_loss"


def aux_loss_coefficient(coefficient: float, *, tensor: int, context: int) -> float:
    """The ``moe_aux_loss_coeff`` by which the load-balancing loss enters with ``coefficient``, whatever the version.

    With ``calculate_per_token_loss`` the router multiplies its loss with its own count of tokens. Before 0.19 it forgot
    that tensor and context parallel ranks each count only their share (Megatron-LM#5047), so that the loss weighed
    less by that factor; from 0.19 on it is exact.
    """
    return coefficient * (1 if versions.require_megatron_core().release >= (0, 19) else tensor * context)


def require_grouped_experts() -> None:
    """Refuse a Transformer Engine without grouped matrix multiplications.

    For ``moe_grouped_gemm`` megatron-core would take others without a word: one expert after the other (0.19), or a
    package of kernels that it has given up (0.16 to 0.18).

    Raises:
        EnvironmentUnsupported: they are not in it (before 1.9).
    """
    from megatron.core.extensions import transformer_engine

    if transformer_engine.TEColumnParallelGroupedLinear is None:
        raise versions.EnvironmentUnsupported(
            "a trunk with experts was asked for in Transformer Engine's layers, and the installed one has no grouped "
            "matrix multiplications. Install 1.9 or later, or build the layers without it."
        )


def take_load_balancing_loss() -> torch.Tensor:
    """Sum over this rank's routers and microbatches since the last call of their load-balancing losses, ``[]`` fp32.

    The losses come without their coefficient, and over tensor and context parallel ranks they add up. A perfectly even
    router has a loss of 1 per layer and microbatch.
    """
    taken = _tracked().pop(_LOSS, None)
    if taken is None:
        return torch.zeros(())
    values: torch.Tensor = taken["values"] if isinstance(taken, dict) else taken.values
    return values.sum()


def _tracked() -> Any:
    """Megatron's own record of the routers' losses by name: a dict before 0.17 or so, an object's dict after."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ModuleNotFoundError:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        return get_moe_layer_wise_logging_tracker()
    return get_moe_metrics_tracker().metrics


def draw_every_expert(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the constructor of megatron-core's experts so that each expert starts with weights of its own.

    On a GPU every expert parallel rank draws from a generator of its own. Weights made on the CPU come from one that
    is the same on all ranks, so that the first expert of each rank would be the same expert. Here every rank draws the
    experts of all ranks, in order, and keeps its own: the model is then the same at any expert parallel size.
    """

    def __init__(
        self: torch.nn.Module, num_local_experts: int, config: Any, submodules: Any, pg_collection: Any, **more: Any
    ) -> None:
        def discard(count: int) -> None:
            if count:
                original(type(self).__new__(type(self)), count, config, submodules, pg_collection, **more)

        before = pg_collection.ep.rank() * num_local_experts if config.use_cpu_initialization else 0
        discard(before)
        original(self, num_local_experts, config, submodules, pg_collection, **more)
        if config.use_cpu_initialization:
            discard(config.num_moe_experts - before - num_local_experts)

    return __init__
