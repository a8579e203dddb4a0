"""Checks of a bundle's tensors: shapes, NaN and infinity, and that each draft is made of the model's own heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mtp_megatron.checkpoint.description import shape_of
from mtp_megatron.checkpoint.hf import EXPORT_CONFIG, HEADS_STEM, MODEL_STEM
from mtp_megatron.checkpoint.hf_config import model_settings
from mtp_megatron.checkpoint.hf_reader import HFFolder
from mtp_megatron.checkpoint.sharded import is_finite, read_sharded
from mtp_megatron.checkpoint.source import expected_shape, model_shapes
from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, expand
from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.drafts import TRANSFORMS, Draft, drafts_of

_AGAIN = "Convert the checkpoint again."


def check_tensors(folder: Path) -> int:
    """Check every tensor of a bundle; returns how many there are.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected, misshapen, not finite, or not what the
            draft's rule makes of the model's.
    """
    llama, export = _read(folder / "config.json"), _read(folder / EXPORT_CONFIG)
    expected = expected_shapes(llama, export)
    count = 0
    for stem in (MODEL_STEM, HEADS_STEM):
        for key, tensor in read_sharded(folder, stem):
            shape = expected.pop(key, None)
            if shape is None:
                raise CheckpointError(f"{folder}: {key} is no tensor of the model that config.json describes. {_AGAIN}")
            _check(f"{folder}: {key}", tensor, shape)
            count += 1
    if expected:
        raise CheckpointError(f"{folder}: {min(expected)} is missing. {_AGAIN}")
    tensors = HFFolder(folder)
    for draft in drafts_of(llama, export, tensors.keys()):
        count += _check_draft(folder, draft, tensors)
    return count


def expected_shapes(llama: dict[str, Any], export: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the plain model and of the further heads, by key."""
    layers = export["heads"]["kind"] == "transformer"
    model = model_settings(llama, Path("config.json"), heads_are_layers=layers)
    shape = shape_of(model, {**export["heads"], "n": export["num_heads"]}, model["vocab_size"], model["vocab_size"])
    sizes = model_shapes(shape)
    return {
        key: tuple(part.shape)
        for mapping in expand((*LLAMA, *FURTHER_HEADS), shape)
        for key, part in mapping.split(
            torch.empty(expected_shape(mapping.megatron, sizes), device="meta"), shape
        ).items()
    }


def _check_draft(folder: Path, draft: Draft, tensors: HFFolder) -> int:
    dtype: torch.dtype = getattr(torch, draft.config["dtype"])
    rules = {rule.draft: rule for rule in draft.rules}
    for key, tensor in read_sharded(folder / draft.folder, MODEL_STEM):
        rule = rules.pop(key, None)
        name = f"{folder / draft.folder}: {key}"
        if rule is None:
            raise CheckpointError(f"{name} is no tensor of this draft. {_AGAIN}")
        made = TRANSFORMS[rule.transform]([tensors.read(source) for source in rule.sources], draft.config, dtype)
        _check(name, tensor, tuple(made.shape))
        if not torch.equal(tensor, made):
            origin = ", ".join(rule.sources) or "its rule"
            raise CheckpointError(f"{name} is not what {origin} makes: the draft is of another model. {_AGAIN}")
    if rules:
        raise CheckpointError(f"{folder / draft.folder}: {min(rules)} is missing. {_AGAIN}")
    return len(draft.rules)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {list(tensor.shape)} instead of {list(shape)}. {_AGAIN}")
    if not is_finite(tensor):
        raise CheckpointError(f"{name} holds NaN or infinity: the training had diverged. Export an earlier one.")


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}). {_AGAIN}") from error
    return content
