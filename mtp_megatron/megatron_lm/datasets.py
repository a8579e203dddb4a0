"""Megatron-LM's data sets from its arguments, as its ``pretrain_gpt.py`` builds them; the wheel has no such script."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

from mtp_megatron.errors import ConfigError

# Fields of GPTDatasetConfig whose argument has another name.
_RENAMED = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}


def train_valid_test_datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Training, validation and test sets of ``num_samples`` samples on this rank, None where it reads no data.

    Raises:
        ConfigError: an argument that asks for data sets of another kind.
    """
    args = get_args()
    if getattr(args, "fim_data", False):
        raise ConfigError("--fim-data", True, "fill-in-the-middle data sets are not built here", "Drop it")
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    kind = MockGPTDataset if args.mock_data else GPTDataset
    on_this_rank = partial(_is_built_on_rank, vp_stage)
    sets: tuple[Any, ...] = BlendedMegatronDatasetBuilder(
        kind, list(num_samples), on_this_rank, dataset_config(args)
    ).build()
    return sets


# Megatron-LM then calls the provider on every rank, not on each pipeline's first alone.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Every field of this release's ``GPTDatasetConfig`` that has an argument of its own."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(GPTDatasetConfig):
        name = _RENAMED.get(field.name, field.name)
        if field.init and hasattr(args, name):
            values[field.name] = getattr(args, name)
    values["tokenizer"] = get_tokenizer()
    values["blend"], values["blend_per_split"] = get_blend_and_blend_per_split(args)
    values["create_attention_mask"] = bool(args.reset_attention_mask)  # a causal one needs no tensor
    values["sequence_parallel_size"] = args.tensor_model_parallel_size * args.sequence_parallel
    sequences = getattr(args, "per_dataset_sequences_path", None)
    if sequences is not None:
        values["sequences_per_dataset"] = json.loads(Path(sequences).read_text(encoding="utf-8"))
    return GPTDatasetConfig(**values)


def _is_built_on_rank(vp_stage: int | None) -> bool:
    where: dict[str, Any] = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    ends = parallel_state.is_pipeline_first_stage(**where) or parallel_state.is_pipeline_last_stage(**where)
    return bool(ends and parallel_state.get_tensor_model_parallel_rank() == 0)
