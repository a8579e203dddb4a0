"""The model for Megatron-LM's ``pretrain``: its arguments to :func:`mtp_megatron.model.build_model`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.training import get_args, get_tokenizer
from megatron.training.arguments import core_transformer_config_from_args

from mtp_megatron.errors import ConfigError
from mtp_megatron.megatron_lm.arguments import check_args
from mtp_megatron.model import MTPGPTModel, build_model
from mtp_megatron.rope import RopeScaling

# What Megatron-LM's --use-rope-scaling means: Llama 3.1's numbers, of which only the factor can be set.
_LOW_FREQ, _HIGH_FREQ, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> MTPGPTModel:
    """One pipeline stage as Megatron-LM asks for it: ``--num-layers`` layers of trunk, and the heads on the last stage.

    Every row of the padded vocabulary takes part in the softmax, as in Megatron-LM's own loss.

    Raises:
        ConfigError: an argument that cannot work with heads, by its name on the command line.
    """
    args = get_args()
    heads = check_args(args)
    config = config or transformer_config(args)
    # Travels with the arguments in every checkpoint, so that an export leaves out the padding rows.
    args.mtp_vocab_size = min(get_tokenizer().vocab_size, args.padded_vocab_size)
    return build_model(
        config,
        heads,
        vocab_size=args.padded_vocab_size,
        padded_vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        rotary_base=args.rotary_base,
        rope_scaling=rope_scaling(args),
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        transformer_engine=args.transformer_impl == "transformer_engine",
    )


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """Megatron-LM's own translation of its arguments, with what a machine without CUDA cannot do put right."""
    if args.yaml_cfg is not None:
        raise ConfigError("--yaml-cfg", args.yaml_cfg, "the heads are chosen by arguments", "Give arguments instead")
    config = core_transformer_config_from_args(args)
    if not torch.cuda.is_available():
        # Freed while gloo still reads it, the interleaved schedule's output reaches the next stage as garbage.
        config.deallocate_pipeline_outputs = False
    return config


def rope_scaling(args: argparse.Namespace) -> RopeScaling | None:
    """How ``--use-rope-scaling`` lowers the rotary frequencies, None without it."""
    if not args.use_rope_scaling:
        return None
    factor = float(getattr(args, "rope_scaling_factor", 8.0))
    return RopeScaling("llama3", factor, _LOW_FREQ, _HIGH_FREQ, _ORIGINAL_CONTEXT)


def get_embedding_ranks(pp_ranks: Sequence[int]) -> list[int]:
    """Ranks of a pipeline that hold the token embedding: the first and, where it is tied to the unembedding, the last.

    Naming the last one where they are not tied would sum unrelated gradients.
    """
    tied = not get_args().untie_embeddings_and_output_weights
    return sorted({pp_ranks[0], pp_ranks[-1]} if tied else {pp_ranks[0]})
