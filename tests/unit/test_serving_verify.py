"""`mtp-megatron verify` without an engine: the simulation, the comparisons, and their errors."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_megatron import cli
from mtp_megatron.errors import ConfigError
from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.decode import generate
from mtp_megatron.serving.engine import find_python
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import Counts, Simulation, simulate
from mtp_megatron.serving.verify import (
    VerificationError,
    check_heads,
    compare_counts,
    compare_text,
    engine_context,
    padded_drafts,
    simulate_all,
)
from tests.serving.models import CONFIG, sentences, trained_weights, write_export


@pytest.fixture(scope="module")
def model():
    return HeadsLlama(CONFIG, trained_weights())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    return write_bundle(write_export(folder / "hf", trained_weights()), folder / "out", progress=False).output


def off_by_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Head 2 is a copy of head 1: an export that counts heads wrongly. In this language no token follows itself."""
    last = f"model.layers.{CONFIG.num_trunk_layers}."
    copies = {key.replace(last, "mtp_heads.2."): value for key, value in weights.items() if key.startswith(last)}
    return {**weights, **copies}


def hand_made(said: list[list[int]]) -> Simulation:
    """Prompt [5], then 1 2 3 4 5 6 7; four tokens are asked for."""
    return Simulation((5,), (1, 2, 3, 4, 5, 6, 7), 4, tuple(map(tuple, said)), 1.0)


def test_counts_by_hand():
    """Heads that are always right draft once after token 1 (2, 3, 4 follow), and the text is done."""
    right = [[2, 3, 4, 5, 6, 7, -1, -1], [3, 4, 5, 6, 7, -1, -1, -1], [4, 5, 6, 7, -1, -1, -1, -1]]
    assert hand_made(right).counts(3) == Counts(1, (1, 1, 1))
    # With one head in use: after 1 comes 2 by draft and 3 for certain; after 3, draft 4 and certain 5: counted beyond.
    assert hand_made(right).counts(1) == Counts(2, (2,))
    # Head 3 right and head 2 wrong: nothing is accepted, each pass gives one token.
    assert hand_made([[0] * 8, right[1], right[2]]).counts(3) == Counts(3, (0, 0, 0))
    assert Counts(4, (2, 1)).tokens_per_forward == 1.75


def test_simulation_agrees_with_the_decoder(model):
    """Two programs: one walks over a finished text, the other drafts and decodes."""
    for row in sentences(6, 20, seed=31):
        prompt = row.tolist()
        made = simulate(model, prompt, 24)
        decoded = generate(model, prompt, max_new_tokens=24, heads=4)
        assert made.text == decoded.tokens
        assert abs(made.counts(3).drafts - decoded.forwards) <= 1


def test_a_head_that_nothing_accepts_is_an_error_with_a_hint(model):
    broken = HeadsLlama(CONFIG, off_by_one(trained_weights()))
    prompts = [row.tolist() for row in sentences(4, 12, seed=8)]
    check_heads([simulate(model, prompt, 24) for prompt in prompts])
    with pytest.raises(VerificationError, match=r"head 2: none of its drafts was accepted in 4 prompts\. On its own"):
        check_heads([simulate(broken, prompt, 24) for prompt in prompts])


def test_differences_are_named():
    compare_text("engine", [[1, 2, 3]], [[1, 2, 3]])
    with pytest.raises(VerificationError, match=r"engine: in prompt 2 new token 3 is \[9\], torch's \[3\]"):
        compare_text("engine", [[1], [1, 2, 3]], [[1], [1, 2, 9]])
    with pytest.raises(VerificationError, match=r"new token 3 is \[\], torch's \[3\]"):
        compare_text("engine", [[1, 2, 3]], [[1, 2]])
    compare_counts("engine", Counts(5, (3, 2)), Counts(5, (3, 2)))
    with pytest.raises(VerificationError, match=r"\[3, 1\] of 5 drafts accepted.*\[3, 2\] of 5"):
        compare_counts("engine", Counts(5, (3, 1)), Counts(5, (3, 2)))
    with pytest.raises(VerificationError, match="eagle_aux_hidden_state_layer_ids"):
        compare_counts("engine", Counts(9, (0, 0)), Counts(5, (3, 2)))


