"""Loss, accuracy and all gradients of every layout against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mtp_megatron.reference import reference_loss
from mtp_megatron.targets import context_positions
from tests.harness import run_world
from tests.parity import (
    Case,
    Step,
    assemble,
    assert_same_step,
    gradient_problems,
    make_batches,
    make_parameters,
    megatron_step,
    reference_step,
    step_body,
)

Z_LOSS = {"n": 3, "z_loss": 0.05}
LAYOUTS = {
    "one": Case(),
    "tp2": Case(world=2, tp=2),
    "tp2-sp": Case(world=2, tp=2, sequence_parallel=True),
    "pp2": Case(world=2, pp=2),
    "tp2-pp2-sp": Case(world=4, tp=2, pp=2, sequence_parallel=True),
    "dp2": Case(world=2),
    "tp4": Case(world=4, tp=4),
    "tp4-uneven": Case(world=4, tp=4, vocab_size=33, padded_vocab_size=64, heads=Z_LOSS),
    "pp4": Case(world=4, pp=4),
    "vpp": Case(world=2, pp=2, vp=2),
    "vpp-tp2": Case(world=4, tp=2, pp=2, vp=2),
    "dp2-tp2": Case(world=4, tp=2),
    "dp4": Case(world=4, heads=Z_LOSS),
    "dp2-pp2": Case(world=4, pp=2),
    "heads-alone": Case(world=2, pp=2, layout="Etttt|L"),
    "heads-alone-vpp": Case(world=2, pp=2, vp=2, layout="Et|t|tt|L"),
    "heads-on-both": Case(world=2, pp=2, layout="Ettttm|mmL"),  # more of those: test_heads_on_stages.py
    "cp2": Case(world=2, cp=2),
    "cp2-tp2-sp": Case(world=4, cp=2, tp=2, sequence_parallel=True),
    "cp2-pp2-tied": Case(world=4, cp=2, pp=2, tied=True),
    "cp2-dp2-overlap": Case(world=4, cp=2, overlap=True),
    "cp2-causal": Case(world=2, cp=2, heads={**Z_LOSS, "arrangement": "causal"}),
    "tied": Case(tied=True),
    "tied-tp2": Case(world=2, tp=2, tied=True, sequence_parallel=True),
    "tied-pp2": Case(world=2, pp=2, tied=True),
    "tied-tp2-pp2": Case(world=4, tp=2, pp=2, tied=True, heads=Z_LOSS),
    "tied-vpp": Case(world=2, pp=2, vp=2, tied=True),
    "overlap-dp2": Case(world=2, overlap=True),
    "overlap-dp2-pp2": Case(world=4, pp=2, overlap=True),
    "overlap-tied-dp2-pp2": Case(world=4, pp=2, overlap=True, tied=True),
    "loss-scale": Case(world=2, pp=2, loss_scale=2.0**16, heads=Z_LOSS),
    "chunks": Case(world=2, tp=2, heads={**Z_LOSS, "loss_chunk_tokens": 5}),
    "recompute-full": Case(
        world=2,
        tp=2,
        config={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "recompute-selective": Case(world=2, pp=2, config={"recompute_granularity": "selective"}),
    "joint": Case(world=2, tp=2, heads={**Z_LOSS, "execution": "joint"}),
    "n1": Case(world=2, pp=2, heads={"n": 1}),
    "n8": Case(world=2, tp=2, heads={"n": 8}),
    "n15": Case(heads={"n": 15}),
    "linear": Case(world=2, tp=2, sequence_parallel=True, heads={"n": 3, "kind": "linear"}),
    "linear-pp2": Case(world=2, pp=2, heads={**Z_LOSS, "kind": "linear"}),
    "medusa": Case(world=4, tp=2, pp=2, heads={"n": 3, "kind": "medusa"}),
    "medusa-sp": Case(world=2, tp=2, sequence_parallel=True, heads={**Z_LOSS, "kind": "medusa"}),
    "causal": Case(world=4, tp=2, pp=2, heads={"n": 3, "arrangement": "causal"}),
    "anticausal": Case(world=2, tp=2, sequence_parallel=True, heads={"n": 3, "arrangement": "anticausal"}),
    "anticausal-pp2": Case(world=2, pp=2, heads={"n": 3, "arrangement": "anticausal"}),
    "replicated": Case(world=2, tp=2, heads={**Z_LOSS, "unembedding": "replicated"}),
    "replicated-tied-pp": Case(world=2, pp=2, tied=True, heads={"n": 3, "unembedding": "replicated"}),
    "weights": Case(world=2, pp=2, heads={**Z_LOSS, "loss_decay": 0.6}),
    "weights-zero": Case(world=2, overlap=True, heads={**Z_LOSS, "loss_weights": [1.0, 0.0, 0.5]}),
    "causal-zero-tail": Case(
        world=2, overlap=True, heads={"n": 3, "arrangement": "causal", "loss_weights": [1.0, 0.5, 0.0]}
    ),
    "anticausal-zero-mid": Case(heads={"n": 3, "arrangement": "anticausal", "loss_weights": [1.0, 0.0, 0.5]}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_reference(name: str) -> None:
    case = LAYOUTS[name]
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-5)


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "vpp", "tied-pp2", "dp2", "causal", "medusa-sp"])
def test_fp64_equals_reference_to_machine_precision(name: str) -> None:
    case = replace(LAYOUTS[name], dtype=torch.float64)
    parameters = make_parameters(case)
    assert_same_step(megatron_step(case, parameters), reference_step(case, parameters), 1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "loss_scale"),
    [
        ("one", torch.bfloat16, 1.0),
        ("tp2-sp", torch.bfloat16, 1.0),
        ("pp2", torch.bfloat16, 1.0),
        ("heads-on-both", torch.bfloat16, 1.0),
        ("n8", torch.bfloat16, 1.0),
        ("tp2-sp", torch.float16, 2.0**6),
        ("pp2", torch.float16, 2.0**6),
    ],
)
def test_half_precision_loses_no_more_than_plain_half_precision(
    name: str, dtype: torch.dtype, loss_scale: float
) -> None:
    """The yardstick is the oracle itself run in that type: both are compared with it in fp32, tensor by tensor."""
    case = replace(LAYOUTS[name], dtype=dtype, loss_scale=loss_scale)
    parameters = make_parameters(case)
    exact = reference_step(case, {key: value.float() for key, value in parameters.items()})
    plain, got = reference_step(case, parameters), megatron_step(case, parameters)
    ratios = {
        key: distance(got.gradients[key][: right.shape[0]], right) / distance(plain.gradients[key], right)
        for key, right in exact.gradients.items()
    }
    assert sorted(ratios.values())[len(ratios) // 2] <= 1.0
    assert max(ratios.values()) <= 2.0, max(ratios.items(), key=lambda item: item[1])  # single tensors scatter
    assert distance(got.loss_sum, exact.loss_sum) <= distance(plain.loss_sum, exact.loss_sum) + 1e-3


def distance(value: torch.Tensor, right: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((value.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


def _roll_targets(chunks: list) -> None:
    """Megatron's own way of making future targets, which wraps around and crosses documents."""
    for chunk in chunks:
        loss = chunk.future_heads_loss
        chunk.future_heads_loss = lambda z, t, kw, loss=loss, **more: loss(
            z, torch.stack([t[0].roll(-i, -1) for i in range(t.shape[0])]), kw, **more
        )


