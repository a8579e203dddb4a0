"""From the quickstart's training to vLLM: its export served with all heads, 50 prompts, text and counts as torch's."""

from __future__ import annotations

import re

import pytest

from mtp_megatron import cli

pytestmark = [pytest.mark.serving, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_vllm_serves_the_export_of_the_quickstart(fast_quickstart, vllm_python, capfd):
    """`--fast` has trained 40 steps on a part of the corpus; the command after it is that of the README."""
    folder, _ = fast_quickstart
    capfd.readouterr()
    prompts = ["--prompts-from", str(folder / "data"), "--num-prompts", "50", "--quiet"]
    status = cli.main(["verify", str(folder / "run" / "export"), "--vllm-python", vllm_python, *prompts])
    captured = capfd.readouterr()
    assert status == 0, captured.err
    assert "Text and accepted drafts are those of the torch decoder" in captured.out
    engine = captured.out.split("vLLM, fp32")[1]
    rows = re.findall(r"^ +(\d)  (\S+) +(\d\.\d\d)", engine, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("1", "-"),
        ("2", "mtp-heads"),
        ("3", "mtp-heads"),
        ("4", "mtp-heads"),
        ("2", "eagle3-head2"),
    ]
    assert float(rows[3][2]) > 1.0
