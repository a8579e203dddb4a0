"""What the memory of a rank is spent on."""

from __future__ import annotations

from mtp_megatron.planning.live_memory import Allocation
from mtp_megatron.planning.makers import Maker

CATEGORIES = (
    "weights",
    "main gradients",
    "master weights",
    "Adam moments",
    "gradients",
    "z",
    "head",
    "logits chunk",
    "trunk activations",
    "optimizer temporaries",
    "batch",
    "other",
)
"""In the order of a table. *main gradients* are the buffers in which DDP sums them, *gradients* those on their way
there; *head* and *trunk activations* hold the gradients of activations too."""

_HEAD_MODULES = ("heads.", "final_norm", "output_layer", "unembedding_heads")


def categorise(allocation: Allocation, maker: Maker, unembeddings: set[tuple[int, ...]]) -> str:
    """Category of an allocation that nobody has named.

    Args:
        unembeddings: shapes ``[V/tp, h]`` of the unembeddings on this rank.
    """
    if maker.phase in ("optimizer", "first update"):
        return "optimizer temporaries"
    if maker.phase == "batch":
        return "batch"
    module = maker.module.rpartition(": ")[2]
    if maker.head or module.startswith(_HEAD_MODULES):
        if allocation.shape in unembeddings:
            return "gradients"
        rows = {shape[0] for shape in unembeddings}
        return "logits chunk" if allocation.shape and allocation.shape[-1] in rows and "loss" in maker.head else "head"
    if maker.phase == "forward and backward":
        return "trunk activations" if module or maker.backward else "other"
    return "other"
