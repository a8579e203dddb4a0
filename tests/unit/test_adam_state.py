"""A run may be resumed where another Adam is: torch's, or Transformer Engine's or Apex's, with their state elsewhere.

The fused one is a stand-in for Transformer Engine's; tests/transformer_engine/test_checkpoints.py has the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.compat import fallbacks
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.adam_runs import Adam, trained
from tests.training_runs import VOCAB, make_data, tiny_tree


class FusedAdam(torch.optim.Optimizer):
    """Its step and a setting that torch's lacks are in the groups, and no other state than moments is taken back."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})
        assert adam_w_mode

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        unknown = {name for state in state_dict["state"].values() for name in state} - {"exp_avg", "exp_avg_sq"}
        if unknown:
            raise KeyError(unknown.pop())
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                self._update(parameter, group, 1 - beta1 ** group["step"], 1 - beta2 ** group["step"])

    def _update(self, parameter: Tensor, group: dict[str, Any], correction1: float, correction2: float) -> None:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        gradient, (beta1, beta2) = parameter.grad, group["betas"]
        assert gradient is not None
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = state["exp_avg"] / correction1 / ((state["exp_avg_sq"] / correction2).sqrt() + group["eps"])
        parameter.sub_(update + group["weight_decay"] * parameter, alpha=group["lr"])


@contextmanager
def fused_adam() -> Iterator[None]:
    """As where Transformer Engine or Apex is: Megatron's Adam is theirs, and torch's needs no repairs."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        for module in (optimizer, distrib_optimizer):
            patch.setattr(module, "Adam", FusedAdam)
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        fallbacks.uninstall()
        compat.prepare()
        try:
            yield
        finally:
            fallbacks.uninstall()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about what a CPU has: torch's Adam")
@pytest.mark.parametrize("saved_by", ["torch", "fused"])
@pytest.mark.parametrize("loaded_by", ["torch", "fused"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("distributed", [False, True], ids=["each rank its own", "distributed"])
def test_a_run_goes_on(tmp_path: Path, saved_by: str, loaded_by: str, precision: str, distributed: bool) -> None:
    compat.prepare()
    tree = tiny_tree(
        make_data(tmp_path), tmp_path / "run", train__precision=precision, optimizer__distributed=distributed
    )
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)

    def adam(of: str, save: bool) -> Adam:
        with fused_adam() if of == "fused" else nullcontext():
            return trained(recipe, tmp_path, save)[1]

    saved, loaded = adam(saved_by, save=True), adam(loaded_by, save=False)
    assert saved.step == loaded.step == 2
    assert saved.moments[0].abs().max() > 0
    torch.testing.assert_close(loaded.moments, saved.moments, rtol=1e-6, atol=0)
