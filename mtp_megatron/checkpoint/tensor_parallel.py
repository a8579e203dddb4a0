"""How megatron-core's tensor parallelism cuts each parameter of a model, by its name in the state dictionary.

Parameters that no pattern matches are the same on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = (  # cut along their first axis: columns of the layer's output
    r".*word_embeddings\.weight",
    r".*output_layer\.weight",
    r"unembedding_heads\..*\.weight",
    r".*linear_qkv\.(weight|bias)",
)
GATE_AND_UP = (r".*linear_fc1\.weight",)  # two such parameters, one after the other, each cut
COLUMNS = (r".*linear_proj\.weight", r".*linear_fc2\.weight")  # cut along their second axis: the layer's input


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is all of ``name``."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def is_sharded(name: str) -> bool:
    """Whether each tensor parallel rank holds a part of parameter ``name``."""
    return matches(name, (*ROWS, *GATE_AND_UP, *COLUMNS))


def merge(name: str, shards: Sequence[Tensor]) -> Tensor:
    """The whole parameter from what the tensor parallel ranks hold, in their order; meta tensors will do."""
    if matches(name, GATE_AND_UP):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    if matches(name, ROWS):
        return torch.cat(list(shards))
    if matches(name, COLUMNS):
        return torch.cat(list(shards), dim=1)
    return shards[0]


def split(name: str, whole: Tensor, ranks: int) -> list[Tensor]:
    """What each of ``ranks`` tensor parallel ranks holds of a parameter: :func:`merge` backwards."""
    if matches(name, GATE_AND_UP):
        gates, ups = (part.chunk(ranks) for part in whole.chunk(2))
        return [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    if matches(name, ROWS):
        return list(whole.chunk(ranks))
    if matches(name, COLUMNS):
        return list(whole.chunk(ranks, dim=1))
    return [whole] * ranks
