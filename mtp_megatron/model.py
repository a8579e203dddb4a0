"""A Megatron trunk with n future-token heads on its last stage, or on several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.carry import carry
from mtp_megatron.config import HeadsConfig
from mtp_megatron.copies import build_output_layer, mark_copies, sharded_state_with_copies
from mtp_megatron.errors import ConfigError
from mtp_megatron.head_pass import MegatronHeadPass
from mtp_megatron.heads import HeadLayers, IdentityHead, PostNormHead, build_heads
from mtp_megatron.joint import joint_loss
from mtp_megatron.loss import VocabShard
from mtp_megatron.model_checks import check_config, check_forward
from mtp_megatron.parameter_access import PLAIN, ParameterAccess
from mtp_megatron.rope import RopeScaling
from mtp_megatron.sequential import HeadReport, run_heads


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
        config = self.config if heads.fp8 else compat.without_fp8(self.config)
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
                self.unembedding_heads.append(
                    tensor_parallel.ColumnParallelLinear(
                        config.hidden_size,
                        padded_vocab_size,
                        config=config,
                        init_method=config.init_method,
                        bias=False,
                        gather_output=False,
                        tp_group=pg_collection.tp,
                    )
                )

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
            ``(loss [], report)``. The loss is the weighted sum over heads of *summed* token losses; the divisor is
            ``report.normalizer``, summed over the global batch by Megatron (``calculate_per_token_loss``). In training
            its value is NaN until backward has run, see ``report``.
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
        report = HeadReport.empty(targets, weights, sums_dtype, predictions and not training, elsewhere)
        if self.heads_config.execution == "joint" and training:
            return joint_loss(self, z, targets, layer_kwargs, report), report
        heads = MegatronHeadPass(self, targets, layer_kwargs)
        return run_heads(z, heads, report, detach_trunk=self.heads_config.trainable != "all"), report

    def vocab_shard(self) -> VocabShard:
        """Vocabulary entries whose unembedding rows this rank holds."""
        group = self.tensor_parallel_group if self.config.tensor_model_parallel_size > 1 else None
        return VocabShard.of(self.true_vocab_size, self.unembedding().shape[0], group)


class MTPGPTModel(FutureHeads, GPTModel):
    """Megatron-core's GPTModel with n future-token heads in place of its output: build it with :func:`build_model`.

    ``forward(input_ids, position_ids, attention_mask, labels=targets)`` returns, on the last stage, ``(loss,
    HeadReport)`` for targets ``[n, b, s]``, and head 1's logits ``[b, s, V/tp]`` without labels; hidden states on any
    other stage. One of those that holds heads wants targets too: the hidden states that it returns run its heads in
    their backward pass (:func:`.carry.carry`), and it keeps the report until :meth:`take_reports`.
    """

    post_process: bool  # upstream's
    keep_predictions = False
    """Set to True around an evaluation to get every head's predictions in its report."""

    def attach_heads(self, heads: HeadsConfig, *, padded_vocab_size: int, pg_collection: Any, **settings: Any) -> None:
        self._kept_reports: list[HeadReport] = []
        if not self.post_process:
            self.output_layer = build_output_layer(self, padded_vocab_size, pg_collection.tp)
        super().attach_heads(heads, padded_vocab_size=padded_vocab_size, pg_collection=pg_collection, **settings)
        if self.heads_are_spread:
            mark_copies(self)

    def take_reports(self) -> list[HeadReport]:
        """Reports of the microbatches since the last call, on a stage before the last; empty on the last one."""
        if not self.owned_heads:
            return []
        kept, self._kept_reports = self._kept_reports, []
        return kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check_forward(kwargs.get("packed_seq_params"))
        return super().forward(*args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """As GPTModel's; of tensors that several stages hold one copy is written, and all are loaded."""

        def upstream() -> Any:
            return super(MTPGPTModel, self).sharded_state_dict(prefix, sharded_offsets, metadata)

        if self.post_process or not self.owned_heads:
            return upstream()
        return sharded_state_with_copies(self, upstream, prefix)

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        targets = kwargs.get("labels")
        if not self.post_process and (targets is None or not self.owned_heads):
            if self.owned_heads and torch.is_grad_enabled():
                raise ValueError(
                    f"a stage with heads {self.owned_heads} was trained without labels [n, batch, sequence]"
                )
            return hidden_states
        passed_on = (
            "attention_mask",
            "rotary_pos_emb",
            "rotary_pos_cos",
            "rotary_pos_sin",
            "sequence_len_offset",
            "inference_context",
        )
        layer_kwargs = {name: kwargs[name] for name in passed_on if kwargs.get(name) is not None}
        layer_kwargs.setdefault("attention_mask", None)
        layer_kwargs.update(kwargs.get("extra_block_kwargs") or {})
        if targets is None:
            return self.next_token_logits(hidden_states, layer_kwargs, kwargs.get("runtime_gather_output"))
        loss, report = self.future_heads_loss(hidden_states, targets, layer_kwargs, predictions=self.keep_predictions)
        if self.post_process:
            return loss, report
        self._kept_reports.append(report)
        return carry(hidden_states, loss, self.config.grad_scale_func) if torch.is_grad_enabled() else hidden_states


def build_model(
    config: TransformerConfig,
    heads: HeadsConfig,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    max_sequence_length: int,
    pre_process: bool = True,
    post_process: bool = True,
    tied_embeddings: bool = False,
    rotary_base: int = 10000,
    rope_scaling: RopeScaling | None = None,
    vp_stage: int | None = None,
    pg_collection: Any = None,
    transformer_engine: bool = False,
    owned_heads: Sequence[int] | None = None,
) -> MTPGPTModel:
    """One pipeline stage of a Llama-like trunk with n heads.

    Args:
        config: Megatron's; ``num_layers`` counts the trunk's layers only.
        vocab_size: real vocabulary entries; rows between it and ``padded_vocab_size`` exist but take no part.
        padded_vocab_size: rows of embedding and unembedding over all tensor-parallel ranks.
        rope_scaling: how rotary frequencies are lowered; None: they are not.
        transformer_engine: build trunk and heads from Transformer Engine's modules.
        owned_heads: the stage's heads (0-based; :mod:`mtp_megatron.layout`); None: all where ``post_process`` is set.

    Raises:
        ConfigError: a setting of ``config`` that the heads cannot work with.
    """
    compat.prepare()
    check_config(config, vocab_size, padded_vocab_size, fp8_heads=heads.fp8, transformer_engine=transformer_engine)
    compat.take_load_balancing_loss()  # what an earlier model of this process left, perhaps of other layers
    model = MTPGPTModel(
        config=config,
        transformer_layer_spec=compat.trunk_block_spec(config, vp_stage, transformer_engine=transformer_engine),
        vocab_size=padded_vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=tied_embeddings,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    if rope_scaling is not None:
        # Megatron's own scaling knows one of llama3's four numbers; the frequencies are all that it changes.
        model.rotary_pos_emb.inv_freq = rope_scaling.apply(model.rotary_pos_emb.inv_freq)
    finish(
        model,
        heads,
        vocab_size,
        padded_vocab_size,
        vp_stage,
        transformer_engine=transformer_engine,
        owned=owned_heads,
    )
    return model


def finish(
    model: Any,
    heads: HeadsConfig,
    vocab_size: int,
    padded_vocab_size: int,
    vp_stage: int | None,
    *,
    transformer_engine: bool,
    owned: Sequence[int] | None = None,
) -> None:
    """Attach the heads to a trunk's stage (``owned``; None: all to the last one), and freeze what ``heads.trainable``
    excludes on any stage."""
    if model.post_process if owned is None else owned:
        model.attach_heads(
            heads,
            true_vocab_size=vocab_size,
            padded_vocab_size=padded_vocab_size,
            vp_stage=vp_stage,
            pg_collection=model.pg_collection,
            transformer_engine=transformer_engine,
            owned=owned,
        )
    freeze(model, heads)


def freeze(model: torch.nn.Module, heads: HeadsConfig) -> None:
    """Turn off the gradients of everything on this stage that ``heads.trainable`` excludes.

    ``heads`` leaves the heads, the final norm and the unembedding (unless tied: then it is the frozen embedding);
    ``new_heads`` leaves heads 2..n and, where replicated, their unembeddings.
    """
    if heads.trainable == "all":
        return
    for name, parameter in model.named_parameters():
        room, _, rest = name.partition(".")
        if heads.trainable == "heads":
            learns = room in {"heads", "final_norm", "unembedding_heads"}
            learns |= room == "output_layer" and not getattr(model, "share_embeddings_and_output_weights", False)
        else:
            learns = room == "unembedding_heads" or (room == "heads" and not rest.startswith("0."))
        parameter.requires_grad_(learns)
