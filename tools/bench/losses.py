"""Linear + cross entropy by this project and by its peers, as callables that do the same work."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.compat.kernels import why_no_triton
from mtp_megatron.loss import VocabShard, linear_cross_entropy, vocab_parallel_linear_cross_entropy
from mtp_megatron.loss_softmax import RowSums, Softmax, TorchSoftmax


@dataclass(frozen=True)
class Problem:
    """One rank's inputs: ``hidden`` ``[tokens, h]``, the same on all ranks, and its own ``weight`` ``[V/tp, h]``."""

    hidden: Tensor
    weight: torch.nn.Parameter
    targets: Tensor
    shard: VocabShard

    @classmethod
    def random(cls, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        shard = VocabShard.of(vocab, vocab // group.size(), group)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(tokens, hidden, generator=generator)
        whole = torch.randn(vocab, hidden, generator=generator).mul_(hidden**-0.5)
        mine = whole[shard.start : shard.start + shard.rows].clone()
        targets = torch.randint(vocab, (tokens,), generator=generator)
        return cls(
            states.to(device, dtype).requires_grad_(),
            torch.nn.Parameter(mine.to(device, dtype)),
            targets.to(device),
            shard,
        )


@dataclass(frozen=True)
class Outcome:
    """Summed loss ``[]``, dL/dhidden ``[tokens, h]`` over the whole vocabulary, dL/dweight of this rank's rows."""

    loss: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


@dataclass(frozen=True)
class Rival:
    """One way to compute an :class:`Outcome`; ``run`` is None where it cannot run, and ``reason`` says why."""

    name: str
    run: Callable[[], Outcome] | None
    reason: str = ""


RAW = "mtp_megatron, into main_grad"
AUTOGRAD = "mtp_megatron"
RAW_TORCH = f"{RAW}, torch's softmax"
RAW_COMPILED = f"{RAW}, compiled softmax"
UNFUSED = "megatron-core"
FUSED = "megatron-core, fused"
COMPILED = "torch.compile, plain"
LIGER = "Liger"
CCE = "cut-cross-entropy"


def rivals(problem: Problem) -> list[Rival]:
    """Every rival for this problem; those that cannot run here say why."""
    alone = problem.shard.size == 1
    one_process = "" if alone else "works on an unsplit vocabulary only"
    return [
        Rival(AUTOGRAD, lambda: _autograd(problem)),
        Rival(RAW, _Raw(problem)),
        _where_possible(RAW_TORCH, lambda: _Raw(problem, TorchSoftmax), _same_softmax(problem)),
        _where_possible(RAW_COMPILED, lambda: _Raw(problem, CompiledSoftmax), _same_softmax(problem)),
        Rival(UNFUSED, _Megatron(problem, fused=False)),
        Rival(FUSED, _Megatron(problem, fused=True)),
        _where_possible(COMPILED, lambda: _Compiled(problem), one_process),
        _where_possible(LIGER, lambda: _Liger(problem), _missing("liger_kernel", "liger-kernel") or one_process),
        _where_possible(CCE, lambda: _Cut(problem), _missing("cut_cross_entropy", "cut-cross-entropy") or one_process),
    ]


def _where_possible(name: str, make: Callable[[], Callable[[], Outcome]], reason: str) -> Rival:
    return Rival(name, None, reason) if reason else Rival(name, make())


def _same_softmax(problem: Problem) -> str:
    """Why this project has no Triton kernels here, with which others could be compared; empty if it has."""
    reason = why_no_triton(problem.hidden.device, problem.hidden.dtype)
    return f"nothing to compare: mtp_megatron's softmax is torch's here ({reason})" if reason else ""


def _missing(module: str, package: str) -> str:
    """Why a rival made of Triton kernels cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "not available on this device: Triton kernels, which need a GPU"
    if importlib.util.find_spec(module) is None:
        return f"not installed (pip install {package})"
    return ""


def _differentiate(problem: Problem, loss: Tensor) -> Outcome:
    hidden_grad, weight_grad = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    return Outcome(loss.detach(), hidden_grad, weight_grad)


def _autograd(problem: Problem) -> Outcome:
    loss, _ = vocab_parallel_linear_cross_entropy(problem.hidden, problem.weight, problem.targets, problem.shard)
    return _differentiate(problem, loss)


class _Raw:
    """As the deferred heads call it: the weight's gradient is added to a buffer that exists anyway."""

    def __init__(self, problem: Problem, softmax: type[Softmax] | None = None) -> None:
        self.problem = problem
        self.softmax = softmax
        self.main_grad = torch.zeros_like(problem.weight, dtype=torch.float32)
        self.scale = torch.ones((), device=problem.hidden.device)

    def __call__(self) -> Outcome:
        problem, shard = self.problem, self.problem.shard
        sums, hidden_grad = linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            shard,
            grad_scale=self.scale,
            weight_grad=self.main_grad,
            softmax=self.softmax,
        )
        assert hidden_grad is not None
        if shard.group is not None:
            dist.all_reduce(hidden_grad, group=shard.group)
        return Outcome(sums.loss, hidden_grad, self.main_grad)


class CompiledSoftmax:
    """The loss's two steps as plain formulas under ``torch.compile``: what its Triton kernels have to beat."""

    def __init__(self, hidden: Tensor, tokens: int, rows: int) -> None:
        self.logits = hidden.new_empty(tokens, rows)

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype) -> int:
        return dtype.itemsize

    def sums(self, logits: Tensor, column: Tensor) -> RowSums:
        return RowSums(*_sums(logits, column))

    def gradient(self, logits: Tensor, column: Tensor, own: RowSums, whole: RowSums, scale: Tensor) -> Tensor:
        return _gradient(logits, column, whole.top, whole.total, scale)


