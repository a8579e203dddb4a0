"""Linear cross entropy over a vocabulary split across ranks, against `F.cross_entropy` with the whole matrix.

Not exercised here: sequence parallelism and the model around it, see `test_exactness.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mtp_megatron import compat
from mtp_megatron import loss as loss_module
from mtp_megatron.loss import VocabShard, linear_cross_entropy, vocab_parallel_linear_cross_entropy
from mtp_megatron.targets import IGNORE_INDEX
from tests.harness import run_world

TOKENS, SIZE, SCALE = 23, 8, 0.75
# Tokens to a chunk, and the weight of the z-loss.
WAYS = ((None, 0.0), (1, 0.0), (10, 0.0), (10, 0.05))
# world, vocabulary, rows per rank: 507 over 4 x 128 as Liger and cut-cross-entropy test it; then ranks of padding alone
LAYOUTS = {
    "tp2-even": (2, 64, 32),
    "tp2-uneven": (2, 61, 32),
    "tp4-507": (4, 507, 128),
    "tp4-one-row-on-rank-2": (4, 33, 16),
    "tp4-only-rank-0-has-entries": (4, 15, 16),
    "tp2-single-entry": (2, 1, 4),
}


def inputs(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocab, (TOKENS,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def here(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """On this rank's device, where its backend takes them."""
    return [tensor.to(compat.device()) for tensor in tensors]


def on_cpu(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in result.items() if value is not None}


def whole(vocab: int, dtype: torch.dtype, z_loss: float = 0.0) -> dict[str, torch.Tensor]:
    """Loss sum, gradients and argmax from the whole logits."""
    return of_the_whole_matrix(*inputs(vocab, dtype), z_loss)


def of_the_whole_matrix(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0
) -> dict[str, torch.Tensor]:
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    log_z_squared = (logits.logsumexp(-1).square() * (targets != IGNORE_INDEX)).sum()
    ((loss + z_loss * log_z_squared) * SCALE).backward()
    best = logits.argmax(-1)
    return {
        **({"log_z_squared": log_z_squared.detach()} if z_loss else {}),
        "loss": loss.detach(),
        "correct": ((best == targets) & (targets != IGNORE_INDEX)).sum().to(hidden.dtype),
        "predictions": best,
        "hidden_grad": hidden.grad,
        "weight_grad": weight.grad,
    }


def local_rows(weight: torch.Tensor, rows: int, rank: int) -> torch.Tensor:
    """This rank's rows; padding rows hold values that would dominate everything if they took part."""
    padded = weight.new_full((rows * dist.get_world_size(), weight.shape[1]), 1e4)
    padded[: weight.shape[0]] = weight
    return padded[rank * rows : (rank + 1) * rows].contiguous()


def _split(rank: int, world: int, vocab: int, rows: int, dtype: torch.dtype, shift: int) -> list[dict]:
    """This rank's figures for each of `WAYS`. `shift` moves the start of every shard but rank 0's."""
    hidden, weight, targets, scale = here(*inputs(vocab, dtype), torch.tensor(SCALE, dtype=dtype))
    shard = VocabShard.of(vocab, rows, dist.group.WORLD)
    shard = replace(shard, start=shard.start + shift * (rank > 0))
    local = local_rows(weight, rows, rank)
    results = []
    for chunk, z_loss in WAYS:
        weight_grad = torch.zeros_like(local)
        sums, hidden_grad = linear_cross_entropy(
            hidden,
            local,
            targets,
            shard,
            grad_scale=scale,
            weight_grad=weight_grad,
            chunk_tokens=chunk,
            predictions=True,
            z_loss=z_loss,
        )
        dist.all_reduce(hidden_grad)
        results.append(on_cpu({**vars(sums), "hidden_grad": hidden_grad, "weight_grad": weight_grad}))
    return results


def by_way(ranks: Sequence[list[dict]]) -> list[tuple[float, tuple[dict, ...]]]:
    """The z-loss of each of `WAYS` and the ranks' figures, from what `_split` returned on each."""
    return [(z_loss, found) for (_, z_loss), found in zip(WAYS, zip(*ranks, strict=True), strict=True)]


