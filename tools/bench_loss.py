"""Time and peak memory of unembedding + cross entropy, forward and backward: this project beside its peers.

    python tools/bench_loss.py              # minutes on 2 cores
    python tools/bench_loss.py --quick --tp 1 2

All get the same hidden states ``[tokens, h]``, unembedding ``[V/tp, h]`` and targets, and return the summed loss and
both gradients (hidden's summed over the tensor-parallel ranks). They are timed in turns, so that a busy machine hits
all alike; the medians are compared. Only this project's also counts correct predictions. On a GPU it appears with its
Triton kernels and, beside them, with torch's operations and torch.compile's code for the same two steps.

Peak memory is the allocator's, beyond the inputs and the weight: logits, gradients, everything on the way.
"error" is the largest deviation of either gradient from megatron-core's unfused path, relative to its largest entry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bench.losses import AUTOGRAD, RAW, UNFUSED, Outcome, Problem, Rival, rivals
from bench.memory import device_peak
from bench.report import Column, Limit, Result, add_common_arguments, dtype_of
from bench.timing import interleave, synchronize_device
from bench.worlds import spawn

MIB = 2**20


def body(rank: int, size: int, device: torch.device, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank's rows; the processor time is this rank's, the clock's the slowest rank's."""
    dtype: torch.dtype = getattr(torch, settings["dtype"])
    problem = Problem.random(settings["tokens"], settings["hidden"], settings["vocab"], dtype, device)
    everyone = [rival for rival in rivals(problem) if settings["only"] is None or rival.name in settings["only"]]
    runnable = {rival.name: rival.run for rival in everyone if rival.run is not None}
    errors = _errors(runnable)
    times = interleave(runnable, settings["repeats"], synchronize=_all_ranks)
    peaks = {name: device_peak(run) / MIB for name, run in runnable.items()}
    return [_row(size, rival, times, peaks, errors) for rival in everyone]


def _row(size: int, rival: Rival, times: dict, peaks: dict, errors: dict) -> dict[str, Any]:
    row: dict[str, Any] = {"tp": size, "rival": rival.name, "note": rival.reason}
    if rival.run is not None:
        time = times[rival.name]
        row |= {"seconds": time.median, "cpu_seconds": time.median_cpu, "wall": time.wall, "cpu": time.cpu}
        row |= {"peak_mib": peaks[rival.name], "error": errors[rival.name]}
    return row


def _all_ranks() -> None:
    synchronize_device()
    if dist.get_world_size() > 1:
        dist.barrier()


def _errors(runnable: dict[str, Callable[[], Outcome]]) -> dict[str, float | None]:
    """Deviation of every rival's gradients from megatron-core's; also the first call, which compiles what compiles."""
    want = runnable[UNFUSED]() if UNFUSED in runnable else None
    errors: dict[str, float | None] = {}
    for name, run in runnable.items():
        got = run()
        if want is None:
            errors[name] = None
            continue
        pairs = ((got.hidden_grad, want.hidden_grad), (got.weight_grad, want.weight_grad))
        deviations = [(left.float() - right.float()).abs().max() / right.abs().max().float() for left, right in pairs]
        errors[name] = float(torch.stack(deviations).max())
    return errors


def measure(args: argparse.Namespace) -> Result:
    columns = [
        Column("tp", "TP"),
        Column("rival", "loss"),
        Column("seconds", "median s", ".3f"),
        Column("over_core", "over core", ".2f"),
        Column("cpu_seconds", "CPU s", ".3f"),
        Column("cpu_over_core", "over core", ".2f"),
        Column("peak_mib", "peak MiB", ".0f"),
        Column("peak_over_core", "over core", ".2f"),
        Column("error", "error", ".0e"),
        Column("note", "note"),
    ]
    settings = {
        "tokens": args.tokens,
        "hidden": args.hidden,
        "vocab": args.vocab,
        "dtype": str(dtype_of(args)).removeprefix("torch."),
        "repeats": args.repeats,
        "only": args.only,
    }
    result = Result("Unembedding and cross entropy, forward and backward", settings, columns)
    result.setting = {key: value for key, value in settings.items() if value is not None}
    for size in args.tp:
        if torch.cuda.is_available() and size > torch.cuda.device_count():
            result.notes.append(f"TP {size} left out: {torch.cuda.device_count()} CUDA devices.")
            continue
        threads = args.threads or max(1, torch.get_num_threads() // size)
        ranks = spawn(body, size, threads, settings)
        for row, *others in zip(*ranks, strict=True):
            if row.get("peak_mib") is not None:
                row["peak_mib"] = max(other["peak_mib"] for other in (row, *others))
                row["error"] = None if row["error"] is None else max(other["error"] for other in (row, *others))
            result.rows.append(row)
    result.notes.append("Seconds and peak are of one rank; 'over core' is the ratio to megatron-core's unfused path.")
    if not torch.cuda.is_available():
        result.notes.append(
            "The ranks share this machine's cores: TP 2 and 4 compare the losses, they show no speed-up."
        )
    _compare(result, args)
    return result


def _compare(result: Result, args: argparse.Namespace) -> None:
    core = {row["tp"]: row for row in result.rows if row["rival"] == UNFUSED}
    for row in result.rows:
        base = core.get(row["tp"])
        if base is None or row.get("seconds") is None:
            continue
        row["over_core"] = row["seconds"] / base["seconds"]
        row["cpu_over_core"] = row["cpu_seconds"] / base["cpu_seconds"]
        row["peak_over_core"] = row["peak_mib"] / base["peak_mib"]
        if row["rival"] in (AUTOGRAD, RAW) and row["tp"] == 1 and not args.quick:
            result.limits.append(Limit(f"{row['rival']}: time over megatron-core's", row["over_core"], 1.05))
            result.limits.append(Limit(f"{row['rival']}: peak over megatron-core's", row["peak_over_core"], 0.25))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Unembedding + cross entropy: this project beside its peers.")
    add_common_arguments(parser)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4], metavar="SIZE", help="tensor-parallel sizes")
    parser.add_argument("--tokens", type=int, help="default: 4096")
    parser.add_argument("--vocab", type=int, help="a multiple of the TP sizes; default: 32768")
    parser.add_argument("--hidden", type=int, help="default: 512")
    parser.add_argument("--repeats", type=int, help="timed rounds; default: 7")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the losses to run")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (256 if args.quick else 4096)
    args.vocab = args.vocab or (1024 if args.quick else 32768)
    args.hidden = args.hidden or (64 if args.quick else 512)
    args.repeats = args.repeats or (2 if args.quick else 7)
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
