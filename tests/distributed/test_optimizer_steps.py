"""Parameters after several optimizer steps against the oracle trained by torch's own Adam and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_world
from tests.parity import (
    Batch,
    Case,
    build_chunks,
    finalize_with_heads,
    make_batches,
    make_parameters,
    named_shards,
    reference_step,
    run_schedule,
    wrap,
)

STEPS, RATE, CLIP, EPSILON = 3, 1e-2, 0.5, 1e-3

CASES = {
    "dp2": Case(world=2),
    "distributed-optimizer": Case(world=2, distributed_optimizer=True),
    "distributed-optimizer-overlap": Case(world=2, distributed_optimizer=True, overlap=True),
    "distributed-optimizer-overlap-pp2-tied": Case(world=4, pp=2, distributed_optimizer=True, overlap=True, tied=True),
    "distributed-optimizer-vpp": Case(world=4, pp=2, vp=2, distributed_optimizer=True, overlap=True),
    "distributed-optimizer-tp2-sp": Case(world=4, tp=2, sequence_parallel=True, distributed_optimizer=True),
    "tied-tp2": Case(world=2, tp=2, tied=True),
    "causal-overlap": Case(
        world=2, distributed_optimizer=True, overlap=True, heads={"n": 3, "arrangement": "causal", "loss_decay": 0.5}
    ),
    "spread": Case(
        world=4, pp=2, layout="Ettttm|mmL", distributed_optimizer=True, overlap=True, heads={"n": 3, "kind": "medusa"}
    ),
    "spread-tied-vpp": Case(
        world=4, pp=2, vp=2, layout="Ett|ttm|m|mL", distributed_optimizer=True, overlap=True, tied=True
    ),
    "replicated": Case(world=2, pp=2, tied=True, heads={"n": 3, "unembedding": "replicated"}),
}


@pytest.mark.parametrize("name", CASES)
def test_trained_parameters_equal_the_oracle(name: str) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    ranks = run_world(_train_body, case.world, case, parameters, make_batches(case, parameters))
    assert_trained_alike(ranks, *train_reference(case, parameters))


def test_the_comparison_can_fail() -> None:
    """Controls: targets given to the wrong heads; one tensor off by a thousandth."""
    case = CASES["distributed-optimizer"]
    parameters = make_parameters(case)
    batches = make_batches(case, parameters)
    want = train_reference(case, parameters)
    rolled = [(tokens, targets.roll(1, 0)) for tokens, targets in batches]
    mixed_up = run_world(_train_body, case.world, case, parameters, rolled)
    with pytest.raises(AssertionError, match="comparison failed"):
        assert_trained_alike(mixed_up, *want)
    ranks = run_world(_train_body, case.world, case, parameters, batches)
    nudged = {**want[0], "final_norm.weight": want[0]["final_norm.weight"] * 1.001}
    with pytest.raises(AssertionError, match=r"final_norm\.weight"):
        assert_trained_alike(ranks, nudged, want[1])


def assert_trained_alike(ranks: list[Any], want: dict[str, torch.Tensor], want_norms: list[float]) -> None:
    """What every rank holds after training, beside the oracle's parameters and gradient norms."""
    for norms, shards in ranks:
        assert norms == pytest.approx(want_norms, rel=1e-5)
        for key, index, value in shards:
            whole = want[key]
            padded = torch.full(value.shape, torch.nan)
            expected = whole[index]
            padded[: expected.shape[0]] = expected
            rows = expected.shape[0]  # vocabulary padding has no counterpart
            torch.testing.assert_close(
                value[:rows], padded[:rows], rtol=1e-5, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def train_reference(case: Case, parameters: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[float]]:
    current = {name: tensor.clone() for name, tensor in parameters.items()}
    optimizer = torch.optim.Adam(list(current.values()), lr=RATE, eps=EPSILON)
    batches = make_batches(case, parameters)
    norms = []
    for _ in range(STEPS):
        for name, gradient in reference_step(case, current, batches).gradients.items():
            current[name].grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(current.values()), CLIP)))
        optimizer.step()
    return current, norms


def _train_body(rank: int, world: int, case: Case, parameters: dict, batches: list[Batch]) -> tuple[list[float], Any]:
    with case.parallel():
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config, chunks = build_chunks(case, parameters)
        model = wrap(case, config, chunks)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=RATE,
                adam_beta1=0.9,
                adam_beta2=0.999,
                adam_eps=EPSILON,
                weight_decay=0.0,
                clip_grad=CLIP,
                use_distributed_optimizer=case.distributed_optimizer,
                overlap_param_gather=case.overlap and case.distributed_optimizer,
            ),
            model,
        )
        finalize_with_heads(case, config, chunks)
        config.grad_scale_func = optimizer.scale_loss
        if case.overlap and case.distributed_optimizer:
            starts = [chunk.start_param_sync for chunk in model]
            config.param_sync_func = starts if len(model) > 1 else starts[0]
        norms = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            run_schedule(case, config, model, batches, [])
            ok, norm, _ = optimizer.step()
            assert ok
            norms.append(float(norm))
        if case.overlap and case.distributed_optimizer:
            for chunk in model:
                chunk.disable_forward_pre_hook()  # gathers the parameters of the last step
        shards = [(name, index, shard.data.detach().cpu().clone()) for name, index, shard in named_shards(chunks)]
        return norms, shards
