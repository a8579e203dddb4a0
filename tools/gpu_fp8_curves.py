"""Loss curves of one small model trained in bf16 and in every FP8 recipe that works on this GPU, on the same data.

    python tools/gpu_fp8_curves.py             # minutes; needs a GPU with FP8 and Transformer Engine
    python tools/gpu_fp8_curves.py --quick     # on any machine: shows that it runs

Every run has the same initial weights and the same batches of a random bigram language, which can be learnt down to its
entropy. The trunk's matrices are in FP8, the heads in bf16 (with ``--fp8-heads`` one more run has
both in FP8). Where FP8 cannot run, the reason is printed and fp32 is compared with bf16.

Expected, not measured: over the last quarter of the run the mean loss lies within EXPECTED of bf16's, relatively. FP8
rounds each product's factors to 3 bits of mantissa (e4m3), NVFP4 to 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from bench.report import Column, Limit, Result, add_common_arguments
from bench.timing import synchronize_device
from bench.worlds import alone

from mtp_megatron.compat import fp8

EXPECTED, EXPECTED_FP4 = 0.02, 0.05
VOCAB, SURE = 512, 0.8  # of a token's successors one has this probability, the rest is uniform
BF16, FP32 = "bf16", "fp32"


def variants(fp8_heads: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Settings of ``train`` (and ``heads``) by name, the base first; and what was left out, with the reason."""
    machine = fp8.this_machine()
    engine = {"precision": "bf16", "transformer_engine": True}
    works = fp8.working(machine)
    if not works:
        left_out = [f"{name}: {fp8.why_not(scaling, machine)}" for name, scaling in fp8.SCALINGS.items()]
        return {BF16: {"precision": "bf16"}, FP32: {"precision": "fp32"}}, left_out
    found: dict[str, dict[str, Any]] = {BF16: engine}
    left_out = []
    for name, scaling in fp8.SCALINGS.items():
        reason = fp8.why_not(scaling, machine)
        if reason is not None:
            left_out.append(f"{name}: {reason}")
        elif name == fp8.NVFP4:
            found[name] = {**engine, "fp4": "e2m1"}
        else:
            found[name] = {**engine, "fp8": "hybrid", "fp8_recipe": name}
    if fp8_heads:
        best = next(name for name in works if name != "delayed")
        found[f"{best}, heads too"] = {**found[best], "heads": {"fp8": True}}
    return found, left_out


def recipe_tree(settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The recipe of one run."""
    train = {key: value for key, value in settings.items() if key != "heads"}
    return {
        "model": {
            "num_trunk_layers": sizes["layers"],
            "hidden_size": sizes["hidden"],
            "num_attention_heads": sizes["hidden"] // 64,
            "seq_length": sizes["sequence"],
        },
        "heads": {"n": 2, **settings.get("heads", {})},
        "optimizer": {"lr": 1e-3, "warmup_steps": min(20, sizes["steps"] - 1)},
        "train": {
            "steps": sizes["steps"],
            "micro_batch_size": sizes["batch"],
            "global_batch_size": sizes["batch"],
            **train,
        },
    }


def train(settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """One run, in the world of this process; its losses and the median time of a step."""
    from time import perf_counter

    from mtp_megatron.training.batches import to_microbatch
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.step import train_step
    from mtp_megatron.training.validate import check_recipe

    recipe = check_recipe(parse_recipe(recipe_tree(settings, sizes)), world_size=1, tokenizer_vocab_size=VOCAB)
    trainable = build_trainable(recipe)
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(VOCAB, generator=generator)
    losses, times = [], []
    for _ in range(sizes["steps"]):
        text = bigrams(sizes["batch"], sizes["sequence"] + 1, successor, generator)
        sample = {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": torch.ones(text.shape[0], text.shape[1] - 1),
        }
        batch = to_microbatch(recipe, sample, eod=VOCAB - 1)
        synchronize_device()
        start = perf_counter()
        figures = train_step(recipe, trainable, [iter([batch])], 1, False)
        synchronize_device()
        times.append(perf_counter() - start)
        losses.append(figures.head_loss)
    (model,) = trainable.models
    types = {str(parameter.dtype) for parameter in model.heads.parameters()}
    return {"losses": losses, "seconds": statistics.median(times), "heads": sorted(types)}


def bigrams(batch: int, length: int, successor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Text ``[batch, length]`` of the random bigram language; no token but the last id ends a document."""
    text = torch.randint(VOCAB - 1, (batch, length), generator=generator)
    follows = torch.rand(batch, length, generator=generator) < SURE
    for place in range(1, length):
        text[:, place] = torch.where(follows[:, place], successor[text[:, place - 1]], text[:, place])
    return text.clamp_(max=VOCAB - 2)


def measure(args: argparse.Namespace) -> Result:
    names, left_out = variants(args.fp8_heads)
    sizes = {name: getattr(args, name) for name in ("layers", "hidden", "sequence", "batch", "steps")}
    columns = [
        Column("run", "run"),
        Column("first", "first loss", ".3f"),
        Column("last", "last quarter", ".4f"),
        Column("off", "off bf16", ".4f"),
        Column("largest", "largest gap", ".3f"),
        Column("seconds", "s per step", ".4f"),
    ]
    result = Result("Loss of head 1 in bf16 and FP8, the same data and initial weights", sizes, columns)
    for name, settings in names.items():
        with alone(args.threads):  # one process: importing everything again would take longer than a run
            run = train(settings, sizes)
        result.rows.append({"run": name, **run})
    base = [losses[0] for losses in result.rows[0]["losses"]]
    quarter = max(1, len(base) // 4)
    for row in result.rows:
        curve = [losses[0] for losses in row["losses"]]
        row["first"], row["last"] = curve[0], statistics.mean(curve[-quarter:])
        row["off"] = row["last"] / statistics.mean(base[-quarter:]) - 1
        row["largest"] = max(abs(left - right) for left, right in zip(curve, base, strict=True))
        if row["run"] != BF16:
            bound = EXPECTED_FP4 if row["run"] == fp8.NVFP4 else EXPECTED
            result.limits.append(Limit(f"{row['run']}: |loss / bf16's - 1|, last quarter", abs(row["off"]), bound))
    falls = result.rows[0]["last"] / result.rows[0]["first"]
    if not args.quick:
        result.limits.append(Limit("bf16: last quarter over first loss (it must learn)", falls, 0.8))
    result.notes = [f"left out: {line}" for line in left_out]
    result.notes.append(
        f"Expected, not measured: within {EXPECTED:.0%} ({EXPECTED_FP4:.0%} in NVFP4) over the last quarter."
    )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Loss curves in FP8 beside bf16.")
    add_common_arguments(parser)
    parser.add_argument("--fp8-heads", action="store_true", help="one more run whose heads are in FP8 too")
    parser.add_argument("--steps", type=int, help="default: 150")
    parser.add_argument("--layers", type=int, default=2, help="transformer layers of the trunk")
    parser.add_argument("--hidden", type=int, help="a multiple of 64; default: 512")
    parser.add_argument("--sequence", type=int, help="default: 256")
    parser.add_argument("--batch", type=int, help="sequences of a step; default: 16")
    args = parser.parse_args(argv)
    args.steps = args.steps or (4 if args.quick else 150)
    args.hidden = args.hidden or (64 if args.quick else 512)
    args.sequence = args.sequence or (32 if args.quick else 256)
    args.batch = args.batch or (1 if args.quick else 16)
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
