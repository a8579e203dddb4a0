"""``mtp-megatron generate``."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtp_megatron.data.tokenizer import Tokenizer
    from mtp_megatron.serving.compare import HeadCount
    from mtp_megatron.serving.decode import Generation

SUMMARY = "decode an export speculatively, beside plain greedy decoding"
EXIT_DIFFERENT = 1
# One thread is fastest for a model whose layers take microseconds; larger ones take what torch takes.
_ONE_THREAD_PARAMETERS = 50_000_000
_COLOURS = ("\033[36m", "\033[33m")
_PLAIN = "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("export", metavar="EXPORT", help="folder that `mtp-megatron convert` wrote")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", metavar="TEXT", action="append", help="text to continue; may be given several times"
    )
    prompts.add_argument("--prompts-file", metavar="FILE", help="prompts, separated by lines of ---")
    prompts.add_argument(
        "--prompts-from", "--dataset", metavar="DIR", help="take prompts from the held-out documents of this data set"
    )
    parser.add_argument("--num-prompts", type=int, default=50, metavar="N", help="of --prompts-from (default: 50)")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="length of --prompts-from (default: half of what the context leaves)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    parser.add_argument("--heads", type=int, metavar="K", help="heads to decode with (default: all that the model has)")
    parser.add_argument(
        "--sweep-heads",
        action=argparse.BooleanOptionalAction,
        help="decode with 1, 2, ... K heads (default: with --prompts-from), else with 1 and K",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="arithmetic; fp32 (default) gives the text of plain greedy token for token, bf16 promises nothing",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: 1 for a small model)")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after the end of the document")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Decode, print, and return 1 if speculative and plain decoding gave different text."""
    import torch

    from mtp_megatron.errors import ConfigError
    from mtp_megatron.serving.compare import compare, report, table
    from mtp_megatron.serving.decode import check_lengths
    from mtp_megatron.serving.export import open_export
    from mtp_megatron.serving.llama import HeadsLlama

    for option in ("num_prompts", "prompt_tokens", "threads"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", getattr(args, option), "must be 1 or more", "Raise it.")
    if args.json:
        _check_writable(Path(args.json))
    export = open_export(args.export)
    most = export.config.num_heads if args.heads is None else args.heads
    prompts = _prompts(args, export.tokenizer, export.config.context)
    for prompt in prompts:
        check_lengths(export.config, len(prompt), args.max_new_tokens, most)
    model = HeadsLlama.load(export, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    if args.threads or model.num_parameters < _ONE_THREAD_PARAMETERS:
        torch.set_num_threads(args.threads or 1)
    sweep = args.sweep_heads if args.sweep_heads is not None else args.prompts_from is not None
    results = compare(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        heads=range(1, most + 1) if sweep and most > 1 else (most,),
        ends=() if args.ignore_eod else (export.tokenizer.eod, *export.tokenizer.more_ends),
        progress=not args.quiet,
    )
    if not args.prompts_from:
        for prompt, generation in zip(prompts, results[-1].generations, strict=True):
            print(_text(export.tokenizer, prompt, generation, colour=sys.stdout.isatty()))
            print()
        _say_unknown(results[-1], export.tokenizer)
    print(table(results))
    if args.json:
        command = shlex.join(["mtp-megatron", "generate", *sys.argv[2:]])
        figures = report(results, model, command=command, export=str(export.folder), max_new_tokens=args.max_new_tokens)
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    experts = export.config.num_experts is not None
    return _verdict(results, len(prompts), bf16=args.dtype == "bf16", experts=experts)


def _prompts(args: argparse.Namespace, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    from mtp_megatron.serving.prompts import from_file, from_held_out

    if args.prompt:
        return [tokenizer.encode_prompt(text) for text in args.prompt]
    if args.prompts_file:
        return from_file(args.prompts_file, tokenizer)
    length = args.prompt_tokens or max(1, (context - args.max_new_tokens) // 2)
    return from_held_out(args.prompts_from, tokenizer, args.num_prompts, length)


def _text(tokenizer: Tokenizer, prompt: list[int], generation: Generation, *, colour: bool) -> str:
    """Prompt and continuation; on a terminal the tokens that one forward pass made certain share a colour."""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])

    whole = decode([*prompt, *generation.tokens])
    if not colour:
        return whole
    ends = itertools.accumulate(generation.accepted_together, initial=0)
    # A character may be spread over several byte tokens: what is incomplete decodes to U+FFFD and waits for the rest.
    lengths = [len(decode([*prompt, *generation.tokens[:end]]).rstrip("\ufffd")) for end in ends]
    parts = [whole[: lengths[0]]]
    for number, (start, end) in enumerate(itertools.pairwise([*lengths[:-1], len(whole)])):
        parts.append(f"{_COLOURS[number % 2]}{whole[start:end]}{_PLAIN}")
    return "".join(parts)


def _say_unknown(result: HeadCount, tokenizer: Tokenizer) -> None:
    """A model may have more ids than its tokenizer (``model.vocab_size``), and say them while it has learned little."""
    tokens = [token for generation in result.generations for token in generation.tokens]
    if unknown := sum(token >= tokenizer.vocab_size for token in tokens):
        print(
            f"note: {unknown} of {len(tokens)} new tokens are ids that the tokenizer of {tokenizer.vocab_size} does "
            "not have; the text above lacks them",
            file=sys.stderr,
        )


def _check_writable(path: Path) -> None:
    """Make the file's folder, and refuse a place that cannot be written before anything is decoded for it."""
    from mtp_megatron.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            "--json", str(path), f"cannot be written ({error.strerror})", "Choose another file."
        ) from error


def _verdict(results: list[HeadCount], prompts: int, *, bf16: bool, experts: bool) -> int:
    different = [result for result in results if not result.identical]
    if not different:
        best = results[-1]
        if best.heads > 1:
            print(
                f"{best.tokens_per_forward:.2f} tokens per forward pass, {best.speedup:.2f}x the speed of plain greedy "
                f"decoding; {prompts} of {prompts} texts identical"
            )
        return 0
    worst = different[-1]
    pairs = list(zip(worst.generations, results[0].generations, strict=True))
    number, (ours, plain) = next((i, pair) for i, pair in enumerate(pairs) if pair[0].tokens != pair[1].tokens)
    position = next((i for i, (a, b) in enumerate(zip(ours.tokens, plain.tokens, strict=False)) if a != b), 0)
    hint = (
        "In bf16 near-ties fall differently when a forward pass has more rows; decode with --dtype fp32."
        if bf16
        else "Two experts that a router likes equally well may change places when a forward pass has more rows: that "
        "is no fault of the export where it is rare. `mtp-megatron verify` leaves such prompts out."
        if experts
        else "This must not happen in fp32: please report it with the export."
    )
    count = sum(a.tokens != b.tokens for a, b in pairs)
    print(
        f"error: {count} of {prompts} texts differ between {worst.heads} heads and plain greedy decoding, first in "
        f"prompt {number + 1} at new token {position + 1}. {hint}",
        file=sys.stderr,
    )
    return EXIT_DIFFERENT
