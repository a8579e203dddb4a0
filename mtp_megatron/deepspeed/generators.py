"""The state of every random generator of a rank as plain numbers and tensors, for a file that is read without pickle's
more dangerous parts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generators() -> dict[str, Any]:
    """This rank's generators; data parallel ranks draw alike, so DeepSpeed's one copy of a client state is enough."""
    from megatron.core import tensor_parallel

    state: Any = np.random.get_state()  # noqa: NPY002 - megatron-core's data sets draw from it
    name, keys, *rest = state
    return {
        "random": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Put back what :func:`generators` recorded."""
    from megatron.core import tensor_parallel

    random.setstate(state["random"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    torch.cuda.set_rng_state(state["cuda"].cpu())
    tensor_parallel.get_cuda_rng_tracker().set_states({key: value.cpu() for key, value in state["tracker"].items()})
