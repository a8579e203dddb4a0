"""A checkpoint of torch's norms is loaded into norms that keep an extra state, as Transformer Engine's do, and one is
found by either name where the two save it by different ones.

The norm is a stand-in with such a state; tests/transformer_engine/test_checkpoints.py has the real one.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mtp_megatron.compat import checkpoints
from mtp_megatron.compat.checkpoints import leave_experts_scales, take_unsaved_states
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import VOCAB, make_data, tiny_tree


def keeps_state(norm: torch.nn.Module, given: list[Any]) -> None:
    """Turn a norm into one that saves an empty extra state, and notes what it is given back."""

    def set_extra_state(self: Any, state: Any) -> None:
        given.append(state)

    methods = {"get_extra_state": lambda self: torch.empty(0, dtype=torch.uint8), "set_extra_state": set_extra_state}
    norm.__class__ = type("Keeping", (norm.__class__,), methods)


def test_a_checkpoint_without_them_is_loaded_and_they_stay_as_they_are(tmp_path: Path) -> None:
    from mtp_megatron.data.blend import load_blend
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
    from mtp_megatron.training.world import model_parallel_world

    tree = tiny_tree(make_data(tmp_path), tmp_path / "run")
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)
    given: list[Any] = []
    with model_parallel_world(recipe):
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        for parameter in model.parameters():
            parameter.main_grad.fill_(1e-3)
        trainable.update()  # a step, so that there are moments to be saved
        save_checkpoint(recipe, load_blend([(None, str(tmp_path / "data"))]), trainable, tmp_path / "checkpoints", 1)
        folder = latest_checkpoint(tmp_path / "checkpoints")
        assert folder is not None
        weight = model.final_norm.weight.detach().clone()
        with torch.no_grad():
            model.final_norm.weight.zero_()
        keeps_state(model.final_norm, given)
        assert load_checkpoint(recipe, trainable, folder) == 1
        torch.testing.assert_close(model.final_norm.weight, weight, rtol=0, atol=0)
        assert given == [None]

        # The control: what is missing and no extra state is still named.
        model.final_norm.register_buffer("scale", torch.ones(1))
        with pytest.raises(CheckpointError, match=r"final_norm\.scale"):
            load_checkpoint(recipe, trainable, folder)


def test_the_norm_before_experts_is_found_by_the_name_of_the_other_modules(tmp_path: Path) -> None:
    """The checkpoint's index with Transformer Engine's names in it: weights and moments come back."""
    from mtp_megatron.data.blend import load_blend
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint
    from mtp_megatron.training.world import model_parallel_world

    tree = tiny_tree(make_data(tmp_path), tmp_path / "run", model__num_experts=2)
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)
    with model_parallel_world(recipe):
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        weight = model.decoder.layers[2].pre_mlp_layernorm.weight
        for parameter in model.parameters():
            parameter.main_grad.fill_(1e-3)
        trainable.update()
        save_checkpoint(recipe, load_blend([(None, str(tmp_path / "data"))]), trainable, tmp_path / "checkpoints", 1)
        folder = latest_checkpoint(tmp_path / "checkpoints")
        assert folder is not None
        moment = trainable.optimizer.optimizer.state[weight]["exp_avg"]
        saved = weight.detach().clone(), moment.clone()
        assert saved[1].abs().min() > 0
        other_names(folder)
        with torch.no_grad():
            weight.zero_()
        moment.zero_()
        assert load_checkpoint(recipe, trainable, folder) == 1
        torch.testing.assert_close(weight, saved[0], rtol=0, atol=0)
        torch.testing.assert_close(trainable.optimizer.optimizer.state[weight]["exp_avg"], saved[1], rtol=0, atol=0)


def other_names(folder: Path) -> None:
    """Give the trunk's norms before the MLP the name that Transformer Engine's modules save them by."""
    ours, theirs = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    tensors = metadata.state_dict_metadata
    before = set(tensors)
    metadata.state_dict_metadata = {key.replace(ours, theirs): value for key, value in tensors.items()}
    metadata.storage_data = {
        dataclasses.replace(index, fqn=index.fqn.replace(ours, theirs)): value
        for index, value in metadata.storage_data.items()
    }
    assert len(before - set(metadata.state_dict_metadata)) == 3, "the weight and Adam's two moments"
    path.write_bytes(pickle.dumps(metadata))
    sizes = json.loads((folder / "files.json").read_text()) | {".metadata": path.stat().st_size}
    (folder / "files.json").write_text(json.dumps(sizes))


def test_of_experts_in_one_layer_each_has_its_own() -> None:
    """They are left out where the checkpoint lacks them, and where they would be another expert's."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    experts, norm = "decoder.layers.0.mlp.experts.linear_fc1._extra_state", "final_norm._extra_state"

    def sharded() -> dict[str, Any]:
        names = [experts, f"{experts}1", f"{experts}10", norm, "decoder.layers.0.mlp.experts.linear_fc1.weight1"]
        return {"model": {name: ShardedObject(name, None, (1,), (0,)) for name in names}}

    state = sharded()
    leave_experts_scales(state)
    assert list(state["model"]) == [norm, "decoder.layers.0.mlp.experts.linear_fc1.weight1"]

    state = sharded()
    saved = {state["model"][f"{experts}1"].unique_key: None}
    with mock.patch.object(checkpoints, "FileSystemReader") as reader:
        reader.return_value.read_metadata.return_value.state_dict_metadata = saved
        unsaved = take_unsaved_states(state, Path("folder"))
    assert unsaved == [("model", experts), ("model", f"{experts}10"), ("model", norm)]
    assert list(state["model"]) == [f"{experts}1", "decoder.layers.0.mlp.experts.linear_fc1.weight1"]
