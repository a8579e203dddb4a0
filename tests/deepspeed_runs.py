"""Runs under DeepSpeed for the tests: the tiny recipe with a configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.training_runs import tiny_tree

TIMEOUT = 300.0  # seconds: DeepSpeed compiles its communication for CPUs at a machine's first start


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed configuration; every parameter is sharded at stage 3, however small."""
    section: dict[str, Any] = {"stage": stage}
    if stage == 3:
        section |= {"stage3_param_persistence_threshold": 0}
    return {"zero_optimization": section, **settings}


def deepspeed_tree(data: Path, run: Path, config: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """A recipe as nested data that trains under ``config``, which is written beside the run's folder."""
    path = run.with_name(f"{run.name}.json")
    path.write_text(json.dumps(config))
    return tiny_tree(data, run, run__deepspeed=str(path), **overrides)


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Whole tensors of a run's newest checkpoint, whichever host saved it."""
    from mtp_megatron.checkpoint.kinds import open_source

    source, _ = open_source(run)
    return {key: source.read(key).float() for key in source.keys()}  # noqa: SIM118 (not a dict)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of any two values; both must hold the same tensors."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)
