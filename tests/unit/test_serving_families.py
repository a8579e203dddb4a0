"""The torch decoder for every family and head kind that can be exported, against transformers and the formula."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mtp_megatron.checkpoint.convert import convert
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.decode import generate
from mtp_megatron.serving.drafts import EAGLE3_FOLDER, HEADS_FOLDER, MEDUSA_FOLDER, drafts_in
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.tensor_checks import check_tensors
from tests.checkpoints import SHAPE, random_tensors, write_checkpoint
from tests.foreign_models import FAMILIES, VOCAB, hf_logits, write_hf

TOKENS = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(3))
POST_NORM = ("linear", "medusa")


@torch.inference_mode()
def head_logits(folder: Path, tokens: Tensor) -> Tensor:
    """``[n, s, V]`` by the torch decoder."""
    model = HeadsLlama.load(open_export(folder))
    caches = model.new_caches(len(tokens))
    z, first = model.run(tokens, caches, rows=len(tokens))
    return torch.cat((first[None], model.run_further_heads(z, caches, rows=len(tokens))))


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A family's folder, and its export with one further head, a copy of head 1."""
    source = write_hf(tmp_path / "source", request.param)
    convert(source, tmp_path / "export", to="hf", heads=2, new_heads="copy", progress=False)
    return request.param, source, tmp_path / "export"


def test_every_family_has_the_logits_of_transformers(family):
    case, source, export = family
    theirs = hf_logits(source, TOKENS[None])[0]
    assert theirs.abs().max() > 0.5
    for ours in head_logits(export, TOKENS):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    model = HeadsLlama.load(open_export(export))
    exact = model.exact_logits(TOKENS)
    torch.testing.assert_close(exact, theirs[-1].double(), atol=1e-4, rtol=0)
    # Controls: without the family's own settings the model is another, or refused.
    changes = {"llama3": {"rope_scaling": None}, "linear": {"rope_scaling": None}}.get(case)
    if changes:
        model.config = dataclasses.replace(model.config, **changes)
        assert (model.exact_logits(TOKENS) - exact).abs().max() > 1e-2
    if case in ("qwen2", "qwen3"):
        plain = dataclasses.replace(model.config, qkv_bias=False, qk_norm=False)
        with pytest.raises(CheckpointError, match=r"q_proj\.bias|q_norm"):
            HeadsLlama(plain, dict(open_export(export).tensors()))


def test_every_family_has_a_bundle(family, tmp_path):
    case, _, export = family
    bundle = write_bundle(export, tmp_path / "bundle", progress=False).output
    stock = [] if case.startswith("qwen") else [EAGLE3_FOLDER]  # no engine's EAGLE-3 layer is a Qwen layer
    assert drafts_in(bundle) == [HEADS_FOLDER, *stock]
    assert check_tensors(bundle) > 0
    assert ("EAGLE-3" in (bundle / "README.md").read_text()) == bool(stock)


def test_qwen2_with_heads_of_another_size_is_for_transformers_alone(tmp_path):
    """It reads head_dim; vLLM's Qwen2Attention divides the hidden size, and would not load."""
    source = write_hf(tmp_path / "source", "qwen2", head_dim=32)
    convert(source, tmp_path / "export", to="hf", heads=2, new_heads="copy", progress=False)
    theirs = hf_logits(tmp_path / "export", TOKENS[None])[0]
    torch.testing.assert_close(head_logits(tmp_path / "export", TOKENS)[0], theirs, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match=r"model\.head_size=32 with model\.qkv_bias=true: vLLM.*Use --to hf"):
        write_bundle(source, tmp_path / "bundle", heads=2, new_heads="copy", progress=False)
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(params=POST_NORM)
def run(request, tmp_path):
    """A Megatron run whose heads are maps of the trunk's output."""
    shape = dataclasses.replace(SHAPE, head_kind=request.param)
    tensors = random_tensors(shape)
    return shape, tensors, write_checkpoint(tmp_path / "run", shape, tensors=tensors)


