"""Layer specs of a GPT trunk and its heads, from megatron-core's own functions that all supported versions share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mtp_megatron.compat import packages
from mtp_megatron.compat.devices import prepare
from mtp_megatron.compat.experts import require_grouped_experts

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec, TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def _prepare(transformer_engine: bool) -> None:
    prepare()
    if transformer_engine:
        packages.require_transformer_engine(torch.cuda.is_available())


def layer_spec(config: TransformerConfig, *, transformer_engine: bool = False) -> ModuleSpec:
    """Spec of one dense transformer layer; where the trunk has experts, a layer without them.

    Args:
        config: decides the norm (`config.normalization`), query/key norms and latent attention.
        transformer_engine: use Transformer Engine's modules instead of megatron-core's own.
    """
    _prepare(transformer_engine)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs

    # Signatures of the functions for single layers differ between versions; that of the list is the same since 0.16.
    dense = copy.copy(config)
    dense.moe_layer_freq = [0] * config.num_layers
    specs: list[ModuleSpec] = get_gpt_decoder_layer_specs(
        dense, use_transformer_engine=transformer_engine, normalization=config.normalization
    )
    if not transformer_engine:
        _put_attention(config, specs)
    return specs[0]


def trunk_block_spec(
    config: TransformerConfig, vp_stage: int | None = None, *, transformer_engine: bool = False
) -> TransformerBlockSubmodules:
    """Spec of the trunk layers of this pipeline stage (and virtual stage), without a final norm: the heads own it.

    Raises:
        EnvironmentUnsupported: the layers' modules are not here, those for experts included (``moe_grouped_gemm``).
    """
    _prepare(transformer_engine)
    if transformer_engine and config.num_moe_experts is not None and config.moe_grouped_gemm:
        require_grouped_experts()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec: TransformerBlockSubmodules = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    spec.layer_norm = None
    if not transformer_engine:
        _put_attention(config, spec.layer_specs)
    return spec


def _put_attention(config: TransformerConfig, specs: Sequence[ModuleSpec]) -> None:
    """Megatron-core's own attention drops masks in its fused softmax and refuses context parallelism; put one in its
    place that does neither."""
    from mtp_megatron.compat.context_attention import GatherContextAttention
    from mtp_megatron.compat.masked_attention import MaskedAttention

    attention = MaskedAttention if config.context_parallel_size == 1 else GatherContextAttention
    for spec in specs:
        spec.submodules.self_attention.submodules.core_attention = attention


def norm_class(config: TransformerConfig, *, transformer_engine: bool = False) -> Any:
    """Norm to be built as `norm_class(config)(config=config, hidden_size=h, eps=config.layernorm_epsilon)`."""
    _prepare(transformer_engine)
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    from megatron.core.models.backends import LocalSpecProvider

    return LocalSpecProvider().layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False)
