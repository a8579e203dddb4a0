"""FP8 in the trunk: which layers run and are built in an FP8 context, and how often one is entered.

Transformer Engine cannot be imported without a GPU: its layers are stood in for by megatron-core's own, and the FP8
contexts that megatron-core enters are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from mtp_megatron import compat
from mtp_megatron.compat import fp8, packages, specs
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import tiny_tree

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU; tests/gpu/test_fp8.py uses one")
TE = packages.Package("transformer-engine", packages.State.USABLE, "2.10.0")
H100 = fp8.Machine("NVIDIA H100", (9, 0), Version("13.0"), TE)
ON = {"train__precision": "bf16", "train__transformer_engine": True, "train__fp8": "hybrid"}
MICROBATCHES, TRUNK, HEADS = 2, 4, 3


class Contexts:
    """In place of megatron-core's ``get_fp8_context``: who asks, what runs inside, how often the history advances."""

    def __init__(self) -> None:
        self.depth = self.rolls = 0
        self.entered: Counter[tuple[int, bool]] = Counter()  # (layer_no, is_init)
        self.built: dict[int, bool] = {}  # layer: inside of a context for parameters
        self.ran: Counter[tuple[int, bool]] = Counter()  # (layer, inside of a context)
        self.trained = self.ran  # the same up to the end of the training step

    def __call__(self, config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        from megatron.core.fp8_utils import is_first_last_bf16_layer

        wanted = config.fp8_param if is_init else config.fp8
        off = not wanted or is_first_last_bf16_layer(config, layer_no)
        return self._inside(config, layer_no, is_init, off)

    @contextmanager
    def _inside(self, config: Any, layer_no: int, is_init: bool, off: bool) -> Iterator[None]:
        if off:
            yield
            return
        self.entered[layer_no, is_init] += 1
        self.depth += 1
        yield
        self.depth -= 1
        # What Transformer Engine does when the outermost region ends (FP8GlobalStateManager.autocast_exit).
        if not self.depth and not is_init and config.fp8_recipe == "delayed" and torch.is_grad_enabled():
            self.rolls += 1


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> Contexts:
    """A machine with an H100 to everything that asks; megatron-core's layers for Transformer Engine's."""
    compat.prepare()
    from megatron.core import fp8_utils
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.transformer_layer import TransformerLayer

    found = Contexts()
    for module in (fp8_utils, transformer_block, sys.modules.get("megatron.core.recompute")):
        if module is not None:
            monkeypatch.setattr(module, "get_fp8_context", found)
    monkeypatch.setattr(fp8, "this_machine", lambda: H100)
    for name in ("trunk_block_spec", "layer_spec", "norm_class"):
        local = getattr(specs, name)
        monkeypatch.setattr(compat, name, lambda *args, local=local, transformer_engine=False: local(*args))
    build, forward = TransformerLayer.__init__, TransformerLayer.forward

    def building(layer: Any, *args: Any, **kwargs: Any) -> None:
        build(layer, *args, **kwargs)
        found.built[id(layer)] = found.depth > 0

    def running(layer: Any, *args: Any, **kwargs: Any) -> Any:
        found.ran[layer.layer_number, found.depth > 0] += 1
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(TransformerLayer, "__init__", building)
    monkeypatch.setattr(TransformerLayer, "forward", running)
    return found


def step(contexts: Contexts, **overrides: Any) -> Any:
    """One training step of two microbatches, then an evaluation of one; the model."""
    from mtp_megatron.training.batches import to_microbatch
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.step import train_step, training_loss
    from mtp_megatron.training.world import model_parallel_world

    tree = tiny_tree(Path("data"), Path("run"), **ON | overrides | {"train__global_batch_size": MICROBATCHES})
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=257)
    text = torch.randint(257, (1, 33), generator=torch.Generator().manual_seed(0))
    sample = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(1, 32)}
    with model_parallel_world(recipe):
        microbatch = to_microbatch(recipe, sample, eod=256)
        trainable = build_trainable(recipe)
        (model,) = trainable.models
        figures = train_step(recipe, trainable, [iter([microbatch] * MICROBATCHES)], MICROBATCHES, False)
        assert all(0 < loss < 10 for loss in figures.head_loss)
        contexts.trained = contexts.ran.copy()
        with torch.no_grad(), trainable.evaluating():
            trainable.forward(recipe, [iter([microbatch])], 1, training_loss)
    return model


@no_cuda
@pytest.mark.parametrize("execution", ["deferred", "joint"])
def test_delayed_scaling_advances_once_and_the_heads_stay_out(contexts: Contexts, execution: str) -> None:
    model = step(contexts, heads__execution=execution)
    assert contexts.rolls == MICROBATCHES, "once per microbatch, as without heads; not at all in an evaluation"
    assert contexts.entered == {(-1, False): MICROBATCHES + 1}
    assert contexts.trained == {
        **{(number, True): MICROBATCHES for number in range(1, TRUNK + 1)},
        **{(number, False): MICROBATCHES for number in range(TRUNK + 1, TRUNK + HEADS + 1)},
    }
    assert model.config.fp8 == "hybrid"
    assert {module.config.fp8 for module in model.heads.modules() if hasattr(module, "config")} == {None}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@no_cuda
def test_first_and_last_layers_in_bf16_are_the_trunks(contexts: Contexts) -> None:
    step(contexts, train__fp8_recipe="tensorwise", train__first_last_layers_bf16=True)
    inside = {number for (number, inside), _ in contexts.ran.items() if inside}
    assert inside == {2, 3}
    assert contexts.rolls == 0


@no_cuda
def test_fp8_parameters_are_the_trunks(contexts: Contexts) -> None:
    model = step(contexts, train__fp8_recipe="tensorwise", train__fp8_param=True, optimizer__distributed=True)
    assert [contexts.built[id(layer)] for layer in model.decoder.layers] == [True] * TRUNK
    assert [contexts.built[id(layer)] for layer in model.heads] == [False] * HEADS


@no_cuda
def test_fp8_heads_enter_it_one_by_one(contexts: Contexts) -> None:
    """The control of the tests above: a head that did enter the context would be seen."""
    model = step(contexts, train__fp8_recipe="tensorwise", heads__fp8=True)
    assert contexts.trained == {(number, True): MICROBATCHES for number in range(1, TRUNK + HEADS + 1)}
    assert [contexts.built[id(layer)] for layer in model.heads] == [False] * HEADS
