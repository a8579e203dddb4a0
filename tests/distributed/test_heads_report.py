"""The heads on Megatron's modules: when figures exist, what an error leaves, one forward each, memory flat in n.

Gradients are held against the oracle in `test_exactness.py`, the same contract on a toy in `unit/test_sequential*.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtp_megatron.reference import reference_loss
from mtp_megatron.targets import IGNORE_INDEX
from tests.harness import parallel, run_world
from tests.parity import Case, build_chunks, make_batches, make_parameters, run_schedule, wrap

CASES = {
    "one": Case(),
    "tp2-sp": Case(world=2, tp=2, sequence_parallel=True),
    "tp4-uneven": Case(world=4, tp=4, vocab_size=33, padded_vocab_size=64),
    "causal": Case(world=2, tp=2, heads={"n": 3, "arrangement": "causal"}),
    "anticausal": Case(
        world=2, tp=2, heads={"n": 3, "arrangement": "anticausal", "loss_chunk_tokens": 5, "z_loss": 0.05}
    ),
    "medusa": Case(world=2, tp=2, sequence_parallel=True, heads={"n": 3, "kind": "medusa"}),
    "replicated": Case(world=2, tp=2, heads={"n": 3, "unembedding": "replicated"}),
    "tied": Case(world=2, tp=2, tied=True),
    "weights": Case(world=2, tp=2, heads={"n": 3, "loss_weights": [1.0, 0.0, 0.5]}),
    "curriculum": Case(heads={"n": 3, "loss_decay": 0.5, "curriculum_steps": 10}),  # evaluation weighs all heads
}


class OneStage:
    """The whole model on this rank's TP shard, and one microbatch of it."""

    def __init__(self, case: Case, parameters: dict[str, torch.Tensor], batch: tuple) -> None:
        from mtp_megatron import compat

        _, (self.model,) = build_chunks(case, parameters)
        device = compat.device()
        self.tokens, self.targets = (tensor.to(device) for tensor in batch)
        self.positions = torch.arange(self.tokens.shape[1], device=device).expand_as(self.tokens)
        self.forwards = [0] * case.heads_config.n
        for head, layer in enumerate(self.model.heads):
            layer.register_forward_hook(lambda *_, head=head: self.count(head))

    def count(self, head: int) -> None:
        self.forwards[head] += 1

    def __call__(self) -> tuple[torch.Tensor, Any]:
        return self.model(self.tokens, self.positions, None, labels=self.targets)


def values(report: Any) -> dict[str, Any]:
    names = ("loss_sum", "correct", "tokens", "normalizer", "total", "predictions", "losses", "log_z_squared")
    return {
        name: value.detach().cpu().clone() if isinstance(value := getattr(report, name), torch.Tensor) else value
        for name in names
    }


# When figures exist ---------------------------------------------------------------------------------------------------


def _life_of_a_report(rank: int, world: int, case: Case, parameters: dict, batch: tuple) -> dict[str, Any]:
    with parallel(tp=case.tp):
        stage = OneStage(case, parameters, batch)
        loss, report = stage()
        found = {"forward": (float(loss), values(report), list(stage.forwards))}
        loss.backward()
        found["backward"] = (float(loss), values(report), list(stage.forwards))
        stage.model.keep_predictions = True
        with torch.no_grad():
            loss, report = stage()
        found["evaluation"] = (float(loss), values(report), list(stage.forwards))
        return found


