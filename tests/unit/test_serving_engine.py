"""How an engine is started, without one: an interpreter that does something else takes vLLM's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mtp_megatron.serving.engine import EngineRun, run_vllm

RUN = EngineRun("plain")
ROUND = {"tokens": [[7]], "seconds": 1.0, "counters": {}}
# Ends as a run of vLLM does.
DONE = f"result.write_text(json.dumps({{'runs': [{{'name': 'plain', 'rounds': [{ROUND}]}}]}}))"


def fake_python(folder: Path, body: str) -> str:
    """An interpreter that runs ``body`` in place of engine_run.py: ``job`` is what it was given, ``result`` a path."""
    path = folder / "python"
    lines = ("import json, os, pathlib, sys", "job, result = map(pathlib.Path, sys.argv[3:5])", body)
    path.write_text("\n".join((f"#!{sys.executable}", *lines)))
    path.chmod(0o755)
    return str(path)


def run(python: str, folder: Path, **options):
    """One prompt of one token, one run."""
    return run_vllm(python, folder, [[1]], [RUN], max_new_tokens=1, context=8, **options)


@pytest.mark.parametrize(("chosen", "expected"), [(None, "ieee"), ("tf32", "tf32")])
def test_fp32_is_fp32_on_a_gpu_too(tmp_path, monkeypatch, chosen, expected):
    """Triton's products are in TF32 otherwise; what the user has set stays."""
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    if chosen:
        monkeypatch.setenv("TRITON_F32_DEFAULT", chosen)
    said = tmp_path / "said"
    python = fake_python(tmp_path, f"pathlib.Path({str(said)!r}).write_text(json.dumps(dict(os.environ)))\n{DONE}")
    assert run(python, tmp_path)["plain"][0].tokens == [[7]]
    assert json.loads(said.read_text())["TRITON_F32_DEFAULT"] == expected
