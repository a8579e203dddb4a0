"""A trunk with experts in Transformer Engine's grouped layers, in bf16 and in FP8: modules, passes, whole trainings.

That gradients in fp32 are the oracle's is in test_exactness.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.compat.checkpoints import NORM_BEFORE_EXPERTS
from tests import fp8_runs
from tests.harness import run_world
from tests.parity import named_shards
from tests.training_runs import interrupted_copy, largest_difference, metrics, tiny_tree, train_body
from tests.transformer_engine import runs
from tests.transformer_engine.loops import train_recipe, unfed_experts
from tests.transformer_engine.runs import DELAYED, EXPERTS, HEADS, TENSORWISE, TRUNK
from tests.transformer_engine.test_modules import stored

pytestmark = pytest.mark.timeout(900)

EP2: dict[str, Any] = {"parallel__expert": 2, "optimizer__distributed": True}
TP2 = {"parallel__expert": 2, "parallel__tensor": 2, "parallel__sequence_parallel": True}


@pytest.mark.parametrize("settings", [{}, TENSORWISE], ids=["bf16", "tensorwise"])
def test_modules_names_shapes_and_keys(pretend_gpu: Callable[..., None], settings: dict[str, Any]) -> None:
    """A layer's experts are two modules, and a checkpoint has of them what it has of those of megatron-core's own."""
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

    with runs.built(runs.recipe_of(**EXPERTS, train__transformer_engine=False)) as model:
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        pieces, keys = pieces_of(model), set(stored(model))
        assert {type(layer.mlp.experts) for layer in model.decoder.layers} == {SequentialMLP}
    pretend_gpu()
    with runs.built(runs.recipe_of(**EXPERTS, **settings)) as model:
        assert {type(layer.mlp.experts) for layer in model.decoder.layers} == {TEGroupedMLP}
        assert {runs.local_name(n): (tuple(p.shape), p.dtype) for n, p in model.named_parameters()} == shapes
        assert pieces_of(model) == pieces
        in_megatron, in_engine = NORM_BEFORE_EXPERTS
        found = {key.replace(in_engine, in_megatron) for key in stored(model)}
        assert {key for key in found ^ keys if not key.endswith("norm._extra_state")} == set(), "those of norms"
        assert len(fp8_runs.linear_layers(model.decoder)) == 4 * TRUNK


def pieces_of(model: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes of the whole tensors that a checkpoint has, by name and by the piece."""
    return {(name, str(place)): shard.whole_shape for name, place, shard in named_shards([model])}