def test_a_padded_prompt_of_one_token_may_count_as_a_draft():
    def prompt(*tokens: int) -> Simulation:
        return Simulation(tokens, (), 1, (), 1.0)

    assert padded_drafts([prompt(3), prompt(3, 4), prompt(5)]) == 2
    compare_counts("engine", Counts(6, (3, 2)), Counts(5, (3, 2)), padded=1)
    for counts in (Counts(7, (3, 2)), Counts(4, (3, 2)), Counts(6, (3, 1))):
        with pytest.raises(VerificationError, match="drafts accepted at each position"):
            compare_counts("engine", counts, Counts(5, (3, 2)), padded=1)


def test_verify_without_an_engine(bundle, capsys):
    arguments = [str(bundle), "--no-vllm", "--quiet", "--num-prompts", "6", "--max-new-tokens", "16"]
    assert cli.main(["verify", *arguments]) == 0
    out = capsys.readouterr().out
    assert "each with the SHA-256" in out
    assert "tokens per forward" in out
    assert "vLLM: --no-vllm" in out


def test_verify_refuses_a_bundle_whose_head_is_another_models(bundle, tmp_path, capsys):
    """Hashes and drafts are consistent, and still the head is of no use: only decoding tells."""
    export = tmp_path / "hf"
    shutil.copytree(bundle, export, ignore=shutil.ignore_patterns("mtp-heads", "eagle3-head2", "manifest.json"))
    broken_weights = off_by_one(trained_weights())
    kept = {key: broken_weights[key].clone() for key in load_file(export / "mtp_heads.safetensors")}
    save_file(kept, export / "mtp_heads.safetensors")
    broken = write_bundle(export, tmp_path / "out", progress=False).output
    assert cli.main(["verify", str(broken), "--no-vllm", "--quiet", "--num-prompts", "4"]) == 2
    assert "head 2: none of its drafts was accepted" in capsys.readouterr().err


def test_verify_refuses_what_is_no_bundle(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path), "--no-vllm"]) == 2
    assert "manifest.json: missing" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path), "--no-vllm", "--max-new-tokens", "1"]) == 2  # it blamed a head
    assert "--max-new-tokens=1: nothing is drafted for the first new token" in capsys.readouterr().err


def test_interpreter_without_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("MTP_VLLM_PYTHON", raising=False)
    with pytest.raises(ConfigError, match="is not a program"):
        find_python(str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="has no vLLM"):
        find_python(sys.executable)
    monkeypatch.setenv("MTP_VLLM_PYTHON", sys.executable)
    with pytest.raises(ConfigError, match="MTP_VLLM_PYTHON"):
        find_python(None)


def test_text_and_drafts_fit_into_the_context(model):
    """vLLM drafts for nobody where one request's drafts do not fit: 3 for each of 3 heads behind 32 + 8 tokens."""
    longest = CONFIG.context - 8 - 9
    row = sentences(1, longest + 1, seed=4)[0].tolist()
    made, _ = simulate_all(model, iter([row[:4], row[:longest]]), 2, 8, progress=False)
    assert engine_context(made[:1]) == 4 + 8 + 9  # and not the model's: its keys and values may not fit
    assert engine_context(made) == CONFIG.context
    with pytest.raises(ConfigError, match=rf"prompt={longest + 1}.*must have 1 to {longest} tokens"):
        simulate_all(model, iter([row]), 1, 8, progress=False)
    with pytest.raises(ConfigError, match=r"max-new-tokens=119.*the context is 128"):
        simulate_all(model, iter([row]), 1, CONFIG.context - 9, progress=False)
