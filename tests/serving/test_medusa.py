"""Heads without layers: vLLM's own Medusa class serves Medusa blocks and linear maps."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.decode import generate
from mtp_megatron.serving.drafts import MEDUSA_FOLDER
from mtp_megatron.serving.engine import EngineRun, run_vllm
from mtp_megatron.serving.engine_command import speculative_config
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import Simulation, total
from mtp_megatron.serving.tensor_checks import check_tensors
from tests.serving.conftest import NEW_TOKENS
from tests.serving.models import CONFIG, sentences, trained_weights, write_export

HEADS = 3  # beside head 1
PLAIN = replace(CONFIG, num_heads=1)
KINDS = ("medusa", "linear")


class Probe(HeadsLlama):
    """Keeps what the unembedding reads."""

    hidden: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        self.hidden = F.rms_norm(hidden, (self.config.hidden_size,), self.final_norm, self.config.norm_epsilon)
        return super().logits(hidden)

    def normed(self, tokens: Tensor) -> Tensor:
        """``[r]`` tokens -> normed output of the last layer ``[r, h]``."""
        with torch.no_grad():
            self.run(tokens, self.new_caches(len(tokens)), rows=len(tokens))
        return self.hidden[0]


def apply(kind: str, weights: dict[str, Tensor], head: int, normed: Tensor) -> Tensor:
    """Logits of one head (``mtp_megatron.heads.PostNormHead``)."""
    matrix = weights[f"mtp_heads.{head}.linear.weight"]
    if kind == "linear":
        made = normed @ matrix.T
    else:
        made = normed + F.silu(normed @ matrix.T + weights[f"mtp_heads.{head}.linear.bias"])
    return made @ weights["lm_head.weight"].T


@functools.cache
def trained(kind: str) -> dict[str, Tensor]:
    """A trained plain model, and heads trained on its outputs for a moment."""
    weights = {key: value for key, value in trained_weights().items() if not key.startswith("mtp_heads.")}
    model, size = Probe(PLAIN, weights), CONFIG.hidden_size
    heads: dict[str, Tensor] = {}
    for head in range(2, HEADS + 2):
        heads[f"mtp_heads.{head}.linear.weight"] = torch.eye(size) if kind == "linear" else torch.zeros(size, size)
        if kind == "medusa":
            heads[f"mtp_heads.{head}.linear.bias"] = torch.zeros(size)
    parameters = [tensor.requires_grad_() for tensor in heads.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(150):
        text = sentences(1, 120, seed=5000 + step)[0]
        normed = model.normed(text).detach()
        losses = [
            F.cross_entropy(apply(kind, {**weights, **heads}, head, normed)[:-head], text[head:])
            for head in range(2, HEADS + 2)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return {**weights, **{key: tensor.detach() for key, tensor in heads.items()}}


def simulated(kind: str, count: int) -> list[Simulation]:
    """As :func:`mtp_megatron.serving.simulate.simulate`, for these heads."""
    weights = trained(kind)
    model = Probe(PLAIN, {key: value for key, value in weights.items() if not key.startswith("mtp_heads.")})
    made = []
    for number, row in enumerate(sentences(count, 30, seed=99)):
        prompt = row[: 2 + number].tolist()
        tokens = generate(model, prompt, max_new_tokens=NEW_TOKENS + HEADS, heads=1).tokens
        normed = model.normed(torch.tensor([*prompt, *tokens]))
        logits = torch.stack(
            [
                normed @ weights["lm_head.weight"].T,
                *(apply(kind, weights, head, normed) for head in range(2, HEADS + 2)),
            ]
        )[:, len(prompt) - 1 :]
        best = logits.topk(2).values
        margin = ((best[..., 0] - best[..., 1]) / best[..., 0].abs().clamp(min=1.0)).min()
        said = torch.stack([apply(kind, weights, head, normed).argmax(-1) for head in range(2, HEADS + 2)])
        made.append(
            Simulation(tuple(prompt), tuple(tokens), NEW_TOKENS, tuple(map(tuple, said.tolist())), float(margin))
        )
    return [simulation for simulation in made if simulation.certain]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def medusa(kind, tmp_path):
    layers = replace(CONFIG, num_trunk_layers=CONFIG.num_trunk_layers + 1)  # all of them are trunk here
    export = write_export(tmp_path / "export", trained(kind), layers, kind=kind)
    return write_bundle(export, tmp_path / "bundle", progress=False).output


def test_files(kind, medusa):
    assert not (medusa / "mtp-heads").exists()
    assert check_tensors(medusa) > 0
    made, weights = load_file(medusa / MEDUSA_FOLDER / "model.safetensors"), trained(kind)
    if kind == "medusa":
        assert torch.equal(made["blocks.1.layers.0.bias"], weights["mtp_heads.3.linear.bias"])
        assert torch.equal(made["lm_head.weight"], weights["lm_head.weight"])
    else:
        expected = weights["lm_head.weight"] @ weights["mtp_heads.3.linear.weight"]
        torch.testing.assert_close(made["lm_heads.1.weight"], expected)
    assert "medusa" in (medusa / "README.md").read_text()


@pytest.mark.serving
@pytest.mark.slow
def test_vllm_counts_as_torch(kind, medusa, vllm_python):
    made = simulated(kind, 16)
    run = EngineRun("medusa", speculative_config(medusa, MEDUSA_FOLDER, HEADS), {"enforce_eager": True})
    prompts = [simulation.prompt for simulation in made]
    (first,) = run_vllm(
        vllm_python, medusa, prompts, [run], max_new_tokens=NEW_TOKENS, context=128, plugin=False, quiet=True
    )["medusa"]
    expected = total(made, HEADS)
    assert 0 < expected.accepted[0] < expected.drafts
    assert first.tokens == [simulation.text for simulation in made]
    assert (first.drafts, first.accepted) == (expected.drafts, expected.accepted)
