"""Step time of models with n heads over a next-token model of the same parameters, beside what the FLOPs allow.

    python tools/bench_step.py              # minutes on 2 cores
    python tools/bench_step.py --quick

Every model has ``--layers`` transformer layers: n of them are heads, the rest is the trunk. So an n-head model has the
parameters of the next-token model (megatron-core's GPTModel) and adds n - 1 passes through the unembedding. A step is
forward and backward of the whole model; the optimizer's work is the same for all and left out.

"FLOP ratio" is counted on the real step (``torch.utils.flop_counter``) and checked against the formula. "over FLOPs"
is the measured ratio divided by it: 1 means that a FLOP costs what it costs in the next-token model. Processor time
says the same with less noise where others use the machine; the column after it takes this project's n=1 for the base
instead. "head forwards" counts, by hooks on the heads' layers, how often each head's forward ran in one step: once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench.models import Shape, megatron_model, mtp_model, positions, tokens_and_labels
from bench.report import Column, Limit, Result, add_common_arguments, dtype_of
from bench.timing import Times, interleave, synchronize_device
from bench.worlds import alone
from torch.utils.flop_counter import FlopCounterMode

from mtp_megatron.config import HeadsConfig
from mtp_megatron.targets import future_targets

BASE, ONE = "next token (megatron-core)", "n=1"


def base_step(shape: Shape, layers: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of megatron-core's next-token model."""
    model = megatron_model(shape, layers, 0, device)
    tokens, labels = tokens_and_labels(shape, device)
    place = positions(shape, device)

    def step() -> None:
        model(tokens, place, None, labels=labels).sum().backward()

    return step


def heads_step(
    shape: Shape, layers: int, heads: HeadsConfig, device: torch.device
) -> tuple[Callable[[], None], Sequence[torch.nn.Module]]:
    """Forward and backward of a model with n heads on ``layers - n`` trunk layers; and the heads' layers."""
    model = mtp_model(shape, layers - heads.n, heads, device)
    tokens, labels = tokens_and_labels(shape, device)
    place, targets = positions(shape, device), future_targets(labels, heads.n)

    def step() -> None:
        model(tokens, place, None, labels=targets)[0].backward()

    return step, list(model.heads)


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in one step."""
    ours = {torch.ops.aten.addmm_: _addmm_flops, torch.ops.aten.addmm: _addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        step()
    return counter.get_total_flops()


def _addmm_flops(total: Sequence[int], left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of ``total + left @ right`` from the shapes: PyTorch's table lacks the sum in place and ``out_dtype``."""
    return 2 * left[0] * left[1] * right[1]


def count_forwards(step: Callable[[], object], layers: Sequence[torch.nn.Module]) -> list[int]:
    """How often each layer's forward ran in one step."""
    counts = [0] * len(layers)

    def counting(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [layer.register_forward_hook(counting(index)) for index, layer in enumerate(layers)]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def expected_flops(shape: Shape, layers: int, n: int) -> int:
    """The same by formula: all layers once, the unembedding once for each head."""
    return layers * shape.layer_flops() + n * shape.unembedding_flops()


def measure(args: argparse.Namespace) -> Result:
    columns = [
        Column("model", "model"),
        Column("seconds", "median s", ".3f"),
        Column("gflop", "GFLOP", ".1f"),
        Column("allowed", "FLOP ratio", ".3f"),
        Column("measured", "time ratio", ".3f"),
        Column("over", "over FLOPs", ".3f"),
        Column("cpu_over", "CPU time over FLOPs", ".3f"),
        Column("own_over", "same, over own n=1", ".3f"),
        Column("forwards", "head forwards"),
    ]
    shape = Shape(args.hidden, args.ffn, args.hidden // 64, args.vocab, args.sequence, args.batch, dtype_of(args))
    setting = {
        "layers": args.layers,
        "hidden": args.hidden,
        "ffn": args.ffn,
        "V": args.vocab,
        "sequence": args.sequence,
        "microbatch": args.batch,
        "dtype": args.dtype,
        "repeats": args.repeats,
    }
    result = Result("Step time of n heads over a parameter-matched next-token model", setting, columns)
    with alone(args.threads) as device:
        result.header["threads"] = str(torch.get_num_threads())
        steps = {BASE: base_step(shape, args.layers, device)}
        rows: dict[str, dict[str, Any]] = {BASE: {"n": 1}}
        for n in args.heads:
            name = f"n={n}"
            steps[name], layers = heads_step(shape, args.layers, HeadsConfig.parse({"n": n}), device)
            forwards = count_forwards(steps[name], layers)
            rows[name] = {"n": n, "head_forwards": forwards, "forwards": " ".join(map(str, forwards))}
        for name, step in steps.items():
            rows[name]["gflop"] = count_flops(step) / 1e9
            rows[name]["formula"] = expected_flops(shape, args.layers, rows[name]["n"]) / 1e9
        times = interleave(steps, args.repeats, synchronize=synchronize_device)
    _compare(result, rows, times, quick=args.quick)
    return result


def _compare(result: Result, rows: dict[str, dict[str, Any]], times: dict[str, Times], quick: bool) -> None:
    flops = rows[BASE]["gflop"]
    for name, row in rows.items():
        time = times[name]
        row |= {"model": name, "seconds": time.median, "cpu_seconds": time.median_cpu, "wall": time.wall}
        row["cpu"], row["allowed"] = time.cpu, row["gflop"] / flops
        row["measured"] = time.median / times[BASE].median
        row["over"] = row["measured"] / row["allowed"]
        row["cpu_over"] = time.median_cpu / times[BASE].median_cpu / row["allowed"]
        if ONE in rows:  # the same parameters and FLOPs as the base, but with this project's loss
            row["own_over"] = time.median_cpu / times[ONE].median_cpu / row["allowed"]
        result.rows.append(row)
        if row["n"] == 4 and not quick:
            result.limits.append(Limit("n=4: time ratio / FLOP ratio", row["over"], 1.05))
    forwards = [count for row in result.rows for count in row.get("head_forwards", [])]
    result.limits.append(Limit("forwards of any head in one step", max(forwards), 1))
    off = max(abs(row["gflop"] / row["formula"] - 1) for row in result.rows)
    result.limits.append(Limit("counted FLOPs beside the formula, relative deviation", off, 0.001))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Step time of n heads over a parameter-matched next-token model.")
    add_common_arguments(parser)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--layers", type=int, default=12, help="transformer layers of every model, heads included")
    parser.add_argument("--hidden", type=int, help="a multiple of 64; default: 256")
    parser.add_argument("--vocab", type=int, help="default: 8192")
    parser.add_argument("--sequence", type=int, help="default: 256")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--repeats", type=int, help="timed rounds; default: 9")
    args = parser.parse_args(argv)
    args.hidden = args.hidden or (64 if args.quick else 256)
    args.vocab = args.vocab or (512 if args.quick else 8192)
    args.sequence = args.sequence or (32 if args.quick else 256)
    args.repeats = args.repeats or (2 if args.quick else 9)
    args.ffn = args.hidden * 8 // 3 // 32 * 32
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
