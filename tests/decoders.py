"""Small decoders whose heads are partly right: trained for a moment on a made-up language, then disturbed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, expand
from mtp_megatron.checkpoint.transforms import ModelShape
from mtp_megatron.serving.export import DecoderConfig
from mtp_megatron.serving.llama import HeadsLlama
from tests.checkpoints import random_tensors

VOCAB, EOD = 48, 0
SHAPE = ModelShape(
    num_trunk_layers=2,
    num_heads=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=VOCAB,
    padded_vocab_size=VOCAB,
    tied_embeddings=False,
)
CONFIG = DecoderConfig(
    num_trunk_layers=SHAPE.num_trunk_layers,
    num_heads=SHAPE.num_heads,
    hidden_size=SHAPE.hidden_size,
    num_attention_heads=SHAPE.num_attention_heads,
    num_key_value_heads=SHAPE.num_query_groups,
    head_dim=SHAPE.head_dim,
    vocab_size=VOCAB,
    context=128,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
    tied=False,
)


def random_weights(shape: ModelShape = SHAPE, seed: int = 0) -> dict[str, Tensor]:
    """A model's tensors by Hugging Face key, random."""
    tensors = random_tensors(shape, seed=seed)
    parts = [mapping.split(tensors[mapping.megatron], shape) for mapping in expand((*LLAMA, *FURTHER_HEADS), shape)]
    return {key: tensor.clone() for part in parts for key, tensor in part.items()}


def sentences(count: int, length: int, seed: int) -> Tensor:
    """``[count, length]`` of a language in which the last two tokens decide the next one, 5 % of them slips."""
    generator = torch.Generator().manual_seed(351)  # of all tried, the language that repeats itself latest
    after_even, after_odd = (1 + torch.randperm(VOCAB - 1, generator=generator) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, VOCAB, (count, length), generator=generator)
    slips = torch.rand(count, length, generator=generator) < 0.05
    for t in range(2, length):
        regular = torch.where(text[:, t - 2] % 2 == 0, after_even[text[:, t - 1] - 1], after_odd[text[:, t - 1] - 1])
        text[:, t] = torch.where(slips[:, t], text[:, t], regular)
    return text


def train_and_disturb(
    config: DecoderConfig,
    weights: dict[str, Tensor],
    text: Callable[[int], Tensor],
    *,
    learning_rate: float,
    steps: int,
    noise: float,
) -> dict[str, Tensor]:
    """Train every head on ``text(step)`` for a few seconds, then disturb heads 2..n: some of their drafts are wrong."""
    weights = {key: tensor.requires_grad_() for key, tensor in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        tokens = text(step)
        model = HeadsLlama(config, weights)  # views of the leaves, so that gradients reach them
        caches = model.new_caches(len(tokens))
        z, first = model.run(tokens, caches, rows=len(tokens))
        logits = [first, *model.run_further_heads(z, caches, rows=len(tokens))]
        loss = torch.stack([F.cross_entropy(row[: -1 - i], tokens[1 + i :]) for i, row in enumerate(logits)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in weights.items():
            if key.startswith("mtp_heads.") and tensor.dim() == 2:
                tensor += torch.randn(tensor.shape, generator=generator) * noise
    return {key: tensor.detach() for key, tensor in weights.items()}


@functools.cache
def trained_weights() -> dict[str, Tensor]:
    """Weights whose further heads are partly right."""
    return train_and_disturb(
        CONFIG,
        random_weights(),
        lambda step: sentences(1, 120, seed=1000 + step)[0],
        learning_rate=6e-3,
        steps=260,
        noise=0.2,
    )


@functools.cache
def trained_decoder() -> HeadsLlama:
    """The decoder of :func:`trained_weights`, fp32."""
    return HeadsLlama(CONFIG, trained_weights())


def prompts(count: int) -> list[list[int]]:
    """Beginnings that the training has not seen, 1 to 30 tokens long."""
    return [row[: 1 + 7 * i % 30].tolist() for i, row in enumerate(sentences(count, 30, seed=77))]
