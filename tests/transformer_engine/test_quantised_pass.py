"""Trunk and heads, forward and backward, with Transformer Engine's quantisers: the trunk in FP8, the heads not.

``tensorwise`` and NVFP4 run in Transformer Engine's own reference implementations of them (a ``CustomRecipe`` with its
``current_scaling_ref_quantizer_factory``, or NVFP4's); ``delayed`` in its own quantisers, histories and state manager,
above a cast in torch (``kernels.quantize``). What a GPU's kernels make of the same numbers is not exercised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests import fp8_runs
from tests.fp8_runs import Manager
from tests.transformer_engine import runs
from tests.transformer_engine.pretend import BLACKWELL
from tests.transformer_engine.runs import DELAYED, HEADS, MICROBATCHES, TRUNK, HeadsPass


@dataclass
class Reference:
    """Transformer Engine's own reference of a recipe.

    Attributes:
        settings: of the project's recipe that ask for it.
        made: roles of the quantisers that were made, counted.
        worst: largest relative error of anything, at these sizes.
    """

    settings: dict[str, Any]
    worst: float
    made: Counter[str] = field(default_factory=Counter)


@pytest.fixture(params=["tensorwise", "nvfp4"])
def reference(request: pytest.FixtureRequest, pretend_gpu: Callable[..., None]) -> Iterator[Reference]:
    fp4 = request.param == "nvfp4"
    pretend_gpu(*((BLACKWELL,) if fp4 else ()))
    from megatron.core import fp4_utils, fp8_utils
    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import (
        current_scaling_ref_quantizer_factory,
    )
    from transformer_engine.pytorch.custom_recipes.quantization_nvfp4 import nvfp4_ref_rht_2d_quantizer_factory

    found = Reference({"train__fp4": "e2m1"}, 0.5) if fp4 else Reference(runs.TENSORWISE, 0.2)

    def factory(role: str) -> Any:
        found.made[role] += 1
        return nvfp4_ref_rht_2d_quantizer_factory(role) if fp4 else current_scaling_ref_quantizer_factory(role)

    recipe = CustomRecipe(qfactory=factory)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module, name in ((fp8_utils, "get_fp8_recipe"), (fp4_utils, "get_fp4_recipe")):
            monkeypatch.setattr(module, name, lambda config: recipe)
        yield found


def test_the_stand_in_for_the_cast_is_the_reference(pretend_gpu: Callable[..., None]) -> None:
    """Current scaling, which both have: the same scale, the same bytes, the transpose too."""
    pretend_gpu()
    import transformer_engine_torch as native
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import CurrentScalingQuantizerRef
    from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer

    values = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[0, 0] = 7.0
    for kind, stored in (
        (native.DType.kFloat8E4M3, torch.float8_e4m3fn),
        (native.DType.kFloat8E5M2, torch.float8_e5m2),
    ):
        ours = Float8CurrentScalingQuantizer(kind, torch.device("cpu"))(values)
        reference = CurrentScalingQuantizerRef(dtype=stored, rowwise=True, columnwise=True)(values)
        assert torch.equal(ours._scale_inv.view(()), reference.scale.view(()))
        assert torch.equal(ours._data.view(stored).float(), reference.data.float())
        assert torch.equal(ours._transpose.view(stored).float(), reference.data_t.float())
        assert ours._data.unique().numel() > 70


def same(left: HeadsPass, right: HeadsPass) -> None:
    """Bit by bit."""
    assert torch.equal(left.losses, right.losses)
    assert torch.equal(left.grad_z, right.grad_z)
    assert left.grads.keys() == right.grads.keys()
    for name, grad in left.grads.items():
        assert torch.equal(grad, right.grads[name]), name


def passes(recipe: Any, weights: dict[str, Any] | None, **fields: Any) -> tuple[Any, ...]:
    """Weights, the pass through trunk and heads, the trunk's gradients, and which layers ran in FP8."""
    with runs.built(recipe, **fields) as model:
        if weights is not None:
            runs.put_weights(model, weights)
        ran = runs.whole_pass(model, runs.microbatch(recipe))
        fp8 = (fp8_runs.in_fp8(model.decoder), fp8_runs.in_fp8(model.heads))
        return runs.weights_of(model), ran, runs.trunk_grads(model), fp8


