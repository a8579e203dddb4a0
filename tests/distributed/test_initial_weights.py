"""Starting from a run with fewer or more heads: what is taken over is taken over exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.errors import CheckpointError
from tests.harness import run_world
from tests.training_runs import metrics, tiny_tree, train_body

ONE_STEP = {"train__steps": 1, "optimizer__warmup_steps": 0, "train__eval_interval": 1}


@pytest.fixture(scope="module", params=[{}, {"model__tied_embeddings": True}], ids=["untied", "tied"])
def plain(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A next-token model: one head."""
    run = tmp_path_factory.mktemp("plain") / "run"
    settings = {**ONE_STEP, **request.param, "heads__n": 1}
    run_world(train_body, 4, tiny_tree(data, run, parallel__tensor=2, parallel__pipeline=2, **settings))
    return run


def tied(run: Path) -> dict[str, Any]:
    return {"model__tied_embeddings": "tied_embeddings: true" in (run / "recipe.yaml").read_text()}


def loaded_parameters(rank: int, world_size: int, tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters right after `run.load`, before any step."""
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.initial_weights import load_weights
    from mtp_megatron.training.preflight import preflight
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.world import model_parallel_world

    plan = preflight(parse_recipe(tree), world_size)
    with model_parallel_world(plan.recipe):
        trainable = build_trainable(plan.recipe)
        assert plan.initial is not None
        load_weights(plan.recipe, trainable, plan.initial)
        return {name: p.detach().clone() for name, p in trainable.models[-1].named_parameters()}


@pytest.mark.parametrize("unembedding", ["shared", "replicated"])
def test_new_heads_start_as_copies_of_the_last_layer(unembedding: str, plain: Path, data: Path, tmp_path: Path) -> None:
    heads = {"heads__n": 3, "heads__new_heads": "copy", "heads__unembedding": unembedding}
    tree = tiny_tree(data, tmp_path / "run", run__load=str(plain), **heads, **tied(plain))
    (state,) = run_world(loaded_parameters, 1, tree)
    names = [name for name in state if name.startswith("heads.0.")]
    assert names
    for name in names:
        for head in (1, 2):
            assert torch.equal(state[name], state[name.replace("heads.0.", f"heads.{head}.")])
    if unembedding == "replicated":
        owner = "embedding.word_embeddings" if tied(plain)["model__tied_embeddings"] else "output_layer"
        assert torch.equal(state["unembedding_heads.1.weight"], state[f"{owner}.weight"])


def test_new_heads_start_fresh_and_the_rest_is_taken_over(plain: Path, data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "run", run__load=str(plain), heads__n=3, **tied(plain))
    (state,) = run_world(loaded_parameters, 1, tree)
    alone = tiny_tree(data, tmp_path / "alone", run__load=str(plain), heads__n=1, **tied(plain))
    (source,) = run_world(loaded_parameters, 1, alone)
    for name, value in source.items():
        assert torch.equal(state[name], value), name
    qkv = "self_attention.linear_qkv.weight"
    assert not torch.equal(state[f"heads.1.{qkv}"], state[f"heads.0.{qkv}"])
    assert not torch.equal(state[f"heads.1.{qkv}"], state[f"heads.2.{qkv}"])


@pytest.mark.parametrize("trainable", ["heads", "new_heads"])
def test_training_the_heads_alone_leaves_the_rest_as_it_was(
    trainable: str, plain: Path, data: Path, tmp_path: Path
) -> None:
    """TP2 x PP2 with weight decay, which would move frozen parameters if the optimizer had them."""
    run = tmp_path / "run"
    heads = {"heads__n": 3, "heads__new_heads": "copy", "heads__trainable": trainable}
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2, **tied(plain)}
    run_world(
        train_body,
        4,
        tiny_tree(data, run, run__load=str(plain), **heads, **{**ONE_STEP, "train__steps": 2}, **layout),
    )
    after_tree = tiny_tree(
        data, tmp_path / "after", run__load=str(run), **{**heads, "heads__trainable": "all"}, **tied(plain)
    )
    (after,) = run_world(loaded_parameters, 1, after_tree)
    before_tree = tiny_tree(data, tmp_path / "before", run__load=str(plain), **heads, **tied(plain))
    (before,) = run_world(loaded_parameters, 1, before_tree)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("heads.2.") for name in moved)
    frozen = (
        ("embedding.", "decoder.") if trainable == "heads" else ("embedding.", "decoder.", "heads.0.", "final_norm.")
    )
    assert not {name for name in moved if name.startswith(frozen)}
    if trainable == "new_heads":
        assert metrics(run, "valid")[2]["head_loss"][0] == pytest.approx(
            metrics(plain, "valid")[1]["head_loss"][0], rel=1e-6
        )


def test_dropping_to_one_head_keeps_the_next_token_model(data: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    run_world(train_body, 1, tiny_tree(data, many, **ONE_STEP))
    one = tmp_path / "one"
    frozen = {**ONE_STEP, "optimizer__lr": 1e-12, "optimizer__min_lr": 1e-12}
    run_world(train_body, 1, tiny_tree(data, one, run__load=str(many), heads__n=1, **frozen))
    assert metrics(one, "valid")[1]["head_loss"][0] == pytest.approx(
        metrics(many, "valid")[1]["head_loss"][0], rel=1e-6
    )


def test_an_anticausal_chain_cannot_lose_a_head(data: Path, tmp_path: Path) -> None:
    """There head 1 reads head 2: without it, it would be another model."""
    many = tmp_path / "many"
    run_world(train_body, 1, tiny_tree(data, many, heads__arrangement="anticausal", **ONE_STEP))
    tree = tiny_tree(data, tmp_path / "one", run__load=str(many), heads__n=1, **ONE_STEP)
    with pytest.raises(RuntimeError, match=CheckpointError.__name__):
        run_world(train_body, 1, tree)
