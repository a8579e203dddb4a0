"""What one microbatch asks of the heads, on Megatron's modules and process groups (a `sequential.HeadPass`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron.heads import PostNormHead
from mtp_megatron.loss import TokenSums, VocabShard, linear_cross_entropy

if TYPE_CHECKING:
    from mtp_megatron.future_heads import FutureHeads


class MegatronHeadPass:
    """Runs the heads of ``model`` for one microbatch.

    Args:
        model: owner of ``heads``, ``final_norm`` and the unembedding(s).
        targets: ``[n, b, s]`` of this context-parallel rank.
        layer_kwargs: what every transformer layer gets beside its input (attention mask, rotary embedding, ...).
    """

    def __init__(self, model: FutureHeads, targets: Tensor, layer_kwargs: dict[str, Any]) -> None:
        self.model = model
        self.targets = targets
        self.layer_kwargs = layer_kwargs
        self.chains: Sequence[Sequence[int]] = model.chains
        self.unembeddings = model.unembeddings()
        self.access = model.parameter_access
        self._gradients: dict[int, Tensor] = {}
        self._norm = [parameter for parameter in model.final_norm.parameters() if parameter.requires_grad]
        self._norm_gradients_to_come = len(model.owned_heads)
        # Copies on several stages lie in buckets of their own (copies.mark_copies): under overlap_grad_reduce the
        # norm's would be reduced when the first head has added to it. So its gradient too is delivered once.
        self._norm_sums: list[Tensor] | None = [] if model.heads_are_spread else None
        self.shared: Sequence[Tensor] = [] if self.access.sharded else self.unembeddings
        if self._norm_sums is not None:
            self._norm_sums = [torch.zeros_like(weight, dtype=_wide(weight)) for weight in self._norm]
            self.shared = [*self.unembeddings, *self._norm]

    def forward_head(self, head: int, inputs: Tensor) -> Tensor:
        return self.model.run_head_layer(head, inputs, self.layer_kwargs)

    def head_loss(
        self, head: int, outputs: Tensor, scale: Tensor | None, predictions: bool
    ) -> tuple[TokenSums, Tensor | None]:
        model, config = self.model, self.model.config
        with torch.set_grad_enabled(scale is not None):
            leaf = outputs.detach().requires_grad_(scale is not None)
            features = model.head_features(head, leaf)
        which = head if len(self.unembeddings) > 1 else 0
        weight = self.unembeddings[which]
        model.await_unembedding(which)
        group = model.tensor_parallel_group if config.tensor_model_parallel_size > 1 else None
        hidden = features.detach()
        if group is not None and config.sequence_parallel:
            hidden = _gather_sequence(hidden, group)
        with self.access.whole([weight]):
            sums, gradient = linear_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                self.targets[head].t().reshape(-1),
                VocabShard.of(model.true_vocab_size, weight.shape[0], group),
                grad_scale=scale,
                weight_grad=self._weight_gradient(which) if scale is not None else None,
                chunk_tokens=model.heads_config.loss_chunk_tokens,
                predictions=predictions,
                z_loss=model.heads_config.z_loss,
            )
        if gradient is None:
            return sums, None
        gradient = gradient.view_as(hidden)
        if group is not None:
            if config.sequence_parallel:
                gradient = _scatter_sequence(gradient, group)
            else:
                dist.all_reduce(gradient, group=group)
        if self._norm_sums is not None:
            return sums, self._backward_beside_the_norm(head, features, leaf, gradient)
        with self._one_of_the_norm_gradients():
            torch.autograd.backward(features, gradient)
        return sums, leaf.grad

    def _backward_beside_the_norm(self, head: int, features: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
        """dL/doutputs; the norm's gradient is added to ``_norm_sums``, the head's own parameters accumulate theirs."""
        layer = self.model.heads[head]
        own = [p for p in layer.parameters() if p.requires_grad] if isinstance(layer, PostNormHead) else []
        wanted = [leaf, *self._norm, *own]
        leaf_gradient, *others = torch.autograd.grad(features, wanted, gradient)
        for total, part in zip(self._norm_sums or [], others, strict=False):
            total += part
        if own:
            torch.autograd.backward(own, others[len(self._norm) :])
        return leaf_gradient

    def shared_gradients(self) -> Sequence[Tensor | None]:
        gradients, self._gradients = self._gradients, {}
        if not self.access.sharded:
            delivered = [self._deliver(weight, gradients.get(which)) for which, weight in enumerate(self.unembeddings)]
            sums, self._norm_sums = self._norm_sums or [], None
            return [*delivered, *map(self._deliver, self._norm, sums)] if sums else delivered
        tied = self.model.share_embeddings_and_output_weights
        for which, weight in enumerate(self.unembeddings):
            # The first one of a tied model gets another gradient when the embedding's own backward runs.
            more = self.access.incomplete([weight] if tied and which == 0 else [])
            with self.access.whole([weight]), more:
                gradient = self._deliver(weight, gradients.pop(which, None))
                if gradient is not None:
                    torch.autograd.backward(weight, gradient)
        return []

    def skip(self, head: int, layer: bool) -> None:
        module = self.model.heads[head]
        for idle_module in (module, self.model.final_norm):
            self.model.await_parameters(idle_module)
        self.model.await_unembedding(head if len(self.unembeddings) > 1 else 0)
        after_norm = [*self.model.final_norm.parameters()] if self._norm_sums is None else []
        if layer or isinstance(module, PostNormHead):
            after_norm += module.parameters()
        idle = [parameter for parameter in after_norm if parameter.requires_grad]
        with self.access.whole(idle), self._one_of_the_norm_gradients():
            if idle:
                torch.autograd.backward(idle, [torch.zeros_like(parameter) for parameter in idle])

    def _one_of_the_norm_gradients(self) -> AbstractContextManager[None]:
        """Around each head's contribution to the final norm: the engine is told which one is the last."""
        self._norm_gradients_to_come -= 1
        return self.access.incomplete(self._norm if self._norm_gradients_to_come else [])

    def _fuses_into_main_grad(self, weight: Tensor) -> bool:
        """Megatron's gradient accumulation fusion: the gradient is added to the fp32 buffer without a temporary."""
        return bool(self.model.config.gradient_accumulation_fusion) and hasattr(weight, "main_grad")

    def _weight_gradient(self, which: int) -> Tensor | None:
        weight = self.unembeddings[which]
        if not weight.requires_grad:
            return None
        if self._fuses_into_main_grad(weight):
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            return weight.main_grad  # type: ignore[attr-defined]
        if which not in self._gradients:
            # Summed over heads and chunks in fp32, rounded to the parameter's type once.
            self._gradients[which] = torch.zeros_like(weight, dtype=_wide(weight))
        return self._gradients[which]

    def _deliver(self, weight: Tensor, gradient: Tensor | None) -> Tensor | None:
        if not weight.requires_grad:
            return None
        if gradient is not None:
            return gradient.to(weight.dtype)
        # Fused into main_grad, or no head had a loss. DDP wants to see a gradient all the same; it adds this one only
        # where it was not fused or where the weight has a second use (a tied embedding), so it must be zero.
        return torch.zeros_like(weight)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _gather_sequence(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[s/tp, b, h]`` -> ``[s, b, h]``."""
    whole = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole


def _scatter_sequence(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' ``[s, b, h]``, of which each keeps its ``[s/tp, b, h]``."""
    local = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    dist.reduce_scatter_tensor(local, partial.contiguous(), group=group)
    return local
