"""From the quickstart's training to vLLM: its export served with all heads, 50 prompts, text and counts as torch's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_megatron import cli

pytestmark = [pytest.mark.serving, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
def test_vllm_serves_the_export_of_the_quickstart(tmp_path, vllm_python, capfd):
    """`--fast` trains 40 steps on a part of the corpus; the commands after it are those of the README."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"MTP_SETUP": "skip", "CUDA_VISIBLE_DEVICES": ""}
    folders = ["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run")]
    subprocess.run(["bash", "tools/quickstart.sh", "--fast", *folders], cwd=ROOT, env=env, check=True, timeout=400)
    capfd.readouterr()
    export = str(tmp_path / "run" / "export")
    prompts = ["--prompts-from", str(tmp_path / "data"), "--num-prompts", "50", "--quiet"]
    status = cli.main(["verify", export, "--vllm-python", vllm_python, *prompts])
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
