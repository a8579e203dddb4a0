"""Greedy decoding, plain or self-speculative (Stern et al. 2018; Gloeckle et al. 2024, section 2), by the same code.

Each forward pass reads the last token that is certain and up to k - 1 drafted ones. Head 1 says at each of them what
comes next; drafts are accepted as long as they agree, and head 1's token after the last accepted one is certain too.
From z at that position heads 2 to k draft the next tokens. With k = 1 nothing is drafted: plain greedy decoding.

**Why both give the same text, token for token.** The arithmetic of a forward pass depends on how many rows it has, so
the logits of one position differ in the last bits between k = 1 and k = 4, and a near-tie could go either way. Where
the two best logits are closer than those differences can be (:data:`TIE_MARGIN`), the choice is therefore made by
:meth:`HeadsLlama.exact_logits`, in fp64 from the tokens alone: the same question gets the same answer in either run.
That holds in fp32; in bf16 the differences are as large as many a margin, and nothing is promised.

With experts in the trunk there is one more choice. Two experts that a router likes equally well to the last bits may
change places between two passes, and what follows differs by more than a tie does; decoding does not look for that
(:attr:`.simulate.Simulation.routing` does).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_megatron.errors import ConfigError
from mtp_megatron.serving.export import DecoderConfig
from mtp_megatron.serving.llama import Caches, HeadsLlama

# Two best logits closer than this, relative to the largest (at least 1), are a tie for fp32. The differences between
# forward passes of different widths are two orders smaller (tests/unit/test_serving_decode.py measures them).
TIE_MARGIN = 1e-4


@dataclass
class Generation:
    """What decoding one prompt gave.

    Attributes:
        tokens: the new tokens; the last is one of ``ends`` if the model ended its text.
        accepted_together: how many of them each forward pass made certain, the prompt's own pass first.
        forwards: forward passes after the prompt's.
        drafted: of heads 2 to k, how many drafts the head made.
        accepted: how many of them became part of the text.
        ties: choices made by the exact logits.
        seconds: wall-clock time, the prompt's pass included.
    """

    tokens: list[int] = field(default_factory=list)
    accepted_together: list[int] = field(default_factory=list)
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    ties: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward pass, without the prompt's pass and the token it gives; plain decoding has 1."""
        return (len(self.tokens) - 1) / self.forwards if self.forwards else 1.0


def check_lengths(config: DecoderConfig, prompt_tokens: int, max_new_tokens: int, heads: int) -> None:
    """Refuse what cannot be decoded.

    Raises:
        ConfigError: no prompt, no new tokens, more than the model's context, or heads that the model has not.
    """
    if not 1 <= heads <= config.num_heads:
        raise ConfigError("--heads", heads, f"the model has heads 1 to {config.num_heads}", "Choose one of these.")
    if prompt_tokens < 1:
        raise ConfigError("--prompt", "", "it holds no token", "Give at least one character.")
    if max_new_tokens < 1:
        raise ConfigError("--max-new-tokens", max_new_tokens, "must be 1 or more", "Ask for at least one token.")
    if prompt_tokens + max_new_tokens > config.context:
        raise ConfigError(
            "--max-new-tokens",
            max_new_tokens,
            f"with a prompt of {prompt_tokens} tokens it exceeds the model's context of {config.context}",
            f"Set it to {config.context - prompt_tokens} or less, or shorten the prompt."
            if prompt_tokens < config.context
            else "Shorten the prompt.",
        )


@torch.inference_mode()
def generate(
    model: HeadsLlama, prompt: Sequence[int], *, max_new_tokens: int, heads: int, ends: Collection[int] = ()
) -> Generation:
    """Continue ``prompt`` greedily, ``heads`` tokens of look-ahead in each forward pass.

    Args:
        model: the decoder.
        prompt: token ids.
        max_new_tokens: stop after so many.
        heads: ``k``: 1 decodes plainly, up to the model's n.
        ends: stop after any of these tokens.

    Raises:
        ConfigError: see :func:`check_lengths`.
    """
    check_lengths(model.config, len(prompt), max_new_tokens, heads)
    began = time.perf_counter()
    result = Generation(drafted=[0] * (heads - 1), accepted=[0] * (heads - 1))
    text = list(prompt)
    caches = model.new_caches(len(prompt) + max_new_tokens, heads - 1)
    z, logits = model.run(torch.tensor(text), caches, rows=1)
    certain = _choose(model, logits, text, [], result)
    while True:
        text += certain
        result.tokens += certain
        left = max_new_tokens - len(result.tokens)
        result.accepted_together.append(len(certain))
        if left == 0 or certain[-1] in ends:
            break
        drafts = _draft(model, z, caches, min(heads, left) - 1)
        z, logits = model.run(torch.tensor([text[-1], *drafts]), caches, rows=1 + len(drafts))
        certain = _choose(model, logits, text, drafts, result)
        result.forwards += 1
        agreed = len(certain) - 1
        end = next((place for place, token in enumerate(certain) if token in ends), agreed)
        certain = certain[: end + 1]
        for head in range(len(drafts)):
            result.drafted[head] += 1
            result.accepted[head] += head < min(agreed, len(certain))  # not what agrees behind the end
        # Of the block, only the first token and the accepted drafts are part of the text.
        caches.truncate(len(text) - 1 + len(certain))
        z = z[:, : len(certain)]
    result.seconds = time.perf_counter() - began
    return result


def _draft(model: HeadsLlama, z: Tensor, caches: Caches, count: int) -> list[int]:
    """Up to ``count`` drafts by heads 2 and up at the last position of z, all of whose positions are new to them."""
    if count == 0:
        return []
    drafts: list[int] = model.run_further_heads(z, caches)[:count, -1].argmax(-1).tolist()
    return drafts


def _choose(model: HeadsLlama, logits: Tensor, text: list[int], drafts: list[int], result: Generation) -> list[int]:
    """The tokens that head 1's logits ``[1 + drafts, V]`` make certain after ``text``: accepted drafts and one more."""
    certain: list[int] = []
    (best, second), tokens = logits.topk(2).values.unbind(-1), logits.argmax(-1).tolist()
    margin = TIE_MARGIN * best.abs().clamp(min=1.0) if model.dtype == torch.float32 else torch.zeros_like(best)
    ties = (best - second < margin).tolist()
    for row, token in enumerate(tokens):
        if ties[row]:
            result.ties += 1
            token = int(model.exact_logits(torch.tensor(text + certain)).argmax())
        certain.append(token)
        if row == len(drafts) or token != drafts[row]:
            break
    return certain
