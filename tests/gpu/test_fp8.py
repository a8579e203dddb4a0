"""FP8 on a GPU that has it: the trunk learns in every recipe that works here, the heads stay in BF16.

Not run on one yet. tests/transformer_engine/test_gpu_code.py runs these functions without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mtp_megatron.compat import fp8
from mtp_megatron.training.low_precision import WITH_EXPERTS
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.fp8_runs import Manager, in_fp8

pytestmark = pytest.mark.gpu
VOCAB, MICROBATCHES = 256, 2


def recipe_of(
    train: dict[str, Any], heads: dict[str, Any] | None = None, distributed: bool = False, experts: bool = False
) -> Recipe:
    """A recipe of two trunk layers and two heads; skips the test where this machine lacks what it asks for."""
    asked = fp8.Request(fp8=train.get("fp8"), fp8_recipe=train.get("fp8_recipe", "delayed"), fp4=train.get("fp4"))
    reason = fp8.why_not(asked.scaling, fp8.this_machine())
    if reason is not None:
        pytest.skip(f"{asked.scaling.name}: {reason}")
    tree = {
        "model": {"num_trunk_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128}
        | ({"num_experts": 4, "moe_ffn_hidden_size": 128} if experts else {}),
        "heads": {"n": 2, **(heads or {})},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "distributed": distributed},
        "train": {
            "micro_batch_size": 2,
            "global_batch_size": 2 * MICROBATCHES,
            "precision": "bf16",
            "transformer_engine": True,
            **train,
        },
    }
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)


@contextmanager
def trained(recipe: Recipe, steps: int) -> Iterator[tuple[Any, list[float]]]:
    """The model after some steps on one batch, and head 1's losses; inside of its world."""
    from mtp_megatron.training.batches import to_microbatch
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.step import train_step
    from mtp_megatron.training.world import model_parallel_world

    text = torch.randint(VOCAB - 1, (2, 129), generator=torch.Generator().manual_seed(0))
    sample = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(2, 128)}
    with model_parallel_world(recipe):
        batch = to_microbatch(recipe, sample, eod=VOCAB - 1)
        trainable = build_trainable(recipe)
        batches = [batch] * MICROBATCHES
        losses = [
            train_step(recipe, trainable, [iter(batches)], MICROBATCHES, False).head_loss[0] for _ in range(steps)
        ]
        (model,) = trainable.models
        yield model, losses


@pytest.mark.parametrize(
    ("name", "experts"), [*((name, False) for name in fp8.SCALINGS), *((name, True) for name in WITH_EXPERTS)]
)
def test_the_trunk_learns_and_the_heads_stay_in_bf16(name: str, experts: bool) -> None:
    asked = {"fp4": "e2m1"} if name == fp8.NVFP4 else {"fp8": "hybrid", "fp8_recipe": name}
    with trained(recipe_of(asked, experts=experts), 20) as (model, losses):
        assert losses[-1] < losses[0] - 0.5
        assert in_fp8(model.decoder)
        assert all(in_fp8(model.decoder))
        assert in_fp8(model.heads)
        assert not any(in_fp8(model.heads))
        assert {parameter.dtype for parameter in model.heads.parameters()} == {torch.bfloat16}


def test_heads_in_fp8_where_they_are_asked_for() -> None:
    """Also the control of the test above."""
    with trained(recipe_of({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, {"fp8": True}), 20) as (model, losses):
        assert losses[-1] < losses[0] - 0.5
        assert all(in_fp8(model.heads))


def test_fp8_parameters_are_the_trunks() -> None:
    recipe = recipe_of({"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True}, distributed=True)
    with trained(recipe, 20) as (model, losses):
        from megatron.core.fp8_utils import is_float8tensor

        assert losses[-1] < losses[0] - 0.5
        assert any(is_float8tensor(parameter) for parameter in model.decoder.parameters())
        for room in (model.heads, model.final_norm, model.output_layer):
            assert not any(is_float8tensor(parameter) for parameter in room.parameters())


def test_the_amax_history_advances_once_per_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of({"fp8": "hybrid", "fp8_recipe": "delayed"})
    manager = Manager(monkeypatch)
    with trained(recipe, 1):
        assert manager.regions == MICROBATCHES, "the heads open none"
        assert manager.updates == {True: MICROBATCHES, False: MICROBATCHES}
