"""A run may be resumed where another Adam is: torch's, or Transformer Engine's or Apex's, with their state elsewhere.

The fused one is a stand-in for Transformer Engine's; tests/transformer_engine/test_checkpoints.py has the real one.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mtp_megatron import compat
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.adam_runs import Adam, fused_adam, trained
from tests.training_runs import VOCAB, make_data, tiny_tree


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about what a CPU has: torch's Adam")
@pytest.mark.parametrize("saved_by", ["torch", "fused"])
@pytest.mark.parametrize("loaded_by", ["torch", "fused"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("distributed", [False, True], ids=["each rank its own", "distributed"])
def test_a_run_goes_on(tmp_path: Path, saved_by: str, loaded_by: str, precision: str, distributed: bool) -> None:
    compat.prepare()
    tree = tiny_tree(
        make_data(tmp_path), tmp_path / "run", train__precision=precision, optimizer__distributed=distributed
    )
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)

    def adam(of: str, save: bool) -> Adam:
        with fused_adam() if of == "fused" else nullcontext():
            return trained(recipe, tmp_path, save)[1]

    saved, loaded = adam(saved_by, save=True), adam(loaded_by, save=False)
    assert saved.step == loaded.step == 2
    assert saved.moments[0].abs().max() > 0
    torch.testing.assert_close(loaded.moments, saved.moments, rtol=1e-6, atol=0)
