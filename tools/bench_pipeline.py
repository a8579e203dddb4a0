"""Heads on both stages of a pipeline of two against all heads on its last stage, and what the simulator says of each.

    python tools/bench_pipeline.py              # minutes on 2 cores, one thread for each stage
    python tools/bench_pipeline.py --quick

Two processes over gloo hold both models, cut as the planner's own balance says, and step them in turns. Every pass of
every stage is timed inside of megatron-core's schedule, where it does not wait for the other stage. "simulated" is
the simulator on the medians of those times, with the measured reduction at the end of the step; "planned" is the cost
model alone, which knows nothing of this machine. The gain is the step with the heads on the last stage over the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench.report import Column, Limit, Result, add_common_arguments
from torch.multiprocessing.spawn import start_processes

from mtp_megatron.planning.balance import as_layout, balance
from mtp_megatron.planning.candidates import unit_seconds
from mtp_megatron.planning.estimate import Hardware, estimate
from mtp_megatron.planning.lines import changed
from mtp_megatron.planning.simulate import order, simulate
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe

STAGES = 2
END, SPREAD, INTERLEAVED = "all heads on the last stage", "heads on both stages", "heads on both stages, interleaved"
WORLDS = ((END, SPREAD), (INTERLEAVED,))  # what megatron-core can have in one process: its virtual stages are global
# Only ratios of planned times count: no exchange, and a rate that cancels out.
HARDWARE = Hardware(tflops=0.1, efficiency=1.0, link=1e6, network=1e6, memory=1e6)


def recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """All cuts of one model, resolved and checked."""
    model = {
        "num_trunk_layers": args.layers,
        "hidden_size": args.hidden,
        "num_attention_heads": args.hidden // 32,
        "seq_length": args.sequence,
        "vocab_size": args.vocab,
    }
    tree = {
        "model": model,
        "heads": {"n": args.heads},
        "train": {"micro_batch_size": 1, "global_batch_size": args.microbatches},
    }
    whole = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=args.vocab)
    layer, head = unit_seconds(whole, HARDWARE)
    found = {}
    for name, head_stages, chunks in ((END, 1, 1), (SPREAD, STAGES, 1), (INTERLEAVED, STAGES, 2)):
        counts = balance(
            ranks=STAGES,
            chunks=chunks,
            layers=args.layers,
            heads=args.heads,
            layer=layer,
            head=head,
            head_stages=head_stages,
        )[0]
        virtual = {"parallel.virtual_pipeline": chunks} if chunks > 1 else {}
        cut = changed(whole, {"parallel.pipeline": STAGES, "parallel.layout": as_layout(counts), **virtual})
        found[name] = check_recipe(cut, world_size=STAGES, tokenizer_vocab_size=args.vocab)
    return found


class Stopwatch:
    """Seconds of every pass of this rank in megatron-core's schedule, in its order, and of the reduction after them."""

    def __init__(self) -> None:
        self.passes: list[float] = []
        self.reduction: list[float] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time the schedule's own functions inside."""
        from megatron.core.pipeline_parallel import schedules

        originals = {name: getattr(schedules, name) for name in ("forward_step", "backward_step")}
        try:
            for name, original in originals.items():
                setattr(schedules, name, timed(original, self.passes))
            yield
        finally:
            for name, original in originals.items():
                setattr(schedules, name, original)

    def by_chunk(self, rank: int, recipe: Recipe) -> dict[str, list[list[float]]]:
        """The passes each way of every chunk, without those of the first step, which warms up."""
        chunks = recipe.parallel.virtual_pipeline or 1
        works = order(STAGES, rank, recipe.train.global_batch_size, chunks)
        found: dict[str, list[list[float]]] = {way: [[] for _ in range(chunks)] for way in ("forward", "backward")}
        for index, seconds in enumerate(self.passes[len(works) :]):
            work = works[index % len(works)]
            found["backward" if work.backward else "forward"][work.chunk].append(seconds)
        return found


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which adds to ``seconds`` how long each call took."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    return call


def stage(rank: int, folder: str, args: argparse.Namespace, names: Sequence[str]) -> None:
    """One process: rank ``rank`` of each named cut, stepped in turns; writes its times as JSON."""
    from mtp_megatron import compat
    from mtp_megatron.training.batches import chunk_iterators
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.world import model_parallel_world

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo sends from the CPU's memory alone
    torch.set_num_threads(args.threads or 1)
    compat.prepare()
    dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=rank, world_size=STAGES)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(args.vocab, (1, args.sequence + 1), generator=generator)

    def samples(**_: int) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield {
                "tokens": ids[:, :-1].clone(),
                "labels": ids[:, 1:].clone(),
                "loss_mask": torch.ones(1, args.sequence),
            }

    cuts = {name: recipe for name, recipe in recipes(args).items() if name in names}
    with model_parallel_world(cuts[names[0]]):
        trainables = {name: build_trainable(recipe) for name, recipe in cuts.items()}
        iterators = {name: chunk_iterators(recipe, args.vocab - 1, samples) for name, recipe in cuts.items()}
        watches = {name: Stopwatch() for name in cuts}
        steps: dict[str, list[float]] = {name: [] for name in cuts}
        for name, trainable in trainables.items():
            config = trainable.config
            config.finalize_model_grads_func = timed(config.finalize_model_grads_func, watches[name].reduction)
        for turn in range(-1, args.repeats):
            for name in (list(cuts), list(cuts)[::-1])[turn % 2]:
                dist.barrier()
                started = time.perf_counter()
                with watches[name].running():
                    trainables[name].backward(cuts[name], iterators[name], args.microbatches)
                dist.barrier()
                steps[name].append(time.perf_counter() - started)
    times = {
        name: {
            "steps": steps[name][1:],  # the first one warms up
            "reduction": watch.reduction[1:],
            **watch.by_chunk(rank, cuts[name]),
        }
        for name, watch in watches.items()
    }
    (Path(folder) / f"stage{rank}").write_text(json.dumps(times), encoding="utf-8")
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """What each rank measured of every cut."""
    measured: list[dict[str, dict[str, Any]]] = [{} for _ in range(STAGES)]
    for names in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(stage, args=(folder, args, names), nprocs=STAGES, start_method="spawn")
            for rank, times in enumerate(measured):
                times |= json.loads((Path(folder) / f"stage{rank}").read_text(encoding="utf-8"))
    return measured


