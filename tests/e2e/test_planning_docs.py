"""The commands of docs/planning.md run, and traces of 13B and 70B ranks stay within their limits."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_megatron.training.recipe_io import load_recipe
from mtp_megatron.training.validate import check_recipe

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^(?:<!-- test: (.+?) -->\n)?```bash\n(.*?)^```$",
    (ROOT / "docs/planning.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
# Of the whole command, Python's start and imports included; seconds of the processor, for the machine may be shared.
TRACE_MEMORY = 2**30
TRACE_SECONDS = {"13B": 15, "70B": 60}


def test_every_block_is_run() -> None:
    assert len(BLOCKS) >= 4
    assert {directive for directive, _ in BLOCKS} == {"run"}


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=lambda code: " ".join(code.split()[1:3]))
def test_the_command_does_what_the_document_says(code: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program, *arguments = code.split()
    assert program == "mtp-megatron"
    text, used = run(arguments, tmp_path)
    if "--trace" in arguments:
        assert "rank 31 of 32" in text
        assert "Adam moments" in text
        assert_within_limits(used, TRACE_SECONDS["13B"])
    elif "--search" in arguments:
        check_recipe(load_recipe(tmp_path / "found.yaml"), world_size=8, tokenizer_vocab_size=128000)
        rows = [line.split() for line in text.splitlines() if re.match(r" +[1-9-] +\d+ ", line)]
        (best, *_, end), table = (rows[0], *rows[1:]), (ROOT / "docs/planning.md").read_text()
        for row in (best, end):  # the ratio to the mean, and the step's seconds
            assert f"| {row[8]} | {row[12]} s |" in table, text
    elif "--memory" in arguments:
        assert "does NOT fit 60 GB" in text
        assert "train.micro_batch_size=4" in text
    else:
        assert "13,0" in text
        assert (tmp_path / "pipeline.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_the_last_rank_of_70b_at_tp8_pp8_is_traced_in_a_minute(tmp_path: Path) -> None:
    text, used = run(["plan", "70B", "--gpus", "64", "--trace", "63"], tmp_path)
    assert "rank 63 of 64" in text
    assert {"TP7", "PP7"} <= set(re.findall(r"[A-Z]+\d+", text))
    assert_within_limits(used, TRACE_SECONDS["70B"])


def assert_within_limits(used: resource.struct_rusage, seconds: int) -> None:
    assert used.ru_maxrss * 1024 < TRACE_MEMORY
    assert used.ru_utime + used.ru_stime < seconds


def run(arguments: list[str], tmp_path: Path) -> tuple[str, resource.struct_rusage]:
    """What the command printed, and what its process took."""
    output = tmp_path / "output"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtp_megatron", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    text = output.read_text()
    assert process.returncode == 0, text
    return text, used
