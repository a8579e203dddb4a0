"""Peak memory of a microbatch under DeepSpeed, ZeRO 0 to 3, and under megatron-core's DDP, as heads are added.

    python tools/bench_deepspeed.py            # about five minutes
    python tools/bench_deepspeed.py --quick

A model of one trunk layer and n heads, forward and backward, in the middle of an accumulation. Counted: every tensor
made on the way (see ``bench_memory.py``): activations, gathered parameters, gradients on their way to the buffers,
reduction buckets. Not counted: parameters, gradient buffers, optimizer state, which ZeRO shards and which grow with n,
as the model does. One process: nothing is divided.

megatron-core's gradient buffers exist before a step, and so do ZeRO's, with one exception: ZeRO 2 that accumulates in
the model's own type (fp32) makes a buffer for its share of the gradients anew in each microbatch, at the first
reduction, and drops it at the end. Here that buffer is made before the microbatch, like the others; another row shows
what is seen when it is not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench.memory import cuda_peak, live_peak
from bench.models import Shape, mtp_model, positions, tokens_and_labels
from bench.report import Column, Limit, Result, add_common_arguments, dtype_of
from bench.worlds import alone

from mtp_megatron.config import HeadsConfig
from mtp_megatron.targets import future_targets

MIB = 2**20
MEGATRON = "megatron-core's DDP"
WAYS = (MEGATRON, "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")
MADE_ANEW = ", with the gradient buffer that it makes anew"
JOINT = ", plain autograd: all heads alive"


@dataclass(frozen=True)
class Microbatch:
    """One that neither begins nor ends an accumulation: ``run`` is its forward and backward.

    ``make_buffer`` makes, before a run, the gradient buffer that the engine would make in it; None: it makes none.
    """

    run: Callable[[], None]
    make_buffer: Callable[[], None] | None = None

    def peak(self, *, buffer_exists: bool = True) -> float:
        """MiB of what ``run`` makes."""
        if self.make_buffer is not None and buffer_exists:
            self.make_buffer()
        return (cuda_peak if torch.cuda.is_available() else live_peak)(self.run) / MIB


def microbatch(way: str, heads: HeadsConfig, shape: Shape, device: torch.device) -> Microbatch:
    """The microbatch of a model with ``heads`` whose gradient buffers exist."""
    tokens, labels = tokens_and_labels(shape, device)
    place, targets = positions(shape, device), future_targets(labels, heads.n)
    model = mtp_model(shape, 1, heads, device)
    for parameter in model.parameters():
        parameter.grad = None
    if way == MEGATRON:
        return _under_ddp(model, tokens, place, targets)
    engine = _engine(model, int(way.removeprefix("ZeRO ")), shape)

    def run() -> None:
        loss, _ = engine(tokens, place, None, labels=targets)
        engine.backward(loss / tokens.numel(), scale_wrt_gas=False)

    run()  # makes the gradient buffers, and what is made once
    engine.step()
    return Microbatch(run, _buffer_maker(engine))


def _under_ddp(model: Any, tokens: Any, place: Any, targets: Any) -> Microbatch:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)

    def run() -> None:
        with chunk.no_sync():
            (chunk(tokens, place, None, labels=targets)[0] / tokens.numel()).backward()

    run()
    return Microbatch(run)


def _engine(model: Any, stage: int, shape: Shape) -> Any:
    import logging

    import deepspeed

    from mtp_megatron.deepspeed.parameters import ZeroParameters, parameter_groups
    from mtp_megatron.deepspeed.unit import MegatronUnit

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", "0")
    bucket = shape.layer_parameters() // 4  # DeepSpeed's default, 5e8 elements, would be all that one sees
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
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


def _buffer_maker(engine: Any) -> Callable[[], None] | None:
    """What ``DeepSpeedZeroOptimizer.copy_grads_in_partition`` does where it finds no buffer; it takes one it finds.

    A stage 2 that accumulates in another type than the model's has a lasting buffer and makes none.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 2 or optimizer.dtype != optimizer.gradient_accumulation_dtype:
        return None
    share = [parameter for group in optimizer.params_in_partition for parameter in group]

    def make() -> None:
        optimizer.grads_in_partition = torch.empty(
            sum(parameter.numel() for parameter in share), dtype=optimizer.dtype, device=share[0].device
        )
        optimizer.grads_in_partition_offset = 0

    return make


def measure(args: argparse.Namespace) -> Result:
    setting = {"vocab": args.vocab, "hidden": args.hidden, "sequence": args.sequence, "microbatch": args.batch}
    columns = [Column("way", "way"), *(Column(f"n{n}", f"n={n} MiB", ".1f") for n in args.heads)]
    columns.append(Column("growth", "last / first", ".2f"))
    result = Result("Peak memory of a microbatch, trunk of one layer", {**setting, "dtype": args.dtype}, columns)
    shape = Shape(
        args.hidden, 4 * args.hidden, args.hidden // 64, args.vocab, args.sequence, args.batch, dtype_of(args)
    )
    first, last = args.heads[0], args.heads[-1]
    with alone(args.threads) as device:
        result.header["threads"] = str(torch.get_num_threads())
        for way in WAYS:
            row, anew = {"way": way}, {"way": way + MADE_ANEW}
            for n in args.heads:
                work = microbatch(way, HeadsConfig.parse({"n": n}), shape, device)
                row[f"n{n}"] = work.peak()
                if work.make_buffer is not None:
                    anew[f"n{n}"] = work.peak(buffer_exists=False)
                del work
            result.rows.append(_with_growth(row, first, last))
            result.limits.append(Limit(f"{way}: n={last} over n={first}", row["growth"], 1.05))
            if len(anew) > 1:
                result.rows.append(_with_growth(anew, first, last))
        joint: dict[str, Any] = {"way": WAYS[1] + JOINT}
        for n in args.heads:
            heads = HeadsConfig.parse({"n": n, "execution": "joint"})
            joint[f"n{n}"] = microbatch(WAYS[1], heads, shape, device).peak()
        result.rows.append(_with_growth(joint, first, last))
    return result


def _with_growth(row: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    row["growth"] = row[f"n{last}"] / row[f"n{first}"]
    return row


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
