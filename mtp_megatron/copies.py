"""Tensors of the model that every stage with heads holds: the final norm and the unembedding, as upstream sees them.

:mod:`mtp_megatron.training.head_stages` keeps the copies equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedBase

if TYPE_CHECKING:
    from mtp_megatron.model import MTPGPTModel


def build_output_layer(model: MTPGPTModel, padded_vocab_size: int, tp_group: Any) -> Any:
    """An output layer as GPTModel builds it on the last stage alone; without a weight beside a tied embedding."""
    return tensor_parallel.ColumnParallelLinear(
        model.config.hidden_size,
        padded_vocab_size,
        config=model.config,
        init_method=model.config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=model.pre_process and model.share_embeddings_and_output_weights,
        tp_group=tp_group,
    )


def mark_copies(model: MTPGPTModel) -> None:
    """Tell megatron-core's data parallelism and optimizer of this stage's copies.

    ``shared_embedding``: in a bucket of its own, so that the distributed optimizer shards every copy alike. ``shared``:
    not counted in the gradient norm; one copy is, the last stage's, or the embedding where tied.
    """
    tied = model.share_embeddings_and_output_weights
    for parameter in model.final_norm.parameters():
        parameter.shared_embedding = True  # type: ignore[attr-defined]
        parameter.shared = not model.post_process  # type: ignore[attr-defined]
    weight = model.unembedding()
    weight.shared_embedding = True  # type: ignore[attr-defined]
    weight.shared = not model.pre_process if tied else not model.post_process  # type: ignore[attr-defined]
    weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]


def sharded_state_with_copies(model: MTPGPTModel, upstream: Callable[[], dict[str, Any]], prefix: str) -> Any:
    """The sharded state of a stage with heads before the last: its copies are loaded, and written by another stage.

    Args:
        upstream: makes the sharded state; for it, a stage with an output layer is the last one.
    """
    model.post_process = True
    try:
        state = upstream()
    finally:
        model.post_process = False
    copies = (f"{prefix}final_norm.", f"{prefix}output_layer.")
    for name, value in state.items():
        # Transformer Engine's norm has an `_extra_state` beside its weight.
        if name.startswith(copies) and isinstance(value, ShardedBase):
            value.replica_id = (1, *value.replica_id[1:])
    return state
