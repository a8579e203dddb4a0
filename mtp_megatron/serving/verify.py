"""Does a bundle serve what was trained? vLLM held against the torch decoder, token for token and draft for draft."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mtp_megatron.errors import ConfigError, MTPError
from mtp_megatron.serving.drafts import EAGLE3_FOLDER, HEADS_FOLDER, MEDUSA_FOLDER, drafts_in
from mtp_megatron.serving.engine import EngineRound, EngineRun, run_vllm
from mtp_megatron.serving.engine_command import speculative_config
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import Counts, Simulation, simulate, total

PLAIN = "plain"
_LENGTHS = (4, 16)  # of made-up prompts
# Room that vLLM needs behind a text, in tokens for each head that drafts. It stops drafting, for all requests of a
# batch, where the drafts to be checked and those to come do not fit (GPUModelRunner._input_fits_in_drafter); where
# steps are scheduled ahead, it takes the drafts of the step before for accepted, too.
_AHEAD = 3


class VerificationError(MTPError):
    """A bundle whose files are whole, and which does not do what it should."""


@dataclass(frozen=True)
class EngineResult:
    """One way of serving the bundle, held against torch.

    Attributes:
        draft: folder of the draft; None for plain decoding.
        heads: heads in use beside head 1.
        counts: vLLM's, of the first round.
        expected: torch's.
        seconds: of the faster round.
    """

    draft: str | None
    heads: int
    counts: Counts
    expected: Counts
    seconds: float


def made_up_prompts(model: HeadsLlama, eod: int) -> Iterator[list[int]]:
    """Random tokens, the same at every call: what follows is the model's own text, and heads are held against that."""
    drawn = random.Random(0)
    while True:
        length = drawn.randint(*_LENGTHS)
        yield [token for token in (drawn.randrange(model.config.vocab_size) for _ in range(length)) if token != eod]


def simulate_all(
    model: HeadsLlama, prompts: Iterator[list[int]], count: int, max_new_tokens: int, *, progress: bool
) -> tuple[list[Simulation], int]:
    """Simulate until ``count`` prompts are certain, see :attr:`Simulation.certain`; also returns how many were not.

    Raises:
        ConfigError: a prompt is empty or does not fit into the context, or none is certain.
    """
    room = model.config.context - max_new_tokens - _AHEAD * (model.config.num_heads - 1)
    if room < 1:
        raise ConfigError(
            "--max-new-tokens",
            max_new_tokens,
            f"the context is {model.config.context}, and drafting takes room behind the text",
            "Ask for fewer tokens.",
        )
    kept: list[Simulation] = []
    close = 0
    with tqdm(total=count, desc="torch", unit="prompt", disable=not progress) as bar:
        for prompt in prompts:
            if not 1 <= len(prompt) <= room:
                raise ConfigError("prompt", len(prompt), f"must have 1 to {room} tokens", "Shorten it.")
            simulation = simulate(model, prompt, max_new_tokens)
            if simulation.certain:
                kept.append(simulation)
                bar.update()
            else:
                close += 1
            if len(kept) == count or close > 2 * count:
                break
    if not kept:
        raise ConfigError("prompts", close, "in all of them some choice is too close to call", "Give other prompts.")
    return kept, close


def check_heads(simulations: Sequence[Simulation]) -> None:
    """Refuse a bundle with a head none of whose drafts is accepted.

    Raises:
        VerificationError: names the head.
    """
    heads = len(simulations[0].said)
    accepted = total(simulations, heads).accepted
    for index, count in enumerate(accepted):
        if count:
            continue
        right = sum(
            simulation.said[index][t] == whole
            for simulation in simulations
            for t, whole in enumerate([*simulation.prompt, *simulation.tokens][index + 2 :])
        )
        hint = (
            "On its own it is never right either: its weights do not belong to this trunk, or it was not trained (a "
            "loss weight of 0, a curriculum that had not reached it). Compare head_accuracy in the run's metrics.jsonl"
            if not right
            else f"On its own it is right {right} times: decode prompts of the training's kind (--prompts-from), or "
            "serve with fewer heads"
        )
        raise VerificationError(
            f"head {index + 2}: none of its drafts was accepted in {len(simulations)} prompts. {hint}."
        )


def engine_runs(bundle: Path, heads: int, *, eager: bool, rounds: int = 2) -> list[EngineRun]:
    """Plain decoding, and every draft of the bundle with every number of heads that it takes."""
    options = {"enforce_eager": True} if eager else {}
    numbers = {HEADS_FOLDER: range(1, heads + 1), MEDUSA_FOLDER: (heads,), EAGLE3_FOLDER: (1,)}
    runs = [EngineRun(PLAIN, None, options, rounds)]
    for draft in drafts_in(bundle):
        for count in numbers[draft]:
            config = speculative_config(bundle.absolute(), draft, count)
            runs.append(EngineRun(f"{draft} {count}", config, options, rounds))
    return runs


