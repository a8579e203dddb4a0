"""What a Megatron language model needs to end in n future-token heads: a mixin for any trunk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.head_pass import MegatronHeadPass
from mtp_megatron.heads import HeadLayers, IdentityHead, PostNormHead, build_heads
from mtp_megatron.joint import joint_loss
from mtp_megatron.loss import VocabShard
from mtp_megatron.parameter_access import PLAIN, ParameterAccess
from mtp_megatron.sequential import HeadReport, run_heads

_DDP = "megatron.core.distributed.distributed_data_parallel"


class FutureHeads:
    """Mixin that gives a Megatron language model n future-token heads.

    The host class must end its trunk without a final norm, own ``output_layer`` and call :meth:`attach_heads` after
    its own constructor, then hand the trunk's output to :meth:`future_heads_loss` or :meth:`next_token_logits`.
    """

    config: TransformerConfig
    heads: HeadLayers
    final_norm: torch.nn.Module
    output_layer: torch.nn.Module
    unembedding_heads: torch.nn.ModuleList
    share_embeddings_and_output_weights: bool
    parameter_access: ParameterAccess = PLAIN
    """Set by a host whose engine shards parameters or reduces a gradient when it arrives."""
    owned_heads: tuple[int, ...] = ()
    """Heads (0-based) on this stage."""
    transformer_engine = False
    """Whether the layers of trunk and heads are Transformer Engine's."""

    def attach_heads(
        self,
        heads: HeadsConfig,
        *,
        true_vocab_size: int,
        padded_vocab_size: int,
        vp_stage: int | None,
        pg_collection: Any,
        transformer_engine: bool = False,
        owned: Sequence[int] | None = None,
    ) -> None:
        """Build heads, final norm and, where replicated, the further unembeddings on this stage.

        ``owned`` names the stage's heads (0-based); None: all.
        """
        self.heads_config = heads
        self.owned_heads = tuple(range(heads.n) if owned is None else owned)
        # Megatron-core enters FP8, and builds FP8 parameters, inside of a TransformerBlock; what is built here is in
        # none, and its configuration says so too.
        config = compat.without_overlap(self.config if heads.fp8 else compat.without_fp8(self.config))
        self.true_vocab_size = true_vocab_size
        self.head_weights: tuple[float, ...] = heads.weights_at(0)
        self.tensor_parallel_group = pg_collection.tp
        self.heads = build_heads(
            config,
            heads,
            compat.layer_spec(config, transformer_engine=transformer_engine),
            first_layer_number=config.num_layers + 1,
            owned=self.owned_heads,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        norm = compat.norm_class(config, transformer_engine=transformer_engine)
        self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.unembedding_heads = HeadLayers()
        if heads.unembedding == "replicated":
            for _ in range(1, heads.n):
                layer = tensor_parallel.ColumnParallelLinear(
                    config.hidden_size,
                    padded_vocab_size,
                    config=config,
                    init_method=config.init_method,
                    bias=False,
                    gather_output=False,
                    tp_group=pg_collection.tp,
                )
                # As upstream marks the output layer: --decoupled-lr is for it, and Muon leaves it to Adam.
                layer.weight.is_embedding_or_output_parameter = True
                self.unembedding_heads.append(layer)

    @property
    def heads_are_spread(self) -> bool:
        """Whether other stages hold heads too; asked on a stage that holds some."""
        return len(self.owned_heads) < self.heads_config.n

    @property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """This stage's groups of heads that run one after another."""
        return tuple(chain for chain in self.heads_config.chains if set(chain) <= set(self.owned_heads))

    def set_head_weights(self, weights: tuple[float, ...]) -> None:
        """Weights of the heads' losses from now on (a schedule over training); length n."""
        if len(weights) != self.heads_config.n:
            raise ConfigError(
                "heads.weights", weights, f"{len(weights)} for {self.heads_config.n} heads", "Give one for each"
            )
        self.head_weights = tuple(weights)

    def unembeddings(self) -> list[Tensor]:
        """``[V/tp, h]`` weights: one that all heads share, or one for each head."""
        if self.parameter_access.unembeddings is not None:
            return list(self.parameter_access.unembeddings)
        return [self.unembedding(), *(layer.get_parameter("weight") for layer in self.unembedding_heads)]

    def await_unembedding(self, which: int) -> None:
        """Fire the hooks that calling the owner of ``unembeddings()[which]`` would fire first.

        The loss reads the weight without calling its module; under ``overlap_param_gather`` DDP waits in a forward
        pre-hook for the weight's all-gather, and without this the loss could read last step's values. Where an engine
        shards parameters, :meth:`.ParameterAccess.whole` gathers the weight instead.
        """
        if self.parameter_access.sharded:
            return
        owner = self.unembedding_heads[which - 1] if which else self.output_layer
        for hook in owner._forward_pre_hooks.values():
            hook(owner, ())

    def await_parameters(self, module: torch.nn.Module) -> None:
        """Fire the hooks of Megatron's DDP that running ``module`` would fire first.

        Under ``overlap_param_gather`` each waits for a bucket's all-gather and starts the next one. A bucket that no
        hook has waited for cannot be gathered again: the second step would end with an assertion.
        """
        if self.parameter_access.sharded:
            return
        for part in module.modules():
            for hook in part._forward_pre_hooks.values():
                if getattr(hook, "__module__", None) == _DDP:
                    hook(part, ())

    def unembedding(self) -> Tensor:
        """``[V/tp, h]``: the weight that head 1, or all heads, use here."""
        if self.share_embeddings_and_output_weights and self.pre_process:  # type: ignore[attr-defined]
            return self.shared_embedding_or_output_weight()  # type: ignore[attr-defined]
        return self.output_layer.weight  # type: ignore[return-value]

    def run_head_layer(self, head: int, inputs: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
        """Layer of one head (0-based): ``[s, b, h]`` -> ``[s, b, h]``."""
        layer = self.heads[head]
        if isinstance(layer, IdentityHead | PostNormHead):
            return inputs
        with compat.fp8_context(self.config) if self.heads_config.fp8 else nullcontext():
            output: Tensor = layer(hidden_states=inputs, **layer_kwargs)[0]
        return output

    def head_features(self, head: int, outputs: Tensor) -> Tensor:
        """What the unembedding reads: the shared final norm and, for linear and Medusa heads, the head's own block."""
        normed = self.final_norm(outputs)
        layer = self.heads[head]
        return layer(normed) if isinstance(layer, PostNormHead) else normed

    def head_logits(self, head: int, outputs: Tensor, gather: bool | None = None) -> Tensor:
        """Logits of one head, ``[s, b, V/tp]`` (``[s, b, V]`` with ``gather``), through Megatron's own output layer."""
        weights = self.unembeddings()
        logits: Tensor = self.output_layer(
            self.head_features(head, outputs),
            weight=weights[head if len(weights) > 1 else 0],
            runtime_gather_output=gather,
        )[0]
        return logits

    def next_token_logits(self, z: Tensor, layer_kwargs: dict[str, Any], gather: bool | None = None) -> Tensor:
        """Logits ``[b, s, V/tp]`` of the next-token head from the trunk's output."""
        inputs = z
        chain = next(chain for chain in self.heads_config.chains if 0 in chain)
        for head in chain[: chain.index(0) + 1]:
            inputs = self.run_head_layer(head, inputs, layer_kwargs)
        return self.head_logits(0, inputs, gather).transpose(0, 1).contiguous()

    def future_heads_loss(
        self, z: Tensor, targets: Tensor, layer_kwargs: dict[str, Any], *, predictions: bool = False
    ) -> tuple[Tensor, HeadReport]:
        """Summed loss of all heads over this microbatch, and the report that it fills.

        Args:
            z: trunk output ``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism).
            targets: ``[n, b, s]`` from :func:`mtp_megatron.targets.future_targets`.
            layer_kwargs: what each head's layer gets beside its input.
            predictions: keep every head's most likely entries (evaluation).

        Returns:
            ``(loss [], report)``. The loss is the weighted sum over heads of *summed* token losses, and its gradient
            that of their z-losses too (``heads.z_loss``); the divisor is ``report.normalizer``, summed over the global
            batch by Megatron (``calculate_per_token_loss``). In training its value is NaN until backward has run, see
            ``report``.
        """
        n = self.heads_config.n
        if targets.dim() != 3 or targets.shape[0] != n:
            raise ValueError(
                f"labels have shape {tuple(targets.shape)}, but {n} heads need targets [n={n}, batch, sequence]: "
                "build them with mtp_megatron.targets.future_targets"
            )
        training = torch.is_grad_enabled()
        weights = self.head_weights if training else self.heads_config.base_weights()
        sums_dtype = torch.promote_types(z.dtype, torch.float32)
        elsewhere = [head for head in range(n) if head not in self.owned_heads]
        weights = tuple(0.0 if head in elsewhere else weight for head, weight in enumerate(weights))
        z_loss = self.heads_config.z_loss > 0
        report = HeadReport.empty(targets, weights, sums_dtype, predictions and not training, elsewhere, z_loss)
        if self.heads_config.execution == "joint" and training:
            return joint_loss(self, z, targets, layer_kwargs, report), report
        heads = MegatronHeadPass(self, targets, layer_kwargs)
        return run_heads(z, heads, report, detach_trunk=self.heads_config.trainable != "all"), report

    def vocab_shard(self) -> VocabShard:
        """Vocabulary entries whose unembedding rows this rank holds."""
        group = self.tensor_parallel_group if self.config.tensor_model_parallel_size > 1 else None
        return VocabShard.of(self.true_vocab_size, self.unembedding().shape[0], group)
