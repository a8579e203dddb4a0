"""Tests with the real Transformer Engine and without a GPU: tools/te_lane.sh has an environment for them.

They need a process of their own, as Megatron decides at its import whether there is a Transformer Engine, and elsewhere
in this suite there must be none. Without ``MTP_TE_LANE`` a single test is collected, and skipped with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

LANE = bool(os.environ.get("MTP_TE_LANE"))
OTHERS = (
    "checkpoints",
    "exactness",
    "experts",
    "gpu_code",
    "megatron_lm",
    "megatron_lm_experts",
    "modules",
    "quantised_pass",
    "recipe_loop",
)
collect_ignore = [] if LANE else [f"test_{name}.py" for name in OTHERS]
if LANE:
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # read at its import: seconds for each function, and it asks for the device

    from tests.transformer_engine.pretend import import_transformer_engine

    import_transformer_engine()


@pytest.fixture
def pretend_gpu() -> Iterator[Callable[..., None]]:
    """Call it (with a compute capability, where 9.0 will not do) to have one until the test ends."""
    from tests.transformer_engine import pretend

    with pytest.MonkeyPatch.context() as monkeypatch:
        yield lambda *capability: pretend.pretend(monkeypatch, *capability)
    pretend.forget()
