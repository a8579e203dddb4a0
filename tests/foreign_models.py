"""Tiny models as others write them: Hugging Face folders by transformers, releases in Meta's layout by torch.save."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_megatron.data.train_tokenizer import train_tokenizer

VOCAB = 300  # above the byte tokenizer's 257, and no multiple of anything
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large enough to be seen if it went to the wrong place
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 6.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 32,
}
# Name of the case, model_type, settings beside SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [2],
        },
    ),
}


def write_hf(folder: Path, case: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of a family, saved by transformers; norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, settings = FAMILIES[case]
    config = AutoConfig.for_model(name, **{**SIZES, **settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def hf_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits ``[b, s, V]`` of transformers' model; every tensor of the folder must have been used.

    Not by ``from_pretrained``: after other models in the process, transformers 5 left the rotary frequencies, a buffer
    that no file holds, uninitialised.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    report = model.load_state_dict(_experts_together(load_file(folder / "model.safetensors")), strict=False)
    assert report.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert not report.unexpected_keys
    model.tie_weights()
    with torch.inference_mode():
        logits: Tensor = model.eval()(tokens).logits
    return logits


def _experts_together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's experts in one tensor for each projection, as transformers 5 holds them: in files they are apart."""
    together: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key in list(tensors):
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)_proj\.weight", key):
            together.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensors.pop(key)
    for name, experts in together.items():
        parts = [experts[number] for number in range(len(experts))]
        tensors[f"{name}.gate_up_proj"] = torch.stack([torch.cat((part["gate"], part["up"])) for part in parts])
        tensors[f"{name}.down_proj"] = torch.stack([part["down"] for part in parts])
    return tensors


PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": -1,
    "multiple_of": 16,
    "norm_eps": 1e-3,
    "n_future_tokens": 4,
}


def meta_tensors(params: dict[str, Any], vocab: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors by the release's keys: ``layers`` ends with head 1, ``extra_heads`` are heads 2 to n."""
    generator = torch.Generator().manual_seed(0)
    dim, n, ffn = params["dim"], params.get("n_future_tokens", 1), 96
    head = dim // params["n_heads"]

    def random(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator)
        return (1 + values / 5 if len(size) == 1 else values * size[-1] ** -0.5).to(dtype)

    tensors = {
        "tok_embeddings.weight": random(vocab, dim),
        "norm.weight": random(dim),
        "output.weight": random(vocab, dim),
    }
    layers = params["n_layers"] - n + 1
    for prefix in [f"layers.{i}." for i in range(layers)] + [f"extra_heads.{i}." for i in range(n - 1)]:
        tensors |= {
            f"{prefix}attention.wq.weight": random(params["n_heads"] * head, dim),
            f"{prefix}attention.wk.weight": random(params["n_kv_heads"] * head, dim),
            f"{prefix}attention.wv.weight": random(params["n_kv_heads"] * head, dim),
            f"{prefix}attention.wo.weight": random(dim, dim),
            f"{prefix}feed_forward.w1.weight": random(ffn, dim),
            f"{prefix}feed_forward.w2.weight": random(dim, ffn),
            f"{prefix}feed_forward.w3.weight": random(ffn, dim),
            f"{prefix}attention_norm.weight": random(dim),
            f"{prefix}ffn_norm.weight": random(dim),
        }
    return tensors


def tokenizer_model() -> bytes:
    """A small sentencepiece model, as every release has one."""
    texts = [" ".join(f"word{i * j % 97}" for j in range(40)) for i in range(1, 40)]
    return train_tokenizer(texts, 280).files()["tokenizer.model"]


def write_meta(
    folder: Path,
    tokenizer: bytes,
    *,
    shards: int = 1,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> dict[str, Tensor]:
    """A release in Meta's layout, in shards as Llama 2 is cut; returns its tensors."""
    params = {**PARAMS, **changes}
    tensors = meta_tensors(params, vocab, dtype)
    folder.mkdir(parents=True)
    for rank in range(shards):
        part = {key: _shard(key, value, rank, shards) for key, value in tensors.items()}
        name = "consolidated.pth" if shards == 1 else f"consolidated.{rank:02d}.pth"
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / name)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return tensors


def _shard(key: str, value: Tensor, rank: int, shards: int) -> Tensor:
    if "norm" in key:
        return value
    axis = 1 if any(name in key for name in (".wo.", ".w2.", "tok_embeddings")) else 0
    return value.chunk(shards, dim=axis)[rank].clone()


def meta_logits(tensors: dict[str, Tensor], params: dict[str, Any], tokens: Tensor, head: int = 1) -> Tensor:
    """Logits ``[b, s, V]`` of head ``head`` (1-based) as Meta's code computes them: neighbouring channels are turned
    by complex multiplication."""
    import torch.nn.functional as F

    n, heads, groups = params.get("n_future_tokens", 1), params["n_heads"], params["n_kv_heads"]
    size, eps = params["dim"] // heads, params["norm_eps"]
    length = tokens.shape[1]
    freqs = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
    turns = torch.polar(torch.ones(length, size // 2), torch.outer(torch.arange(length).float(), freqs))

    def norm(x: Tensor, key: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[key]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(3)

    def layer(x: Tensor, prefix: str) -> Tensor:
        y = norm(x, f"{prefix}attention_norm.weight")
        q, k, v = ((y @ tensors[f"{prefix}attention.w{part}.weight"].T).view(*y.shape[:2], -1, size) for part in "qkv")
        q, k = rotate(q), rotate(k).repeat_interleave(heads // groups, 2)
        v = v.repeat_interleave(heads // groups, 2)
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ tensors[f"{prefix}attention.wo.weight"].T
        y = norm(x, f"{prefix}ffn_norm.weight")
        gate, up = (y @ tensors[f"{prefix}feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        return x + (F.silu(gate) * up) @ tensors[f"{prefix}feed_forward.w2.weight"].T

    x = tensors["tok_embeddings.weight"][tokens]
    trunk = params["n_layers"] - n
    for number in range(trunk):
        x = layer(x, f"layers.{number}.")
    x = layer(x, f"layers.{trunk}." if head == 1 else f"extra_heads.{head - 2}.")
    return norm(x, "norm.weight") @ tensors["output.weight"].T
