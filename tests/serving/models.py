"""Exports for the tests of serving: small models trained for some seconds, their further heads then disturbed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtp_megatron.data.tokenizer import ByteTokenizer
from mtp_megatron.serving.export import DecoderConfig
from tests.decoders import train_and_disturb

# vLLM's CPU attention has no heads narrower than 32. Three trunk layers, as an EAGLE-3 draft for every reader needs.
CONFIG = DecoderConfig(
    num_trunk_layers=3,
    num_heads=4,
    hidden_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=ByteTokenizer.vocab_size,
    context=128,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
    tied=False,
)
_FFN = 96
_USED = 64  # tokens of the made-up language: fewer than the vocabulary, so that it is learnt in seconds


def shapes(config: DecoderConfig = CONFIG) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an export, by key."""
    from mtp_megatron.serving.tensor_checks import expected_shapes

    return expected_shapes(llama_config(config), mtp_config(config))


def sentences(count: int, length: int, seed: int) -> Tensor:
    """``[count, length]`` of a language in which the last two tokens decide the next one, 5 % of them slips."""
    language = torch.Generator().manual_seed(2223)  # repeats itself after 45 tokens or more
    after_even, after_odd = (torch.randperm(_USED, generator=language) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, _USED, (count, length), generator=generator)
    slips = torch.rand(count, length, generator=generator) < 0.05
    for t in range(2, length):
        regular = torch.where(text[:, t - 2] % 2 == 0, after_even[text[:, t - 1]], after_odd[text[:, t - 1]])
        text[:, t] = torch.where(slips[:, t], text[:, t], regular)
    return text


def random_weights(config: DecoderConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of an export."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.06
        for key, shape in shapes(config).items()
    }


@functools.cache
def trained_weights(config: DecoderConfig = CONFIG) -> dict[str, Tensor]:
    """Heads 2 to 4 are disturbed after training, so that some of their drafts are wrong."""
    return train_and_disturb(
        config,
        random_weights(config),
        lambda step: sentences(1, 120, seed=1000 + step)[0],
        learning_rate=5e-3,
        steps=220,
        noise={"transformer": 0.2, "linear": 0.05, "medusa": 0.15}[config.head_kind],
    )


def llama_config(config: DecoderConfig = CONFIG, dtype: str = "float32") -> dict[str, Any]:
    """``config.json`` of an export; head 1 is a layer only where the heads are layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": _FFN,
        "num_hidden_layers": config.num_trunk_layers + config.heads_are_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": ByteTokenizer.eod,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def mtp_config(config: DecoderConfig = CONFIG, dtype: str = "float32") -> dict[str, Any]:
    """``mtp_config.json`` of an export."""
    return {
        "format": "mtp_megatron export",
        "version": 1,
        "num_heads": config.num_heads,
        "num_trunk_layers": config.num_trunk_layers,
        "heads": {"n": config.num_heads, "kind": config.head_kind, "arrangement": "parallel", "unembedding": "shared"},
        "dtype": dtype,
        "tokenizer": {"kind": "bytes", "sha256": ByteTokenizer().sha256, "eod": ByteTokenizer.eod},
        "source": {"checkpoint": "iter_0000007", "step": 7, "fingerprint": "0" * 64},
        "mtp_megatron": "0.1.0",
    }


def write_export(
    folder: Path,
    weights: dict[str, Tensor],
    config: DecoderConfig = CONFIG,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """What ``convert --to hf`` writes, without the conversion."""
    from mtp_megatron.checkpoint.hf_tokenizer import tokenizer_files

    folder.mkdir(parents=True)
    name = str(dtype).removeprefix("torch.")
    parts = {"model": False, "mtp_heads": True}
    for stem, further in parts.items():
        tensors = {
            key: tensor.to(dtype).contiguous()
            for key, tensor in weights.items()
            if key.startswith("mtp_heads.") == further
        }
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, f"{stem}.safetensors")}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(llama_config(config, name)))
    (folder / "mtp_config.json").write_text(json.dumps(mtp_config(config, name)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ByteTokenizer.eod, "do_sample": False}))
    for file, content in tokenizer_files(ByteTokenizer(), config.context)[0].items():
        (folder / file).write_bytes(content)
    return folder
