"""Training a part of the model: what learns has the oracle's gradient, what is frozen has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity import Case, Step, gradient_problems, make_parameters, megatron_step, reference_step

CASES = {
    "heads": Case(world=2, tp=2, heads={"n": 3, "trainable": "heads"}),
    "heads-pp2-overlap": Case(world=4, pp=2, overlap=True, heads={"n": 3, "trainable": "heads"}),
    "heads-tied-pp2": Case(world=2, pp=2, tied=True, heads={"n": 3, "trainable": "heads"}),
    "heads-joint": Case(world=2, pp=2, heads={"n": 3, "trainable": "heads", "execution": "joint"}),
    "new-heads": Case(world=2, tp=2, sequence_parallel=True, heads={"n": 3, "trainable": "new_heads"}),
    "new-heads-pp2": Case(world=2, pp=2, heads={"n": 3, "trainable": "new_heads"}),
    "new-heads-medusa": Case(heads={"n": 3, "trainable": "new_heads", "kind": "medusa"}),
    "new-heads-replicated": Case(heads={"n": 3, "trainable": "new_heads", "unembedding": "replicated"}),
    "new-heads-causal": Case(heads={"n": 3, "trainable": "new_heads", "arrangement": "causal"}),
}


def learns(name: str, case: Case) -> bool:
    if case.heads["trainable"] == "new_heads":
        return name.startswith(("heads.1.", "heads.2.", "unembedding_heads."))
    return name.startswith(("heads.", "final_norm.")) or (name == "output_layer.weight" and not case.tied)


@pytest.mark.parametrize("name", CASES)
def test_only_the_trainable_part_gets_the_reference_gradient(name: str) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    assert_trains_its_part(case, megatron_step(case, parameters), reference_step(case, parameters))


def _lose_a_head(chunks: list) -> None:
    for chunk in chunks:
        chunk.set_head_weights((1.0, 0.0, 1.0))


def test_the_comparison_can_fail() -> None:
    """Controls: a trunk that is not frozen, a head whose gradient is lost."""
    case = CASES["heads"]
    parameters = make_parameters(case)
    thawed = megatron_step(replace(case, heads={"n": 3}), parameters)
    with pytest.raises(AssertionError, match="has a gradient"):
        assert_trains_its_part(case, thawed, reference_step(case, parameters))
    lossy = megatron_step(case, parameters, _lose_a_head, idle_heads_are_checked=False)
    with pytest.raises(AssertionError, match=r"heads\.1\..*: off by"):
        assert_trains_its_part(case, lossy, reference_step(case, parameters))


def assert_trains_its_part(case: Case, got: Step, want: Step) -> None:
    frozen = {key for key in want.gradients if not learns(key, case)}
    assert frozen
    assert frozen != set(want.gradients)
    for key in frozen:
        assert got.gradients.pop(key).isnan().all(), f"{key} has a gradient"
        del want.gradients[key]
    problems = gradient_problems(got, want, 1e-5)
    assert not problems, "\n".join(problems)
    assert got.correct.tolist() == want.correct.tolist()
