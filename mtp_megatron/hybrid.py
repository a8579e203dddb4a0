"""Megatron-core's HybridModel with n future-token heads: the trunk by a pattern of layers in place of a GPTModel.

Importing it needs megatron-core 0.19 or later, and says so otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.compat.hybrid import hybrid_stack_spec, require_hybrid_model
from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.future_heads import FutureHeads
from mtp_megatron.model import finish
from mtp_megatron.model_checks import check_config, check_forward, check_mask

compat.prepare()
require_hybrid_model()

from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

LAYERS = {"*": "attention", "-": "MLP"}


class MTPHybridModel(FutureHeads, HybridModel):
    """HybridModel with n future-token heads in place of its output: build it with :func:`build_hybrid_model`.

    ``forward`` takes and returns what :class:`mtp_megatron.model.MTPGPTModel`'s does.
    """

    post_process: bool  # upstream's
    keep_predictions = False
    """Set to True around an evaluation to get every head's predictions in its report."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        labels: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        check_forward(packed_seq_params)
        check_mask(attention_mask, transformer_engine=self.transformer_engine)
        z = self._trunk_output(input_ids, position_ids, attention_mask)
        if not self.post_process:
            return z
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, z, self.config)
        layer_kwargs = {"attention_mask": attention_mask, "rotary_pos_emb": self.rotary_pos_emb(length)}
        if labels is None:
            return self.next_token_logits(z, layer_kwargs, runtime_gather_output)
        return self.future_heads_loss(z, labels, layer_kwargs, predictions=self.keep_predictions)

    def _trunk_output(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``[s, b, h]``. Upstream's forward has no hook before its output, but returns early on a stage without one."""
        post_process, self.post_process = self.post_process, False
        try:
            z: Tensor = super().forward(input_ids, position_ids, attention_mask)
        finally:
            self.post_process = post_process
        return z


def build_hybrid_model(
    config: TransformerConfig,
    heads: HeadsConfig,
    pattern: str,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    max_sequence_length: int,
    pre_process: bool = True,
    post_process: bool = True,
    tied_embeddings: bool = False,
    rotary_base: int = 10000,
    vp_stage: int | None = None,
    pg_collection: Any = None,
    transformer_engine: bool = False,
) -> MTPHybridModel:
    """One pipeline stage of a hybrid trunk with n heads; the heads are built where ``post_process`` is set.

    Args:
        config: Megatron's; ``num_layers`` counts the pattern's layers, attention and MLP each one.
        pattern: the trunk's layers in megatron-core's notation, ``*`` attention and ``-`` MLP, stages cut by ``|``:
            ``"*-*-|*-*-"`` is a Llama of four layers on two stages.

    The other arguments are those of :func:`mtp_megatron.model.build_model`.

    Raises:
        ConfigError: layers that are not supported, a pattern that does not fit ``config``, or a setting of ``config``
            that the heads cannot work with.
    """
    _check_pattern(config, pattern)
    check_config(config, vocab_size, padded_vocab_size, fp8_heads=heads.fp8, transformer_engine=transformer_engine)
    model = MTPHybridModel(
        config=config,
        hybrid_stack_spec=hybrid_stack_spec(config, transformer_engine=transformer_engine),
        vocab_size=padded_vocab_size,
        max_sequence_length=max_sequence_length,
        hybrid_layer_pattern=pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=tied_embeddings,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    finish(model, heads, vocab_size, padded_vocab_size, vp_stage, transformer_engine=transformer_engine)
    return model


def _check_pattern(config: TransformerConfig, pattern: str) -> None:
    layers = pattern.replace("|", "")
    foreign = sorted(set(layers) - set(LAYERS))
    if foreign or not layers:
        known = ", ".join(f"{symbol} ({name})" for symbol, name in LAYERS.items())
        raise ConfigError(
            "pattern",
            pattern,
            f"it holds {', '.join(foreign) or 'no layer'}; Mamba and other layers need kernels not tested here",
            f"Use {known} and | between stages",
        )
    if len(layers) != config.num_layers:
        raise ConfigError(
            "pattern", pattern, f"{len(layers)} layers for num_layers={config.num_layers}", "Let them agree"
        )
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    if pattern.count("|") + 1 != chunks:
        raise ConfigError(
            "pattern", pattern, f"{pattern.count('|') + 1} stages for {chunks} chunks of the pipeline", "Cut it with |"
        )