def engine_context(simulations: Sequence[Simulation]) -> int:
    """Positions that the engine is asked for: vLLM takes memory for a request of full length before it starts."""
    longest = max(len(simulation.prompt) + simulation.max_new_tokens for simulation in simulations)
    return longest + _AHEAD * len(simulations[0].said)


def run_engines(
    python: str,
    bundle: Path,
    simulations: Sequence[Simulation],
    *,
    eager: bool,
    quiet: bool,
    arguments: Sequence[str] = (),
) -> list[EngineResult]:
    """Serve the prompts in every way and hold each against torch.

    Args:
        python: interpreter that has vLLM.
        bundle: its folder.
        simulations: the prompts, and what torch makes of them.
        eager: vLLM does not compile the model.
        quiet: do not show vLLM's messages.
        arguments: of ``vllm serve``, for every engine.

    Raises:
        EngineError: vLLM does not run.
        VerificationError: text or acceptances differ; names the draft, prompt and position.
    """
    heads = len(simulations[0].said)
    rounds = run_vllm(
        python,
        bundle,
        [simulation.prompt for simulation in simulations],
        engine_runs(bundle, heads, eager=eager),
        max_new_tokens=simulations[0].max_new_tokens,
        context=engine_context(simulations),
        arguments=arguments,
        plugin=HEADS_FOLDER in drafts_in(bundle),
        quiet=quiet,
    )
    results = []
    for name, made in rounds.items():
        draft, _, used = name.partition(" ")
        results.append(_held_against(simulations, made, None if name == PLAIN else draft, int(used or 0)))
    return results


def _held_against(
    simulations: Sequence[Simulation], rounds: Sequence[EngineRound], draft: str | None, heads: int
) -> EngineResult:
    name = f"vLLM with {heads} of {draft}" if draft else "vLLM without speculation"
    for made in rounds:
        compare_text(name, [simulation.text for simulation in simulations], made.tokens)
    first = rounds[0]
    expected = total(simulations, heads)
    counts = Counts(first.drafts, first.accepted if draft else ())
    if draft:
        compare_counts(name, counts, expected, padded=padded_drafts(simulations))
    return EngineResult(draft, heads, counts, expected, min(made.seconds for made in rounds))


def compare_text(name: str, expected: Sequence[list[int]], made: Sequence[list[int]]) -> None:
    """Refuse text that differs from torch's greedy text.

    Raises:
        VerificationError: names the first prompt and token.
    """
    for number, (ours, theirs) in enumerate(zip(expected, made, strict=True), start=1):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            raise VerificationError(
                f"{name}: in prompt {number} new token {at + 1} is {theirs[at : at + 1]}, torch's {ours[at : at + 1]}. "
                "The engine computes another model: check its version and its settings (dtype, quantization, rope)."
            )


def padded_drafts(simulations: Sequence[Simulation]) -> int:
    """How many drafts vLLM may count beyond those that it makes.

    A prompt of which one token is left to compute, admitted while other requests decode, is padded to the length of a
    draft (``Scheduler.schedule``, for CUDA graphs of one shape), and the padding is counted as a draft of which nothing
    is accepted.
    """
    return sum(len(simulation.prompt) == 1 for simulation in simulations)


def compare_counts(name: str, counts: Counts, expected: Counts, *, padded: int = 0) -> None:
    """Refuse acceptances that differ from the simulation's.

    Args:
        padded: drafts that may be counted beyond the expected ones, see :func:`padded_drafts`.

    Raises:
        VerificationError: says which, with a hint where nothing at all was accepted.
    """
    if counts.accepted == expected.accepted and 0 <= counts.drafts - expected.drafts <= padded:
        return
    hint = "The engine feeds the heads something else than training did"
    if not any(counts.accepted):
        hint = (
            "Nothing was accepted: the draft reads another layer's output than z (eagle_aux_hidden_state_layer_ids in "
            "its config.json), or other weights"
        )
    raise VerificationError(
        f"{name}: {list(counts.accepted)} of {counts.drafts} drafts accepted at each position, torch's simulation has "
        f"{list(expected.accepted)} of {expected.drafts}. {hint}."
    )


def table(results: Sequence[EngineResult]) -> str:
    """Results for a terminal: tokens per forward pass and wall-clock ratio by number of heads used."""
    plain = next(result.seconds for result in results if result.draft is None)
    lines = [
        f"{'heads':>5}  {'draft':<13}  {'tokens per forward':>18}  {'speedup':>7}  accepted drafts of heads 2, 3, ..."
    ]
    for result in results:
        accepted = "  ".join(f"{100 * count / result.counts.drafts:5.1f} %" for count in result.counts.accepted) or "-"
        lines.append(
            f"{result.heads + 1:>5}  {result.draft or '-':<13}  {result.counts.tokens_per_forward:>18.2f}  "
            f"{plain / result.seconds:>6.2f}x  {accepted}"
        )
    return "\n".join(lines)
