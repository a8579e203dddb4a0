"""How an engine is started, without one: an interpreter that does something else takes vLLM's place."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from mtp_megatron.serving.engine import EngineError, EngineRun, explain, run_vllm

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


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where files of the run are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


TALK = "print('INFO loading', flush=True); print('warning', file=sys.stderr, flush=True)"


@pytest.mark.parametrize("quiet", [False, True])
def test_messages_are_shown_if_asked_for(tmp_path, temporary, monkeypatch, capfd, quiet):
    """vLLM logs to standard output: what it says goes to standard error, and the level is its own or the user's."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    level = "assert 'VLLM_LOGGING_LEVEL' not in os.environ"
    run(fake_python(tmp_path, f"{level}\n{TALK}\n{DONE}"), tmp_path, quiet=quiet)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ("" if quiet else "INFO loading\nwarning\n")
    assert not list(temporary.iterdir())


def test_all_that_a_failed_engine_said_is_kept(tmp_path, temporary):
    body = f"{TALK}\nfor line in range(50): print('line', line)\nsys.exit(3)"
    with pytest.raises(EngineError, match=r"(?s)vLLM ended with status 3\.\n  line 35\n.*  line 49\n") as error:
        run(fake_python(tmp_path, body), tmp_path, quiet=True)
    (log,) = re.findall(r"All that it said is in (\S+)", str(error.value))
    assert Path(log).parent == temporary
    assert Path(log).read_text().startswith("INFO loading\nwarning\nline 0\n")


def test_arguments_reach_the_job(tmp_path):
    said = tmp_path / "said"
    body = f"pathlib.Path({str(said)!r}).write_text(job.read_text())\n{DONE}"
    run(fake_python(tmp_path, body), tmp_path, arguments=["--tensor-parallel-size", "2"])
    assert json.loads(said.read_text())["arguments"] == ["--tensor-parallel-size", "2"]


def test_an_engine_that_fails_says_why(tmp_path, temporary):
    """This interpreter has the plugin's entry point or not, and no vLLM: either way the error is of the engine."""
    with pytest.raises(EngineError, match="vLLM ended with status 1"):
        run(sys.executable, tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "no vLLM plugin named mtp_megatron is installed in /x (found: none)",
            "PYTHON -m pip install --no-deps PATH_TO_CHECKOUT (",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "--tensor-parallel-size"),
        ("ValueError: Free memory on device cuda:0 is less than desired GPU memory utilization", "end what else uses"),
        ("ValueError: To serve at least one request with the model's max seq len (131072)", "VLLM_CPU_KVCACHE_SPACE"),
        ("ValueError: No available memory for the cache blocks.", "--gpu-memory-utilization"),
    ],
)
def test_known_causes_have_a_remedy(said, remedy):
    assert remedy in explain(1, f"Traceback\n{said}\n")