def test_heads_that_are_no_layers(run, tmp_path):
    shape, tensors, folder = run
    convert(folder, tmp_path / "hf", to="hf", progress=False)
    found = head_logits(tmp_path / "hf", TOKENS % shape.vocab_size)
    torch.testing.assert_close(found[0], hf_logits(tmp_path / "hf", TOKENS[None] % 257)[0], atol=1e-4, rtol=0)
    model = HeadsLlama.load(open_export(tmp_path / "hf"))
    with torch.inference_mode():
        z, _ = model.run(TOKENS % shape.vocab_size, model.new_caches(len(TOKENS)), rows=1)
    normed = F.rms_norm(z[0], (shape.hidden_size,), tensors["final_norm.weight"], 1e-5)
    for head in range(1, shape.num_heads):
        mapped = normed @ tensors[f"heads.{head}.linear.weight"].T
        if shape.medusa_heads:
            mapped = normed + F.silu(mapped + tensors[f"heads.{head}.linear.bias"])
        expected = mapped @ tensors["output_layer.weight"][: shape.vocab_size].T
        torch.testing.assert_close(found[head], expected, atol=1e-4, rtol=0)
        assert (found[head] - found[0]).abs().max() > 0.1, "control: another head would be noticed"
    prompt = [5, 17, 3]
    plain, speculative = (generate(model, prompt, max_new_tokens=40, heads=k) for k in (1, shape.num_heads))
    assert speculative.tokens == plain.tokens
    assert sum(speculative.drafted) > 0


def test_they_come_back_bit_by_bit(run, tmp_path):
    shape, _, folder = run
    convert(folder, tmp_path / "hf", to="hf", progress=False)
    convert(tmp_path / "hf", tmp_path / "megatron", to="megatron", progress=False)
    convert(tmp_path / "megatron", tmp_path / "again", to="hf", progress=False)
    for name in ("model.safetensors", "mtp_heads.safetensors"):
        first, second = load_file(tmp_path / "hf" / name), load_file(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert f"kind: {shape.head_kind}" in (tmp_path / "megatron" / "model_recipe.yaml").read_text()


def test_their_bundle_and_what_has_no_place(run, tmp_path):
    shape, _, folder = run
    bundle = write_bundle(folder, tmp_path / "bundle", progress=False).output
    assert drafts_in(bundle) == [MEDUSA_FOLDER]
    assert check_tensors(bundle) > 0
    with pytest.raises(CheckpointError, match=f"heads.kind={shape.head_kind} has no place in Meta's layout"):
        convert(folder, tmp_path / "meta", to="meta", progress=False)
    with pytest.raises(ConfigError, match="no layer to make more from"):
        convert(folder, tmp_path / "more", to="hf", heads=5, progress=False)
    assert not (tmp_path / "meta").exists()
    assert not (tmp_path / "more").exists()


def _write_settings(folder: Path, **settings: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, **settings}, indent=2))


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """The export of a model that came with a tokenizer, and without settings of generation."""
    source = write_hf(tmp_path / "source", "llama")
    (source / "tokenizer.json").write_text("{}")
    _write_settings(source)
    (source / "generation_config.json").unlink(missing_ok=True)
    convert(source, tmp_path / "export", to="hf", heads=2, new_heads="copy", progress=False)
    return tmp_path / "export"


def test_a_chat_template_may_be_added_to_an_export(with_tokenizer: Path) -> None:
    """It decides no ids; what does is still the model's."""
    open_export(with_tokenizer)
    (with_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    (with_tokenizer / "generation_config.json").write_text('{"temperature": 0.7}')
    _write_settings(with_tokenizer, chat_template="{{ messages }}")
    open_export(with_tokenizer)
    _write_settings(with_tokenizer, added_tokens_decoder={"5": {"content": "<new>"}})
    with pytest.raises(CheckpointError, match="its tokenizer is not the model's"):
        open_export(with_tokenizer)
    _write_settings(with_tokenizer)
    (with_tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="its tokenizer is not the model's"):
        open_export(with_tokenizer)


def test_hashes_of_earlier_exports_hold(with_tokenizer: Path) -> None:
    """They were of every file that the model came with."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (with_tokenizer / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    path = with_tokenizer / "mtp_config.json"
    config = json.loads(path.read_text())
    assert config["tokenizer"]["sha256"] != digest.hexdigest()
    config["tokenizer"]["sha256"] = digest.hexdigest()
    path.write_text(json.dumps(config))
    open_export(with_tokenizer)
    (with_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    open_export(with_tokenizer)
    (with_tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="its tokenizer is not the model's"):
        open_export(with_tokenizer)