@pytest.mark.parametrize("name", CASES)
def test_figures_exist_after_backward_or_at_once_in_evaluation(name: str) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    batch = make_batches(case, parameters)[0]
    want = reference_loss(parameters, case.reference_config(), *batch)
    weights = torch.tensor(case.heads_config.weights_at(0))
    ranks = run_world(_life_of_a_report, case.world, case, parameters, batch)
    for found in ranks:
        loss, report, forwards = found["forward"]
        assert torch.tensor(loss).isnan()
        assert all(report[figure].isnan().all() for figure in ("loss_sum", "correct", "total"))
        assert report["tokens"].tolist() == want.tokens.tolist()
        assert report["normalizer"] == want.tokens[0]
        assert not any(forwards)
        assert report["predictions"] is None
        assert report["losses"] is None

        loss, report, forwards = found["backward"]
        active = weights != 0
        torch.testing.assert_close(report["loss_sum"][active], want.loss_sum[active], rtol=1e-5, atol=0)
        assert report["correct"][active].tolist() == want.correct[active].tolist()
        assert report["loss_sum"][~active].isnan().all()
        torch.testing.assert_close(report["total"], (weights * want.loss_sum).sum(), rtol=1e-5, atol=0)
        # Once for each transformer layer; a Medusa block is applied once, head 1 has none. Nothing for a weight of 0.
        once = [int(case.heads.get("kind") != "medusa" or head > 0) for head in range(3)]
        assert forwards == [count * int(weight > 0) for count, weight in zip(once, weights, strict=True)]

        loss, report, after = found["evaluation"]
        plain = (torch.tensor(case.heads_config.base_weights()) * want.loss_sum).sum()
        torch.testing.assert_close(torch.tensor(loss), plain, rtol=1e-5, atol=0)
        if case.heads_config.z_loss:
            assert found["forward"][1]["log_z_squared"].isnan().all()
            for moment in ("backward", "evaluation"):
                z_losses = found[moment][1]["log_z_squared"]
                torch.testing.assert_close(z_losses, want.log_z_squared, rtol=1e-5, atol=0)
        else:
            assert report["log_z_squared"] is None
        torch.testing.assert_close(report["loss_sum"], want.loss_sum, rtol=1e-5, atol=0)
        assert report["correct"].tolist() == want.correct.tolist()
        assert torch.equal(report["predictions"], want.logits.argmax(-1))
        each = F.cross_entropy(want.logits.movedim(-1, 1), batch[1], ignore_index=IGNORE_INDEX, reduction="none")
        torch.testing.assert_close(report["losses"], each, rtol=1e-5, atol=1e-6)
        assert [b - a for a, b in zip(forwards, after, strict=True)] == once
    for figure in ("loss_sum", "correct", "predictions", "losses"):
        assert all(torch.equal(found["evaluation"][1][figure], ranks[0]["evaluation"][1][figure]) for found in ranks)


def _through_the_schedule(rank: int, world: int, case: Case, parameters: dict, batches: list) -> dict[str, Any]:
    with parallel(case.tp, case.pp, case.vp, case.cp):
        config, chunks = build_chunks(case, parameters)
        model = wrap(case, config, chunks)
        training: list = []
        run_schedule(case, config, model, batches, training)
        evaluation: list = []
        with torch.no_grad():
            run_schedule(case, config, model, batches, evaluation, forward_only=True)
        return {"training": [values(r) for r in training], "evaluation": [values(r) for r in evaluation]}


@pytest.mark.parametrize("layout", [{"world": 2, "pp": 2}, {"world": 2, "pp": 2, "vp": 2}], ids=["pp2", "vpp"])
def test_evaluation_by_a_schedule_finds_what_training_found(layout: dict) -> None:
    """Also for the microbatch that has no target at all."""
    case = Case(**layout)
    parameters = make_parameters(case)
    batches = make_batches(case, parameters)
    *others, last = run_world(_through_the_schedule, case.world, case, parameters, batches)
    assert not any(found["training"] or found["evaluation"] for found in others)
    assert len(last["training"]) == len(batches)
    for trained, evaluated, batch in zip(last["training"], last["evaluation"], batches, strict=True):
        torch.testing.assert_close(trained["loss_sum"], evaluated["loss_sum"], rtol=1e-6, atol=0)
        assert torch.equal(trained["correct"], evaluated["correct"])
        want = reference_loss(parameters, case.reference_config(), *batch)
        torch.testing.assert_close(trained["loss_sum"], want.loss_sum, rtol=1e-5, atol=0)
    assert any((batch[1] == IGNORE_INDEX).all() for batch in batches)


# Errors ---------------------------------------------------------------------------------------------------------------


