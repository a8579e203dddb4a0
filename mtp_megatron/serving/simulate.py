"""What an engine that drafts with all heads at once must count, computed from the torch decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtp_megatron.serving.decode import generate
from mtp_megatron.serving.llama import HeadsLlama

# Two best logits closer than this, relative to the largest (at least 1), may swap places in another fp32 program: the
# layers' sums are taken in another order there. Measured differences between vLLM and torch are ten times smaller.
ENGINE_MARGIN = 2e-5
# So may two experts whose scores are closer than this, relative to the best, and what follows is another text then.
# Twice what was measured for one score between passes of other widths (6 layers, 64 experts). Wider, it would leave few
# prompts of a large model: a text has thousands of such choices.
ROUTING_MARGIN = 5e-6


@dataclass(frozen=True)
class Counts:
    """What vLLM's counters should say.

    Attributes:
        drafts: how often the heads drafted.
        accepted: how often the draft at each position was accepted, one entry for each head beside head 1.
    """

    drafts: int
    accepted: tuple[int, ...]

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.drafts + other.drafts, tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True))
        )

    @property
    def tokens_per_forward(self) -> float:
        """One certain token and the drafts accepted, in each forward pass."""
        return 1.0 + sum(self.accepted) / max(self.drafts, 1)


@dataclass(frozen=True)
class Simulation:
    """One prompt continued greedily, and what every head says at every position.

    Attributes:
        prompt: its tokens.
        tokens: the ``max_new_tokens`` that follow, and as many more as heads can look ahead.
        max_new_tokens: what the engine is asked for.
        said: ``said[k][t]``: what head k + 2 expects two plus k tokens after position t of the whole text.
        margin: the smallest distance of two best logits, relative to the largest, wherever a choice depends on it.
        routing: the same of the scores of experts, see :attr:`.LayerCache.routing`.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    max_new_tokens: int
    said: tuple[tuple[int, ...], ...]
    margin: float
    routing: float = math.inf

    @property
    def certain(self) -> bool:
        """No choice is so close that another fp32 program could choose otherwise."""
        return self.margin > ENGINE_MARGIN and self.routing > ROUTING_MARGIN

    @property
    def text(self) -> list[int]:
        """The new tokens that the engine is asked for."""
        return list(self.tokens[: self.max_new_tokens])

    def counts(self, heads: int) -> Counts:
        """Drafts and acceptances with ``heads`` heads beside head 1.

        vLLM also counts drafts accepted beyond the last token asked for, hence the longer continuation.
        """
        whole, at = [*self.prompt, *self.tokens], len(self.prompt)
        drafts, accepted = 0, [0] * heads
        # `at`: the newest certain token; the heads read z of the one before it.
        while at - len(self.prompt) + 1 < self.max_new_tokens:
            drafts += 1
            right = 0
            while right < heads and self.said[right][at - 1] == whole[at + 1 + right]:
                accepted[right] += 1
                right += 1
            at += right + 1
        return Counts(drafts, tuple(accepted))


@torch.inference_mode()
def simulate(model: HeadsLlama, prompt: Sequence[int], max_new_tokens: int) -> Simulation:
    """Continue a prompt greedily and ask every head at every position.

    Args:
        model: the decoder, in fp32.
        prompt: token ids.
        max_new_tokens: what the engine will be asked for; the model's context must hold ``n - 1`` more.
    """
    ahead = model.config.num_heads - 1
    tokens = generate(model, prompt, max_new_tokens=max_new_tokens + ahead, heads=1).tokens
    whole = torch.tensor([*prompt, *tokens])
    caches = model.new_caches(len(whole))
    first = len(prompt) - 1
    rows = len(whole) - first
    z, next_tokens = model.run(whole, caches, rows)
    further = model.run_further_heads(z, caches, rows=rows)
    best = torch.cat([next_tokens.unsqueeze(0), further]).topk(2).values
    margin = ((best[..., 0] - best[..., 1]) / best[..., 0].abs().clamp(min=1.0)).min()
    said = torch.full((ahead, len(whole)), -1)
    said[:, first:] = further.argmax(-1)
    routing = min(cache.routing for cache in caches.trunk)
    lists = tuple(map(tuple, said.tolist()))
    return Simulation(tuple(prompt), tuple(tokens), max_new_tokens, lists, float(margin), routing)


def total(simulations: Sequence[Simulation], heads: int) -> Counts:
    """Counts of several prompts together."""
    return sum((simulation.counts(heads) for simulation in simulations), Counts(0, (0,) * heads))
