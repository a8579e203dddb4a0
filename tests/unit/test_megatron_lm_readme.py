"""What examples/megatron_lm/README.md says: its table of arguments."""

from __future__ import annotations

import re
from pathlib import Path

from mtp_megatron.megatron_lm.arguments import FLAGS

README = Path(__file__).parents[2] / "examples" / "megatron_lm" / "README.md"


def test_the_table_lists_the_parsers_arguments_and_no_other() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `--mtp")]
    listed = [name for row in rows for name in re.findall(r"`(--mtp-[\w-]+)", row.split("|")[1])]
    assert sorted(listed) == sorted(flag.name for flag in FLAGS)
