"""What the ranks of a job say to one another fits together in NCCL's terms: traced rank by rank, without any GPU.

Covered: partners, order, sizes and types of every collective, send and receive of training steps and an evaluation;
and that no order of launches leaves ranks waiting for one another. Not covered: experts and DeepSpeed, which are not
traced; Transformer Engine's own communication; what a collective reduces by; whether a tensor is on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.communication import Group, Operation, Recorder, Transfer, problems

MODEL = {
    "num_trunk_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 160,
    "seq_length": 64,
    "vocab_size": 1000,
}
OVERLAP = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 PP2 DP2, overlaps": (8, {"parallel": {**TP2, "pipeline": 2}, "optimizer": OVERLAP}),
    "TP2 CP2 PP2, tied, heads on both": (
        8,
        {
            "parallel": {"tensor": 2, "context": 2, "pipeline": 2, "layout": "Ettttmm|mmL"},
            "model": {"tied_embeddings": True},
        },
    ),
    "PP4, heads on three, one of them idle": (
        4,
        {"parallel": {"pipeline": 4, "layout": "Ett|ttm|m|mmL"}, "heads": {"loss_weights": [1.0, 1.0, 0.0, 1.0]}},
    ),
    "PP2 interleaved, heads on three of four, DP2, overlaps": (
        4,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "layout": "Ett|ttm|m|mmL"}, "optimizer": OVERLAP},
    ),
    "PP4 interleaved, heads on four of eight": (
        4,
        {"parallel": {"pipeline": 4, "virtual_pipeline": 2, "layout": "Et|t|t|t|m|m|m|mL"}},
    ),
}
Meddle = Callable[[Any], None]


def recipe_of(layout: str) -> Any:
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.validate import check_recipe

    world_size, sections = LAYOUTS[layout]
    pipeline = sections["parallel"].get("pipeline", 1)
    copies = world_size // (pipeline * sections["parallel"].get("tensor", 1) * sections["parallel"].get("context", 1))
    train = {"micro_batch_size": 2, "global_batch_size": 2 * pipeline * copies, "precision": "bf16", "eval_batches": 1}
    tree = {
        **sections,
        "model": {**MODEL, **sections.get("model", {})},
        "heads": {"n": 4, **sections.get("heads", {})},
        "train": train,
    }
    return check_recipe(parse_recipe(tree), world_size=world_size, tokenizer_vocab_size=1000)


@functools.cache
def traced(layout: str) -> tuple[list[Operation], ...]:
    """Operations of every rank."""
    return tuple(traced_rank(layout, rank) for rank in range(LAYOUTS[layout][0]))


def traced_rank(layout: str, rank: int, meddle: Meddle = lambda trainable: None) -> list[Operation]:
    """Operations of one rank in two training steps with an evaluation between them.

    Args:
        meddle: called with the rank's trainable before the first step.
    """
    import torch

    from mtp_megatron.compat.fake import fake_rank
    from mtp_megatron.training.batches import chunk_iterators
    from mtp_megatron.training.checkpointing import count_parameters
    from mtp_megatron.training.evaluation import evaluate
    from mtp_megatron.training.step import train_step
    from mtp_megatron.training.validate import num_microbatches
    from mtp_megatron.training.world import model_parallel_world

    recipe, world_size = recipe_of(layout), LAYOUTS[layout][0]

    def samples(*, micro_batch_size: int, **_: int) -> Iterator[dict[str, torch.Tensor]]:
        shape = (micro_batch_size, recipe.train_seq_length)
        while True:
            text = torch.ones(shape, dtype=torch.int64)
            yield {"tokens": text, "labels": text, "loss_mask": torch.ones(shape)}

    recorder = Recorder()
    with fake_rank(rank, world_size, fused_kernels=False), recorder.recording(), model_parallel_world(recipe):
        from mtp_megatron.training.build import build_trainable

        trainable = build_trainable(recipe)
        trainable.config.deallocate_pipeline_outputs = True  # as on GPUs
        meddle(trainable)
        count_parameters(trainable)
        count = num_microbatches(recipe, world_size)
        iterators = chunk_iterators(recipe, 0, samples)
        train_step(recipe, trainable, iterators, count, False)
        evaluate(recipe, trainable, iterators, 1, count)
        train_step(recipe, trainable, iterators, count, False)
        del trainable
    return recorder.operations


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_that_the_ranks_say_fits_together(layout: str) -> None:
    ranks = traced(layout)
    assert problems(ranks) == []
    for rank, operations in enumerate(ranks):
        assert any(operation.transfers for operation in operations), "its stages were not traced"
        groups = {operation.group for operation in operations if len(operation.group.ranks) > 1}
        print(layout, rank, len(operations), "operations,", len(groups), "communicators of several ranks")
        # Each takes some of a GPU's memory: all, TP, PP, DP x CP, CP, TP x PP, all again for the norm, two for copies.
        assert len(groups) <= 9


def _copies_in_another_order(trainable: Any) -> None:
    trainable.head_stages._copies.reverse()


def _no_part_in_the_evaluation(trainable: Any) -> None:
    trainable.head_stages.put_together = lambda reports: None


def _in_another_type(trainable: Any) -> None:
    chunk = trainable.chunks[0]
    former = chunk.forward
    chunk.forward = lambda *args, **kwargs: former(*args, **kwargs).float()


@pytest.mark.parametrize(
    ("meddle", "said"),
    [
        (_copies_in_another_order, "differs"),
        (_no_part_in_the_evaluation, "waits for ever"),
        (_in_another_type, "rank 1 sends float32[64, 2, 64], and rank 2 receives bfloat16[64, 2, 64]"),
    ],
)
def test_a_rank_that_does_otherwise_is_noticed(meddle: Meddle, said: str) -> None:
    layout = "PP4, heads on three, one of them idle"
    ranks = list(traced(layout))
    ranks[1] = traced_rank(layout, 1, meddle)
    found = problems(ranks)
    assert any(said in problem for problem in found), found


# --- what NCCL makes of it, without any trace ---

BOTH, OTHER = Group("all", (0, 1)), Group("others", (0, 1))


def collective(group: Group, what: str = "sum", awaited: tuple[int, ...] = ()) -> Operation:
    return Operation(group, what, awaited=frozenset(awaited))


def transfer(sends: bool, peer: int, awaited: tuple[int, ...] = (), group: Group = BOTH, what: str = "x") -> Operation:
    return Operation(group, transfers=(Transfer(sends, peer, what),), batched=False, awaited=frozenset(awaited))


SEND_THEN_RECEIVE = [[transfer(True, 1), transfer(False, 1)], [transfer(True, 0), transfer(False, 0)]]
CASES: dict[str, tuple[list[list[Operation]], str | None]] = {
    "alike": ([[collective(BOTH), collective(OTHER)]] * 2, None),
    "two groups in another order on each rank": (
        [[collective(BOTH), collective(OTHER, awaited=(0,))], [collective(OTHER), collective(BOTH, awaited=(0,))]],
        "waits for ever",
    ),
    "a collective that one rank leaves out": ([[collective(BOTH)], []], "rank 0 waits for ever in its operation 0"),
    "sizes": ([[collective(BOTH, "sum [1]")], [collective(BOTH, "sum [2]")]], "collective 0 of group all differs"),
    "one that sends and one that receives": ([[transfer(True, 1)], [transfer(False, 0)]], None),
    "both send first": (SEND_THEN_RECEIVE, "waits for ever"),
    "both send first, at once with the receive": (
        [
            [Operation(BOTH, transfers=(Transfer(True, 1 - rank, "x"), Transfer(False, 1 - rank, "x")))]
            for rank in range(2)
        ],
        None,
    ),
    "nobody receives": ([[transfer(True, 1)], []], "1 sends and 0 receives from rank 0 to rank 1"),
    "what is received is another thing": (
        [[transfer(True, 1, what="x")], [transfer(False, 0, what="y")]],
        "rank 0 sends x, and rank 1 receives y",
    ),
    # The kernel that waits for the send below holds up the collective, for which rank 1 waits before it sends.
    "one queue": (
        [
            [transfer(False, 1), collective(OTHER)],
            [collective(OTHER), transfer(True, 0, awaited=(0,))],
        ],
        "waits for ever",
    ),
    "a batch that makes a communicator without all of its ranks": (
        [
            [Operation(Group("three", (0, 1, 2)), transfers=(Transfer(True, 1, "x"),)), collective(BOTH)],
            [Operation(Group("three", (0, 1, 2)), transfers=(Transfer(False, 0, "x"),)), collective(BOTH)],
            [],
        ],
        "waits for ever",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_nccl_makes_of_it(name: str) -> None:
    ranks, said = CASES[name]
    found = problems(ranks)
    assert (said is None and not found) or (said is not None and any(said in each for each in found)), found


def test_tensors_that_nccl_does_not_take_are_named() -> None:
    """Through torch.distributed, as the training does."""
    import torch
    import torch.distributed as dist

    from mtp_megatron.compat.fake import fake_rank

    recorder = Recorder()
    with fake_rank(0, 2, fused_kernels=False), recorder.recording():
        dist.all_reduce(torch.zeros(2, 3))
        dist.all_reduce(torch.zeros(2, 3, dtype=torch.int16))
        dist.isend(torch.zeros(2, 3).t(), 1).wait()
    good, typed, strided = recorder.operations
    assert good.wrong == []
    assert typed.wrong == ["NCCL has no torch.int16"]
    assert strided.wrong == ["strides (1, 3) of (3, 2) are not contiguous"]
    assert strided.awaited == {0, 1}
