"""Checkpoints of Megatron-LM with heads, and the arguments in them wherever the release put them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron.checkpoint.kinds import open_source
from mtp_megatron.checkpoint.megatron_args import read_arguments
from mtp_megatron.errors import CheckpointError
from tests.checkpoints import MEGATRON_LM_ARGUMENTS, SHAPE, random_tensors, stack_trunk, write_torch_dist

HEADS = MEGATRON_LM_ARGUMENTS | {"num_layers": 3, "mtp_heads": 3, "mtp_vocab_size": 257, "vocab_size": None}


def with_heads(folder: Path, *, beside_the_tensors: bool = True, **changes: Any) -> dict[str, Tensor]:
    """What 0.19 (or, with a ``common.pt``, an earlier release) saves of SHAPE at step 5; returns its tensors."""
    tensors = random_tensors()
    common = {"args": Namespace(**(HEADS | changes)), "iteration": 5}
    objects = {"common_state/shard_0_1": [common]} if beside_the_tensors else {}
    write_torch_dist(folder, stack_trunk(tensors), objects=objects)
    if not beside_the_tensors:
        torch.save(common, folder / "common.pt")
    return tensors


@pytest.mark.parametrize("beside_the_tensors", [True, False], ids=["0.19", "0.16"])
def test_heads_are_told_by_the_arguments(tmp_path: Path, beside_the_tensors: bool) -> None:
    tensors = with_heads(tmp_path, beside_the_tensors=beside_the_tensors)
    source, description = open_source(tmp_path)
    assert (description.shape.num_trunk_layers, description.shape.num_heads) == (3, 3)
    assert (description.shape.vocab_size, description.shape.padded_vocab_size) == (257, SHAPE.padded_vocab_size)
    assert description.step == 5
    assert set(source.keys()) == set(tensors)
    assert all(torch.equal(source.read(key), tensors[key]) for key in tensors)


def test_settings_that_are_as_usual_mean_nothing(tmp_path: Path) -> None:
    """What releases store of settings that make another model where they are others."""
    usual = {"qk_l2_norm": False, "no_rope_freq": None, "softmax_type": "vanilla", "glu_linear_offset": 0.0}
    tensors = with_heads(tmp_path, **usual, activation_func_clamp_value=None, use_mup=False)
    assert set(open_source(tmp_path)[0].keys()) == set(tensors)


def test_the_norms_epsilon_by_either_name(tmp_path: Path) -> None:
    with_heads(tmp_path, norm_epsilon=None, layernorm_epsilon=1e-6)
    assert open_source(tmp_path)[1].norm_epsilon == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp_unembedding": "replicated"}, "heads.unembedding=replicated cannot be written"),
        ({"mtp_head_arrangement": "causal"}, "heads.arrangement=causal cannot be written"),
        ({"mtp_heads": 2}, "has 3 layers and 3 heads, and its description num_trunk_layers=3 and 2 heads"),
        ({"num_layers": 4}, "has 3 layers and 3 heads, and its description num_trunk_layers=4"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm' is not supported"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True is not supported"),
        ({"no_rope_freq": [0, 0, 1]}, r"no_rope_freq=\[0, 0, 1\] is not supported"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one' is not supported"),
        ({"glu_linear_offset": 1.0}, r"glu_linear_offset=1\.0 is not supported"),
        ({"activation_func_clamp_value": 7.0}, r"activation_func_clamp_value=7\.0 is not supported"),
        ({"use_mup": True}, "use_mup=True is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with_heads(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_arguments_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    write_torch_dist(tmp_path / "none", stack_trunk(random_tensors()))
    with pytest.raises(CheckpointError, match=r"neither common\.pt nor common_state.*--model RECIPE\.yaml"):
        read_arguments(tmp_path / "none")
    with_heads(tmp_path / "cut")
    data = tmp_path / "cut" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_arguments(tmp_path / "cut")
