"""Data as Megatron-LM's tools/preprocess_data.py writes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch


def write_upstream(prefix: Path, documents: Iterable[list[list[int]]], dtype: str = "uint16") -> Path:
    """By megatron-core's builder, as that script does; a document is a list of sequences of ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
