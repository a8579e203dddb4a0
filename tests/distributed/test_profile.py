"""`train.profile_steps`: a trace with the parts of a step, and the same training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_world
from tests.training_runs import metrics, tiny_tree, train_body

SMALL = {"train__global_batch_size": 2, "train__eval_batches": 0}  # torch takes its time for every event


def events_of(trace: Path) -> dict[str, int]:
    """How often each labelled part is in a trace."""
    counts: dict[str, int] = {}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        name = event.get("name", "")
        if name.startswith("mtp/"):
            counts[name] = counts.get(name, 0) + 1
    return counts


def names(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "profile").iterdir())


def test_steps_are_recorded_and_the_training_is_the_same(data: Path, tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    sizes: dict[str, Any] = SMALL | {"train__save_interval": 3, "train__steps": 4, "optimizer__decay_steps": 4}
    tree = tiny_tree(data, run, **sizes, train__profile_steps=[2, 3])
    assert run_world(train_body, 1, tree) == [4]
    assert names(run) == ["rank0-steps2-3.json.gz", "rank0-steps2-3.txt"]
    # Two steps of two microbatches with three heads.
    heads = {f"mtp/head {head} {part}": 4 for head in (1, 2, 3) for part in ("forward", "loss", "loss and backward")}
    assert events_of(run / "profile" / "rank0-steps2-3.json.gz") == {
        **heads,
        "mtp/heads": 12,
        "mtp/data": 4,
        "mtp/trunk forward": 4,
        **dict.fromkeys(("mtp/forward and backward", "mtp/figures over the world", "mtp/optimizer"), 2),
    }
    text = (run / "profile" / "rank0-steps2-3.txt").read_text()
    assert text.startswith("steps 2 to 3 of rank 0, torch ")
    (row,) = [line for line in text.splitlines() if line.startswith("mtp/head 2 forward ")][:1]
    assert row.split()[3] == "2", "per step"
    assert "aten::mm" in text
    assert run_world(train_body, 1, tiny_tree(data, plain, **sizes)) == [4]
    assert metrics(run) == metrics(plain), "to the last digit"
    # A resumption may record other steps, until data is passed over.
    skips = {"train__steps": 7, "train__skip_steps": [[6, 6]]}
    again = tiny_tree(data, run, **sizes | skips, train__profile_steps=[2, 9])
    assert run_world(train_body, 1, again) == [7]
    assert [name for name in names(run) if name.endswith("gz")] == ["rank0-steps2-3.json.gz", "rank0-steps5-5.json.gz"]


@pytest.mark.deepspeed
def test_under_deepspeed_too(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run, config = tmp_path / "run", tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    tree = tiny_tree(data, run, **SMALL, train__steps=3, train__profile_steps=[3, 3])
    tree["run"]["deepspeed"] = str(config)
    assert run_world(train_body, 1, tree) == [3]
    counts = events_of(run / "profile" / "rank0-steps3-3.json.gz")
    assert counts["mtp/head 1 loss"] == counts["mtp/trunk forward"] == 2
    assert counts["mtp/optimizer"] == counts["mtp/data"] == 1
