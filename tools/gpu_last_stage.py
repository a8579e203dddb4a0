"""The last stage of the paper's 1.3B model at TP1 on one GPU: peak memory and time of its step by heads and vocabulary.

    python tools/gpu_last_stage.py             # 2048 wide, 16 attention heads, 4096 tokens, bf16
    python tools/gpu_last_stage.py --quick     # very small, on any machine: shows that it runs

The step goes from the trunk's output z to dL/dz: n heads, each a transformer layer, and n passes through the
unembedding. "deferred" is this project's way, "joint" plain autograd with all heads alive; where joint does not fit
the device, its row says so. Layers are Transformer Engine's where it can be used, else megatron-core's own.

Peak memory is beyond parameters and gradient buffers (``torch.cuda.max_memory_allocated``; the allocator's on a CPU).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from bench.memory import device_peak
from bench.models import Shape
from bench.report import Column, Limit, Result, add_common_arguments, dtype_of
from bench.timing import interleave, synchronize_device
from bench.worlds import alone
from bench_memory import DEFERRED, JOINT, MIB, stage_step

from mtp_megatron.compat import packages

HIDDEN, FFN, ATTENTION_HEADS = 2048, 5632, 16  # examples/recipes/paper_1b3.yaml


def measure(args: argparse.Namespace) -> Result:
    columns = [
        Column("vocab", "V"),
        Column("n", "n"),
        Column("way", "way"),
        Column("peak_mib", "peak MiB", ".0f"),
        Column("over_n1", "over n=1", ".2f"),
        Column("seconds", "median s", ".4f"),
        Column("per_head", "ms per head", ".2f"),
        Column("note", "note"),
    ]
    cuda = torch.cuda.is_available()
    engine = packages.transformer_engine(cuda)
    use_engine = engine.state is packages.State.USABLE and not args.local
    setting = {
        "hidden": args.hidden,
        "sequence": args.sequence,
        "microbatch": args.batch,
        "dtype": args.dtype,
        "layers": "Transformer Engine's"
        if use_engine
        else f"megatron-core's own (transformer-engine: {engine.state.value})",
    }
    result = Result("Last stage of a 1.3B shape at TP1: z to dL/dz", setting, columns)
    scale = HIDDEN // args.hidden
    with alone(args.threads) as device:
        for vocab in args.vocab:
            shape = Shape(
                args.hidden,
                FFN // scale,
                max(1, ATTENTION_HEADS // scale),
                vocab,
                args.sequence,
                args.batch,
                dtype_of(args),
            )
            for n in args.heads:
                for way in args.ways:
                    result.rows.append(
                        {"vocab": vocab, "n": n, "way": way, **_row(way, n, shape, device, args, use_engine)}
                    )
    _compare(result)
    return result


def _row(
    way: str, n: int, shape: Shape, device: torch.device, args: argparse.Namespace, use_engine: bool
) -> dict[str, Any]:
    try:
        step = stage_step(way, n, shape, None, device, transformer_engine=use_engine)
        step()  # compiles, and makes what is made once
        peak = device_peak(step) / MIB
        time = interleave({way: step}, args.repeats, warmup=0, synchronize=synchronize_device)[way]
    except torch.cuda.OutOfMemoryError:
        return {"note": f"does not fit into {torch.cuda.get_device_properties(device).total_memory // 2**30} GiB"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {"peak_mib": peak, "seconds": time.median, "per_head": 1000 * time.median / n, "wall": time.wall}


def _compare(result: Result) -> None:
    peaks = {(row["vocab"], row["n"], row["way"]): row.get("peak_mib") for row in result.rows}
    for row in result.rows:
        first = peaks.get((row["vocab"], 1, row["way"]))
        if first is not None and row.get("peak_mib") is not None:
            row["over_n1"] = row["peak_mib"] / first
            if row["way"] == DEFERRED and row["n"] == 8:
                what = f"V={row['vocab']}: peak(n=8) / peak(n=1), deferred"
                result.limits.append(Limit(what, row["over_n1"], 1.05))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Memory and time of a 1.3B model's last stage by heads and vocabulary."
    )
    add_common_arguments(parser)
    parser.set_defaults(dtype="bf16")
    parser.add_argument("--heads", type=int, nargs="+", metavar="N", help="default: 1 2 4 8")
    parser.add_argument("--vocab", type=int, nargs="+", metavar="V", help="default: 32768 131072")
    parser.add_argument("--hidden", type=int, help=f"a divisor of {HIDDEN}; default: {HIDDEN}")
    parser.add_argument("--sequence", type=int, help="default: 4096")
    parser.add_argument("--batch", type=int, default=1, help="sequences of the microbatch")
    parser.add_argument("--repeats", type=int, help="timed steps; default: 5")
    parser.add_argument("--ways", nargs="+", choices=(DEFERRED, JOINT), default=[DEFERRED, JOINT])
    parser.add_argument("--local", action="store_true", help="megatron-core's own layers, also where there are others")
    args = parser.parse_args(argv)
    args.heads = args.heads or ([1, 8] if args.quick else [1, 2, 4, 8])
    args.vocab = args.vocab or ([4096] if args.quick else [32768, 131072])
    args.hidden = args.hidden or (64 if args.quick else HIDDEN)
    args.sequence = args.sequence or (64 if args.quick else 4096)
    args.repeats = args.repeats or (2 if args.quick else 5)
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
