"""bench_deepspeed at small sizes: heads are as flat under ZeRO as under megatron-core; what is left out is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from bench.models import Shape
from bench_deepspeed import JOINT, MADE_ANEW, MEGATRON, MIB, WAYS

ROOT = Path(__file__).parents[2]
SHAPE = Shape(hidden=64, ffn=256, attention_heads=1, vocab=4096, sequence=64, batch=2)
FIRST, LAST = 1, 4


@pytest.mark.deepspeed
def test_heads_are_as_flat_under_zero_as_under_megatron_core(tmp_path: Path) -> None:
    sizes = {"vocab": SHAPE.vocab, "hidden": SHAPE.hidden, "sequence": SHAPE.sequence, "batch": SHAPE.batch}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    path = tmp_path / "result.json"
    # A process of its own: an engine leaves traces in the one that made it.
    result = subprocess.run(
        [sys.executable, "tools/bench_deepspeed.py", "--heads", str(FIRST), str(LAST), *options, "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["way"]: row for row in measured["rows"]}
    for way in WAYS:
        assert rows[way]["growth"] <= 1.05
        assert rows[way]["growth"] == pytest.approx(rows[MEGATRON]["growth"], abs=0.02), way
    assert len(measured["limits"]) == len(WAYS)
    assert rows["ZeRO 0" + JOINT]["growth"] > 2, "the limit can be broken"
    # What ZeRO 2 makes anew, and the table leaves out, is one gradient of the model: no activation hides in it.
    last = f"n{LAST}"
    model = 2 * SHAPE.vocab * SHAPE.hidden + (1 + LAST) * SHAPE.layer_parameters()
    left_out = rows["ZeRO 2" + MADE_ANEW][last] - rows["ZeRO 2"][last]
    assert left_out * MIB == pytest.approx(model * torch.float32.itemsize, rel=0.01)