@pytest.mark.parametrize("settings", [DELAYED, TENSORWISE], ids=["delayed", "tensorwise"])
def test_experts_are_quantised_and_the_heads_are_not(
    pretend_gpu: Callable[..., None], settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpu()
    with runs.built(runs.recipe_of(**EXPERTS)) as model:
        weights = runs.weights_of(model)
        runs.whole_pass(model, runs.microbatch(runs.recipe_of(**EXPERTS)))
        plain = runs.trunk_grads(model)
    exact = runs.recipe_of(**EXPERTS, train__precision="fp32")
    with runs.built(exact) as model:
        runs.put_weights(model, {name: value.float() for name, value in weights.items()})
        full = runs.whole_pass(model, runs.microbatch(exact))
        full_grads = runs.trunk_grads(model)
    recipe = runs.recipe_of(**EXPERTS, **settings)
    with runs.built(recipe) as model:
        runs.put_weights(model, weights)
        for _ in range(6):  # until the largest values of the last pass, where it counts, are those of this one
            quantised = runs.whole_pass(model, runs.microbatch(recipe))
        grads = runs.trunk_grads(model)
        assert fp8_runs.in_fp8(model.decoder) == [True] * 4 * TRUNK
        assert fp8_runs.in_fp8(model.heads) == [False] * 4 * HEADS
    with runs.built(runs.recipe_of(**EXPERTS)) as model:
        runs.put_weights(model, weights)
        alone = runs.heads_alone(model, quantised)
    assert torch.equal(alone.losses, quantised.losses)
    assert torch.equal(alone.grad_z, quantised.grad_z)
    assert alone.grads.keys() == quantised.grads.keys()
    assert all(torch.equal(grad, quantised.grads[name]) for name, grad in alone.grads.items())

    of_experts = [name for name in full_grads if ".mlp.experts." in name]
    assert len(of_experts) == 2 * 4 * TRUNK
    low, high = (max(runs.relative(found[name], full_grads[name]) for name in of_experts) for found in (plain, grads))
    with capsys.disabled():
        print(f"\n  worst gradient of an expert: bf16 {low:.1e}, here {high:.1e}", end="")
    assert 2 * low < high < 0.2, "three bits of mantissa must show, and no more"
    assert runs.relative(quantised.losses, full.losses) < 0.01


def test_layers_in_bf16_and_heads_in_fp8(pretend_gpu: Callable[..., None]) -> None:
    pretend_gpu()
    asked = {"train__first_last_layers_bf16": True, "heads__fp8": True}
    recipe = runs.recipe_of(**EXPERTS, **TENSORWISE, **asked)
    with runs.built(recipe) as model:
        assert runs.whole_pass(model, runs.microbatch(recipe)).losses.isfinite().all()
        assert fp8_runs.in_fp8(model.decoder) == [False] * 4 + [True] * 4 * (TRUNK - 2) + [False] * 4
        assert fp8_runs.in_fp8(model.heads) == [True] * 4 * HEADS


@pytest.mark.parametrize("settings", [DELAYED, TENSORWISE], ids=["delayed", "tensorwise"])
def test_experts_without_tokens(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """All those of a rank: it takes part in what ranks reduce, and its experts' scales and weights stay sound."""
    tree = tiny_tree(data, tmp_path / "run", **EXPERTS, **EP2, **settings)
    tree["train"] |= {"precision": "bf16", "transformer_engine": True}
    ranks = run_world(unfed_experts, 2, tree, fresh=True, timeout=300)
    assert [rank.tokens > 0 for rank in ranks] == [True, False], "control: the second rank's experts got none"
    fed, unfed = (rank.gradients for rank in ranks)
    assert fed > 0
    assert unfed == 0
    assert all(rank.loss == ranks[0].loss < 10 for rank in ranks)
    first, second = (rank.seen.scales for rank in ranks)
    assert len(first) == len(second) == (2 * 4 * TRUNK if settings is DELAYED else 0)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
        assert (one > 0).all()
    for rank in ranks:
        # A region for all layers, or one for each.
        regions = runs.MICROBATCHES * 2 * (1 if settings is DELAYED else TRUNK)
        assert (rank.seen.regions, rank.seen.updates) == (regions, {True: regions, False: regions})


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step in bf16 of megatron-core's own layers: initial weights that are the same in every layout."""
    run = tmp_path_factory.mktemp("start") / "run"
    first = {"train__precision": "bf16", "train__steps": 1, "optimizer__warmup_steps": 0}
    run_world(train_body, 1, tiny_tree(data, run, **EXPERTS, **first))
    return run


@pytest.fixture(scope="module")
def train(data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Train from these weights, with some settings of the recipe; what the ranks saw, and the run's folder."""

    def trained(world: int = 1, run: Path | None = None, **settings: Any) -> tuple[list[fp8_runs.Seen], Path]:
        common = {"train__precision": "bf16", "train__transformer_engine": True, "run__load": str(start)}
        # The norm's last bit depends on the order of parameters, and clipped by it an update in bf16 may too.
        common |= EXPERTS | {"optimizer__clip_grad": 0}
        run = run or tmp_path_factory.mktemp("runs") / "run"
        return run_world(train_recipe, world, tiny_tree(data, run, **common | settings), fresh=True, timeout=300), run

    return trained


@pytest.fixture(scope="module")
def bf16(train: Callable[..., Any]) -> dict[int, Any]:
    _, run = train()
    return metrics(run)


@pytest.fixture(scope="module")
def shared(train: Callable[..., Any]) -> tuple[list[fp8_runs.Seen], Path]:
    """A run in delayed scaling whose experts are over two ranks."""
    found: tuple[list[fp8_runs.Seen], Path] = train(2, **DELAYED, **EP2)
    return found


def test_they_train_as_one_after_the_other(train: Callable[..., Any], bf16: dict[int, Any]) -> None:
    _, run = train(train__transformer_engine=False)
    assert largest_difference(metrics(run), bf16) == 0


def test_delayed_scaling_learns_alike_and_resumes(
    train: Callable[..., Any], bf16: dict[int, Any], shared: tuple[list[fp8_runs.Seen], Path], tmp_path: Path
) -> None:
    (one,), alone = train(**DELAYED)
    assert one.trunk == [True] * 4 * TRUNK
    cost = largest_difference(metrics(alone), bf16)
    assert 1e-5 < cost < 1e-2, "FP8 takes part, and costs little"
    _, staged = train(2, **DELAYED, parallel__pipeline=2)
    assert largest_difference(metrics(staged), metrics(alone)) == 0
    ranks, run = shared
    # An expert's scales come from the largest values of the experts at its place on all ranks.
    assert largest_difference(metrics(run), metrics(alone)) <= cost
    _resumes(train, ranks, run, tmp_path, **DELAYED, **EP2)


def test_tensorwise_scaling_learns_alike_and_resumes(
    train: Callable[..., Any], bf16: dict[int, Any], tmp_path: Path
) -> None:
    _, alone = train(**TENSORWISE)
    cost = largest_difference(metrics(alone), bf16)
    assert 1e-5 < cost < 1e-2, "FP8 takes part, and costs little"
    ranks, run = train(2, **TENSORWISE, **TP2)
    assert largest_difference(metrics(run), metrics(alone)) <= 2 * cost
    _resumes(train, ranks, run, tmp_path, **TENSORWISE, **TP2)


def _resumes(train: Callable[..., Any], ranks: list[fp8_runs.Seen], run: Path, folder: Path, **settings: Any) -> None:
    """Bit by bit."""
    resumed = interrupted_copy(run, folder / "resumed", step=4)
    again, _ = train(2, resumed, **settings)
    assert again[0].regions == ranks[0].regions // 2, "control: it was resumed"
    for kind in ("train", "valid"):
        assert metrics(resumed, kind) == metrics(run, kind)
    for one, other in zip(ranks, again, strict=True):
        assert len(one.scales) == len(other.scales)
        assert all(torch.equal(a, b) for a, b in zip(one.scales, other.scales, strict=True))


def test_scales_of_experts_do_not_move_to_another_expert_parallel_size(
    pretend_gpu: Callable[..., None], shared: tuple[list[fp8_runs.Seen], Path]
) -> None:
    """Megatron-core would give each expert others'; those of dense layers move with the weights."""
    from mtp_megatron.training.checkpoint_files import latest_complete
    from mtp_megatron.training.initial_weights import load_initial

    pretend_gpu()
    folder = latest_complete(shared[1] / "checkpoints")
    assert folder is not None
    recipe = runs.recipe_of(**EXPERTS, **DELAYED)
    with runs.built(recipe) as model:
        load_initial(recipe, [model], folder)
        for name, layer in fp8_runs.linear_layers(model.decoder).items():
            state = layer.fp8_meta.get("scaling_fwd")
            scales = torch.ones(1) if state is None else state.scale
            assert (scales == 1).all() == (".experts." in name), name
