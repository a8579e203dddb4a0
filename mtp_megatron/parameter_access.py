"""How the heads reach parameters that an engine may keep in pieces, and how it learns which gradients are complete."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


class ParameterAccess:
    """Every parameter is whole, and a gradient may arrive any number of times: autograd alone, megatron-core's DDP.

    Attributes:
        unembeddings: the unembedding weights, for an engine that must be spared looking them up in a forward pass;
            None: look them up.
        sharded: parameters are in pieces outside of :meth:`whole`. The unembedding's gradient is then delivered inside
            of it, and not returned from an autograd function, whose inputs must have kept their shapes.
    """

    unembeddings: tuple[Tensor, ...] | None = None
    sharded = False

    def whole(self, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Inside, these parameters have all of their values."""
        return nullcontext()

    def incomplete(self, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Gradients that reach these parameters inside are not the last ones of this microbatch."""
        return nullcontext()


PLAIN = ParameterAccess()
