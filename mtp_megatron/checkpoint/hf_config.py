"""The configuration files of a Hugging Face folder, written and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtp_megatron.checkpoint.description import ModelDescription, moe_aux_loss_of
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """A decoder of transformers that differs from Llama in no more than these.

    Attributes:
        architecture: transformers' class.
        qkv_bias: always has biases on queries, keys and values.
        qk_norm: always normalises queries and keys.
        experts: its layers have experts, but for those in ``mlp_only_layers``.
        window_flag: setting without which ``sliding_window`` has no effect.
        default_window: what transformers takes where ``sliding_window`` is absent.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    window_flag: str | None = None
    default_window: int | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", default_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window_flag="use_sliding_window"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, window_flag="use_sliding_window"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, experts=True, window_flag="use_sliding_window"),
}
# Settings under which a model is another one: the values that mean nothing, and why any other is refused.
_INERT: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish", None), "the MLP here is SwiGLU"),
    "hidden_activation": (("silu", "swish", None), "the MLP here is SwiGLU"),
    "attention_bias": ((False, None), "the output projection has no bias here"),
    "mlp_bias": ((False, None), "the MLP has no bias here"),
    "partial_rotary_factor": ((1, None), "rotary positions turn whole heads here"),
    "quantization_config": ((None,), "weights are not quantised here"),
    "auto_map": ((None,), "code that comes with a model is not run"),
}
# What a family with experts has in its config.json besides.
EXPERT_SETTINGS: dict[str, Callable[[ModelDescription], Any]] = {
    "num_experts": lambda model: model.shape.num_experts,
    "num_experts_per_tok": lambda model: model.moe_top_k,
    # Training's softmax over the chosen experts is that over all, made to add up to 1 again. Of one expert alone it
    # would always be 1: there it is over all.
    "norm_topk_prob": lambda model: model.moe_top_k != 1,
    "moe_intermediate_size": lambda model: model.shape.expert_width,
    "decoder_sparse_step": lambda model: 1,
    "router_aux_loss_coef": lambda model: moe_aux_loss_of(model.raw["model"]),
    "mlp_only_layers": lambda model: [model.shape.num_trunk_layers] if model.shape.heads_are_layers else [],
}
_ROPE_NUMBERS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context",
}


def model_settings(config: dict[str, Any], path: Path, *, heads_are_layers: bool = True) -> dict[str, Any]:
    """The recipe's section ``model`` of the model that a ``config.json`` describes.

    Args:
        config: its content.
        path: for messages.
        heads_are_layers: its last layer is head 1; otherwise all are the trunk's.

    Raises:
        CheckpointError: another family, a setting that this package's model has not, or a missing one.
    """
    name = config.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None:
        raise CheckpointError(
            f"{path}: model_type={name!r} is not supported. Supported: {', '.join(FAMILIES)} (text only)."
        )
    for key, (inert, reason) in _INERT.items():
        if config.get(key) not in inert:
            raise _unsupported(path, key, config[key], reason)
    _refuse_windows(config, family, path)
    layers = int(_required(config, "num_hidden_layers", path))
    if layers < 1 + heads_are_layers:
        raise _unsupported(path, "num_hidden_layers", layers, "a trunk and head 1 take two layers")
    heads, width = (int(_required(config, key, path)) for key in ("num_attention_heads", "hidden_size"))
    # Qwen3's default head is 128 wide whatever the hidden size.
    head_size = _required(config, "head_dim", path) if name == "qwen3" else config.get("head_dim")
    groups = config.get("num_key_value_heads")
    if groups is None and name != "llama":
        groups = _required(config, "num_key_value_heads", path)
    return {
        "num_trunk_layers": layers - heads_are_layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_query_groups": groups or heads,
        "ffn_hidden_size": _required(config, "intermediate_size", path),
        "seq_length": _required(config, "max_position_embeddings", path),
        "vocab_size": _required(config, "vocab_size", path),
        "norm_epsilon": _required(config, "rms_norm_eps", path),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "head_size": None if head_size in (None, width / heads) else head_size,
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "init_method_std": float(config.get("initializer_range") or 0.02),
        **(_expert_settings(config, path, heads_are_layers) if family.experts else {}),
        **rope_settings(config, path),
    }


def _expert_settings(config: dict[str, Any], path: Path, heads_are_layers: bool) -> dict[str, Any]:
    """The recipe's settings for a trunk with experts."""
    # transformers renamed it within its fifth version, and reads both.
    experts_key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    layers, experts, chosen = (
        int(_required(config, key, path)) for key in ("num_hidden_layers", experts_key, "num_experts_per_tok")
    )
    named = config.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
        raise _unsupported(path, "mlp_only_layers", named, "it is a list of layers")
    dense, last = set(named), {layers - 1}
    if heads_are_layers and not last <= dense:
        reason = f"layer {layers - 1}, the last, becomes head 1, and heads are dense"
        raise _unsupported(path, "mlp_only_layers", sorted(dense), reason)
    every = "every layer of the trunk has experts here, or none"
    if config.get("decoder_sparse_step") not in (1, None):
        raise _unsupported(path, "decoder_sparse_step", config["decoder_sparse_step"], every)
    if dense != (last if heads_are_layers else set()):
        raise _unsupported(path, "mlp_only_layers", named, every)
    if chosen > experts:
        raise _unsupported(path, "num_experts_per_tok", chosen, f"there are {experts_key}={experts}")
    weights = config.get("norm_topk_prob", False)
    if weights is not (chosen > 1):
        reason = "the weights of several chosen experts add up to 1 here, that of one alone is what the router gives it"
        raise _unsupported(path, "norm_topk_prob", weights, reason)
    if config.get("shared_expert_intermediate_size"):
        key = "shared_expert_intermediate_size"
        raise _unsupported(path, key, config[key], "no expert is shared here")
    width = _required(config, "moe_intermediate_size", path)
    settings = {"num_experts": experts, "moe_top_k": chosen, "moe_ffn_hidden_size": width}
    if config.get("router_aux_loss_coef") is not None:
        settings["moe_aux_loss"] = _required(config, "router_aux_loss_coef", path)
    return settings


