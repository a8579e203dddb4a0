"""``parallel.tp_comm_overlap``: who gets it, what is refused, and that Transformer Engine is told of the right buffers.

Transformer Engine is a stand-in here that notes its calls. The overlap itself needs two GPUs and has not been run.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron import compat
from mtp_megatron.compat.versions import EnvironmentUnsupported
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import tiny_tree

OVERLAP = {
    "parallel__tensor": 2,
    "parallel__sequence_parallel": True,
    "parallel__tp_comm_overlap": True,
    "train__transformer_engine": True,
    "train__precision": "bf16",
}
FP8 = {"train__fp8": "hybrid", "train__fp8_recipe": "tensorwise"}
WIDE = {"train__micro_batch_size": 2, "model__hidden_size": 64}  # for blocks of 32 on each rank
WIDER = {"model__seq_length": 256, "model__hidden_size": 128}  # of 128


def recipe_of(**overrides: Any) -> Recipe:
    tree = tiny_tree(Path("data"), Path("run"), **OVERLAP | overrides)
    return check_recipe(parse_recipe(tree), world_size=2, tokenizer_vocab_size=257)


@pytest.mark.parametrize(
    ("says", "overrides"),
    [
        ("parallel.tensor=1", {"parallel__tensor": 1, "parallel__sequence_parallel": False}),
        ("Set parallel.sequence_parallel=true", {"parallel__sequence_parallel": False}),
        ("Set train.transformer_engine=true", {"train__transformer_engine": False}),
        ("Set train.precision=bf16", {"train__precision": "fp32"}),
        ("DeepSpeed", {"run__deepspeed": "ds.json"}),
        ("experts", {"model__num_experts": 2, "parallel__expert": 2}),
        ("train.fp8_recipe to tensorwise", {**WIDER, **FP8, "train__fp8_recipe": "blockwise"}),
        ("32 tokens", {**WIDE, **FP8, "train__fp8_recipe": "mxfp8"}),
        ("train.fp4=e2m1", {**WIDE, "train__fp4": "e2m1"}),
    ],
)
def test_what_cannot_work_is_refused(says: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe_of(**overrides)
    assert (refused.value.field, refused.value.value) == ("parallel.tp_comm_overlap", True)
    assert says in str(refused.value)


def test_the_trunk_gets_it_and_the_heads_do_not() -> None:
    from mtp_megatron.training.build import transformer_config

    assert not transformer_config(recipe_of(parallel__tp_comm_overlap=False)).tp_comm_overlap
    for overrides in ({}, FP8):
        config = transformer_config(recipe_of(**overrides))
        assert config.tp_comm_overlap
        heads = compat.without_overlap(config)
        assert not heads.tp_comm_overlap
        assert config.tp_comm_overlap, "a copy"
        assert heads.fp8 == config.fp8
        assert compat.without_overlap(heads) is heads


@pytest.mark.parametrize("heads", [{}, {"heads__fp8": True}])
def test_the_models_heads_are_built_without_it(heads: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, whatever the heads' precision: the configuration that their layers are built from."""
    from mtp_megatron import future_heads
    from mtp_megatron.training.build import build_models, transformer_config
    from mtp_megatron.training.world import model_parallel_world

    one = {"parallel__tensor": 1, "parallel__sequence_parallel": False, "parallel__tp_comm_overlap": False}
    recipe = recipe_of(**one, train__transformer_engine=False)
    seen = []
    build = future_heads.build_heads

    def watched(config: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(config)
        return build(config, *args, **kwargs)

    monkeypatch.setattr(future_heads, "build_heads", watched)
    with model_parallel_world(recipe):
        config = transformer_config(recipe)
        config.tp_comm_overlap = True
        (model,) = build_models(recipe, config)
        if heads:  # refused without FP8 in the trunk: the branch itself
            assert compat.without_overlap(model.config) is not model.config
    assert [config.tp_comm_overlap for config in seen] == [False]
    assert model.config.tp_comm_overlap


class Engine(types.ModuleType):
    """``transformer_engine.pytorch.module.base``, as far as buffers go."""

    class UserBufferQuantizationMode(Enum):
        NONE = "none"
        FP8 = "fp8"

    def __init__(self) -> None:
        super().__init__("transformer_engine.pytorch.module.base")
        self.calls: list[Any] = []

    def initialize_ub(self, **kwargs: Any) -> None:
        self.calls.append(kwargs)

    def destroy_ub(self) -> None:
        self.calls.append("destroyed")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    stub = Engine()
    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(sys.modules[names[-1]], "base", stub, raising=False)
    return stub


@pytest.mark.parametrize(
    ("overrides", "tokens", "modes"),
    [
        ({}, 32, ["none"]),
        ({"train__micro_batch_size": 2, "model__seq_length": 64}, 128, ["none"]),
        ({"train__micro_batch_size": 2, "parallel__context": 2}, 32, ["none"]),
        (FP8, 32, ["fp8"]),
        ({**FP8, "train__first_last_layers_bf16": True}, 32, ["fp8", "none"]),
    ],
)
def test_the_buffers_are_those_of_a_microbatch(
    engine: Engine, overrides: dict[str, Any], tokens: int, modes: list[str]
) -> None:
    from mtp_megatron.training.build import overlapped_communication

    tree = tiny_tree(Path("data"), Path("run"), **OVERLAP | overrides)
    recipe = check_recipe(parse_recipe(tree), world_size=4, tokenizer_vocab_size=257)
    with overlapped_communication(recipe):
        (call,) = engine.calls
        assert call["shape"] == [tokens, 32], "of all tensor parallel ranks together"
        assert (call["tp_size"], call["dtype"], call["bootstrap_backend"]) == (2, torch.bfloat16, "nccl")
        assert [mode.value for mode in call["quantization_modes"]] == modes
    assert engine.calls[1:] == ["destroyed"]


def test_without_it_nothing_is_allocated_or_imported(engine: Engine) -> None:
    from mtp_megatron.training.build import overlapped_communication

    with overlapped_communication(recipe_of(parallel__tp_comm_overlap=False)):
        assert not engine.calls
    assert not engine.calls


def test_a_run_that_fails_gives_them_back(engine: Engine) -> None:
    from mtp_megatron.training.build import overlapped_communication

    with pytest.raises(RuntimeError, match="lost"), overlapped_communication(recipe_of()):
        raise RuntimeError("lost")
    assert engine.calls[-1] == "destroyed"


def test_where_others_may_still_write_to_them_they_are_left_to_the_end_of_the_process(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtp_megatron.training import build

    monkeypatch.setattr(build, "waits_for_others", lambda: True)
    with pytest.raises(RuntimeError, match="lost"), build.overlapped_communication(recipe_of()):
        raise RuntimeError("lost")
    assert len(engine.calls) == 1
    with build.overlapped_communication(recipe_of()):
        pass
    assert engine.calls[-1] == "destroyed", "all ranks have come to the end"


def test_a_failure_half_way_leaves_none_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine would refuse to begin again: "UB communicators are already initialized"."""
    from mtp_megatron.training.build import overlapped_communication

    def fail(**kwargs: Any) -> None:
        engine.calls.append(kwargs)
        raise RuntimeError("no multicast")

    monkeypatch.setattr(engine, "initialize_ub", fail)
    with pytest.raises(RuntimeError, match="no multicast"), overlapped_communication(recipe_of()):
        pass
    assert engine.calls[1:] == ["destroyed"]


def test_an_old_transformer_engine_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_megatron.training.build import overlapped_communication

    monkeypatch.delattr(Engine, "UserBufferQuantizationMode")
    with pytest.raises(EnvironmentUnsupported, match=r"2\.7"), overlapped_communication(recipe_of()):
        pass


def test_the_loop_enters_it_before_it_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from contextlib import contextmanager

    from mtp_megatron.training import loop
    from tests.training_runs import make_data

    events = []

    @contextmanager
    def overlapped(recipe: Recipe) -> Iterator[None]:
        events.append(torch.distributed.is_initialized())
        yield
        events.append("ended")

    class Session:
        def __init__(self, *args: Any) -> None:
            events.append("built")

        def run(self) -> str:
            return "outcome"

    monkeypatch.setattr(loop, "overlapped_communication", overlapped)
    monkeypatch.setattr(loop, "_Session", Session)
    assert loop.train(parse_recipe(tiny_tree(make_data(tmp_path), tmp_path / "run"))) == "outcome"
    assert events == [True, "built", "ended"]
