"""A Megatron trunk with n future-token heads on its last stage, or on several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.carry import carry
from mtp_megatron.config import HeadsConfig
from mtp_megatron.copies import build_output_layer, mark_copies, sharded_state_with_copies
from mtp_megatron.future_heads import FutureHeads
from mtp_megatron.model_checks import check_config, check_forward, check_mask, check_spread
from mtp_megatron.rope import RopeScaling
from mtp_megatron.sequential import HeadReport


class MTPGPTModel(FutureHeads, GPTModel):
    """Megatron-core's GPTModel with n future-token heads in place of its output: build it with :func:`build_model`.

    ``forward(input_ids, position_ids, attention_mask, labels=targets)`` returns, on the last stage, ``(loss,
    HeadReport)`` for targets ``[n, b, s]``, and head 1's logits ``[b, s, V/tp]`` without labels; hidden states on any
    other stage. One of those that holds heads wants targets too: the hidden states that it returns run its heads in
    their backward pass (:func:`.carry.carry`), and it keeps the report until :meth:`take_reports`.

    Attention is causal. For attention within documents every stage must be told of them, by ``attention_mask``
    (:func:`.documents.document_mask`) or, with Transformer Engine's layers, by ``packed_seq_params``
    (:func:`.documents.document_boundaries`).
    """

    post_process: bool  # upstream's
    keep_predictions = False
    """Set to True around an evaluation to get every head's predictions in its report, and the losses of every position
    if :attr:`keep_losses`."""
    keep_losses = True

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
        check_forward(
            kwargs.get("packed_seq_params"),
            transformer_engine=self.transformer_engine,
            context=self.config.context_parallel_size,
        )
        mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        check_mask(mask, transformer_engine=self.transformer_engine)
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
            "packed_seq_params",
        )
        layer_kwargs = {name: kwargs[name] for name in passed_on if kwargs.get(name) is not None}
        layer_kwargs.setdefault("attention_mask", None)
        layer_kwargs.update(kwargs.get("extra_block_kwargs") or {})
        if targets is None:
            return self.next_token_logits(hidden_states, layer_kwargs, kwargs.get("runtime_gather_output"))
        loss, report = self.future_heads_loss(hidden_states, targets, layer_kwargs, predictions=self.keep_predictions)
        if not self.keep_losses:
            report.losses = None
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
            Heads on other stages than the last need ``config.calculate_per_token_loss``.

    Raises:
        ConfigError: a setting of ``config`` that the heads cannot work with.
    """
    compat.prepare()
    check_config(config, vocab_size, padded_vocab_size, fp8_heads=heads.fp8, transformer_engine=transformer_engine)
    check_spread(config, heads.n, owned_heads, post_process)
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
    model.transformer_engine = transformer_engine
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
