"""The plugin's draft class inside vLLM, without an engine: see heads_probe.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serving, pytest.mark.slow]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def probed(bundle, vllm_python, tmp_path_factory):
    """The probe's answers; this checkout's package comes before an installed one."""
    result = tmp_path_factory.mktemp("probe") / "result.json"
    done = subprocess.run(
        [vllm_python, "-P", str(REPOSITORY / "tests" / "serving" / "heads_probe.py"), str(bundle), str(result)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(result.read_text())


def test_each_number_of_heads_has_its_own_compiled_graph(probed):
    """vLLM's own hash leaves the number out, and a graph of two heads would be run for three."""
    assert len(set(probed["graphs"])) == 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_heads_are_quantised_as_the_draft_is(probed, family):
    """The target's FP8 is not the heads': their tensors are those of the export."""
    assert probed["quantisation"][family] == ["UnquantizedLinearMethod"] * 4
