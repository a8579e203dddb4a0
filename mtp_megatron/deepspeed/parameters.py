"""The parameters of a model under ZeRO: gathered for the heads, reduced once, summed over tensor parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron.model import MTPGPTModel
from mtp_megatron.parameter_access import ParameterAccess


class ZeroParameters(ParameterAccess):
    """Access to the parameters of a DeepSpeed engine.

    To be made before the engine is: ZeRO 3 takes a look at a weight during a forward pass for a wish to keep it
    gathered, so the unembeddings are looked up once, here.

    Args:
        stage: ``zero_optimization.stage``.
        overlapped: ``zero_optimization.overlap_comm``.
    """

    def __init__(self, model: MTPGPTModel, stage: int, overlapped: bool = False) -> None:
        self.unembeddings = tuple(model.unembeddings())
        self.sharded = stage == 3
        # ZeRO 2 and 3, and an overlapped ZeRO 1, reduce a gradient when it arrives and refuse a second one; DeepSpeed's
        # own tiled losses say with this attribute of a parameter that more is to come.
        self._reduces_on_arrival = stage >= 2 or (stage == 1 and overlapped)

    def whole(self, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
        wanted = list(parameters)
        if not self.sharded or not wanted:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(wanted)
        return gathered

    def incomplete(self, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
        wanted = list(parameters)
        return _not_ready(wanted) if self._reduces_on_arrival and wanted else nullcontext()


@contextmanager
def _not_ready(parameters: list[Any]) -> Iterator[None]:
    for parameter in parameters:
        parameter.ds_grad_is_ready = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.ds_grad_is_ready = True


def sum_over_tensor_ranks(model: MTPGPTModel) -> None:
    """Sum the gradients of replicated parameters that see a share of the tokens, or of the attention heads, only.

    What ``finalize_model_grads`` does once a step, for an engine that reduces gradients as they arrive: in a hook of
    each such parameter (norms under sequence parallelism; norms of queries and keys).
    """
    config = model.config
    if config.tensor_model_parallel_size == 1:
        return
    group = model.tensor_parallel_group

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=group)
        return total

    for name, parameter in model.named_parameters():
        shares_tokens = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        shares_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if parameter.requires_grad and (shares_tokens or shares_heads):
            parameter.register_hook(summed)


def parameter_groups(model: MTPGPTModel, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices, and biases and norms, which megatron-core does not decay either."""
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (vectors if name.endswith(".bias") or parameter.dim() == 1 else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": vectors, "weight_decay": 0.0, "wd_mult": 0.0},
    ]
    return [group for group in groups if group["params"]]


def drop_empty_states(model: MTPGPTModel) -> None:
    """Leave megatron-core's extra states that are None out of the model's state dictionary, and do not miss them.

    DeepSpeed takes every entry for a tensor.
    """

    def drop(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in [key for key, value in state.items() if key.endswith("_extra_state") and value is None]:
            del state[key]

    def do_not_miss(module: Any, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith("_extra_state")]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(do_not_miss)


@torch.no_grad()
def gradient_norm(model: MTPGPTModel) -> float:
    """Global norm of ``parameter.grad`` over the model; tensor parallel copies count once. Collective."""
    from megatron.core import tensor_parallel

    group = model.tensor_parallel_group
    gradients = [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
    ]
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        total += gradient.double().square().sum()
    dist.all_reduce(total, group=group)
    return float(total.sqrt())