def _drop_a_head_gradient(chunks: list) -> None:
    for chunk in chunks:
        if chunk.post_process:
            chunk.set_head_weights((1.0, 0.0, 1.0))


def _stop_at_z(chunks: list) -> None:
    for chunk in chunks:
        if chunk.post_process:
            chunk.heads_config = chunk.heads_config.model_copy(update={"trainable": "heads"})


def _count_locally(chunks: list) -> None:
    """Normalise by this rank's own count of tokens, as in Megatron-LM#7452."""
    from megatron.core.distributed import finalize_model_grads

    config = chunks[0].config

    def finalize(model: list, num_tokens: torch.Tensor | None = None, **kwargs: object) -> None:
        for chunk in model:
            chunk.scale_gradients(1.0 / num_tokens / torch.distributed.get_world_size())
        finalize_model_grads(model, None, **kwargs)

    config.finalize_model_grads_func = finalize


@pytest.mark.parametrize(
    ("mutate", "suspect"),
    [
        (_roll_targets, "heads.1."),
        (_drop_a_head_gradient, "heads.1."),
        (_stop_at_z, "decoder.layers."),
        (_count_locally, "decoder.layers."),
    ],
)
def test_the_comparison_can_fail(mutate: Callable, suspect: str) -> None:
    """Controls: what others shipped by mistake must not pass."""
    case = LAYOUTS["dp2"]
    parameters = make_parameters(case)
    want = reference_step(case, parameters)
    got = megatron_step(case, parameters, mutate, idle_heads_are_checked=False)
    problems = gradient_problems(got, want, 1e-3)
    assert any(problem.startswith(suspect) for problem in problems), problems


LEGACY = {
    "pp2": Case(world=2, pp=2),
    "dp2": Case(world=2),  # one rank's microbatches have far fewer targets than the other's
    "dp2-tp2-sp": Case(world=4, tp=2, sequence_parallel=True),
    "cp2": Case(world=2, cp=2, heads=Z_LOSS),
}


def legacy_step(case: Case, parameters: dict[str, torch.Tensor]) -> Step:
    """What Megatron makes of a global batch without `calculate_per_token_loss`: each microbatch's sum is divided by its
    own count of targets, under context parallelism by that of the rank's share, and the quotients are averaged."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    batches = make_batches(case, parameters)
    total = torch.zeros(())
    for tokens, targets in batches:
        for rank in range(case.cp):
            share = targets
            if case.cp > 1:
                positions = context_positions(targets.shape[-1], case.cp, rank)
                share = torch.full_like(targets, -100).index_copy(-1, positions, targets[..., positions])
            result = reference_loss(leaves, case.reference_config(), tokens, share)
            total = total + result.total / result.tokens[0].clamp_min(1) / (len(batches) * case.cp)
    total.backward()
    want = reference_step(case, parameters)
    want.gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return want


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_mean_over_microbatches(name: str) -> None:
    case = replace(LEGACY[name], per_token_loss=False)
    parameters = make_parameters(case)
    got = megatron_step(case, parameters)
    assert_same_step(got, legacy_step(case, parameters), 1e-5)
    # Control: the mean over all targets is another one.
    assert len(gradient_problems(got, reference_step(case, parameters), 1e-2)) > len(parameters) / 2


@pytest.mark.parametrize("per_token_loss", [True, False])
def test_a_global_batch_without_a_target_has_zero_gradients(per_token_loss: bool) -> None:
    """Megatron divides by at least one token; so does nobody find a NaN."""
    case = Case(world=2, pp=2, per_token_loss=per_token_loss)
    parameters = make_parameters(case)
    batches = [(tokens, torch.full_like(targets, -100)) for tokens, targets in make_batches(case, parameters)]
    step = assemble(case, run_world(step_body, case.world, case, parameters, batches, None))
    assert step.normalizer == 0
    assert step.loss_sum.tolist() == [0.0] * 3
    assert all(gradient.eq(0).all() for gradient in step.gradients.values())