def test_the_trunk_is_quantised_and_the_heads_are_not(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    exact = runs.recipe_of(train__precision="fp32")
    weights, plain, plain_grads, _ = passes(runs.recipe_of(), None)
    assert not reference.made
    wide = {name: value.float() for name, value in weights.items()}
    _, full, full_grads, _ = passes(exact, wide)

    recipe = runs.recipe_of(**reference.settings)
    with runs.built(recipe) as model:
        runs.put_weights(model, weights)
        quantised = runs.whole_pass(model, runs.microbatch(recipe))
        grads = runs.trunk_grads(model)
        assert fp8_runs.in_fp8(model.decoder) == [True] * 4 * TRUNK
        assert fp8_runs.in_fp8(model.heads) == [False] * 4 * HEADS
    for role in ("linear_input", "linear_weight", "linear_grad_output"):
        assert reference.made[role] == 4 * TRUNK, "one for each matrix of the trunk"

    # The heads, of a model without FP8, given the same z.
    with runs.built(runs.recipe_of()) as model:
        runs.put_weights(model, weights)
        same(runs.heads_alone(model, quantised), quantised)

    # Relative to fp32: of bf16, and of FP8.
    errors = {
        "z": (runs.relative(plain.z, full.z), runs.relative(quantised.z, full.z)),
        "dL/dz": (runs.relative(plain.grad_z, full.grad_z), runs.relative(quantised.grad_z, full.grad_z)),
        "worst gradient of the trunk": (
            max(runs.relative(plain_grads[name], grad) for name, grad in full_grads.items()),
            max(runs.relative(grads[name], grad) for name, grad in full_grads.items()),
        ),
        "losses": (runs.relative(plain.losses, full.losses), runs.relative(quantised.losses, full.losses)),
    }
    with capsys.disabled():
        for name, (low, high) in errors.items():
            print(f"\n  relative error of {name}: bf16 {low:.1e}, here {high:.1e}", end="")
    for name in ("z", "worst gradient of the trunk"):
        low, high = errors[name]
        assert 2 * low < high < reference.worst, f"{name}: three bits of mantissa (or one) must show, and no more"
    assert errors["dL/dz"][1] < 0.05, "the heads run in bf16 on a slightly different z"
    assert errors["losses"][1] < 0.01


def test_the_first_and_last_layers_stay_in_bf16(reference: Reference) -> None:
    recipe = runs.recipe_of(**reference.settings, train__first_last_layers_bf16=True)
    *_, (trunk, heads) = passes(recipe, None)
    assert trunk == [False] * 4 + [True] * 4 * (TRUNK - 2) + [False] * 4
    assert heads == [False] * 4 * HEADS


def test_heads_in_fp8_where_they_are_asked_for(reference: Reference) -> None:
    """The control of the tests above: heads that are quantised are seen, and differ from those that are not."""
    weights, quantised, _, (trunk, heads) = passes(runs.recipe_of(**reference.settings, heads__fp8=True), None)
    assert trunk == [True] * 4 * TRUNK
    assert heads == [True] * 4 * HEADS
    assert reference.made["linear_weight"] == 4 * (TRUNK + HEADS)
    with runs.built(runs.recipe_of()) as model:
        runs.put_weights(model, weights)
        with pytest.raises(AssertionError):
            same(runs.heads_alone(model, quantised), quantised)


def rolls(layer: Any, key: str, quantizer: int) -> int:
    """Entries of a layer's history of largest values, for one of its quantisers."""
    return int((layer.fp8_meta[key].amax_history[:, quantizer] > 0).sum())


def step(recipe: Any, history: int, monkeypatch: pytest.MonkeyPatch, region: bool = False) -> tuple[Any, Manager]:
    """Two microbatches on Megatron's schedule and an evaluation; ``region``: each head opens a region of FP8."""
    from mtp_megatron import compat
    from mtp_megatron.training import build
    from mtp_megatron.training.batches import Microbatch
    from mtp_megatron.training.step import training_loss
    from mtp_megatron.training.world import model_parallel_world

    config_of = build.transformer_config

    def longer(recipe: Any) -> Any:
        config = config_of(recipe)
        config.fp8_amax_history_len, config.fp8_amax_compute_algo = history, "max"
        return config

    monkeypatch.setattr(build, "transformer_config", longer)
    manager = Manager(monkeypatch)
    with model_parallel_world(recipe):
        trainable = build.build_trainable(recipe)
        (model,) = trainable.models
        if region:
            run = model.run_head_layer

            def inside(*args: Any) -> Any:
                with compat.fp8_context(model.config):
                    return run(*args)

            model.run_head_layer = inside
        batch = runs.microbatch(recipe)
        batch = Microbatch(batch["input_ids"], batch["position_ids"], batch["labels"])
        reports = trainable.backward(recipe, [iter([batch] * MICROBATCHES)], MICROBATCHES)
        assert all(torch.isfinite(report.loss_sum).all() for report in reports)
        with torch.no_grad(), trainable.evaluating():
            trainable.forward(recipe, [iter([batch])], 1, training_loss)
    return model, manager


def test_the_history_advances_once_for_each_microbatch(
    pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu()
    model, manager = step(runs.recipe_of(**DELAYED), 8, monkeypatch)
    assert manager.regions == MICROBATCHES + 1, "and one for the evaluation"
    assert manager.updates == {True: MICROBATCHES, False: MICROBATCHES}
    for name, layer in fp8_runs.linear_layers(model.decoder).items():
        # Its first row is being written to; an evaluation writes there too, and does not advance.
        assert rolls(layer, "scaling_fwd", 0) == MICROBATCHES + 1, name
        assert rolls(layer, "scaling_bwd", 0) == MICROBATCHES, name
    for layer in fp8_runs.linear_layers(model.heads).values():
        assert "scaling_fwd" not in layer.fp8_meta, "no history at all"


def test_heads_that_open_regions_would_advance_it(
    pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above, and the reason why FP8 heads are refused with delayed scaling."""
    pretend_gpu()
    _, manager = step(runs.recipe_of(**DELAYED), 8, monkeypatch, region=True)
    assert manager.updates[True] == MICROBATCHES * (1 + HEADS)
