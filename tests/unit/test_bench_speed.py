"""bench_step and bench_loss at small sizes: they run, count right, and compare like with like. No times here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import bench_loss
import bench_step
from bench.losses import AUTOGRAD, CCE, LIGER, RAW, RAW_COMPILED, RAW_TORCH, UNFUSED, CompiledSoftmax
from bench.models import Shape
from bench.worlds import alone

from mtp_megatron.config import HeadsConfig
from mtp_megatron.loss import VocabShard, linear_cross_entropy

SMALL = Shape(hidden=64, ffn=96, attention_heads=2, vocab=320, sequence=16, batch=2)


def test_no_heads_forward_runs_twice() -> None:
    with alone() as device:
        step, layers = bench_step.heads_step(SMALL, 5, HeadsConfig(n=4), device)
        assert len(layers) == 4
        assert bench_step.count_forwards(step, layers) == [1, 1, 1, 1]
        assert bench_step.count_forwards(lambda: (step(), step()), layers) == [2, 2, 2, 2]  # the counter counts


@pytest.mark.parametrize("n", [1, 2, 4])
def test_flops_of_the_real_step_equal_the_formula(n: int) -> None:
    """So nothing is computed twice anywhere, the unembedding included."""
    with alone() as device:
        step, _ = bench_step.heads_step(SMALL, 5, HeadsConfig(n=n), device)
        assert bench_step.count_flops(step) == bench_step.expected_flops(SMALL, 5, n)


def test_flops_of_the_models_that_are_compared_with() -> None:
    with alone() as device:
        base = bench_step.base_step(SMALL, 5, device)
        joint, _ = bench_step.heads_step(SMALL, 5, HeadsConfig(n=4, execution="joint"), device)
        assert bench_step.count_flops(base) == bench_step.expected_flops(SMALL, 5, 1)
        assert bench_step.count_flops(joint) == bench_step.expected_flops(SMALL, 5, 4)


def test_models_have_the_same_parameters() -> None:
    from bench.models import megatron_model, mtp_model

    with alone() as device:
        sizes = {sum(p.numel() for p in megatron_model(SMALL, 5, 0, device).parameters())}
        for n in (1, 2, 4):
            model = mtp_model(SMALL, 5 - n, HeadsConfig(n=n), device)
            sizes.add(sum(parameter.numel() for parameter in model.parameters()))
    assert len(sizes) == 1


def test_bench_step_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    assert bench_step.main(["--quick", "--layers", "5", "--heads", "2", "4", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in rows] == [bench_step.BASE, "n=2", "n=4"]
    assert rows[2]["head_forwards"] == [1, 1, 1, 1]
    assert all(row["gflop"] == pytest.approx(row["formula"]) for row in rows)
    assert "| n=4 " in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 2])
def test_bench_loss_compares_the_same_gradients(size: int, tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    only = [AUTOGRAD, RAW, RAW_TORCH, RAW_COMPILED, UNFUSED, LIGER, CCE]
    assert bench_loss.main(["--quick", "--repeats", "1", "--tp", str(size), "--json", str(path), "--only", *only]) == 0
    rows = {row["rival"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == only
    for ours in (AUTOGRAD, RAW):
        assert rows[ours]["error"] < 1e-5
        assert len(rows[ours]["wall"]) == 1
    assert rows[RAW]["peak_mib"] < rows[AUTOGRAD]["peak_mib"] < 1.2 * rows[UNFUSED]["peak_mib"]
    if not torch.cuda.is_available():
        for absent in (LIGER, CCE):
            assert rows[absent]["note"].startswith("not available on this device")
            assert "seconds" not in rows[absent]
        for same in (RAW_TORCH, RAW_COMPILED):
            assert rows[same]["note"].endswith("softmax is torch's here (no CUDA device)")


def test_the_softmax_to_be_compiled_is_the_loss() -> None:
    """The formulas alone; compiling them takes longer than it tells."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (30,), generator=generator)
    targets[::5] = -100
    results = []
    with torch.compiler.set_stance("force_eager"):
        for softmax in (None, CompiledSoftmax):
            weight_grad = torch.zeros_like(weight)
            sums, hidden_grad = linear_cross_entropy(
                *(hidden, weight, targets, VocabShard.of(50, 50, None)),
                grad_scale=torch.tensor(0.5),
                weight_grad=weight_grad,
                chunk_tokens=16,
                predictions=True,
                softmax=softmax,
            )
            results.append((sums.loss, sums.correct, sums.predictions, hidden_grad, weight_grad))
    torch.testing.assert_close(results[1], results[0])
