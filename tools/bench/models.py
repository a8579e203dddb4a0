"""The models that the benchmarks compare, all built from the same Megatron layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.config import HeadsConfig

if TYPE_CHECKING:  # imports megatron, which a world prepares first
    from mtp_megatron.model import MTPGPTModel


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model and of its batch; ``ffn`` is the width between the MLP's two matrices."""

    hidden: int
    ffn: int
    attention_heads: int
    vocab: int
    sequence: int
    batch: int
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch

    def layer_parameters(self) -> int:
        """Weights in the matrices of one transformer layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.ffn

    def layer_flops(self) -> int:
        """FLOPs of one layer over the batch, forward and backward; attention scores are not cut at the diagonal."""
        return self.tokens * (6 * self.layer_parameters() + 12 * self.sequence * self.hidden)

    def unembedding_flops(self) -> int:
        """FLOPs of one pass through the unembedding over the batch, forward and backward."""
        return self.tokens * 6 * self.hidden * self.vocab


def transformer_config(shape: Shape, num_layers: int, **more: Any) -> Any:
    """Megatron's TransformerConfig: RMSNorm, SwiGLU, rotary embedding, no biases, no dropout."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.attention_heads,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=shape.dtype,
        pipeline_dtype=shape.dtype,
        bf16=shape.dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,
        # Apex's kernel adds to the buffer of a data parallel wrapper, and there is none here.
        **(compat.fusions() | {"gradient_accumulation_fusion": False}),
        **more,
    )


def mtp_model(
    shape: Shape,
    num_trunk_layers: int,
    heads: HeadsConfig,
    device: torch.device,
    pre_process: bool = True,
    transformer_engine: bool = False,
) -> MTPGPTModel:
    """This project's model: a trunk with ``heads.n`` heads."""
    from mtp_megatron.model import build_model

    model = build_model(
        transformer_config(shape, num_trunk_layers),
        heads,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        max_sequence_length=shape.sequence,
        pre_process=pre_process,
        transformer_engine=transformer_engine,
    )
    return _ready(model, device, shape.dtype)


def megatron_model(
    shape: Shape, num_layers: int, mtp_num_layers: int, device: torch.device, pre_process: bool = True
) -> Any:
    """Megatron-core's GPTModel: next token, and ``mtp_num_layers`` further tokens by its own multi-token prediction.

    Every depth's loss weighs 1, as the next token's does.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()  # a process-wide log of losses, as long as the first model was deep
    own = {"mtp_num_layers": mtp_num_layers, "mtp_loss_scaling_factor": float(mtp_num_layers)} if mtp_num_layers else {}
    config = transformer_config(shape, num_layers, **own)
    spec = compat.trunk_block_spec(config)
    spec.layer_norm = compat.norm_class(config)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab,
        max_sequence_length=shape.sequence,
        pre_process=pre_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, compat.layer_spec(config), use_transformer_engine=False)
        if mtp_num_layers
        else None,
    )
    return _ready(model, device, shape.dtype)


def _ready(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """On its device, in training mode, with the gradient buffers that a training run would hold."""
    model = model.to(device).to(dtype).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def tokens_and_labels(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens and next tokens, both ``[b, s]``."""
    whole = torch.randint(shape.vocab, (shape.batch, shape.sequence + 1), generator=torch.Generator().manual_seed(1))
    return whole[:, :-1].contiguous().to(device), whole[:, 1:].contiguous().to(device)


def positions(shape: Shape, device: torch.device) -> Tensor:
    return torch.arange(shape.sequence, device=device).expand(shape.batch, shape.sequence)
