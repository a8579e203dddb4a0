"""On a GPU a run goes on from its checkpoint, with the Adam that Megatron takes there (Transformer Engine's, Apex's).

tests/unit/test_adam_state.py and tests/transformer_engine/test_checkpoints.py have what a CPU can show.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.adam_runs import trained
from tests.training_runs import VOCAB, make_data, tiny_tree

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("distributed", [False, True], ids=["each rank its own", "distributed"])
def test_adam_goes_on_where_it_was(distributed: bool, tmp_path: Path) -> None:
    tree = tiny_tree(make_data(tmp_path), tmp_path / "run", train__precision="bf16", optimizer__distributed=distributed)
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)
    weights, saved = trained(recipe, tmp_path, save=True)
    again, loaded = trained(recipe, tmp_path, save=False)
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    assert saved.step == loaded.step == 2
    assert saved.moments[0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(saved.moments, loaded.moments, strict=True))
