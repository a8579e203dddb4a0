"""`tools/quickstart.sh --fast`: the whole path on a part of the real corpus, interrupted and resumed on the way."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.quickstart_runs import quickstart

ROOT = Path(__file__).parents[2]


def steps_in(run: Path, kind: str) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == kind]


def check_results(run: Path, out: str, heads: int) -> None:
    assert "interrupting the training on purpose" in out
    assert steps_in(run, "train") == list(range(1, 41)), "a step is missing or was logged twice over the interruption"
    report = json.loads((run / "report.json").read_text())
    assert [row["head"] for row in report["heads"]] == list(range(1, heads + 1))
    first, last = (report["heads"][0][key] for key in ("validation_loss", "validation_accuracy"))
    assert 0 < first < 6.5
    assert 0 < last < 1
    speculative = report["speculative"]
    assert speculative["identical"] is True
    assert speculative["heads_used"] == heads
    assert [row["heads"] for row in speculative["by_heads"]] == list(range(1, heads + 1))
    assert 1.0 <= speculative["tokens_per_forward"] <= heads
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "export" / "mtp-heads" / "mtp_heads.safetensors").exists()
    assert "head  validation loss  validation accuracy" in out
    assert "tokens per forward, speedup" in out


@pytest.mark.timeout(1700)
def test_quickstart_from_corpus_to_report(fast_quickstart):
    folder, output = fast_quickstart
    check_results(folder / "run", output, heads=4)

    # Again: nothing is trained a second time, and the report is the same.
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    again = quickstart(folder, "--fast")
    assert again.returncode == 0, again.stdout
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
    assert "interrupting" not in again.stdout


@pytest.mark.timeout(1700)
def test_quickstart_on_bytes_with_eight_heads(tmp_path):
    result = quickstart(tmp_path, "--fast", "--bytes")
    assert result.returncode == 0, result.stdout
    check_results(tmp_path / "run", result.stdout, heads=8)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--slow"], "unknown option --slow"), (["faster"], "neither an option nor KEY=VALUE")]
)
def test_wrong_arguments_are_refused_before_any_work(tmp_path, arguments, message):
    result = quickstart(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option():
    out = subprocess.run(["bash", "tools/quickstart.sh", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for option in ("--bytes", "--fast", "--data", "--run", "KEY=VALUE"):
        assert option in out
