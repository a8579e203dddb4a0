"""Heads without layers: vLLM's own Medusa class serves Medusa blocks and linear maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.drafts import MEDUSA_FOLDER
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import simulate
from mtp_megatron.serving.tensor_checks import check_tensors
from mtp_megatron.serving.verify import check_heads, run_engines
from tests.serving.conftest import NEW_TOKENS
from tests.serving.models import CONFIG, sentences, trained_weights, write_export


@pytest.fixture(params=["medusa", "linear"])
def config(request):
    """All layers are the trunk's here."""
    return replace(CONFIG, num_trunk_layers=CONFIG.num_trunk_layers + 1, head_kind=request.param)


@pytest.fixture
def bundle(config, tmp_path):
    export = write_export(tmp_path / "export", trained_weights(config), config)
    return write_bundle(export, tmp_path / "bundle", progress=False).output


def test_files(config, bundle):
    assert not (bundle / "mtp-heads").exists()
    assert check_tensors(bundle) > 0
    made, weights = load_file(bundle / MEDUSA_FOLDER / "model.safetensors"), trained_weights(config)
    if config.head_kind == "medusa":
        assert torch.equal(made["blocks.1.layers.0.bias"], weights["mtp_heads.3.linear.bias"])
        assert torch.equal(made["lm_head.weight"], weights["lm_head.weight"])
    else:
        expected = weights["lm_head.weight"] @ weights["mtp_heads.3.linear.weight"]
        torch.testing.assert_close(made["lm_heads.1.weight"], expected)
    assert "medusa" in (bundle / "README.md").read_text()


@pytest.mark.serving
@pytest.mark.slow
def test_vllm_counts_as_torch(bundle, vllm_python):
    model = HeadsLlama.load(open_export(bundle))
    made = [simulate(model, row[: 2 + n].tolist(), NEW_TOKENS) for n, row in enumerate(sentences(16, 30, seed=99))]
    made = [simulation for simulation in made if simulation.certain]
    assert len(made) > 10
    check_heads(made)
    plain, medusa = run_engines(vllm_python, bundle, made, eager=True, quiet=True)
    assert (plain.draft, medusa.draft, medusa.heads) == (None, MEDUSA_FOLDER, 3)
    assert 0 < medusa.counts.accepted[0] < medusa.counts.drafts