@torch.compile(dynamic=False)
def _sums(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = logits.float()
    top, best = wide.max(dim=-1)
    total = (wide - top[:, None]).exp().sum(dim=-1)
    target_logit = wide.gather(1, column.clamp_min(0)[:, None]).squeeze(1)
    return top, best, total, torch.where(column >= 0, target_logit, 0)


@torch.compile(dynamic=False)
def _gradient(logits: Tensor, column: Tensor, top: Tensor, total: Tensor, scale: Tensor) -> Tensor:
    share = (logits.float() - top[:, None]).exp() * (scale / total)[:, None]
    mine = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    return logits.copy_(torch.where(mine, share - scale[:, None], share))


class _Megatron:
    """Megatron-core's output layer, then its vocabulary-parallel cross entropy on the logits."""

    def __init__(self, problem: Problem, fused: bool) -> None:
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.transformer import TransformerConfig

        self.problem = problem
        group = parallel_state.get_tensor_model_parallel_group()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=problem.hidden.shape[1],
            num_attention_heads=group.size(),  # unused, but checked against the tensor-parallel size
            tensor_model_parallel_size=group.size(),
            params_dtype=problem.hidden.dtype,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        self.layer = tensor_parallel.ColumnParallelLinear(
            problem.hidden.shape[1],
            problem.shard.vocab_size,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=True,
            tp_group=group,
        )
        if fused:
            self.loss = lambda logits, targets: fused_vocab_parallel_cross_entropy(logits, targets, group)
        else:
            self.loss = tensor_parallel.vocab_parallel_cross_entropy

    def __call__(self) -> Outcome:
        problem = self.problem
        logits, _ = self.layer(problem.hidden[:, None], weight=problem.weight)  # [s, b, V/tp]
        losses = self.loss(logits, problem.targets[:, None])
        del logits
        return _differentiate(problem, losses.sum())


class _Compiled:
    """Three lines of PyTorch under ``torch.compile``."""

    def __init__(self, problem: Problem) -> None:
        def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

        self.problem = problem
        self.plain = torch.compile(plain)

    def __call__(self) -> Outcome:
        return _differentiate(self.problem, self.plain(self.problem.hidden, self.problem.weight, self.problem.targets))


class _Liger:
    """Liger-Kernel's fused linear cross entropy."""

    def __init__(self, problem: Problem) -> None:
        functional: Any = importlib.import_module("liger_kernel.transformers.functional")
        self.problem = problem
        self.loss = functional.liger_fused_linear_cross_entropy

    def __call__(self) -> Outcome:
        problem = self.problem
        return _differentiate(problem, self.loss(problem.hidden, problem.weight, problem.targets, reduction="sum"))


class _Cut:
    """Apple's cut cross entropy, with its gradient filter off: exact like the others."""

    def __init__(self, problem: Problem) -> None:
        cut: Any = importlib.import_module("cut_cross_entropy")
        self.problem = problem
        self.loss = cut.linear_cross_entropy

    def __call__(self) -> Outcome:
        problem = self.problem
        loss = self.loss(problem.hidden, problem.weight, problem.targets, reduction="sum", filter_eps=None)
        return _differentiate(problem, loss)
