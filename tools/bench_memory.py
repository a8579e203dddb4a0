"""Peak memory of the last stage's step, from the trunk's output to its gradient, as the number of heads grows.

    python tools/bench_memory.py            # a few minutes on 2 cores, below 10 GiB
    python tools/bench_memory.py --quick

Three ways to train n predictions from the same trunk output z ``[s, b, h]``, forward and backward:

- deferred: this project. n heads, each a transformer layer, run one at a time in the backward pass.
- joint: the same n heads by plain autograd, through megatron-core's output layer and cross entropy.
- megatron-core: its own multi-token prediction (DeepSeek-V3's), a GPTModel whose only trunk layer predicts the next
  token and whose ``mtp_num_layers = n - 1`` predict the further ones. So all three run n transformer layers, n
  unembeddings and n softmaxes; megatron-core's adds n - 1 embedding lookups and ``[h, 2h]`` projections, its design.

Counted: every tensor made on the way, z and its gradient, temporaries of the parameters' gradients. Not counted:
parameters, gradient buffers (they exist before the step), optimizer state. On a GPU the peak is the allocator's
(``torch.cuda.max_memory_allocated``).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from bench.memory import allocator_peak, cuda_peak, live_peak
from bench.models import Shape, megatron_model, mtp_model, positions, tokens_and_labels
from bench.report import Column, Limit, Result, add_common_arguments, dtype_of
from bench.worlds import alone

from mtp_megatron.config import HeadsConfig
from mtp_megatron.targets import future_targets

DEFERRED, JOINT, NATIVE = "deferred (this project)", "joint (plain autograd)", "megatron-core"
MIB = 2**20


def stage_step(
    way: str, n: int, shape: Shape, chunk: int | None, device: torch.device, transformer_engine: bool = False
) -> Callable[[], torch.Tensor]:
    """The last stage's step of n predictions, a callable that returns dL/dz; parameters and buffers are made here."""
    tokens, labels = tokens_and_labels(shape, device)
    source = torch.randn(shape.sequence, shape.batch, shape.hidden, generator=torch.Generator().manual_seed(2))
    source = source.to(device, shape.dtype)
    if way == NATIVE:
        run = _native(n, shape, device, tokens, labels)
    else:
        settings = {"n": n, "execution": "deferred" if way == DEFERRED else "joint", "loss_chunk_tokens": chunk}
        run = _heads(HeadsConfig.parse(settings), shape, device, labels, transformer_engine)

    def step() -> torch.Tensor:
        z = source.clone().requires_grad_()
        run(z).backward()
        assert z.grad is not None
        return z.grad

    return step


def _heads(
    heads: HeadsConfig, shape: Shape, device: torch.device, labels: torch.Tensor, transformer_engine: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    model = mtp_model(shape, 1, heads, device, pre_process=False, transformer_engine=transformer_engine)
    targets = future_targets(labels, heads.n)
    rotary = model.rotary_pos_emb(shape.sequence)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return model.future_heads_loss(z, targets, {"attention_mask": None, "rotary_pos_emb": rotary})[0]

    return loss


def _native(
    n: int, shape: Shape, device: torch.device, tokens: torch.Tensor, labels: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    model = megatron_model(shape, 1, n - 1, device, pre_process=False)
    place, mask = positions(shape, device), torch.ones(labels.shape, device=device)
    further = {"loss_mask": mask} if n > 1 else {}

    def loss(z: torch.Tensor) -> torch.Tensor:
        model.set_input_tensor(z)
        total = model(tokens, place, None, labels=labels, **further).sum()
        model.set_input_tensor(None)
        return total

    return loss


def measure(args: argparse.Namespace) -> Result:
    columns = [Column("vocab", "V"), Column("n", "n"), Column("way", "way")]
    if torch.cuda.is_available():
        columns.append(Column("peak_mib", "peak MiB", ".0f"))
    else:
        columns += [Column("peak_mib", "live tensors MiB", ".0f"), Column("allocator_mib", "allocator MiB", ".0f")]
    columns += [Column("over_n1", "over n=1", ".2f"), Column("over_deferred", "over deferred", ".2f")]
    setting = {
        "hidden": args.hidden,
        "sequence": args.sequence,
        "microbatch": args.batch,
        "dtype": args.dtype,
        "loss chunk": args.chunk or "chosen",
    }
    result = Result("Peak memory of the last stage's step (z to dL/dz)", setting, columns)
    with alone(args.threads) as device:
        result.header["threads"] = str(torch.get_num_threads())
        for vocab in args.vocab:
            shape = Shape(
                args.hidden, 4 * args.hidden, args.hidden // 64, vocab, args.sequence, args.batch, dtype_of(args)
            )
            for n in args.heads:
                for way in (DEFERRED, JOINT, NATIVE):
                    step = stage_step(way, n, shape, args.chunk, device)
                    result.rows.append({"vocab": vocab, "n": n, "way": way, **_peaks(step)})
                    del step
    _compare(result)
    return result


def _peaks(step: Callable[[], object]) -> dict[str, float]:
    step()  # what is made once (workspaces, cached masks) belongs to no step
    if torch.cuda.is_available():
        return {"peak_mib": cuda_peak(step) / MIB}
    return {"peak_mib": live_peak(step) / MIB, "allocator_mib": allocator_peak(step) / MIB}


def _compare(result: Result) -> None:
    peaks = {(row["vocab"], row["n"], row["way"]): row["peak_mib"] for row in result.rows}
    for row in result.rows:
        first = min(n for vocab, n, _ in peaks if vocab == row["vocab"])
        row["over_n1"] = row["peak_mib"] / peaks[row["vocab"], first, row["way"]] if first == 1 else None
        row["over_deferred"] = row["peak_mib"] / peaks[row["vocab"], row["n"], DEFERRED]
    result.limits += limits(peaks)


def limits(peaks: dict[tuple[int, int, str], float]) -> list[Limit]:
    """What must hold, for the sizes that were measured."""
    found = []
    for vocab in sorted({vocab for vocab, _, _ in peaks}):
        of = functools.partial(_peak, peaks, vocab)
        if of(1, DEFERRED) and of(8, DEFERRED):
            found.append(Limit(f"V={vocab}: peak(n=8) / peak(n=1)", of(8, DEFERRED) / of(1, DEFERRED), 1.05))
        if of(4, DEFERRED) and vocab >= 128_000:
            found.append(Limit(f"V={vocab}, n=4: deferred / megatron-core", of(4, DEFERRED) / of(4, NATIVE), 0.5))
    return found


def _peak(peaks: dict[tuple[int, int, str], float], vocab: int, n: int, way: str) -> float:
    return peaks.get((vocab, n, way), 0.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory of the last stage's step as the number of heads grows.")
    add_common_arguments(parser)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--vocab", type=int, nargs="+", metavar="V", help="default: 32768 131072")
    parser.add_argument("--hidden", type=int, help="a multiple of 64; default: 256")
    parser.add_argument("--sequence", type=int, help="default: 512")
    parser.add_argument("--batch", type=int, default=2, help="sequences of the microbatch")
    parser.add_argument("--chunk", type=int, help="tokens whose logits exist at one time (default: the project's)")
    args = parser.parse_args(argv)
    args.vocab = args.vocab or ([8192] if args.quick else [32768, 131072])
    args.hidden = args.hidden or (64 if args.quick else 256)
    args.sequence = args.sequence or (128 if args.quick else 512)
    return measure(args).finish(args)


if __name__ == "__main__":
    sys.exit(main())
