"""Every test that docs/support.md names exists, and every row names one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [
    line
    for line in (ROOT / "docs/support.md").read_text().splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| | with"))
]


def collected(names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_row_names_a_test_that_exists() -> None:
    named = [re.findall(r"`(tests/[^`]+)`", row) for row in ROWS]
    assert len(ROWS) > 20
    assert [row for row, names in zip(ROWS, named, strict=True) if not names] == []
    result = collected(sorted({name for names in named for name in names}))
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_test_that_does_not_exist_would_be_noticed() -> None:
    assert collected(["tests/unit/test_model_checks.py::test_a_setting_is_refused_by_name[nothing]"]).returncode != 0


def test_rows_of_deepspeed_say_on_what_they_run() -> None:
    """The second environment, with 0.19.2, has no DeepSpeed."""
    rows = [row for row in ROWS if "test_deepspeed" in row]
    assert len(rows) >= 3
    assert [row for row in rows if "0.16.1 only" not in row] == []
