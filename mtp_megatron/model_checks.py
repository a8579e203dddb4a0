"""Settings and inputs of Megatron's that the heads cannot work with: refused by name, before a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtp_megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def check_config(config: TransformerConfig, vocab_size: int, padded_vocab_size: int) -> None:
    """Refuse settings of ``config`` that the heads cannot work with.

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
    for field in ("fp8", "fp4"):
        if getattr(config, field, None):
            raise ConfigError(
                field,
                getattr(config, field),
                "megatron-core enters its low-precision context around the trunk's layers, and the heads' layers run "
                "outside of it",
                "Leave it unset and train in bf16",
            )


def check_forward(packed_seq_params: Any) -> None:
    """Refuse inputs that the heads cannot work with.

    Raises:
        ConfigError: sequences packed for variable-length attention.
    """
    if packed_seq_params is not None:
        raise ConfigError(
            "packed_seq_params",
            type(packed_seq_params).__name__,
            "the heads' targets are built for sequences of one length, [n, batch, sequence]",
            "Pass whole sequences; targets end with their document (mtp_megatron.targets.future_targets)",
        )
