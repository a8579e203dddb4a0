"""Every kind of head is trained, saved at TP2 x PP2 and resumed on one process as if nothing had happened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_world
from tests.parity import Case, build_chunks, make_parameters
from tests.training_runs import interrupted_copy, largest_difference, metrics, tiny_tree, train_body

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"heads__kind": "linear"},
    "medusa": {"heads__kind": "medusa", "model__tied_embeddings": True},
    "causal": {"heads__arrangement": "causal", "heads__loss_decay": 0.6},
    "anticausal": {"heads__arrangement": "anticausal"},
    "replicated": {"heads__unembedding": "replicated", "heads__loss_weights": [1.0, 0.5, 0.25]},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_head_resumes_at_another_layout(name: str, data: Path, tmp_path: Path) -> None:
    settings = {**KINDS[name], "train__steps": 6, "train__save_interval": 3, "train__eval_interval": 3}
    whole = tmp_path / "whole"
    run_world(train_body, 4, tiny_tree(data, whole, parallel__tensor=2, parallel__pipeline=2, **settings))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=3)
    run_world(train_body, 1, tiny_tree(data, resumed, **settings))
    assert largest_difference(metrics(resumed), metrics(whole)) < 1e-5
    assert largest_difference(metrics(resumed, "valid"), metrics(whole, "valid")) < 1e-5
    losses = [record["loss"] for record in metrics(whole).values()]
    assert losses[-1] < losses[0]


def marks_of_unembeddings(rank: int, world_size: int) -> dict[str, bool]:
    case = Case(heads={"n": 3, "unembedding": "replicated"})
    with case.parallel():
        _, (model,) = build_chunks(case, make_parameters(case))
        return {
            name: getattr(parameter, "is_embedding_or_output_parameter", False)
            for name, parameter in model.named_parameters()
        }


def test_every_unembedding_is_one_to_megatrons_optimizers() -> None:
    """A decoupled learning rate is for all of them, and Muon, which is for other matrices, for none."""
    (marks,) = run_world(marks_of_unembeddings, 1)
    tables = {"embedding.word_embeddings", "output_layer", "unembedding_heads.0", "unembedding_heads.1"}
    assert {name for name, marked in marks.items() if marked} == {f"{table}.weight" for table in tables}


def resumes_with_a_nudge(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    """Resume, but read one tensor of head 2 a hundredth too large."""
    from mtp_megatron.training import checkpointing

    load = checkpointing.load_checkpoint

    def nudged(recipe: Any, trainable: Any, folder: Path) -> int:
        step = load(recipe, trainable, folder)
        next(trainable.models[-1].heads[1].parameters()).data.mul_(1.01)
        return step

    checkpointing.load_checkpoint = nudged
    try:
        train_body(rank, world_size, tree)
    finally:
        checkpointing.load_checkpoint = load


def test_a_head_that_is_not_read_back_exactly_would_be_noticed(data: Path, tmp_path: Path) -> None:
    """Control of the test above."""
    settings = {**KINDS["anticausal"], "train__steps": 6, "train__save_interval": 3, "train__eval_batches": 0}
    whole = tmp_path / "whole"
    run_world(train_body, 1, tiny_tree(data, whole, **settings))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=3)
    run_world(resumes_with_a_nudge, 1, tiny_tree(data, resumed, **settings))
    assert largest_difference(metrics(resumed), metrics(whole)) > 1e-5


def test_a_curriculum_lets_the_heads_join_one_by_one(data: Path, tmp_path: Path) -> None:
    """Overlapped data parallelism counts gradients per parameter: heads that rest must not confuse it."""
    run = tmp_path / "run"
    settings = {"optimizer__distributed": True, "optimizer__overlap_grad_reduce": True, "heads__curriculum_steps": 6}
    run_world(train_body, 2, tiny_tree(data, run, train__steps=8, **settings))
    heads_at_work = [
        sum(loss is not None and math.isfinite(loss) for loss in record["head_loss"])
        for record in metrics(run).values()
    ]
    assert heads_at_work == [1, 1, 2, 2, 3, 3, 3, 3]
    alone = tmp_path / "alone"
    run_world(train_body, 1, tiny_tree(data, alone, train__steps=8, heads__curriculum_steps=6))
    for step, record in metrics(run).items():
        assert record["loss"] == pytest.approx(metrics(alone)[step]["loss"], rel=1e-5)
