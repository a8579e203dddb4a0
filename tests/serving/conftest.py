"""Fixtures of the serving tests: one bundle, one simulation, and the environment that has vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.models import CONFIG, sentences, trained_weights, write_export

NEW_TOKENS = 32


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A serving bundle of a trained model whose drafts are partly right."""
    from mtp_megatron.serving.bundle import write_bundle

    folder = tmp_path_factory.mktemp("serving")
    export = write_export(folder / "export", trained_weights())
    return write_bundle(export, folder / "bundle", progress=False).output


@pytest.fixture(scope="session")
def simulations(bundle):
    """50 prompts of 1 to 40 tokens and what torch makes of them."""
    from mtp_megatron.serving.export import open_export
    from mtp_megatron.serving.llama import HeadsLlama
    from mtp_megatron.serving.simulate import simulate

    model = HeadsLlama.load(open_export(bundle))
    made = []
    for number, row in enumerate(sentences(80, 40, seed=77)):
        simulation = simulate(model, row[: 1 + 7 * number % 40].tolist(), NEW_TOKENS)
        if simulation.certain:
            made.append(simulation)
    assert len(made) >= 50, "too many prompts are too close to call"
    return made[:50]


@pytest.fixture(scope="session")
def context():
    return CONFIG.context


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM; the marker `serving` skips where there is none."""
    from tests.conftest import serving_python

    python = serving_python()
    assert python is not None
    return str(Path(python))
