"""``mtp-megatron verify``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtp_megatron.serving.export import Export
    from mtp_megatron.serving.llama import HeadsLlama

SUMMARY = "check a serving bundle: files, tensors, what torch and vLLM decode"
_ONE_THREAD_PARAMETERS = 50_000_000
_LIMITS = (
    "Everything is computed in fp32, where texts can be compared token for token: by torch on the CPU, which takes 4 "
    "bytes of memory for each parameter and the time of a decoder without a GPU, and by vLLM, which takes as much on "
    "its GPUs. For a large model ask for little (--num-prompts 4 --max-new-tokens 16), and spread vLLM over GPUs "
    "(-- --tensor-parallel-size N)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("export", metavar="EXPORT", help="folder that `mtp-megatron convert --to bundle` wrote")
    parser.add_argument(
        "--vllm-python",
        metavar="PATH",
        help="interpreter of an environment with vLLM (default: MTP_VLLM_PYTHON, else this one if it has vLLM)",
    )
    parser.add_argument("--no-vllm", action="store_true", help="check without vLLM")
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model (slow to start; default: enforce_eager)"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts-file", metavar="FILE", help="prompts, separated by lines of ---")
    prompts.add_argument(
        "--prompts-from",
        metavar="DIR",
        help="take prompts from the held-out documents of this data set (default: random tokens)",
    )
    parser.add_argument("--num-prompts", type=int, default=50, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=16, metavar="N", help="length of --prompts-from (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show vLLM's messages")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "engine", nargs="*", metavar="-- ARGS", help="everything after -- goes to vLLM, e.g. --tensor-parallel-size 2"
    )
    parser.epilog = _LIMITS


def run(args: argparse.Namespace) -> int:
    """Check, print what was found; errors come as exceptions."""
    from pathlib import Path

    import torch

    from mtp_megatron.checkpoint.bundle_manifest import check_manifest
    from mtp_megatron.errors import ConfigError
    from mtp_megatron.serving.compare import compare
    from mtp_megatron.serving.compare import table as torch_table
    from mtp_megatron.serving.engine import find_python
    from mtp_megatron.serving.export import open_export
    from mtp_megatron.serving.llama import HeadsLlama
    from mtp_megatron.serving.tensor_checks import check_tensors
    from mtp_megatron.serving.verify import check_heads, run_engines, simulate_all, table

    for option in ("num_prompts", "prompt_tokens", "max_new_tokens"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", getattr(args, option), "must be 1 or more", "Raise it.")
    if args.max_new_tokens == 1:
        raise ConfigError("--max-new-tokens", 1, "nothing is drafted for the first new token", "Ask for 2 or more.")
    python = None if args.no_vllm else find_python(args.vllm_python)
    folder = Path(args.export)
    print(f"files: {check_manifest(folder)}, each with the SHA-256 of manifest.json")
    print(f"tensors: {check_tensors(folder)}, each of its shape and finite; drafts are made of the model's heads")
    export = open_export(folder)
    model = HeadsLlama.load(export)
    if model.num_parameters < _ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
    simulations, close = simulate_all(
        model, _prompts(args, export, model), args.num_prompts, args.max_new_tokens, progress=not args.quiet
    )
    print(f"prompts: {len(simulations)}, {args.max_new_tokens} new tokens each" + _left_out(close))
    results = compare(
        model,
        [list(simulation.prompt) for simulation in simulations],
        max_new_tokens=args.max_new_tokens,
        heads=range(1, model.config.num_heads + 1),
        ends=(),
        progress=not args.quiet,
    )
    print(f"\ntorch, fp32:\n{torch_table(results)}")
    if not all(result.identical for result in results):
        from mtp_megatron.serving.verify import VerificationError

        raise VerificationError("torch: speculative and plain greedy decoding differ. Please report it.")
    check_heads(simulations)
    if python is None:
        reason = "--no-vllm" if args.no_vllm else "not found; give --vllm-python PATH to compare with it"
        print(f"\nvLLM: {reason}\nThe bundle is whole, and every head's drafts are accepted by the torch decoder.")
        return 0
    del model  # an engine on the CPU needs the memory
    engines = run_engines(
        python, folder, simulations, eager=not args.compile, quiet=not args.verbose, arguments=args.engine
    )
    print(f"\nvLLM, fp32, all prompts at once:\n{table(engines)}")
    print("\nText and accepted drafts are those of the torch decoder, prompt by prompt and position by position.")
    return 0


def _prompts(args: argparse.Namespace, export: Export, model: HeadsLlama) -> Iterator[list[int]]:
    from mtp_megatron.serving.prompts import from_file, from_held_out
    from mtp_megatron.serving.verify import made_up_prompts

    if args.prompts_file:
        return itertools.islice(from_file(args.prompts_file, export.tokenizer), args.num_prompts)
    if args.prompts_from:
        return iter(from_held_out(args.prompts_from, export.tokenizer, args.num_prompts, args.prompt_tokens))
    return made_up_prompts(model, export.tokenizer.eod)


def _left_out(close: int) -> str:
    return f" ({close} more left out: some choice in them is closer than fp32 engines agree)" if close else ""
