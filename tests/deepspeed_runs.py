"""Runs under DeepSpeed for the tests: the tiny recipe with a configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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


def assert_alike(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> None:
    """The figures of two runs are the same to 1e-5, relative; accuracies and learning rates exactly."""
    assert one.keys() == other.keys()
    for step, record in one.items():
        for key, value in record.items():
            expected = other[step][key]
            if key in ("loss", "head_loss", "head_z_loss", "grad_norm"):
                values, wanted = (x if isinstance(x, list) else [x] for x in (value, expected))
                for got, want in zip(values, wanted, strict=True):  # None: a head that had no loss yet
                    assert got == (want if want is None else pytest.approx(want, rel=1e-5)), (step, key)
            else:
                assert value == expected, (step, key)
