"""Tiny data sets and runs for the tests of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

VOCAB = 257  # bytes and end of document

TINY: dict[str, Any] = {
    "model": {
        "num_trunk_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "seq_length": 32,
    },
    "heads": {"n": 3},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2},
    "train": {
        "steps": 8,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "eval_interval": 4,
        "eval_batches": 2,
        "save_interval": 4,
        "log_interval": 1,
        "timeout_minutes": 1.0,
    },
    "run": {"tensorboard": False},
}


def make_data(folder: Path, seed: int = 0, documents: int = 12, words: int = 150) -> Path:
    """A byte data set of a few documents with some structure in them; each seed makes another one."""
    from mtp_megatron.data.preprocess import PreprocessOptions, preprocess

    rng = np.random.default_rng(seed)
    source = folder / "source"
    source.mkdir(parents=True)
    for index in range(documents):
        text = [f"w{number}" for number in rng.integers(0, 30, size=words)]
        (source / f"{index}.py").write_text(" ".join(text))
    preprocess(PreprocessOptions(output=folder / "data", paths=(source,), valid_fraction=0.2, quiet=True))
    return folder / "data"


def tiny_tree(data: Path, run: Path, **overrides: Any) -> dict[str, Any]:
    """A recipe as nested data; ``train__steps=3`` sets ``train.steps``."""
    tree: dict[str, Any] = json.loads(json.dumps(TINY))
    tree["data"] = {"path": str(data)}
    tree["run"]["path"] = str(run)
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return tree


def train_body(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """For ``run_world``: train the recipe; returns the step reached."""
    from mtp_megatron.training.loop import train
    from mtp_megatron.training.recipe_io import parse_recipe

    return train(parse_recipe(tree)).step


def train_in_small_buckets(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """For ``run_world``: :func:`train_body` with a bucket for each few parameters of Megatron's data parallelism."""
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core import distributed

    whole = distributed.DistributedDataParallelConfig
    with mock.patch.object(distributed, "DistributedDataParallelConfig", lambda **of: whole(bucket_size=2000, **of)):
        return train_body(rank, world_size, tree)


def train_on_scarce_targets(rank: int, world_size: int, tree: dict[str, Any], per_step: int) -> int:
    """For ``run_world``: train where no document is longer than one token: no head but the first ever has a target,
    and in the second step, of ``per_step`` microbatches on each rank, neither has that one."""
    from mtp_megatron.training import batches

    whole, made = batches.future_targets, 0

    def scarce(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        targets = whole(*args, **kwargs)
        targets[0 if made // per_step == 1 else 1 :] = -100
        made += 1
        return targets

    batches.future_targets = scarce
    try:
        return train_body(rank, world_size, tree)
    finally:
        batches.future_targets = whole


def assert_trained_on_scarce_targets(run: Path) -> None:
    """What :func:`train_on_scarce_targets` must leave after three steps with three heads."""
    steps = metrics(run)
    assert list(steps) == [1, 2, 3]
    for step in (1, 3):
        first, *others = steps[step]["head_loss"]
        assert first is not None
        assert others == [None, None]
        assert steps[step]["loss"] == first
        assert steps[step]["grad_norm"] > 0
    assert steps[2]["head_loss"] == steps[2]["head_accuracy"] == [None] * 3
    assert steps[2]["loss"] is None
    assert steps[2]["grad_norm"] == 0


def metrics(run: str | Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """Records of a run by step, without what time of day and machine decide."""
    records = {}
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == kind:
            for speed in ("tokens_per_second", "tflops_per_gpu"):
                record.pop(speed, None)
            assert record["step"] not in records, "a step was reported twice"
            records[record["step"]] = record
    return records


def interrupted_copy(run: Path, copy: Path, step: int) -> Path:
    """What a job killed after its checkpoint of ``step`` leaves: that checkpoint, and metrics beyond it."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) > step:
            shutil.rmtree(folder)
    (copy / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return copy


def complete(run: Path, step: int, recipe: Any, /, **changes: Any) -> Path:
    """As much of a checkpoint of a run as the checks before a training look at; ``changes`` go into its description."""
    folder = run / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    described = {
        "model": recipe.model.model_dump(mode="json"),
        "heads": recipe.heads.model_dump(mode="json"),
        "padded_vocab_size": 384,
        **changes,
    }
    (folder / "mtp_config.json").write_text(json.dumps(described))
    (folder / "files.json").write_text("{}")
    return folder


def largest_difference(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> float:
    """Largest relative difference of any head's loss at any step; both must hold the same steps."""
    assert one.keys() == other.keys()
    return max(
        abs(a - b) / abs(b)
        for step in one
        for a, b in zip(one[step]["head_loss"], other[step]["head_loss"], strict=True)
    )
