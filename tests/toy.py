"""A toy trunk with future-token heads in plain torch: what `mtp_megatron.sequential` drives, without Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.config import HeadsConfig
from mtp_megatron.loss import TokenSums, VocabShard, linear_cross_entropy
from mtp_megatron.sequential import HeadReport, run_heads
from mtp_megatron.targets import IGNORE_INDEX, future_targets


class ToyModel(torch.nn.Module):
    """Linear trunk, heads `x + W2 tanh(W1 x)`, a shared norm weight and a shared unembedding."""

    def __init__(
        self,
        heads: HeadsConfig,
        size: int = 8,
        vocab: int = 19,
        dtype: torch.dtype = torch.float64,
        width: int | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = heads
        width = width or size
        self.trunk = torch.nn.Linear(size, size, bias=False, dtype=dtype)
        self.heads = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(size, width, dtype=dtype), torch.nn.Tanh(), torch.nn.Linear(width, size, dtype=dtype)
            )
            for _ in range(heads.n)
        )
        self.norm = torch.nn.Parameter(1 + 0.1 * torch.randn(size, dtype=dtype))
        self.unembedding = torch.nn.Parameter(torch.randn(vocab, size, dtype=dtype))

    def layer(self, head: int, x: Tensor) -> Tensor:
        return x + self.heads[head](x)

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.norm


class ToyPass:
    """One microbatch's work, a `HeadPass`. `events` is the order in which things happened."""

    def __init__(self, model: ToyModel, targets: Tensor) -> None:
        self.model, self.targets = model, targets
        self.chains: Sequence[Sequence[int]] = model.config.chains
        self.shared: Sequence[Tensor] = [model.unembedding]
        self.events: list[str] = []
        self._gradient: Tensor | None = None

    def forward_head(self, head: int, inputs: Tensor) -> Tensor:
        self.events.append(f"forward {head + 1}")
        return self.model.layer(head, inputs)

    def head_loss(
        self, head: int, outputs: Tensor, scale: Tensor | None, predictions: bool
    ) -> tuple[TokenSums, Tensor | None]:
        self.events.append(f"loss {head + 1}")
        weight = self.model.unembedding
        with torch.set_grad_enabled(scale is not None):
            leaf = outputs.detach().requires_grad_(scale is not None)
            features = self.model.features(leaf).to(weight.dtype)
        if scale is not None and weight.requires_grad and self._gradient is None:
            self._gradient = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        sums, gradient = linear_cross_entropy(
            features.detach().flatten(0, 1),
            weight,
            self.targets[head].t().reshape(-1),
            VocabShard.of(weight.shape[0], weight.shape[0], None),
            grad_scale=scale,
            weight_grad=self._gradient,
            predictions=predictions,
            z_loss=self.model.config.z_loss,
        )
        if gradient is None:
            return sums, None
        torch.autograd.backward(features, gradient.view_as(features))
        return sums, leaf.grad

    def shared_gradients(self) -> Sequence[Tensor | None]:
        gradient, self._gradient = self._gradient, None
        weight = self.model.unembedding
        if not weight.requires_grad:
            return [None]
        return [torch.zeros_like(weight) if gradient is None else gradient.to(weight.dtype)]

    def skip(self, head: int, layer: bool) -> None:
        self.events.append(f"skip {head + 1}{' with its layer' if layer else ''}")
        idle = [self.model.norm, *(self.model.heads[head].parameters() if layer else ())]
        torch.autograd.backward(idle, [torch.zeros_like(parameter) for parameter in idle])


def batch(model: ToyModel, length: int = 6, rows: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Trunk input `[s, b, h]` and targets `[n, b, s]` with some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    size, vocab = model.trunk.in_features, model.unembedding.shape[0]
    x = torch.randn(length, rows, size, generator=generator, dtype=torch.float64).to(model.norm.dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[0, 2] = IGNORE_INDEX
    return x, future_targets(labels, model.config.n)


def deferred(
    model: ToyModel,
    x: Tensor,
    targets: Tensor,
    heads: ToyPass | None = None,
    *,
    predictions: bool = False,
    detach_trunk: bool = False,
) -> tuple[Tensor, HeadReport]:
    """The toy's loss by `run_heads`."""
    z = model.trunk(x)
    sums = torch.promote_types(z.dtype, torch.float32)
    z_loss = model.config.z_loss > 0
    report = HeadReport.empty(targets, model.config.base_weights(), sums, predictions=predictions, z_loss=z_loss)
    return run_heads(z, heads or ToyPass(model, targets), report, detach_trunk=detach_trunk), report


def joint(model: ToyModel, x: Tensor, targets: Tensor, *, detach_trunk: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same by plain autograd, all heads alive: weighted loss, each head's loss sum `[n]`, logits `[n, b, s, V]`."""
    z = model.trunk(x)
    if detach_trunk:
        z = z.detach()
    found: dict[int, Tensor] = {}
    for chain in model.config.chains:
        inputs = z
        for head in chain:
            inputs = model.layer(head, inputs)
            found[head] = (model.features(inputs) @ model.unembedding.T).transpose(0, 1)
    logits = torch.stack([found[head] for head in range(model.config.n)])
    losses = torch.stack(
        [
            F.cross_entropy(one.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
            for one, target in zip(logits, targets, strict=True)
        ]
    )
    weights = torch.tensor(model.config.base_weights(), dtype=losses.dtype)
    log_z_squared = (logits.logsumexp(-1).square() * (targets != IGNORE_INDEX)).sum(dim=(1, 2))
    return (weights * (losses + model.config.z_loss * log_z_squared)).sum(), losses.detach(), logits.detach()


def gradients(model: ToyModel) -> dict[str, Tensor]:
    """Gradients by name, zero where there is none; forgotten in the model."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest deviation of any gradient, relative to that tensor's largest entry."""
    assert got.keys() == want.keys()
    errors = [
        float((got[name] - right).abs().max() / right.abs().max().clamp_min(1e-30)) for name, right in want.items()
    ]
    return max(error if error == error else float("inf") for error in errors)
