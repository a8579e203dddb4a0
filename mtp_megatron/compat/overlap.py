"""Transformer Engine's overlap of tensor parallel communication with multiplications (``tp_comm_overlap``).

It communicates through buffers of its own ("userbuffers"), allocated once and shared by all layers of the same name
(qkv, proj, fc1, fc2). The trunk uses them; the heads' layers do without (:func:`without_overlap`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mtp_megatron.compat.versions import EnvironmentUnsupported

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def without_overlap(config: TransformerConfig) -> TransformerConfig:
    """``config`` for layers that communicate as if there were no userbuffers; itself, where nothing has to change.

    A layer looks its buffer up by name and by whether it runs in FP8 itself (Transformer Engine's ``get_ub``). A head
    in bf16 on a trunk in FP8 would find none. Where both are in the same type the buffers would fit, but no heads have
    been run with them.
    """
    if not config.tp_comm_overlap:
        return config
    config = copy.copy(config)
    config.tp_comm_overlap = False
    return config


@contextmanager
def userbuffers(
    config: TransformerConfig, *, tokens: int, abandon: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """The buffers that ``config.tp_comm_overlap`` needs, for the time of a run; collective over all ranks.

    As Megatron-LM does when it starts (``_initialize_tp_communicators``): megatron-core itself leaves it to its caller.

    Args:
        tokens: of one microbatch on all tensor parallel ranks together, ``sequence * micro_batch_size / context``.
        abandon: asked after an error: whether to leave the buffers to the end of the process. Giving them back waits
            for this rank's streams, whose kernels may wait for other ranks, and unmaps memory that those may be writing
            to: they would fail of an illegal address before the error here is seen (Transformer Engine's
            ``~CommOverlapBase``, ``destroy_communicator``).

    Raises:
        EnvironmentUnsupported: a Transformer Engine that cannot tell layers in FP8 from others (before 2.7).
    """
    if not config.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    modes: Any = getattr(base, "UserBufferQuantizationMode", None)
    if modes is None:
        raise EnvironmentUnsupported(
            "parallel.tp_comm_overlap needs Transformer Engine 2.7 or later. Install it, or set this to false."
        )
    quantised = [modes.FP8] if config.fp8 else [modes.NONE]
    if config.fp8 and config.first_last_layers_bf16:
        quantised.append(modes.NONE)  # for the trunk's layers in bf16
    try:
        base.initialize_ub(
            shape=[tokens, config.hidden_size],
            tp_size=config.tensor_model_parallel_size,
            quantization_modes=quantised,
            dtype=config.params_dtype,
            bootstrap_backend=config.tp_comm_bootstrap_backend,
        )
        yield
    except BaseException:
        if not abandon():  # those that it had made when it failed, too: it refuses to begin again beside them
            base.destroy_ub()
        raise
    base.destroy_ub()
