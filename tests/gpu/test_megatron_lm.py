"""Megatron-LM's own loop on a GPU with ``--fp8-format hybrid``; tests/transformer_engine has it without one.

Needs Transformer Engine and a megatron-core that brings the loop (0.17.1 or later, or a checkout).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mtp_megatron.compat import fp8
from tests.fp8_runs import Seen, train_megatron_lm
from tests.harness import run_world
from tests.megatron_lm import CASE, MODEL, TRAINING, needs_megatron_lm, scalars
from tests.parity import make_parameters

pytestmark = [pytest.mark.gpu, needs_megatron_lm]

STEPS, MICROBATCHES, HEADS = 6, 2, 3
ENGINE = "--transformer-impl transformer_engine --bf16"


def losses(folder: Path, arguments: str) -> tuple[Seen, dict[int, float]]:
    """What one rank saw, and head 1's losses by step."""
    parameters = make_parameters(replace(CASE, heads={"n": HEADS}))
    common = f"--mtp-heads {HEADS} --train-iters {STEPS} --no-gradient-accumulation-fusion --tensorboard-dir"
    argv = [*f"{MODEL} {TRAINING} {common}".split(), str(folder), *arguments.split()]
    (seen,) = run_world(train_megatron_lm, 1, argv, parameters, timeout=300)
    return seen, scalars(folder)["lm loss"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_hybrid_is_the_trunks(recipe: str, tmp_path: Path) -> None:
    if (reason := fp8.why_not(fp8.SCALINGS[recipe], fp8.this_machine())) is not None:
        pytest.skip(f"{recipe}: {reason}")
    bf16, expected = losses(tmp_path / "bf16", ENGINE)
    assert not any(bf16.trunk + bf16.heads)
    seen, found = losses(tmp_path / "fp8", f"{ENGINE} --fp8-format hybrid --fp8-recipe {recipe}")
    assert all(seen.trunk)
    assert len(seen.trunk) == len(bf16.trunk) > 0
    assert len(seen.heads) == len(bf16.heads) > 0
    assert not any(seen.heads)
    microbatches = STEPS * MICROBATCHES
    assert seen.regions == microbatches * (1 if recipe == "delayed" else CASE.num_trunk_layers)
    furthest = max(abs(found[step] - expected[step]) for step in expected)
    assert 1e-4 < furthest < 0.05, "FP8 takes part, and costs little"
