"""The heads never wait for the device: no value of a tensor is read while they run, forward or backward.

On a GPU each such read stops the host until all queued kernels are done. Here the operations are counted that would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_megatron.config import HeadsConfig
from mtp_megatron.loss import VocabShard, linear_cross_entropy
from tests.toy import ToyModel, ToyPass, batch, deferred

# What reads a value (`.item()`, `.tolist()`, `bool(tensor)`) or whose result's shape depends on values.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
COPIES = ("tolist", "numpy", "cpu")  # no operation of theirs is dispatched where the tensor is on the host already


class Reads(TorchDispatchMode):
    """Collects the names of what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Reads:
        for name in COPIES:  # modes for functions are off inside backward passes
            self._patch.setattr(torch.Tensor, name, self._recorded(name))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _recorded(self, name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return original(*args, **kwargs)

        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        masks = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1]
        )
        if name in READS or masks:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class ReadsInItsLoss(ToyPass):
    def head_loss(self, head, outputs, scale, predictions):  # type: ignore[no-untyped-def]
        outputs.sum().item(), outputs.flatten().tolist()
        return super().head_loss(head, outputs, scale, predictions)


def test_control_a_read_inside_the_backward_pass_would_be_noticed() -> None:
    model = ToyModel(HeadsConfig(n=2))
    x, targets = batch(model)
    with Reads() as reads:
        loss, _ = deferred(model, x, targets, heads=ReadsInItsLoss(model, targets))
        loss.backward()
    assert reads.names == ["_local_scalar_dense", "tolist"] * 2


@pytest.mark.parametrize("arrangement", ["parallel", "causal", "anticausal"])
def test_a_step_of_the_heads_reads_no_value(arrangement: str) -> None:
    model = ToyModel(HeadsConfig(n=4, arrangement=arrangement))
    inputs = batch(model)
    with Reads() as reads:
        loss, _ = deferred(model, *inputs)
        loss.backward()
    assert reads.names == []
    assert model.unembedding.grad is not None


@pytest.mark.parametrize(("predictions", "z_loss"), [(False, 0.0), (True, 0.1)])
def test_the_loss_reads_no_value_in_any_chunk(predictions: bool, z_loss: float) -> None:
    hidden, weight = torch.randn(40, 8), torch.randn(19, 8)
    targets = torch.randint(0, 19, (40,))
    targets[::3] = -100
    with Reads() as reads:
        linear_cross_entropy(
            hidden,
            weight,
            targets,
            VocabShard.of(19, 19, None),
            grad_scale=torch.ones(()),
            weight_grad=torch.zeros_like(weight),
            chunk_tokens=16,
            predictions=predictions,
            z_loss=z_loss,
        )
    assert reads.names == []


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x[0].tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
    ],
    ids=["item", "tolist", "bool", "mask", "nonzero", "numpy"],
)
def test_control_a_read_would_be_noticed(read) -> None:
    with Reads() as reads:
        read(torch.randn(4, 4))
    assert reads.names