def _break_head_2(rank: int, world: int, case: Case, parameters: dict, batch: tuple, phase: str) -> dict[str, Any]:
    def fail(*_: Any) -> None:
        raise ArithmeticError("boom")

    with parallel(tp=case.tp):
        stage = OneStage(case, parameters, batch)
        layer = stage.model.heads[1]
        if phase == "backward":
            layer.mlp.register_full_backward_hook(fail)
        else:
            layer.mlp.register_forward_hook(fail)
        stage.model.keep_predictions = True
        report: Any = None
        with torch.set_grad_enabled(phase != "evaluation"):

            def keep(*args: Any, **kwargs: Any) -> Any:
                nonlocal report
                report = empty(*args, **kwargs)
                return report

            from mtp_megatron import model as module

            empty = module.HeadReport.empty
            module.HeadReport.empty = keep
            try:
                stage()[0].backward()
            except ArithmeticError as error:
                return {"notes": error.__notes__, "report": values(report), "forwards": stage.forwards}
            finally:
                module.HeadReport.empty = empty
    return {}


@pytest.mark.parametrize("phase", ["forward", "backward", "evaluation"])
def test_error_names_the_head_and_leaves_no_half_report(phase: str) -> None:
    case = CASES["tp2-sp"]
    parameters = make_parameters(case)
    batch = make_batches(case, parameters)[0]
    for found in run_world(_break_head_2, 2, case, parameters, batch, phase):
        assert found["notes"] == [f"in the {phase} of head 2 of 3 (deferred sequential heads)"]
        assert found["forwards"][0] == 1  # head 1 had run, and its figures had been recorded
        assert all(found["report"][figure].isnan().all() for figure in ("loss_sum", "correct", "total"))
        if phase == "evaluation":
            assert (found["report"]["predictions"] == IGNORE_INDEX).all()


def _misuse(rank: int, world: int, case: Case, parameters: dict, batch: tuple) -> list[str]:
    messages = []
    with parallel():
        stage = OneStage(case, parameters, batch)
        loss, _ = stage()
        loss.backward(retain_graph=True)
        for misuse in (
            loss.backward,
            lambda: stage.model(stage.tokens, stage.positions, None, labels=stage.targets[0]),
            lambda: stage.model(stage.tokens, stage.positions, None, labels=stage.targets[:2]),
            lambda: stage.model.set_head_weights((1.0, 0.5)),
        ):
            try:
                misuse()
            except (RuntimeError, ValueError) as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_misuse_is_refused_by_name() -> None:
    case = Case()
    parameters = make_parameters(case)
    (messages,) = run_world(_misuse, 1, case, parameters, make_batches(case, parameters)[0])
    assert len(messages) == 4
    twice, flat, few, weights = messages
    assert "a second time: their gradients were delivered" in twice
    assert "(2, 12), but 3 heads need targets [n=3, batch, sequence]" in flat
    assert "(2, 2, 12), but 3 heads" in few
    assert weights.startswith("ConfigError: heads.weights=(1.0, 0.5): 2 for 3 heads")


# Memory ---------------------------------------------------------------------------------------------------------------


def _peak(rank: int, world: int, cases: list[Case], parameters: list[dict], batches: list[tuple]) -> list[int]:
    from tools.bench.memory import live_peak

    peaks = []
    with parallel(tp=2):
        for case, values_, batch in zip(cases, parameters, batches, strict=True):
            stage = OneStage(case, values_, batch)
            for parameter in stage.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            z = torch.randn(case.sequence // 2, case.batch, 32, requires_grad=True)
            z.grad = torch.zeros_like(z)
            rotary = stage.model.rotary_pos_emb(case.sequence)
            kwargs = {"attention_mask": None, "rotary_pos_emb": rotary}
            work = lambda: stage.model.future_heads_loss(z, stage.targets, kwargs)[0].backward()  # noqa: E731, B023
            peaks.append(live_peak(work))
    return peaks


def test_memory_of_the_heads_is_flat_in_their_number() -> None:
    base = Case(world=2, tp=2, sequence_parallel=True, sequence=64, vocab_size=500, padded_vocab_size=512)
    cases = [replace(base, heads={"n": n, "execution": how}) for how in ("deferred", "joint") for n in (1, 8)]
    parameters = [make_parameters(case) for case in cases]
    batches = [make_batches(case, values_)[0] for case, values_ in zip(cases, parameters, strict=True)]
    for one, eight, joint_one, joint_eight in run_world(_peak, 2, cases, parameters, batches):
        assert eight <= 1.05 * one
        assert joint_eight > 4 * joint_one  # the control
        assert eight < joint_eight / 8
