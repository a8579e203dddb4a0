"""vLLM itself: the text and the accepted drafts are those that torch predicts. One process, several engines."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.drafts import EAGLE3_FOLDER, HEADS_FOLDER
from mtp_megatron.serving.engine import EngineRun, run_vllm
from mtp_megatron.serving.engine_command import speculative_config
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import Counts, simulate, total
from mtp_megatron.serving.verify import (
    VerificationError,
    compare_counts,
    engine_runs,
    padded_drafts,
    run_engines,
    table,
)
from tests.serving.conftest import NEW_TOKENS
from tests.serving.models import CONFIG, trained_weights, write_export

pytestmark = [pytest.mark.serving, pytest.mark.slow]
EAGER = {"enforce_eager": True}


def test_every_number_of_heads_is_exact(bundle, simulations, vllm_python):
    """50 prompts at once: plain, 1, 2 and 3 heads beside head 1, and head 2 as stock EAGLE-3."""
    results = run_engines(vllm_python, bundle, simulations, eager=True, quiet=True)
    print(table(results))
    assert [(result.draft, result.heads) for result in results] == [
        (None, 0),
        (HEADS_FOLDER, 1),
        (HEADS_FOLDER, 2),
        (HEADS_FOLDER, 3),
        (EAGLE3_FOLDER, 1),
    ]
    best = results[3]
    # The comparison says something only where some drafts are right and some are wrong, at every position.
    assert 0 < best.counts.accepted[2] < best.counts.accepted[1] < best.counts.accepted[0] < best.counts.drafts
    # Control: other counts are told from these.
    with pytest.raises(VerificationError, match="accepted at each position"):
        compare_counts("control", best.counts, total(simulations[1:], 3))


def test_chunked_prefill_prefix_caching_and_mixed_batches(bundle, simulations, vllm_python, context):
    """Prompts in pieces, few requests at a time so that prompts and decoding share batches, prompts seen before."""
    speculative = speculative_config(bundle, HEADS_FOLDER, 3)
    # Room for a piece of every request at once: under a tighter budget vLLM cuts drafts short, and counts differ.
    chunked = {**EAGER, "enable_chunked_prefill": True, "long_prefill_token_threshold": 8}
    chunked |= {"max_num_batched_tokens": 32, "max_num_seqs": 4}
    runs = [
        EngineRun("chunked", speculative, {**chunked, "enable_prefix_caching": False}),
        # The second round finds every prompt's blocks in the cache, written by the first.
        EngineRun("cached", speculative, {**EAGER, "enable_prefix_caching": True, "block_size": 32}, rounds=2),
    ]
    rounds = run_vllm(
        vllm_python,
        bundle,
        [simulation.prompt for simulation in simulations],
        runs,
        max_new_tokens=NEW_TOKENS,
        context=context,
        quiet=True,
    )
    expected = total(simulations, 3)
    for made in (*rounds["chunked"], *rounds["cached"]):
        assert made.tokens == [simulation.text for simulation in simulations]
        compare_counts("vLLM", Counts(made.drafts, made.accepted), expected, padded=padded_drafts(simulations))
    assert rounds["cached"][1].drafts == expected.drafts


def assert_as_simulated(python: str, bundle: Path, simulations, context: int, run: EngineRun, heads: int, **options):
    """One run of vLLM gives the simulations' text, and accepts the drafts that they accept."""
    prompts = [simulation.prompt for simulation in simulations]
    options |= {"max_new_tokens": NEW_TOKENS, "context": context, "quiet": True}
    (made,) = run_vllm(python, bundle, prompts, [run], **options)[run.name]
    expected = total(simulations, heads)
    assert made.tokens == [simulation.text for simulation in simulations]
    assert (made.drafts, made.accepted) == (expected.drafts, expected.accepted)


def test_tensor_parallel(bundle, simulations, vllm_python, context):
    """Two workers, each with half of the attention heads (one key/value head, held by both)."""
    arguments = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]  # as after `verify ... --`
    run = EngineRun("tp2", speculative_config(bundle, HEADS_FOLDER, 3), EAGER)
    assert_as_simulated(vllm_python, bundle, simulations, context, run, heads=3, arguments=arguments)


def test_tied_embeddings_and_bf16(tmp_path, vllm_python):
    """Tied: exact in fp32. bf16: two programs round differently, so most drafts must agree, not all."""
    config = dataclasses.replace(CONFIG, tied=True)
    export = write_export(tmp_path / "export", trained_weights(config), config)
    tied = write_bundle(export, tmp_path / "bundle", progress=False).output
    model = HeadsLlama.load(open_export(tied))
    made = [simulate(model, [1 + number, 2 * number], NEW_TOKENS) for number in range(12)]
    made = [simulation for simulation in made if simulation.certain]
    runs = [run for run in engine_runs(tied, 3, eager=True, rounds=1) if run.name[-1] in "31"]
    last = runs[-2]  # all heads
    half = dataclasses.replace(last, name="bf16", engine={**last.engine, "dtype": "bfloat16"})
    prompts = [simulation.prompt for simulation in made]
    options = {"max_new_tokens": NEW_TOKENS, "context": config.context, "quiet": True}
    rounds = run_vllm(vllm_python, tied, prompts, [*runs, half], **options)
    (low,) = rounds.pop("bf16")
    for name, (first,) in rounds.items():
        expected = total(made, int(name[-1]))
        assert first.tokens == [simulation.text for simulation in made], name
        assert (first.drafts, first.accepted) == (expected.drafts, expected.accepted), name
    expected = total(made, 3)
    assert abs(sum(low.accepted) / low.drafts - sum(expected.accepted) / expected.drafts) < 0.5
    assert torch.bfloat16 != model.dtype


def test_the_eagle3_draft_needs_nothing_of_this_package(bundle, simulations, vllm_python, context, tmp_path):
    """A copy of the environment's packages without this one: vLLM reads head 2, and cannot read the others."""
    packages = subprocess.run(
        [vllm_python, "-P", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    stock = tmp_path / "stock"
    stock.mkdir()
    for entry in Path(packages).iterdir():
        if "mtp_megatron" not in entry.name and entry.suffix != ".pth":
            (stock / entry.name).symlink_to(entry)
    base = subprocess.run(
        [vllm_python, "-P", "-c", "import os, sys; print(os.path.join(sys.base_prefix, 'bin', 'python3'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    environment = {"PYTHONPATH": str(stock), "PYTHONNOUSERSITE": "1"}
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('mtp_megatron') is not None)"
    subprocess.run([base, "-P", "-c", probe], check=True, env=environment)
    run = EngineRun("stock", speculative_config(bundle, EAGLE3_FOLDER, 1), EAGER)
    assert_as_simulated(base, bundle, simulations, context, run, heads=1, plugin=False, environment=environment)
    assert sys.executable != base