def deviation(ranks: Sequence[dict[str, torch.Tensor]], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error of each figure, relative to its largest entry; also between the ranks."""
    weight_grad = torch.cat([rank["weight_grad"] for rank in ranks])
    vocab = want["weight_grad"].shape[0]
    assert not weight_grad[vocab:].any(), "vocabulary padding has a gradient"
    errors = {}
    for name, right in want.items():
        copies = [weight_grad[:vocab]] if name == "weight_grad" else [rank[name] for rank in ranks]
        distance = max(float((copy - right).abs().max()) for copy in copies)
        errors[name] = distance / max(float(right.abs().max()), 1e-30)
    return errors


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_whole_matrix(name: str) -> None:
    world, vocab, rows = LAYOUTS[name]
    for z_loss, ranks in by_way(run_world(_split, world, vocab, rows, torch.float64, 0)):
        errors = deviation(ranks, whole(vocab, torch.float64, z_loss))
        assert max(errors.values()) <= 1e-12, errors
        assert all(torch.equal(rank["loss"], ranks[0]["loss"]) for rank in ranks)


def test_fp32() -> None:
    for z_loss, ranks in by_way(run_world(_split, 4, 507, 128, torch.float32, 0)):
        errors = deviation(ranks, whole(507, torch.float32, z_loss))
        assert max(errors.values()) <= 1e-5, errors
        assert errors["correct"] == errors["predictions"] == 0


def test_control_a_wrong_start_of_a_shard_is_caught() -> None:
    for z_loss, ranks in by_way(run_world(_split, 4, 507, 128, torch.float64, 1)):
        errors = deviation(ranks, whole(507, torch.float64, z_loss))
        assert min(errors[name] for name in ("loss", "weight_grad", "hidden_grad")) > 1e-3
        assert errors["predictions"] > 0


# Random shapes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One random case; ``rows`` of each of two ranks hold ``vocab`` entries and padding, perhaps a rank of it alone."""

    seed: int
    tokens: int
    size: int
    vocab: int
    rows: int
    chunk: int | None
    ignored: float

    @classmethod
    def of(cls, seed: int) -> Drawn:
        draw = random.Random(seed)
        vocab = draw.randint(1, 40)
        rows = draw.randint(-(-vocab // 2), vocab + 7)
        chunk = draw.choice([None, draw.randint(1, 25)])
        return cls(seed, draw.randint(0, 20), draw.randint(1, 9), vocab, rows, chunk, draw.choice([0.0, 0.3, 1.0]))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.tokens, self.size, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.vocab, self.size, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, self.vocab, (self.tokens,), generator=generator)
        targets[torch.rand(self.tokens, generator=generator) < self.ignored] = IGNORE_INDEX
        return hidden, weight, targets


DRAWN = [Drawn.of(seed) for seed in range(60)]


def _drawn(rank: int, world: int, cases: Sequence[Drawn], roll: int) -> list[dict[str, torch.Tensor]]:
    results = []
    for case in cases:
        hidden, weight, targets, scale = here(*case.tensors(), torch.tensor(SCALE, dtype=torch.float64))
        local = local_rows(weight, case.rows, rank)
        weight_grad = torch.zeros_like(local)
        sums, hidden_grad = linear_cross_entropy(
            hidden,
            local,
            targets.roll(roll),
            VocabShard.of(case.vocab, case.rows, dist.group.WORLD),
            grad_scale=scale,
            weight_grad=weight_grad,
            chunk_tokens=case.chunk,
        )
        dist.all_reduce(hidden_grad)
        result = {"loss": sums.loss, "correct": sums.correct, "hidden_grad": hidden_grad, "weight_grad": weight_grad}
        results.append(on_cpu(result))
    return results


def drawn_errors(roll: int = 0) -> list[float]:
    """Largest deviation of each random case from the whole matrix."""
    found = []
    for case, *ranks in zip(DRAWN, *run_world(_drawn, 2, DRAWN, roll), strict=True):
        want = of_the_whole_matrix(*case.tensors())
        del want["predictions"]
        errors = deviation(ranks, {name: value for name, value in want.items() if value.numel()})
        found.append(max(errors.values()))
    return found


def test_random_shapes() -> None:
    """One world for all of them; the same on one rank is driven by hypothesis in `unit/test_loss.py`."""
    errors = drawn_errors()
    assert max(errors) <= 1e-12, DRAWN[errors.index(max(errors))]
    assert sum(error > 1e-3 for error in drawn_errors(roll=1)) > len(DRAWN) / 2, "control: rolled targets"


# Counts and ties ------------------------------------------------------------------------------------------------------


def _ties(rank: int, world: int, dtype: torch.dtype) -> tuple[list[int], list[int], float]:
    """Logits are small integers, so that nearly every row has its largest entry on several ranks."""
    generator = torch.Generator().manual_seed(0)
    vocab, rows = 30, 8
    logits = torch.randint(0, 3, (40, vocab), generator=generator)
    logits[0] = 1  # all equal
    logits[1, :8] = 0  # rank 0 has none of the largest
    hidden, weight = logits.to(dtype), torch.eye(vocab, dtype=dtype)
    targets = torch.randint(0, vocab, (40,), generator=generator)
    targets[::2] = hidden.argmax(-1)[::2]
    shard = VocabShard.of(vocab, rows, dist.group.WORLD)
    local = torch.zeros(rows * world, vocab, dtype=dtype)
    local[:vocab] = weight
    hidden, local, targets = here(hidden, local, targets)
    sums, _ = linear_cross_entropy(
        hidden, local[rank * rows : (rank + 1) * rows], targets, shard, chunk_tokens=7, predictions=True
    )
    return (
        sums.predictions.tolist(),
        hidden.argmax(-1).tolist(),
        float(sums.correct) - float((hidden.argmax(-1) == targets).sum()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_across_shards_go_to_the_lowest_entry(dtype: torch.dtype) -> None:
    for predictions, unsplit, miscounted in run_world(_ties, 4, dtype):
        assert predictions == unsplit
        assert predictions[0] == 0
        assert predictions[1] >= 8
        assert miscounted == 0


# Collectives ----------------------------------------------------------------------------------------------------------


def _counted(rank: int, world: int, vocab: int, rows: int, chunk: int | None, elements: int | None) -> list[tuple]:
    """Shapes and operations of the collectives of one forward and backward pass."""
    calls = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        calls.append((tuple(tensor.shape), "max" if op == dist.ReduceOp.MAX else "sum"))
        original(tensor, op=op, group=group)

    before = loss_module.CHUNK_ELEMENTS
    dist.all_reduce = counting
    loss_module.CHUNK_ELEMENTS = elements or before
    try:
        hidden, weight, targets, scale = here(*inputs(vocab, torch.float32), torch.tensor(1.0))
        shard = VocabShard.of(vocab, rows, dist.group.WORLD)
        local = local_rows(weight, rows, rank)
        linear_cross_entropy(
            hidden,
            local,
            targets,
            shard,
            grad_scale=scale,
            weight_grad=torch.zeros_like(local),
            chunk_tokens=chunk,
            z_loss=0.05,  # which needs none of its own
        )
    finally:
        dist.all_reduce = original
        loss_module.CHUNK_ELEMENTS = before
    return calls


def test_two_collectives_per_chunk() -> None:
    for calls in run_world(_counted, 4, 507, 128, 10, None):
        assert calls == [
            ((10,), "max"),
            ((6, 10), "sum"),
            ((10,), "max"),
            ((6, 10), "sum"),
            ((3,), "max"),
            ((6, 3), "sum"),
        ]


def test_default_chunks_are_the_same_on_ranks_with_unequal_shares() -> None:
    """A chunk is a collective: ranks that cut the tokens differently would mix up each other's sums, or hang.

    128,256 entries over 4 ranks of 32,128 rows are such a case; here the ranks hold 32, 32, 32 and 1.
    """
    calls = run_world(_counted, 4, 97, 32, None, 17 * 32)
    assert all(rank == calls[0] for rank in calls)
    assert len(calls[0]) == 2 * 2  # the tokens were cut


# No valid token, bad targets, the autograd form ----------------------------------------------------------------------


def _no_valid_token(rank: int, world: int) -> list[bool]:
    hidden, weight, targets, scale = here(*inputs(33, torch.float32), torch.tensor(1.0))
    local = local_rows(weight, 16, rank)
    shard = VocabShard.of(33, 16, dist.group.WORLD)
    zeros = []
    for tokens in (0, TOKENS):
        weight_grad = torch.zeros_like(local)
        sums, hidden_grad = linear_cross_entropy(
            hidden[:tokens],
            local,
            torch.full_like(targets[:tokens], IGNORE_INDEX),
            shard,
            grad_scale=scale,
            weight_grad=weight_grad,
            chunk_tokens=4,
        )
        zeros += [bool((value == 0).all()) for value in (sums.loss, sums.correct, hidden_grad, weight_grad)]
    return zeros


def test_no_token_and_no_valid_token_are_zero() -> None:
    assert run_world(_no_valid_token, 4) == [[True] * 8] * 4


def _autograd_form(rank: int, world: int, vocab: int, rows: int, bad_targets: Sequence[int | None]) -> list[dict]:
    results = []
    for bad_target in bad_targets:
        hidden, weight, targets = here(*inputs(vocab, torch.float64))
        if bad_target is not None:
            targets[1] = bad_target
        local = local_rows(weight, rows, rank).requires_grad_()
        hidden.requires_grad_()
        shard = VocabShard.of(vocab, rows, dist.group.WORLD)
        loss, correct = vocab_parallel_linear_cross_entropy(hidden, local, targets, shard, chunk_tokens=6)
        (loss * SCALE).backward()
        result = {"loss": loss.detach(), "correct": correct, "hidden_grad": hidden.grad, "weight_grad": local.grad}
        results.append(on_cpu(result))
    return results


def test_autograd_form_sums_the_hidden_gradient() -> None:
    want = whole(507, torch.float64)
    del want["predictions"]
    (ranks,) = zip(*run_world(_autograd_form, 4, 507, 128, [None]), strict=True)
    errors = deviation(ranks, want)
    assert max(errors.values()) <= 1e-12, errors


def test_target_outside_the_vocabulary_is_nan_on_every_rank() -> None:
    """33 and 63 name padding rows that some rank holds."""
    for rank in run_world(_autograd_form, 4, 33, 16, [-1, 33, 63, 64]):
        for result in rank:
            assert result["loss"].isnan()
            assert result["hidden_grad"][1].isnan().all()
            assert result["hidden_grad"][2:].isfinite().all()