def medians(ranks: list[dict[str, Any]], way: str) -> list[float]:
    """Of every global stage: stage ``i`` is chunk ``i // STAGES`` of rank ``i % STAGES``."""
    chunks = len(ranks[0][way])
    return [statistics.median(times[way][chunk]) for chunk in range(chunks) for times in ranks]


def simulated(ranks: list[dict[str, Any]], microbatches: int) -> float:
    """Seconds of a step from the ranks' measured passes; the rank that comes last does not wait in the reduction."""
    forward, backward = medians(ranks, "forward"), medians(ranks, "backward")
    reduction = statistics.median(map(min, zip(*(times["reduction"] for times in ranks), strict=True)))
    return simulate(forward, backward, ranks=STAGES, microbatches=microbatches).seconds + reduction


def measure(args: argparse.Namespace) -> Result:
    columns = [
        Column("model", "model"),
        Column("layout", "layout"),
        Column("passes", "forward + backward ms, by stage"),
        Column("seconds", "median s", ".3f"),
        Column("simulated", "simulated s", ".3f"),
        Column("over", "measured / simulated", ".3f"),
        Column("gain", "gain", ".3f"),
        Column("simulated_gain", "simulated gain", ".3f"),
        Column("planned_gain", "planned gain", ".3f"),
    ]
    names = ("layers", "heads", "hidden", "vocab", "sequence", "microbatches", "repeats")
    result = Result(
        "Heads on two pipeline stages over all heads on the last one",
        {name: getattr(args, name) for name in names},
        columns,
    )
    result.header["threads"] = f"{args.threads or 1} for each of {STAGES} processes"
    measured = run(args)
    rows: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes(args).items():
        ranks = [times[name] for times in measured]
        seconds = statistics.median(ranks[0]["steps"])
        said = simulated(ranks, args.microbatches)
        rows[name] = {
            "model": name,
            "layout": recipe.parallel.layout,
            "passes": ", ".join(
                f"{1e3 * forward:.0f} + {1e3 * backward:.0f}"
                for forward, backward in zip(medians(ranks, "forward"), medians(ranks, "backward"), strict=True)
            ),
            "seconds": seconds,
            "steps": ranks[0]["steps"],
            "simulated": said,
            "over": seconds / said,
            "planned": estimate(recipe, STAGES, HARDWARE).step_seconds,
        }
    end, spread, interleaved = rows[END], rows[SPREAD], rows[INTERLEAVED]
    spread["gain"] = end["seconds"] / spread["seconds"]
    spread["simulated_gain"] = end["simulated"] / spread["simulated"]
    spread["planned_gain"] = end["planned"] / spread["planned"]
    result.rows += [end, spread, interleaved]
    if not args.quick:
        result.limits.append(Limit("step with heads on both stages / on the last one", 1 / spread["gain"], 0.95))
        off = abs(spread["gain"] / spread["simulated_gain"] - 1)
        result.limits.append(Limit("measured gain beside the simulated one, relative deviation", off, 0.15))
        off = max(abs(row["over"] - 1) for row in rows.values())
        result.limits.append(Limit("a measured step beside the simulated one, largest relative deviation", off, 0.15))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Heads on two pipeline stages over all heads on the last one.")
    add_common_arguments(parser)
    parser.add_argument("--layers", type=int, default=6, help="of the trunk")
    parser.add_argument("--heads", type=int, help="default: 8")
    parser.add_argument("--hidden", type=int, help="a multiple of 32; default: 128")
    parser.add_argument("--vocab", type=int, help="default: 16384")
    parser.add_argument("--sequence", type=int, help="default: 64")
    parser.add_argument("--microbatches", type=int, help="of a step; default: 8")
    parser.add_argument("--repeats", type=int, help="timed steps of each; default: 7")
    args = parser.parse_args(argv)
    if args.dtype != "fp32":
        parser.error("--dtype: this benchmark knows fp32")
    defaults = {"heads": (8, 3), "hidden": (128, 32), "vocab": (16384, 512), "sequence": (64, 16)}
    for name, (full, quick) in {**defaults, "microbatches": (8, 3), "repeats": (7, 2)}.items():
        setattr(args, name, getattr(args, name) or (quick if args.quick else full))
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
