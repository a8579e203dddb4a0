"""Runs a script of a Megatron-LM checkout, unmodified, on a machine without a GPU and on given weights:

python tests/megatron_lm_script.py WEIGHTS SCRIPT [ARGUMENTS]

WEIGHTS is a file of whole tensors by the reference's names (tests.parity), or "drawn".
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch


def main() -> None:
    from mtp_megatron.compat import megatron_lm

    megatron_lm.prepare()
    weights = sys.argv[1]
    sys.argv = sys.argv[2:]
    if weights != "drawn":
        from megatron.training import training

        training.get_megatron_optimizer = _filled(training.get_megatron_optimizer, torch.load(weights))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _filled(original: Callable[..., Any], parameters: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """Upstream's maker of the optimizer, which is the first to see the whole model; the weights go in before it."""

    def make(config: Any, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        from megatron.training.training import unwrap_model

        from tests.megatron_lm import as_plain_gpt
        from tests.parity import fill

        chunks = unwrap_model(model)
        fill(chunks, parameters if hasattr(chunks[-1], "heads") else as_plain_gpt(parameters))
        return original(config, model, *args, **kwargs)

    return make


if __name__ == "__main__":  # checkpointing spawns processes, which import this file again
    main()
