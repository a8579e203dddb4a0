"""vLLM with heads of every family: the layers of Qwen2 and Qwen3, a trunk with experts, lowered rotary frequencies."""

from __future__ import annotations

import pytest

from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.drafts import HEADS_FOLDER
from mtp_megatron.serving.engine import EngineRun, run_vllm
from mtp_megatron.serving.engine_command import speculative_config
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import simulate, total
from tests.foreign_models import VOCAB, write_hf

pytestmark = [pytest.mark.serving, pytest.mark.slow]
# vLLM's CPU attention has no heads narrower than 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
NEW_TOKENS = 16


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3_moe", "llama3"])
def test_text_and_counts_are_those_of_torch(case, tmp_path, vllm_python):
    """Heads 2 and 3 are copies of head 1: right wherever the random model repeats itself."""
    source = write_hf(tmp_path / "source", case, **SIZES)
    bundle = write_bundle(source, tmp_path / "bundle", heads=3, new_heads="copy", progress=False).output
    model = HeadsLlama.load(open_export(bundle))
    made = [simulate(model, [number, 7 * number % VOCAB, 3], NEW_TOKENS) for number in range(3, 40)]
    made = [simulation for simulation in made if simulation.certain]
    expected = total(made, 2)
    assert len(made) > 20
    assert 0 < expected.accepted[1] < expected.accepted[0] < expected.drafts
    run = EngineRun(case, speculative_config(bundle, HEADS_FOLDER, 2), {"enforce_eager": True})
    prompts = [simulation.prompt for simulation in made]
    (first,) = run_vllm(
        vllm_python, bundle, prompts, [run], max_new_tokens=NEW_TOKENS, context=model.config.context, quiet=True
    )[case]
    assert first.tokens == [simulation.text for simulation in made]
    assert (first.drafts, first.accepted) == (expected.drafts, expected.accepted)
