"""What the real spec builds: which modules are Transformer Engine's, and that names and shapes are the local spec's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from mtp_megatron.errors import ConfigError
from tests.fp8_runs import linear_layers
from tests.transformer_engine import runs
from tests.transformer_engine.pretend import BLACKWELL, HOPPER

RECIPES: list[Any] = [
    pytest.param({}, HOPPER, id="bf16"),
    *(
        pytest.param({"train__fp8": "hybrid", "train__fp8_recipe": name}, capability, id=name)
        for name, capability in (
            ("delayed", HOPPER),
            ("tensorwise", HOPPER),
            ("blockwise", HOPPER),
            ("mxfp8", BLACKWELL),
        )
    ),
    pytest.param({"train__fp4": "e2m1"}, BLACKWELL, id="nvfp4"),
    pytest.param(
        {**runs.TENSORWISE, "train__first_last_layers_bf16": True}, HOPPER, id="first and last layers in bf16"
    ),
    pytest.param({"model__qk_norm": True, "model__qkv_bias": True}, HOPPER, id="norms of queries and keys, biases"),
]


def origin(module: torch.nn.Module) -> str:
    """Whose code a module is made of: a wrapper of Megatron's counts for what it wraps."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("transformer_engine."):
            return "transformer_engine"
    return type(module).__module__.partition(".")[0]


@pytest.mark.parametrize(("settings", "capability"), RECIPES)
def test_modules_names_and_shapes(
    pretend_gpu: Callable[..., None], settings: dict[str, Any], capability: tuple[int, int]
) -> None:
    local = {key: value for key, value in settings.items() if key.startswith("model__")}
    with runs.built(runs.recipe_of(**local, train__transformer_engine=False)) as model:
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        keys = stored(model)
        assert {origin(module) for module in model.modules()} == {"megatron", "mtp_megatron", "torch"}
    pretend_gpu(capability)
    with runs.built(runs.recipe_of(**settings)) as model:
        found = {runs.local_name(name): (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        assert found == shapes
        state = stored(model)
        assert {key for key in state if not key.endswith("_extra_state")} == {
            key for key in keys if not key.endswith("_extra_state")
        }

        # Four matrices in each layer; the embedding and the unembedding are Megatron's own.
        for room, layers in ((model.decoder, runs.TRUNK), (model.heads, runs.HEADS)):
            assert len(linear_layers(room)) == 4 * layers
            owners = {origin(m) for m in room.modules() if list(m.parameters(recurse=False))}
            assert owners == {"transformer_engine"}
        assert origin(model.final_norm) == "transformer_engine"
        assert {origin(m) for m in (model.embedding.word_embeddings, model.output_layer)} == {"megatron"}

        assert (model.config.fp8, model.config.fp4) == (settings.get("train__fp8"), settings.get("train__fp4"))
        configs = [module.config for module in model.heads.modules() if hasattr(module, "config")]
        assert {(config.fp8, config.fp4) for config in configs} == {(None, None)}


def stored(model: Any) -> dict[str, Any]:
    """What a checkpoint would hold, by key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    from mtp_megatron.training.checkpointing import model_state

    values = [value for value in nested_values(model_state([model])) if isinstance(value, ShardedBase)]
    return {value.key: value for value in values}


def test_the_machine_is_still_looked_at(pretend_gpu: Callable[..., None]) -> None:
    """The control of the fixture: the project's checks see a Hopper, and refuse what that cannot do."""
    pretend_gpu(HOPPER)
    with (
        pytest.raises(ConfigError, match=r"compute capability 10\.0 or higher"),
        runs.built(runs.recipe_of(train__fp8="hybrid", train__fp8_recipe="mxfp8")),
    ):
        pass


def test_fp8_parameters_are_the_trunks(pretend_gpu: Callable[..., None]) -> None:
    """With delayed scaling, whose cast the tests have in torch."""
    pretend_gpu(HOPPER)
    recipe = runs.recipe_of(train__fp8="hybrid", train__fp8_param=True, optimizer__distributed=True)
    with runs.built(recipe) as model:
        from megatron.core.fp8_utils import is_float8tensor

        matrices = [p for p in model.decoder.parameters() if p.dim() == 2]
        assert len(matrices) == 4 * runs.TRUNK
        assert all(is_float8tensor(parameter) for parameter in matrices)
        for room in (model.heads, model.final_norm, model.output_layer, model.embedding):
            assert not any(is_float8tensor(parameter) for parameter in room.parameters())


def test_the_buffers_of_the_overlap_are_asked_for_as_it_wants(
    pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own signature and names; what it does with them needs GPUs (tests/unit/test_tp_comm_overlap.py)."""
    pretend_gpu(HOPPER)
    from transformer_engine.pytorch.module import base

    from mtp_megatron import compat

    config = runs.config_of(runs.recipe_of(**runs.TENSORWISE, train__first_last_layers_bf16=True), tp_comm_overlap=True)
    start = mock.create_autospec(base.initialize_ub)
    monkeypatch.setattr(base, "initialize_ub", start)
    with compat.userbuffers(config, tokens=64):
        (call,) = start.mock_calls
        modes = base.UserBufferQuantizationMode
        assert call.kwargs["quantization_modes"] == [modes.FP8, modes.NONE]
    assert base._ub_communicators is None
