"""Runs vLLM in its own environment: the interpreter is given, this process needs no vLLM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mtp_megatron.errors import ConfigError, MTPError
from mtp_megatron.install import EXPLANATION, install_command

PYTHON_VARIABLE = "MTP_VLLM_PYTHON"
PLUGIN = "mtp_megatron"  # the entry point's name in pyproject.toml
_SCRIPT = Path(__file__).with_name("engine_run.py")
_LAST_LINES = 15
# GiB for keys and values on CPU, where vLLM would otherwise ask for 92 % of the machine's memory; no effect on a GPU.
CPU_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "4"}
# A check shares its machine, and so binds no cores. On a GPU vLLM's attention for fp32 is Triton's, which multiplies in
# TF32 unless it is told otherwise: ten bits, where torch's choices are compared to a part in 50000.
_CHECK = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TRITON_F32_DEFAULT": "ieee"}
# What vLLM says where its memory is too small, in vllm.v1.core.kv_cache_utils, torch, and vllm.v1.worker.utils.
_NO_ROOM_FOR_KEYS = re.compile("To serve at least one request|No available memory for the cache blocks")
_OUT_OF_MEMORY = re.compile("out of memory|OutOfMemoryError|is less than desired GPU memory utilization")


class EngineError(MTPError):
    """vLLM could not be run, or did not end well."""


@dataclass(frozen=True)
class EngineRun:
    """One engine to start.

    Attributes:
        name: for messages and for finding the result.
        speculative: vLLM's speculative configuration; None decodes plainly.
        engine: further arguments of ``vllm.LLM``, among them ``dtype`` where it shall not be fp32.
        rounds: how often to decode all prompts, one after another.
    """

    name: str
    speculative: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1


@dataclass(frozen=True)
class EngineRound:
    """All prompts decoded once.

    Attributes:
        tokens: new tokens of each prompt.
        seconds: wall-clock time of all together.
        drafts: how often the heads drafted.
        accepted: acceptances at each position.
    """

    tokens: list[list[int]]
    seconds: float
    drafts: int
    accepted: tuple[int, ...]


def find_python(path: str | None) -> str | None:
    """The interpreter that has vLLM: as given, else of ``MTP_VLLM_PYTHON``, else this one if it has vLLM.

    Raises:
        ConfigError: the path is not an interpreter that imports vLLM.
    """
    import importlib.util

    name, chosen = ("--vllm-python", path) if path else (PYTHON_VARIABLE, os.environ.get(PYTHON_VARIABLE))
    if not chosen:
        return sys.executable if importlib.util.find_spec("vllm") else None
    if shutil.which(chosen) is None:
        raise ConfigError(name, chosen, "is not a program", "Give the python of an environment with vLLM")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([chosen, "-P", "-c", probe], capture_output=True, check=False).returncode:
        remedy = f"Install it there: {install_command('serving')} ({EXPLANATION}); on a CPU: tools/setup_serving.sh"
        raise ConfigError(name, chosen, "has no vLLM", remedy)
    return chosen


def run_vllm(
    python: str,
    model: Path,
    prompts: Sequence[Sequence[int]],
    runs: Sequence[EngineRun],
    *,
    max_new_tokens: int,
    context: int,
    arguments: Sequence[str] = (),
    plugin: bool = True,
    quiet: bool = False,
    environment: dict[str, str] | None = None,
) -> dict[str, list[EngineRound]]:
    """Decode the prompts with each engine in fp32, one engine after another in one process.

    Args:
        python: interpreter that has vLLM.
        model: the bundle's folder.
        prompts: token ids.
        runs: the engines.
        max_new_tokens: new tokens of each prompt; the end of a document does not stop them.
        context: vLLM's ``max_model_len``.
        arguments: of ``vllm serve``, for every engine; they come after those that are set here.
        plugin: some run needs this package's plugin.
        quiet: do not show vLLM's messages.
        environment: added to the process's environment.

    Returns:
        The rounds of each run by its name.

    Raises:
        EngineError: vLLM ended badly; holds its last lines, and names the file in which all of them are kept.
    """
    job = {
        "model": str(model.absolute()),
        "dtype": "float32",
        "max_model_len": context,
        "max_new_tokens": max_new_tokens,
        "prompts": [list(prompt) for prompt in prompts],
        "arguments": list(arguments),
        "plugin": PLUGIN if plugin else None,
        "runs": [vars(run) for run in runs],
    }
    handle, log = tempfile.mkstemp(prefix="mtp-vllm-", suffix=".log")
    with tempfile.TemporaryDirectory(prefix="mtp-vllm-") as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(json.dumps(job), encoding="utf-8")
        command = [python, "-P", str(_SCRIPT), str(job_path), str(result_path)]
        with open(handle, "w+", encoding="utf-8") as kept:
            status = _run(command, {**_CHECK, **engine_environment(), **(environment or {})}, kept, show=not quiet)
            kept.seek(0)
            output = kept.read()
        if status or not result_path.is_file():
            raise EngineError(f"{explain(status, output)}\nAll that it said is in {log}")
        result = json.loads(result_path.read_text(encoding="utf-8"))
    os.remove(log)
    return {run["name"]: [_round(entry) for entry in run["rounds"]] for run in result["runs"]}


def _run(command: Sequence[str], environment: dict[str, str], log: TextIO, *, show: bool) -> int:
    """Run to the end; all that is said goes to ``log``, and to standard error if it is to be shown."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                if show:
                    sys.stderr.write(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode


def engine_environment() -> dict[str, str]:
    """This process's environment without what belongs to its own interpreter."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**CPU_DEFAULTS, **kept}


def explain(status: int, output: str) -> str:
    """An error message of vLLM's last lines, with a remedy where the cause is a known one."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-_LAST_LINES:]
    text = "\n".join(last)
    remedy = ""
    if any("no vLLM plugin named" in line for line in lines):
        remedy = f" Install this package there: PYTHON -m {install_command(no_deps=True)} ({EXPLANATION})."
    elif any("NUMA" in line and "cpu" in line.lower() for line in last):
        remedy = " Set VLLM_CPU_OMP_THREADS_BIND=nobind."
    elif "Unsupported CPU attention configuration" in text:
        remedy = " vLLM's attention for CPUs has no heads narrower than 32: use a GPU, or check without vLLM."
    elif _NO_ROOM_FOR_KEYS.search(text):
        remedy = (
            " Keys and values have too little room: ask for fewer new tokens or shorter prompts, or give it more (CPU: "
            "VLLM_CPU_KVCACHE_SPACE, in GiB; GPU: -- --gpu-memory-utilization 0.95)."
        )
    elif _OUT_OF_MEMORY.search(output):
        remedy = (
            " The memory does not hold the model in fp32: end what else uses it, spread the model over several GPUs "
            "(-- --tensor-parallel-size N), or check without vLLM (--no-vllm)."
        )
    return f"vLLM ended with status {status}.{remedy}" + "".join(f"\n  {line}" for line in last)


def _round(entry: dict[str, Any]) -> EngineRound:
    counters = entry["counters"]
    return EngineRound(
        tokens=entry["tokens"],
        seconds=entry["seconds"],
        drafts=int(counters.get("drafts", 0)),
        accepted=tuple(int(count) for count in counters.get("accepted_per_position", ())),
    )
