"""Checks of a bundle's tensors: shapes, NaN and infinity, and that each draft is made of the model's own heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mtp_megatron.checkpoint.hf import EXPORT_CONFIG, HEADS_STEM, MODEL_STEM
from mtp_megatron.checkpoint.sharded import is_finite, read_sharded
from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.bundle import TensorSource
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
    tensors = TensorSource(folder)
    for draft in drafts_of(llama, export, tensors.keys()):
        count += _check_draft(folder, draft, tensors)
    return count


def expected_shapes(llama: dict[str, Any], export: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the plain model and of the further heads, by key."""
    h, f, vocab = llama["hidden_size"], llama["intermediate_size"], llama["vocab_size"]
    queries = llama["num_attention_heads"] * llama["head_dim"]
    keys = llama["num_key_value_heads"] * llama["head_dim"]
    layer = {
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (queries, h),
        "self_attn.k_proj.weight": (keys, h),
        "self_attn.v_proj.weight": (keys, h),
        "self_attn.o_proj.weight": (h, queries),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "mlp.down_proj.weight": (h, f),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,)}
    if not llama["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, h)
    head: dict[str, tuple[int, ...]] = layer
    kind = export["heads"]["kind"]
    if kind != "transformer":
        head = {"linear.weight": (h, h), **({"linear.bias": (h,)} if kind == "medusa" else {})}
    prefixes = [(f"model.layers.{k}.", layer) for k in range(llama["num_hidden_layers"])]
    prefixes += [(f"mtp_heads.{i}.", head) for i in range(2, export["num_heads"] + 1)]
    return shapes | {prefix + key: shape for prefix, part in prefixes for key, shape in part.items()}


def _check_draft(folder: Path, draft: Draft, tensors: TensorSource) -> int:
    dtype: torch.dtype = getattr(torch, draft.config["dtype"])
    rules = {rule.draft: rule for rule in draft.rules}
    for key, tensor in read_sharded(folder / draft.folder, MODEL_STEM):
        rule = rules.pop(key, None)
        name = f"{folder / draft.folder}: {key}"
        if rule is None:
            raise CheckpointError(f"{name} is no tensor of this draft. {_AGAIN}")
        made = TRANSFORMS[rule.transform]([tensors.get(source) for source in rule.sources], draft.config, dtype)
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
