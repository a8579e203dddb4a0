"""Peak memory of a microbatch under DeepSpeed, ZeRO 1 to 3, and under megatron-core's DDP, as heads are added.

    python tools/bench_deepspeed.py            # about five minutes
    python tools/bench_deepspeed.py --quick

A model of one trunk layer and n heads, forward and backward, in the middle of an accumulation: gradient buffers exist
already. Counted: every tensor made on the way (see ``bench_memory.py``): activations, gathered parameters, gradients on
their way to the buffers, reduction buckets. Not counted: parameters, gradient buffers, optimizer state, which ZeRO
shards and which grow with n, as the model does. One process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench.memory import cuda_peak, live_peak
from bench.models import Shape, mtp_model, positions, tokens_and_labels
from bench.report import Column, Limit, Result, add_common_arguments, dtype_of
from bench.worlds import alone

from mtp_megatron.config import HeadsConfig
from mtp_megatron.targets import future_targets

MIB = 2**20
MEGATRON = "megatron-core DDP"
WAYS = (MEGATRON, "ZeRO 1", "ZeRO 2", "ZeRO 3")
HOLDS_GRADIENTS = "ZeRO 2"
BUCKET = 10**6  # elements reduced at a time; DeepSpeed's default of 5e8 would be all that one sees


def microbatch(way: str, n: int, shape: Shape, device: torch.device) -> Callable[[], None]:
    """Forward and backward of a microbatch of n heads that neither begins nor ends an accumulation."""
    tokens, labels = tokens_and_labels(shape, device)
    place, targets = positions(shape, device), future_targets(labels, n)
    model = mtp_model(shape, 1, HeadsConfig.parse({"n": n}), device)
    for parameter in model.parameters():
        parameter.grad = None
    if way == MEGATRON:
        return _under_ddp(model, tokens, place, targets)
    engine = _engine(model, int(way.removeprefix("ZeRO ")), shape)

    def run() -> None:
        loss, _ = engine(tokens, place, None, labels=targets)
        engine.backward(loss / tokens.numel(), scale_wrt_gas=False)

    run()  # makes the gradient buffers
    engine.step()
    return run


def _under_ddp(model: Any, tokens: Any, place: Any, targets: Any) -> Callable[[], None]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)

    def run() -> None:
        with chunk.no_sync():
            (chunk(tokens, place, None, labels=targets)[0] / tokens.numel()).backward()

    return run


def _engine(model: Any, stage: int, shape: Shape) -> Any:
    import logging

    import deepspeed

    from mtp_megatron.deepspeed.parameters import ZeroParameters, parameter_groups
    from mtp_megatron.deepspeed.unit import MegatronUnit

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", "0")
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        zero |= {f"stage3_{name}": 0 for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")}
        zero["stage3_param_persistence_threshold"] = 0
    model.parameter_access = ZeroParameters(model, stage)
    config = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_accumulation_steps": 10**6,
        "zero_optimization": zero,
        "bf16": {"enabled": shape.dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    return deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, 0.1),
        config=config,
        mpu=MegatronUnit(),
        dist_init_required=False,
    )[0]


def measure(args: argparse.Namespace) -> Result:
    setting = {"vocab": args.vocab, "hidden": args.hidden, "sequence": args.sequence, "dtype": args.dtype}
    columns = [Column("way", "way"), *(Column(f"n{n}", f"n={n} MiB", ".1f") for n in args.heads)]
    columns.append(Column("growth", "last / first", ".2f"))
    result = Result("Peak memory of a microbatch, trunk of one layer", setting, columns)
    shape = Shape(
        args.hidden, 4 * args.hidden, args.hidden // 64, args.vocab, args.sequence, args.batch, dtype_of(args)
    )
    with alone(args.threads) as device:
        for way in WAYS:
            row: dict[str, Any] = {"way": way}
            for n in args.heads:
                run = microbatch(way, n, shape, device)
                run()  # what is made once belongs to no microbatch
                row[f"n{n}"] = (cuda_peak if torch.cuda.is_available() else live_peak)(run) / MIB
                del run
            row["growth"] = row[f"n{args.heads[-1]}"] / row[f"n{args.heads[0]}"]
            result.rows.append(row)
            if way != HOLDS_GRADIENTS:
                result.limits.append(Limit(f"{way}: n={args.heads[-1]} over n={args.heads[0]}", row["growth"], 1.05))
    result.notes.append(
        f"{HOLDS_GRADIENTS} accumulates in fp32 models by holding a microbatch's gradients beside those before: "
        "its row holds gradients of the model, divided by the data parallel ranks, which grow with n as parameters do."
    )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory of a microbatch under DeepSpeed as heads are added.")
    add_common_arguments(parser)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--vocab", type=int, metavar="V", help="default: 32768")
    parser.add_argument("--hidden", type=int, help="a multiple of 64; default: 256")
    parser.add_argument("--sequence", type=int, help="default: 512")
    parser.add_argument("--batch", type=int, default=2, help="sequences of the microbatch")
    args = parser.parse_args(argv)
    args.vocab = args.vocab or (4096 if args.quick else 32768)
    args.hidden = args.hidden or (64 if args.quick else 256)
    args.sequence = args.sequence or (128 if args.quick else 512)
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
