"""Held-out figures of each folder of a blend: those that the folder has alone, and together the whole's.

Not covered here: several ranks (tests/distributed/test_blend.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.data.blend import Blend, load_blend
from mtp_megatron.data.dataset import AnySamples, BlendedSamples, build_datasets
from mtp_megatron.data.loader import build_valid_batches, count_valid_batches
from mtp_megatron.sequential import HeadReport
from mtp_megatron.targets import IGNORE_INDEX
from mtp_megatron.training import evaluation
from mtp_megatron.training.batches import Microbatch
from mtp_megatron.training.evaluation import Evaluation, _add_samples, evaluate
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import make_data, tiny_tree

BATCH = 4  # samples of a global batch, in microbatches of 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_data(tmp_path_factory.mktemp("set"), seed=seed, documents=8) for seed in (1, 2)]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    settings: dict[str, Any] = {
        "train__micro_batch_size": 2,
        "heads__loss_weights": [1.0, 0.5, 0.0],
        "heads__z_loss": 0.1,
    }
    tree = tiny_tree(Path("data"), Path("run"), **settings)
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=257)


@pytest.fixture(scope="module")
def trainable(recipe: Recipe) -> Iterator[Any]:
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.world import model_parallel_world

    with model_parallel_world(recipe):
        yield build_trainable(recipe)


def held_out(folders: list[Path], weights: tuple[float, float], samples: int) -> tuple[Blend, BlendedSamples]:
    blend = load_blend([(weight, str(folder)) for weight, folder in zip(weights, folders, strict=True)])
    _, valid = build_datasets(blend, seq_length=32, train_samples=8, valid_samples=samples, seed=1234)
    assert isinstance(valid, BlendedSamples)
    return blend, valid


def test_losses_of_every_position_are_kept_for_folders_alone(
    recipe: Recipe, folders: list[Path], trainable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as many numbers as the predictions, which stages with heads send to the last one."""
    count, kept = evaluation.evaluation_counts, list[bool]()

    def counted(batch: Microbatch, report: HeadReport) -> torch.Tensor:
        kept.append(report.losses is not None)
        return count(batch, report)

    monkeypatch.setattr(evaluation, "evaluation_counts", counted)
    blend, valid = held_out(folders, (0.3, 0.7), 4)
    for names in ((), blend.labels, ()):
        figures(recipe, trainable, blend, valid, names)
    assert kept == [False, False, True, True, False, False]


def figures(recipe: Recipe, trainable: Any, blend: Blend, samples: AnySamples, names: tuple[str, ...]) -> Evaluation:
    from mtp_megatron.training.batches import chunk_iterators

    loader = partial(build_valid_batches, samples, global_batch_size=recipe.train.global_batch_size)
    iterators = chunk_iterators(recipe, blend.eod, loader)
    batches = count_valid_batches(samples, global_batch_size=BATCH)
    return evaluate(recipe, trainable, iterators, batches, 2, names)


def test_a_folder_has_the_figures_that_it_has_alone(recipe: Recipe, folders: list[Path], trainable: Any) -> None:
    """Ten samples: the last global batch is half empty."""
    blend, valid = held_out(folders, (0.3, 0.7), 10)
    whole = figures(recipe, trainable, blend, valid, blend.labels)
    assert [len(part) for part in valid.parts] == [3, 7]
    for name, part in zip(blend.labels, valid.parts, strict=True):
        alone, found = figures(recipe, trainable, blend, part, ()), whole.folders[name]
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
        assert found.head_loss == pytest.approx(alone.head_loss, rel=1e-6)
        assert found.head_accuracy == alone.head_accuracy
        assert alone.folders == {}
        # Fresh logits are nearly equal: both are of log(V).
        assert alone.head_z_loss == pytest.approx([loss**2 for loss in alone.head_loss], rel=0.05)
    assert whole == Evaluation(**{**vars(figures(recipe, trainable, blend, valid, ())), "folders": whole.folders}), (
        "what the whole has does not depend on it"
    )


def test_together_they_are_the_whole(recipe: Recipe, folders: list[Path], trainable: Any) -> None:
    blend, valid = held_out(folders, (0.3, 0.7), 10)
    whole = figures(recipe, trainable, blend, valid, blend.labels)
    one, other = whole.folders.values()
    assert one.head_loss != pytest.approx(other.head_loss, rel=1e-4), "control"
    for head in range(3):
        tokens = [found.head_tokens[head] for found in (one, other)]
        for name in ("head_loss", "head_accuracy"):
            total = sum(count * getattr(found, name)[head] for count, found in zip(tokens, (one, other), strict=True))
            assert total / sum(tokens) == pytest.approx(getattr(whole, name)[head], rel=1e-6)
    loss = sum(found.head_tokens[0] * found.loss for found in (one, other))
    assert loss / (one.head_tokens[0] + other.head_tokens[0]) == pytest.approx(whole.loss, rel=1e-6)


def test_a_folder_without_a_sample_has_no_figure(recipe: Recipe, folders: list[Path], trainable: Any) -> None:
    blend, valid = held_out(folders, (1, 1e-6), 6)
    whole = figures(recipe, trainable, blend, valid, blend.labels)
    given, none = whole.folders.values()
    assert given.head_loss == pytest.approx(whole.head_loss, rel=1e-6)
    assert none.head_tokens == [0, 0, 0]
    assert all(map(math.isnan, [none.loss, *none.head_loss, *none.head_accuracy]))


def test_samples_in_one_row_have_the_figures_that_they_have_in_rows() -> None:
    """As attention within documents packs them for Transformer Engine's layers: one sample after another."""
    torch.manual_seed(0)
    targets = torch.randint(0, 3, (2, 3, 5))
    targets[:, :, -1] = IGNORE_INDEX
    report = HeadReport.empty(targets, (1.0, 1.0), torch.float32, predictions=True)
    report.predictions = torch.randint(0, 3, targets.shape)
    report.losses = torch.rand(targets.shape)
    parts, found = torch.tensor([1, 0, 1]), []
    for shape in (targets.shape, (2, 1, 15)):
        rows = replace(report, predictions=report.predictions.view(shape), losses=report.losses.view(shape))
        found.append(torch.zeros(2, 6, dtype=torch.float64))
        _add_samples(found[-1], Microbatch(targets=targets.view(shape), parts=parts), rows)
    assert torch.equal(found[0], found[1])
    assert found[0][0, :2] == pytest.approx(report.losses[:, 1].sum(dim=1))
    assert found[0][:, 4:].tolist() == [[4, 4], [8, 8]]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["data/web", "data/code"], ("web", "code")),
        (["/a/web/text", "/b/web/text", "/b/code"], ("a/web/text", "b/web/text", "code")),
        (["/web", "/x/web"], ("/web", "x/web")),
    ],
)
def test_names_are_short_and_tell_folders_apart(paths: list[str], labels: tuple[str, ...]) -> None:
    class Part:
        def __init__(self, path: str) -> None:
            self.path = Path(path)

    parts: Any = tuple(map(Part, paths))
    assert Blend(parts, (1 / len(parts),) * len(parts), 0, (0,) * len(parts)).labels == labels
