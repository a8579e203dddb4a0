"""Settings and inputs of Megatron's that the heads cannot work with: refused by name, before a model is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtp_megatron.compat import fp8
from mtp_megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def check_config(
    config: TransformerConfig,
    vocab_size: int,
    padded_vocab_size: int,
    *,
    fp8_heads: bool = False,
    transformer_engine: bool = False,
) -> None:
    """Refuse settings of ``config`` that the heads, or this machine, cannot work with.

    Raises:
        ConfigError: names the field.
    """
    tensor = config.tensor_model_parallel_size
    if padded_vocab_size < vocab_size or padded_vocab_size % tensor:
        raise ConfigError(
            "padded_vocab_size",
            padded_vocab_size,
            f"must be at least vocab_size={vocab_size} and divisible by tensor parallel size {tensor}",
            f"Use {-(-vocab_size // tensor) * tensor}",
        )
    if config.mtp_num_layers:
        raise ConfigError(
            "mtp_num_layers",
            config.mtp_num_layers,
            "megatron-core's own multi-token prediction cannot be combined with these heads",
            "Leave it unset and choose heads.n",
        )
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise ConfigError(
            "defer_embedding_wgrad_compute",
            True,
            "the heads compute the unembedding's gradient themselves",
            "Turn it off",
        )
    if config.cuda_graph_impl != "none":
        raise ConfigError(
            "cuda_graph_impl",
            config.cuda_graph_impl,
            "the heads run inside the backward pass, and a graph captured from the forward pass would leave them out",
            "Set it to 'none'",
        )
    cut = getattr(config, "gtp_weight_remat_size", 1)
    if cut > 1:
        raise ConfigError(
            "tensor_parallel_num_weight_shards",
            tensor * cut,
            f"each tensor parallel rank's unembedding would lie in {cut} pieces, and the heads read it whole",
            f"Leave it at tensor_model_parallel_size={tensor}",
        )
    if getattr(config, "fp8_output_proj", False):
        raise ConfigError(
            "fp8_output_proj", True, "the heads compute the unembedding themselves, in the weights' type", "Turn it off"
        )
    _check_low_precision(config, fp8_heads, transformer_engine)


def _check_low_precision(config: TransformerConfig, heads: bool, transformer_engine: bool) -> None:
    request = fp8.Request(
        fp8=config.fp8,
        fp8_recipe=getattr(config.fp8_recipe, "value", config.fp8_recipe),
        fp8_param=config.fp8_param,
        fp4=getattr(config, "fp4", None),
        first_last_layers_bf16=config.first_last_layers_bf16,
        heads=heads,
        bf16=config.bf16,
        transformer_engine=transformer_engine,
    )
    fp8.check(request, {"heads": "heads.fp8"})


def check_spread(config: TransformerConfig, n: int, owned: Sequence[int] | None, post_process: bool) -> None:
    """Refuse heads on a stage before the last where Megatron divides the loss on the last stage alone.

    Without ``calculate_per_token_loss`` its schedule divides each microbatch's loss by the count of tokens and by the
    number of microbatches; both are known on the last stage only, so the other stages' heads would learn that many
    times faster (:func:`.carry.carry` knows the loss scale alone).

    Args:
        n: heads of the model.
        owned: this stage's heads, as :func:`.model.build_model` takes them.
        post_process: whether this is the last stage.

    Raises:
        ConfigError: names the field.
    """
    spread = bool(owned) and not (post_process and len(owned or ()) == n)
    if spread and not config.calculate_per_token_loss:
        raise ConfigError(
            "calculate_per_token_loss",
            config.calculate_per_token_loss,
            f"of {n} heads this stage holds {[head + 1 for head in owned or ()]}, and Megatron would divide the loss "
            "of those on the last stage alone by its tokens and microbatches",
            "Set it to True, or leave all heads on the last stage",
        )


def check_forward(packed_seq_params: Any, *, transformer_engine: bool = False, context: int = 1) -> None:
    """Refuse inputs that the layers cannot work with.

    Args:
        packed_seq_params: boundaries of documents for variable-length attention; None: there are none.
        transformer_engine: whether trunk and heads are a GPTModel of Transformer Engine's layers.
        context: context parallel size.

    Raises:
        ConfigError: packed sequences for layers that would take them for one, or that are not tested with them.
    """
    if packed_seq_params is None:
        return

    def refuse(problem: str, remedy: str) -> ConfigError:
        return ConfigError("packed_seq_params", type(packed_seq_params).__name__, problem, remedy)

    mask = "Pass an attention_mask in their place (mtp_megatron.documents.document_mask)"
    if not transformer_engine:
        raise refuse("only a GPTModel of Transformer Engine's layers attends within them here", mask)
    if context > 1:
        raise refuse(
            f"context_parallel_size={context} would cut each document by itself, and targets are cut by sequence",
            "Set context_parallel_size to 1, or build the model without Transformer Engine and pass an attention_mask",
        )
    layout = getattr(packed_seq_params, "qkv_format", None)
    if layout != "thd":
        raise refuse(
            f"its qkv_format is {layout!r}, with which attention sees whole rows",
            "Set it to 'thd', and pass tokens [1, t] and targets [n, 1, t] "
            "(mtp_megatron.documents.document_boundaries)",
        )


def check_mask(attention_mask: Any, *, transformer_engine: bool) -> None:
    """Refuse an attention mask for layers that would not look at it.

    Raises:
        ConfigError: Transformer Engine's layers. They are built causal, and then its flash and cuDNN kernels take no
            notice of a mask (``DotProductAttention.forward``: "should be None for causal masks").
    """
    if attention_mask is not None and transformer_engine:
        raise ConfigError(
            "attention_mask",
            tuple(attention_mask.shape),
            "Transformer Engine's layers are causal, and their fused kernels ignore any other mask",
            "Pass None for causal attention; for attention within documents give a GPTModel packed_seq_params "
            "(mtp_megatron.documents.document_boundaries)",
        )
