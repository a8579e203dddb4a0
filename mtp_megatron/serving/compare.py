"""Speculative beside plain greedy decoding: text, forward passes and time, measured in one run."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from mtp_megatron import __version__
from mtp_megatron.serving.decode import Generation, check_lengths, generate
from mtp_megatron.serving.llama import HeadsLlama


@dataclass
class HeadCount:
    """All prompts decoded with the same number of heads.

    Attributes:
        heads: k.
        generations: one for each prompt.
        speedup: wall-clock time of plain greedy decoding of all prompts, divided by that with k heads.
        identical: every prompt's tokens are those of plain greedy decoding.
    """

    heads: int
    generations: list[Generation]
    speedup: float
    identical: bool

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward pass over all prompts, without the prompts' own passes and the token of each."""
        forwards = sum(generation.forwards for generation in self.generations)
        return sum(len(generation.tokens) - 1 for generation in self.generations) / forwards if forwards else 1.0

    @property
    def acceptance(self) -> list[float]:
        """Of heads 2 to k: which fraction of the head's drafts became part of the text."""
        totals = []
        for head in range(self.heads - 1):
            drafted = sum(generation.drafted[head] for generation in self.generations)
            totals.append(sum(generation.accepted[head] for generation in self.generations) / max(drafted, 1))
        return totals


def compare(
    model: HeadsLlama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    heads: Iterable[int],
    ends: Collection[int],
    progress: bool = True,
) -> list[HeadCount]:
    """Decode every prompt with each number of heads, plain greedy (1) always among them.

    The runs of one prompt follow one another directly, their order rotating from prompt to prompt, so that whatever
    else the machine does falls on all of them alike. A first prompt is decoded untimed.

    Returns:
        One entry for each number of heads, in rising order.

    Raises:
        ConfigError: a prompt that does not fit, or heads that the model has not; before anything is decoded.
    """
    counts = sorted({1, *heads})
    for prompt in prompts:
        check_lengths(model.config, len(prompt), max_new_tokens, counts[-1])
    runs: dict[int, list[Generation]] = {count: [] for count in counts}
    for count in counts:
        generate(model, prompts[0], max_new_tokens=max_new_tokens, heads=count, ends=ends)
    for number, prompt in enumerate(tqdm(prompts, desc="decoding", unit="prompt", disable=not progress)):
        turn = number % len(counts)
        for count in counts[turn:] + counts[:turn]:
            runs[count].append(generate(model, prompt, max_new_tokens=max_new_tokens, heads=count, ends=ends))
    plain = runs[1]
    plain_seconds = sum(generation.seconds for generation in plain)
    return [
        HeadCount(
            count,
            generations,
            speedup=plain_seconds / sum(generation.seconds for generation in generations),
            identical=all(ours.tokens == theirs.tokens for ours, theirs in zip(generations, plain, strict=True)),
        )
        for count, generations in runs.items()
    ]


def table(results: Sequence[HeadCount]) -> str:
    """The results for a terminal, a row for each number of heads."""
    lines = [f"{'heads':>5}  {'tokens per forward':>18}  {'speedup':>7}  accepted drafts of heads 2, 3, ..."]
    for result in results:
        accepted = "  ".join(f"{100 * rate:5.1f} %" for rate in result.acceptance) or "-"
        verdict = "" if result.identical else "   OUTPUT DIFFERS FROM PLAIN GREEDY"
        lines.append(
            f"{result.heads:>5}  {result.tokens_per_forward:>18.2f}  {result.speedup:>6.2f}x  {accepted}{verdict}"
        )
    return "\n".join(lines)


def report(results: Sequence[HeadCount], model: HeadsLlama, **conditions: Any) -> dict[str, Any]:
    """Content of ``speculative.json``: the most heads' figures at the top, all in ``by_heads``, and per prompt.

    Args:
        results: of :func:`compare`.
        model: what was decoded with.
        conditions: what else to record, such as the command.
    """
    best = results[-1]
    return {
        "prompts": len(best.generations),
        "heads_used": best.heads,
        "tokens_per_forward": best.tokens_per_forward,
        "speedup": best.speedup,
        "identical": all(result.identical for result in results),
        "by_heads": [
            {
                "heads": result.heads,
                "tokens_per_forward": result.tokens_per_forward,
                "speedup": result.speedup,
                "identical": result.identical,
                "acceptance": result.acceptance,
                "forwards": [generation.forwards for generation in result.generations],
                "seconds": sum(generation.seconds for generation in result.generations),
                "ties": sum(generation.ties for generation in result.generations),
            }
            for result in results
        ],
        "new_tokens": [len(generation.tokens) for generation in best.generations],
        "conditions": {
            **conditions,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "parameters": model.num_parameters,
            "processor": platform.processor() or platform.machine(),
            "torch": str(torch.__version__),
            "mtp_megatron": __version__,
        },
    }
