"""Repairs of megatron-core's pure-torch fallbacks, on any device without Transformer Engine and Apex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtp_megatron.compat.patching import Replacement, replace


def _norm_with_sequence_parallel(original: Callable[..., Any]) -> Any:
    """Build the norm as upstream does, also under sequence parallelism.

    Upstream refuses because its torch norm does not mark its weights: `finalize_model_grads` sums the gradients of
    parameters whose `sequence_parallel` is true over the tensor parallel ranks. Marking them is all that is missing.
    """

    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> torch.nn.Module:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, hidden_size, eps, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    return staticmethod(new)


def _state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Allocate Adam's moments before the first step, as upstream's extraction of 'step' asserts that there is one."""

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return original(self)

    return state_dict


def _load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give every parameter its own step: upstream hands out one tensor, which then advances once per *parameter*."""

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    return load_state_dict


def _set_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Copy what the checkpoint holds: 'step' travels with the parameter groups, upstream raises KeyError for it."""

    def set_main_param_and_optimizer_states(
        self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            for key, destination in {"param": main, **self.optimizer.state[main]}.items():
                if key in tensors:
                    destination.copy_(tensors[key])

    return set_main_param_and_optimizer_states


NORM = Replacement(
    "megatron.core.transformer.torch_norm.WrappedTorchNorm",
    "__new__",
    _norm_with_sequence_parallel,
    "refuses sequence parallelism",
)
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
TORCH_ADAM: tuple[Replacement, ...] = (
    Replacement(_OPTIMIZER, "state_dict", _state_dict, "asserts at a checkpoint load, when no step was taken yet"),
    Replacement(
        _OPTIMIZER, "load_state_dict", _load_state_dict, "shares one 'step' tensor: wrong bias correction, silently"
    ),
    Replacement(_OPTIMIZER, "_set_main_param_and_optimizer_states", _set_states, "KeyError: 'step'"),
)
ROUTER = Replacement(
    "megatron.core.transformer.moe.moe_utils",
    "te_general_gemm",
    lambda original: None,
    "NameError in the routers of expert layers: before 0.19 the name exists only with Transformer Engine",
    missing=True,
)
ALL = (NORM, *TORCH_ADAM, ROUTER)

_undo: list[Callable[[], None]] = []


def installed() -> bool:
    """Whether the repairs are in place."""
    return bool(_undo)


def needed() -> tuple[Replacement, ...]:
    """Those of the repairs that this environment needs."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils

    rows = [NORM]
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        rows += TORCH_ADAM
    if not hasattr(moe_utils, ROUTER.name):
        rows.append(ROUTER)
    return tuple(rows)


def install() -> None:
    """Apply the repairs that this environment needs; a second call does nothing."""
    if installed():
        return
    for row in needed():
        replace(row, _undo)


def uninstall() -> None:
    """Put every original back, in reverse order."""
    while _undo:
        _undo.pop()()
