"""Runs vLLM on token prompts and writes what it made; a script for the interpreter that has vLLM.

    python -P engine_run.py JOB.json RESULT.json

It imports vLLM and the standard library alone: that interpreter need not have this package. See
:mod:`mtp_megatron.serving.engine` for the job and the result.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from typing import Any

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_per_position",
}


def run(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One engine, all prompts at once, greedily."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    # The engine's own settings may differ from run to run: chunked prefill, prefix caching, compilation.
    options: dict[str, Any] = {
        "model": job["model"],
        "dtype": job["dtype"],
        "max_model_len": job["max_model_len"],
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **settings.get("engine", {}),
        **engine_options(job.get("arguments", [])),
    }
    if settings.get("speculative"):
        options["speculative_config"] = settings["speculative"]
    llm = LLM(**options)
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], ignore_eos=True, detokenize=False)
    warm = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    rounds: list[dict[str, Any]] = []
    for _ in range(settings.get("rounds", 1)):
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        if not rounds:
            llm.generate([{"prompt_token_ids": job["prompts"][0][:1]}], warm, use_tqdm=False)
        before = counters(llm)
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        rounds.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "seconds": seconds,
                "counters": difference(counters(llm), before),
            }
        )
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"name": settings["name"], "rounds": rounds}


def engine_options(arguments: list[str]) -> dict[str, Any]:
    """Arguments of ``vllm serve`` as those of ``vllm.LLM``: the ones that are given, and no defaults."""
    if not arguments:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vLLM"))
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value != defaults[name]}


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's speculation counters so far; empty without speculation."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if metric.name in COUNTERS:
            found[COUNTERS[metric.name]] = list(metric.values) if hasattr(metric, "values") else metric.value
    return found


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What was counted in between."""
    return {
        name: [a - b for a, b in zip(value, before[name], strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in after.items()
    }


def main() -> None:
    """Read the job, run it, write the result at the end (a job that fails leaves none)."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    plugins = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if job.get("plugin") and job["plugin"] not in plugins:
        sys.exit(f"no vLLM plugin named {job['plugin']} is installed in {sys.prefix} (found: {plugins or 'none'})")
    # In this process, so that counters of all runs can be read; small defaults where the caller has not chosen.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    runs = []
    for number, settings in enumerate(job["runs"], start=1):
        print(f"[engine] {number} of {len(job['runs'])}: {settings['name']}", file=sys.stderr, flush=True)
        runs.append(run(job, settings))
    result = {
        "vllm": vllm.__version__,
        "plugins": plugins,
        "has_this_package": importlib.util.find_spec("mtp_megatron") is not None,
        "runs": runs,
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
