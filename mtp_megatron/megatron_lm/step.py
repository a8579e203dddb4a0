"""Forward step and loss function for Megatron-LM's schedules, with every head's loss beside its ``lm loss``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from mtp_megatron.config import HeadsConfig
from mtp_megatron.megatron_lm.arguments import heads_from_args
from mtp_megatron.megatron_lm.batch import get_batch
from mtp_megatron.sequential import HeadReport

stimer = StragglerDetector()


class HeadLosses(Mapping[str, Tensor]):
    """What Megatron-LM averages and logs of one microbatch: name -> ``[2]`` loss sum and count of targets.

    The sums exist only after the backward pass, so each value is put together when it is read; Megatron-LM reads them
    when its schedule is through. ``lm loss`` is head 1's. In training a head of weight 0 is not computed and not named.
    With a z-loss, its values without the weight follow: they are no part of the losses.
    """

    def __init__(self, report: HeadReport, training: bool) -> None:
        self._report = report
        computed = [head for head, weight in enumerate(report.weights) if weight or not training]
        self._sums = {"lm loss" if head == 0 else f"head {head + 1} loss": (report.loss_sum, head) for head in computed}
        if report.log_z_squared is not None:
            self._sums |= {f"head {head + 1} z loss": (report.log_z_squared, head) for head in computed}

    def __getitem__(self, name: str) -> Tensor:
        sums, head = self._sums[name]
        return torch.stack([sums[head].float(), self._report.tokens[head].float()])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def loss_func(output: tuple[Tensor, HeadReport]) -> tuple[Tensor, Tensor, HeadLosses]:
    """Loss sum, its count of tokens, and what is logged; for the last stage's output.

    The count is head 1's: Megatron-LM divides by it, of this microbatch or with ``--calculate-per-token-loss`` of the
    global batch, so that all heads are normalised alike and one head alone trains as Megatron-LM's own loss does.
    """
    loss, report = output
    args = get_args()
    if loss.requires_grad and (args.check_for_nan_in_loss_and_grad or getattr(args, "check_for_spiky_loss", False)):
        _after_backward(loss, partial(_validate, report))
    # The schedule scales the loss in place: it must not be the autograd function's own output.
    return loss.clone(), report.normalizer.to(torch.int), HeadLosses(report, training=loss.requires_grad)


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """One microbatch through one stage: its output, and the loss function for it."""
    args, timers = get_args(), get_timers()
    heads = heads_from_args(args)
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(data_iterator, heads, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    if model.training and heads.curriculum_steps is not None:
        _follow_curriculum(model, heads, args.curr_iteration)
    with stimer:
        output = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.targets)
    return output, loss_func


def _follow_curriculum(model: torch.nn.Module, heads: HeadsConfig, step: int) -> None:
    stage: Any = get_attr_wrapped_model(model, "set_head_weights", return_model_obj=True)
    if stage.post_process:
        stage.set_head_weights(heads.weights_at(step))


def _after_backward(loss: Tensor, check: Callable[[], None]) -> None:
    """Call ``check`` when the heads have run: the loss has no value before."""
    node = loss.grad_fn
    if node is None:
        raise RuntimeError("the loss carries no gradient: was the model built with heads on this stage?")
    node.register_hook(lambda *gradients: check())


def _validate(report: HeadReport) -> None:
    """Megatron-LM's checks of a microbatch's loss (``--check-for-spiky-loss``; NaN and Inf by default)."""
    args, machine = get_args(), get_rerun_state_machine()
    total = report.total
    if args.check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=total,
                rejection_func=rejected,
                message=f"found {name} in the heads' loss",
                tolerance=0.0,
                fatal=True,
            )
    if getattr(args, "check_for_spiky_loss", False):
        machine.validate_result(
            result=total,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=10, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