def _refuse_windows(config: dict[str, Any], family: Family, path: Path) -> None:
    window = config.get("sliding_window", family.default_window)
    used = family.window_flag is None or config.get(family.window_flag, False)
    if used and window is not None and family.architecture != "LlamaForCausalLM":
        raise _unsupported(path, "sliding_window", window, "attention here reaches back to the first token")
    others = set(config.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise _unsupported(path, "layer_types", sorted(others), "every layer here has full attention")


def rope_settings(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The recipe's rotary settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Raises:
        CheckpointError: a scaling that this package's model has not, or a number of it is missing.
    """
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}
    base = 10000.0 if rope["rope_theta"] is None else float(rope["rope_theta"])
    if not base.is_integer():
        raise _unsupported(path, "rope_theta", base, "the base is a whole number here")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise _unsupported(path, "partial_rotary_factor", rope["partial_rotary_factor"], "whole heads turn here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings: dict[str, Any] = {"rotary_base": int(base)}
    if kind == "default":
        return settings
    if kind not in ("linear", "llama3"):
        raise _unsupported(path, "rope_type", kind, "rotary scaling here is linear or llama3")
    wanted = _ROPE_NUMBERS if kind == "llama3" else {"factor": "rope_scaling_factor"}
    numbers = {ours: _required(rope, key, path) for key, ours in wanted.items()}
    return settings | {"rope_scaling": kind} | numbers


def _required(config: dict[str, Any], key: str, path: Path) -> Any:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path}: {key}={value!r} is missing or no number. Give the model's own config.json.")
    return value


def _unsupported(path: Path, key: str, value: Any, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key}={value!r} is not supported: {reason}. Give a model without it.")


def ends_and_begin(config: dict[str, Any]) -> tuple[list[int], int | None]:
    """Ids that end (-1: none) and begin a text."""
    end, begin = config.get("eos_token_id"), config.get("bos_token_id")
    ends = [token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)]
    return (ends or [-1]), (begin if isinstance(begin, int) else None)


def _ends(tokenizer: Tokenizer) -> int | list[int] | None:
    """``eos_token_id``: a list only where there are several."""
    if tokenizer.eod < 0:
        return None
    return [tokenizer.eod, *tokenizer.more_ends] if tokenizer.more_ends else tokenizer.eod


def family_of(description: ModelDescription) -> str:
    """``model_type`` of trunk + head 1.

    Raises:
        CheckpointError: no family has all of its features.
    """
    shape = description.shape
    if shape.qkv_bias and shape.qk_norm:
        raise CheckpointError(
            "model.qkv_bias and model.qk_norm together belong to no supported Hugging Face family. Train with one of "
            "them to export."
        )
    if shape.num_experts is not None:
        if not shape.qk_norm:
            raise CheckpointError(
                f"model.num_experts={shape.num_experts} with model.qk_norm=false: of Hugging Face's families with "
                "experts, the one that is written here (Qwen3-MoE) always normalises queries and keys. Train with "
                "model.qk_norm=true to export; the checkpoint stays as it is, and --to megatron writes it."
            )
        return "qwen3_moe"
    return "qwen2" if shape.qkv_bias else "qwen3" if shape.qk_norm else "llama"


def llama_config(description: ModelDescription, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of trunk + head 1 as a plain model, of the family that fits.

    Rope settings and the data type stand in both places where readers look: ``rope_parameters`` and ``dtype`` for
    transformers 5, ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` for readers before it.
    """
    shape, tokenizer = description.shape, description.tokenizer
    family, name = family_of(description), str(dtype).removeprefix("torch.")
    scaling = _rope_scaling(description)
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_plain_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": description.context,
        "rms_norm_eps": description.norm_epsilon,
        "rope_theta": description.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": description.rotary_base, **(scaling or {})},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": _ends(tokenizer),
        "pad_token_id": None,
        "initializer_range": float(description.raw["model"].get("init_method_std", 0.02)),
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,
    }
    if scaling is not None:
        config["rope_scaling"] = scaling
    if FAMILIES[family].window_flag:
        config |= {"use_sliding_window": False, "sliding_window": None}
        del config["mlp_bias"]
    if FAMILIES[family].experts:
        config |= {key: value_of(description) for key, value_of in EXPERT_SETTINGS.items()}
    if family == "qwen2":  # its biases are part of the family, and the setting would mean one more
        del config["attention_bias"]
    return config


def _rope_scaling(description: ModelDescription) -> dict[str, Any] | None:
    scaling = description.rope_scaling
    if scaling is None:
        return None
    numbers: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        numbers |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return numbers


def generation_config(description: ModelDescription) -> dict[str, Any]:
    """``generation_config.json``: greedy, ends at the end of the document."""
    tokenizer = description.tokenizer
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": _ends(tokenizer),
        "do_sample": False,
    }
