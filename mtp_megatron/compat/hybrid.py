"""Megatron-core's HybridModel (0.19 on) from megatron-core's own layers; upstream has specs of Transformer Engine's
alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_megatron.compat.specs import layer_spec
from mtp_megatron.compat.versions import EnvironmentUnsupported, require_megatron_core

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec, TransformerConfig


def require_hybrid_model() -> None:
    """Refuse to go on where megatron-core has no HybridModel.

    Raises:
        EnvironmentUnsupported: a version before 0.19.
    """
    version = require_megatron_core()
    if version.release < (0, 19):
        raise EnvironmentUnsupported(
            f"megatron-core {version} has no HybridModel with pipeline segments, 0.19 and later have. Use "
            'mtp_megatron.model.build_model, or run: pip install "megatron-core>=0.19,<0.20"'
        )


def hybrid_stack_spec(config: TransformerConfig, *, transformer_engine: bool = False) -> ModuleSpec:
    """Spec of a HybridStack of attention (``*``) and MLP (``-``) layers without a final norm: the heads own it.

    Each of the two is one half of the transformer layer that :func:`.specs.layer_spec` describes.
    """
    require_hybrid_model()
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules

    whole = layer_spec(config, transformer_engine=transformer_engine).submodules
    keys = whole.sharded_state_dict_keys_map
    attention = TransformerLayerSubmodules(
        input_layernorm=whole.input_layernorm,
        self_attention=whole.self_attention,
        self_attn_bda=whole.self_attn_bda,
        sharded_state_dict_keys_map={old: new for old, new in keys.items() if old.startswith("input_layernorm")},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=whole.pre_mlp_layernorm,
        mlp=whole.mlp,
        mlp_bda=whole.mlp_bda,
        sharded_state_dict_keys_map={old: new for old, new in keys.items() if not old.startswith("input_layernorm")},
    )
    return ModuleSpec(
        module=HybridStack,
        params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
