"""What is for a GPU (tests/gpu, tools/gpu_*.py), without one: that it runs with the real Transformer Engine.

``blockwise``, ``mxfp8`` and NVFP4 have no stand-in for their casts, and synchronisation is CUDA's to see.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fp8_runs import linear_layers
from tests.gpu import test_documents as documents_tests
from tests.gpu import test_fp8 as fp8_tests
from tests.gpu import test_resume as resume_tests
from tests.gpu import test_transformer_engine as modules_tests
from tests.transformer_engine.loops import initialise_as_on_a_gpu
from tests.transformer_engine.runs import TENSORWISE, built, heads_alone, microbatch, recipe_of, relative, whole_pass
from tests.unit.test_no_synchronisation import Reads

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_on_a_gpu(pretend_gpu: Callable[..., None]) -> Iterator[None]:
    pretend_gpu()
    with pytest.MonkeyPatch.context() as monkeypatch:
        initialise_as_on_a_gpu(monkeypatch)
        yield


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("name", ["delayed", "tensorwise"])
def test_learning(name: str, experts: bool) -> None:
    fp8_tests.test_the_trunk_learns_and_the_heads_stay_in_bf16(name, experts)


# Collected here as they are, without the mark that skips them where there is no GPU.
test_heads_in_fp8 = fp8_tests.test_heads_in_fp8_where_they_are_asked_for
test_fp8_parameters = fp8_tests.test_fp8_parameters_are_the_trunks
test_the_amax_history = fp8_tests.test_the_amax_history_advances_once_per_microbatch
test_adam_goes_on_where_it_was = resume_tests.test_adam_goes_on_where_it_was
test_experts = modules_tests.test_experts_together_are_those_one_after_the_other
test_documents = documents_tests.test_nothing_of_one_document_reaches_the_next


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_loss_curves(tools: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The curves of tools/gpu_fp8_curves.py, smaller."""
    import gpu_fp8_curves as curves
    from bench.worlds import alone

    found, left_out = curves.variants(fp8_heads=True)
    assert set(found) == {"bf16", "tensorwise", "delayed", "blockwise", "tensorwise, heads too"}
    assert [line.partition(":")[0] for line in left_out] == ["mxfp8", "nvfp4"]
    sizes = {"layers": 2, "hidden": 128, "sequence": 64, "batch": 8, "steps": 80}
    last = {}
    for name in ("bf16", "tensorwise", "delayed", "tensorwise, heads too"):
        with alone(1):
            run = curves.train(found[name], sizes)
        assert run["heads"] == ["torch.bfloat16"]
        first, last[name] = run["losses"][0][0], statistics.mean(losses[0] for losses in run["losses"][-20:])
        assert last[name] < 0.8 * first, "it learns"
        off = last[name] / last["bf16"] - 1
        with capsys.disabled():
            print(f"\n  {name}: {first:.3f} -> {last[name]:.4f}, {off:+.2%} of bf16's", end="")
        assert abs(off) < curves.EXPECTED
    assert len(set(last.values())) == 4, "control: they are four runs"


def test_the_last_stage(tools: None) -> None:
    from bench.models import Shape
    from bench.worlds import alone
    from bench_memory import DEFERRED, stage_step

    shape = Shape(64, 128, 2, 512, 64, 1, torch.bfloat16)
    with alone(1) as device:
        engine = stage_step(DEFERRED, 3, shape, None, device, transformer_engine=True)()
    with alone(1) as device:
        local = stage_step(DEFERRED, 3, shape, None, device)()
    assert relative(engine, local) < 0.02


@pytest.mark.parametrize("fp8", [{}, TENSORWISE | {"heads__fp8": True}], ids=["bf16", "fp8"])
def test_no_head_reads_a_value(fp8: dict[str, Any]) -> None:
    """Whose reads would make the host wait for a GPU (tests/gpu/test_synchronisation.py asks CUDA itself)."""
    recipe = recipe_of(**fp8)
    with built(recipe) as model:
        trunk = whole_pass(model, microbatch(recipe))
        with Reads() as reads:
            heads_alone(model, trunk)
        # Megatron's tracker compares the states of the host's own generator, which lie on the host.
        assert reads.names == ["_local_scalar_dense"] * recipe.heads.n
        assert len(linear_layers(model.heads)) == 4 * recipe.heads.n
