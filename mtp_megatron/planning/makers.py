"""Who makes a tensor: the module whose forward or backward runs, the head, the phase of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from mtp_megatron.compat.patching import Replacement, replace
from mtp_megatron.loss import TokenSums
from mtp_megatron.planning.live_memory import LiveMemory
from mtp_megatron.sequential import HeadPass, HeadReport

_KEY = "mtp_megatron.planning"


class Maker(NamedTuple):
    """Attributes:
    phase: of the step, such as ``optimizer step``.
    head: ``head 2``, or ``loss of head 2`` inside of its linear cross entropy; empty elsewhere.
    module: whose code runs; empty outside of all modules.
    backward: whether it is the module's backward pass.
    """

    phase: str
    head: str
    module: str
    backward: bool


class Makers:
    """Follows a step through modules, heads and phases; ask :meth:`__call__` at any moment who is at work."""

    def __init__(self) -> None:
        self.phase = "build"
        self.head = ""
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._backward = ""

    def __call__(self) -> Maker:
        if self._stack:
            return Maker(self.phase, self.head, self._stack[-1], False)
        node = torch._C._current_autograd_node()
        if node is None:
            return Maker(self.phase, self.head, "", False)
        # The first node of a module's backward pass is the one that made its output, which _leave has signed.
        self._backward = _notes(node).get(_KEY, self._backward)
        return Maker(self.phase, self.head, self._backward, True)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Everything inside belongs to ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def following(self, models: Sequence[torch.nn.Module], memory: LiveMemory) -> Iterator[None]:
        """Follow the modules of ``models`` and their heads; marks z and the parameters' gradients in ``memory``."""
        for index, model in enumerate(models):
            chunk = f"chunk {index}: " if len(models) > 1 else ""
            self._names |= {id(module): chunk + name for name, module in model.named_modules() if name}
        # Global hooks: the model fires those of its unembedding by itself, without a forward pass.
        handles: list[Any] = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_hook(lambda grad: memory.mark([grad], "gradients")))
        undo: list[Callable[[], None]] = []
        try:
            replace(
                Replacement("mtp_megatron.future_heads", "run_heads", self._run_heads(memory), "names the head"), undo
            )
            replace(Replacement("mtp_megatron.head_pass", "linear_cross_entropy", self._loss, "names the loss"), undo)
            yield
        finally:
            for handle in handles:
                handle.remove()
            while undo:
                undo.pop()()

    def _enter(self, module: torch.nn.Module, inputs: Any) -> None:
        if id(module) in self._names:
            self._stack.append(self._names[id(module)])

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if id(module) not in self._names:
            return
        name = self._stack.pop()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                _notes(leaf.grad_fn).setdefault(_KEY, name)

    def _run_heads(self, memory: LiveMemory) -> Callable[[Any], Any]:
        def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run_heads(z: Tensor, heads: HeadPass, report: HeadReport, **options: Any) -> Tensor:
                allocation = memory.of(z)
                if allocation is not None and allocation.category is None:
                    allocation.category = "z"
                loss = original(z, _NamedHeads(heads, self), report, **options)
                if loss.grad_fn is not None:
                    _notes(loss.grad_fn)[_KEY] = ""  # the heads run in its backward pass: no module's
                return loss

            return run_heads

        return make

    def _loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def linear_cross_entropy(*args: Any, **kwargs: Any) -> Any:
            before, self.head = self.head, f"loss of {self.head}"
            try:
                return original(*args, **kwargs)
            finally:
                self.head = before

        return linear_cross_entropy


def _notes(node: Any) -> dict[str, str]:
    """What can be written on an autograd node."""
    notes: dict[str, str] = node.metadata
    return notes


class _NamedHeads:
    """A :class:`HeadPass` that says which head is at work, from its forward pass to the next head's."""

    def __init__(self, heads: HeadPass, makers: Makers) -> None:
        self._heads, self._makers = heads, makers
        self.chains, self.shared = heads.chains, heads.shared

    def forward_head(self, head: int, inputs: Tensor) -> Tensor:
        self._makers.head = f"head {head + 1}"
        return self._heads.forward_head(head, inputs)

    def head_loss(
        self, head: int, outputs: Tensor, scale: Tensor | None, predictions: bool
    ) -> tuple[TokenSums, Tensor | None]:
        self._makers.head = f"head {head + 1}"
        return self._heads.head_loss(head, outputs, scale, predictions)

    def shared_gradients(self) -> Sequence[Tensor | None]:
        gradients = self._heads.shared_gradients()
        self._makers.head = ""
        return gradients

    def skip(self, head: int, layer: bool) -> None:
        self._heads.skip(head, layer)
