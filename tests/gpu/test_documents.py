"""Attention within documents on a GPU, in bf16: no kernel lets a document see another, forward or backward.

Not run on one yet. tests/transformer_engine/test_gpu_code.py runs these functions without a GPU; against the oracle,
in fp32, tests/distributed/test_document_attention.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron.targets import IGNORE_INDEX
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.fp8_runs import skip_without_transformer_engine

pytestmark = pytest.mark.gpu
VOCAB, EOD, ROWS, LENGTH = 256, 255, 2, 128
FIRST = 48  # tokens of each row's first document, with ids below 100; the second one has those above


def recipe_of(engine: bool, within: bool) -> Recipe:
    tree = {
        "model": {"num_trunk_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "seq_length": LENGTH},
        "heads": {"n": 2},
        "data": {"reset_attention_mask": within},
        "train": {
            "micro_batch_size": ROWS,
            "global_batch_size": ROWS,
            "precision": "bf16",
            "transformer_engine": engine,
        },
    }
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)


@contextmanager
def model_of(recipe: Recipe) -> Iterator[Any]:
    from mtp_megatron import compat
    from mtp_megatron.training.build import build_models, transformer_config
    from mtp_megatron.training.world import model_parallel_world

    with model_parallel_world(recipe):
        (model,) = build_models(recipe, transformer_config(recipe))
        yield model.to(compat.device()).bfloat16()


def second_documents(recipe: Recipe, first: int) -> Any:
    """A microbatch whose second documents alone have targets; ``first`` draws the documents before them."""
    from mtp_megatron.training.batches import to_microbatch

    before = torch.randint(100, (ROWS, FIRST - 1), generator=torch.Generator().manual_seed(first))
    after = torch.randint(100, EOD, (ROWS, LENGTH + 1 - FIRST), generator=torch.Generator().manual_seed(0))
    text = torch.cat([before, torch.full((ROWS, 1), EOD), after], dim=1)
    sample = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(ROWS, LENGTH)}
    batch = to_microbatch(recipe, sample, eod=EOD)
    targets = batch.targets.view(-1, ROWS, LENGTH).clone()
    targets[:, :, :FIRST] = IGNORE_INDEX
    return replace(batch, targets=targets.view(batch.targets.shape))


@dataclass
class Learned:
    """Loss sums of the heads ``[n]``, and the embedding's gradient at the first documents' ids and the others'."""

    losses: Tensor
    first: Tensor
    second: Tensor


def learned(model: Any, batch: Any) -> Learned:
    model.zero_grad(set_to_none=True)
    loss, report = batch.through(model)
    loss.backward()
    grad = model.embedding.word_embeddings.weight.grad
    return Learned(report.loss_sum.clone(), grad[:100].clone(), grad[100:EOD].clone())


@pytest.mark.parametrize("engine", [False, True], ids=["local", "transformer_engine"])
def test_nothing_of_one_document_reaches_the_next(engine: bool) -> None:
    if engine:
        skip_without_transformer_engine()
    recipe = recipe_of(engine, within=True)
    with model_of(recipe) as model:
        one, other = (learned(model, second_documents(recipe, seed)) for seed in (1, 2))
        assert one.losses.isfinite().all()
        assert torch.equal(one.losses, other.losses)
        assert not one.first.any()
        assert one.second.any()
        whole = recipe_of(engine, within=False)
        one, other = (learned(model, second_documents(whole, seed)) for seed in (1, 2))
        assert not torch.equal(one.losses, other.losses), "control: without it they see one another"
        assert one.first.any()
