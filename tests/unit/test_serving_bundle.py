"""The bundle without an engine: keys, configurations, commands, hashes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mtp_megatron import cli
from mtp_megatron.checkpoint.bundle_manifest import check_manifest, check_weights, write_manifest
from mtp_megatron.checkpoint.convert import convert
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.drafts import drafts_of, eagle3_layers
from mtp_megatron.serving.serve import choose_draft
from mtp_megatron.serving.tensor_checks import check_tensors
from mtp_megatron.serving.vllm_plugin import ARCHITECTURE
from tests.serving.models import CONFIG, llama_config, mtp_config, random_weights, shapes, write_export


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export") / "hf", random_weights())


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return write_bundle(source, tmp_path_factory.mktemp("bundle") / "out", progress=False).output


@pytest.fixture
def copy(whole, tmp_path):
    """A bundle to damage. A plain copy: nothing in it shares a file with the original."""
    return shutil.copytree(whole, tmp_path / "copy")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_files_and_plain_model(source, whole):
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert {"README.md", "manifest.json", "config.json", "model.safetensors", "tokenizer.json"} < names
    assert {"mtp-heads/config.json", "mtp-heads/model.safetensors.index.json", "eagle3-head2/config.json"} < names
    for name in ("model.safetensors", "mtp_heads.safetensors"):
        assert (whole / name).read_bytes() == (source / name).read_bytes()
        assert (whole / name).stat().st_ino != (source / name).stat().st_ino
    assert config_of(source).items() <= config_of(whole).items()
    # The heads' tensors have two names and one place.
    assert (whole / "mtp_heads.safetensors").samefile(whole / "mtp-heads" / "mtp_heads.safetensors")


def test_heads_draft(whole):
    config = config_of(whole / "mtp-heads")
    assert config["architectures"] == [ARCHITECTURE]
    assert ARCHITECTURE.startswith("Eagle3") or ARCHITECTURE.endswith("Eagle3")  # else vLLM renames it
    assert config["num_mtp_heads"] == config["num_hidden_layers"] == 3
    assert config["eagle_aux_hidden_state_layer_ids"] == [CONFIG.num_trunk_layers]
    assert config["mask_token_id"] == -1
    index = json.loads((whole / "mtp-heads" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {key for key in shapes() if key.startswith("mtp_heads.")} | {"model.norm.weight"}
    assert all((whole / "mtp-heads" / name).is_file() for name in index.values())


def test_eagle3_draft(whole):
    """Field by field, as vLLM, SGLang and llama.cpp read it."""
    config = config_of(whole / "eagle3-head2")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["num_hidden_layers"] == 1
    assert config["draft_vocab_size"] == config["vocab_size"] == CONFIG.vocab_size
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["eagle_config"] == {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    assert config["num_aux_hidden_states"] == 3
    assert config["norm_before_residual"] is False
    h = CONFIG.hidden_size
    made, weights = load_file(whole / "eagle3-head2" / "model.safetensors"), random_weights()
    assert made["fc.weight"].shape == (h, 3 * h)
    hidden = torch.randn(5, 3 * h)
    assert torch.equal(hidden @ made["fc.weight"].T, hidden[:, 2 * h :])
    embedding, z = torch.randn(5, h), torch.randn(5, h)
    normed = F.rms_norm(z, (h,), made["midlayer.hidden_norm.weight"])
    for part in "qkv":
        key = f"self_attn.{part}_proj.weight"
        both = torch.cat([F.rms_norm(embedding, (h,), made["midlayer.input_layernorm.weight"]), normed], 1)
        expected = F.rms_norm(z, (h,), weights["mtp_heads.2.input_layernorm.weight"]) @ weights[f"mtp_heads.2.{key}"].T
        torch.testing.assert_close(both @ made[f"midlayer.{key}"].T, expected)
    assert torch.equal(made["lm_head.weight"], weights["lm_head.weight"])
    assert len(made) == 13


@pytest.mark.parametrize(("trunk", "layers"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (31, [29, 30, 31])])
def test_eagle3_layers_end_with_the_trunk(trunk, layers):
    assert eagle3_layers(trunk) == layers


def test_tied_embeddings_are_written_out_in_the_stock_draft(tmp_path):
    config = replace(CONFIG, tied=True)
    weights = random_weights(config)
    export = write_export(tmp_path / "hf", weights, config)
    made = write_bundle(export, tmp_path / "out", progress=False).output
    assert config_of(made)["tie_word_embeddings"] is True
    draft = made / "eagle3-head2"
    assert config_of(draft)["tie_word_embeddings"] is False
    tensors = load_file(draft / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert check_tensors(made) > 0


def test_a_head_tensor_without_a_place_is_fatal_and_named():
    keys = [*shapes(), "mtp_heads.2.self_attn.q_proj.bias"]
    with pytest.raises(CheckpointError, match=r"mtp_heads\.2\.self_attn\.q_proj\.bias has no place"):
        drafts_of(llama_config(), mtp_config(), keys)


@pytest.mark.parametrize("key", ["mtp_heads.3.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_fatal_and_named(key):
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        drafts_of(llama_config(), mtp_config(), [other for other in shapes() if other != key])


def test_an_export_that_lacks_a_tensor_leaves_no_bundle(tmp_path):
    weights = random_weights()
    del weights["mtp_heads.4.mlp.down_proj.weight"]
    export = write_export(tmp_path / "hf", weights)
    with pytest.raises(CheckpointError, match=r"mtp_heads\.4\.mlp\.down_proj\.weight"):
        write_bundle(export, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_is_cut_into_shards_of_the_size_asked_for(source, tmp_path):
    made = write_bundle(source, tmp_path / "out", max_shard_bytes=150_000, progress=False).output
    for stem in ("model", "mtp_heads"):
        parts = sorted(made.glob(f"{stem}-0*.safetensors"))
        assert len(parts) > 1, stem
        assert all(path.stat().st_size < 170_000 for path in parts)
        joined = {key: tensor for path in parts for key, tensor in load_file(path).items()}
        whole = load_file(source / f"{stem}.safetensors")
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[key], whole[key]) for key in whole)
    assert check_tensors(made) == len(shapes()) + 1 + 27 + 13


def test_what_an_export_says_of_its_training_and_what_people_added_stay(source, tmp_path):
    export = shutil.copytree(source, tmp_path / "hf")
    (export / "chat_template.jinja").write_text("{{ messages }}")
    (export / "pytorch_model.bin").write_bytes(b"a pickle that nobody checked")
    made = write_bundle(export, tmp_path / "out", dtype="bf16", progress=False).output
    said, says = (json.loads((folder / "mtp_config.json").read_text()) for folder in (export, made))
    assert says["source"] == said["source"]
    assert (says["dtype"], config_of(made)["dtype"]) == ("bfloat16", "bfloat16")
    assert (made / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (made / "pytorch_model.bin").exists()


def test_a_product_that_does_not_fit_its_type_leaves_no_bundle(tmp_path):
    """Both factors fit: the head's map and the unembedding that it is folded into."""
    config = replace(CONFIG, head_kind="linear")
    weights = {key: tensor * (3000 if tensor.ndim > 1 else 1) for key, tensor in random_weights(config).items()}
    export = write_export(tmp_path / "hf", weights, config, torch.float16)
    with pytest.raises(CheckpointError, match=r"lm_heads\.0\.weight does not fit float16\. Choose another --dtype"):
        write_bundle(export, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert write_bundle(export, tmp_path / "out", dtype="fp32", progress=False).drafts == ("medusa",)


def test_one_head_has_nothing_to_draft_with():
    with pytest.raises(CheckpointError, match="nothing to draft with"):
        drafts_of(llama_config(), mtp_config(replace(CONFIG, num_heads=1)), shapes())


def test_output_that_holds_something_is_refused(source, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        write_bundle(source, tmp_path, progress=False)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_readme_holds_the_commands_and_the_facts(whole):
    text = (whole / "README.md").read_text()
    assert "python -m vllm.entrypoints.openai.api_server --model EXPORT" in text
    assert '"num_speculative_tokens": 3, "parallel_drafting": true}' in text
    assert "--speculative-algorithm EAGLE3" in text
    assert "| step | 7 |" in text
    assert "| heads | 4 (parallel, transformer) |" in text


def test_whole_bundle_passes(whole):
    assert check_manifest(whole) == len(json.loads((whole / "manifest.json").read_text())["files"])
    assert check_tensors(whole) == len(shapes()) + 1 + 27 + 13


def test_a_whole_bundle_converts_again(whole, tmp_path, capsys):
    convert(whole, tmp_path / "out", to="hf", progress=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert f"checking {whole.name}" in capsys.readouterr().err


def test_hashes_find_a_changed_byte_a_short_file_and_a_missing_one(copy):
    file = copy / "eagle3-head2" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its content changed"):
        check_manifest(copy)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        check_manifest(copy)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
        check_manifest(copy)


def damage(folder, key, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    save_file(tensors, path)


@pytest.mark.parametrize("to", ["hf", "bundle", "meta", "megatron"])
def test_a_conversion_of_a_bundle_with_a_flipped_bit_leaves_nothing(copy, tmp_path, to, capsys):
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-4] ^= 1  # the last digit of a weight
    (copy / "model.safetensors").write_bytes(content)
    out = tmp_path / "out"
    assert cli.main(["convert", str(copy), "--to", to, "--output", str(out), "--quiet"]) == 2
    assert "model.safetensors: its content changed (SHA-256)" in capsys.readouterr().err
    assert not out.exists()


def test_a_bundle_whose_weights_were_changed_on_purpose_converts_without_its_manifest(copy, tmp_path):
    damage(copy, "model.layers.1.mlp.up_proj.weight", lambda t: t + 1)
    (copy / "README.md").write_text("mine")  # only weights are held to the manifest
    (copy / "manifest.json").write_text('{"format": "of another program"}')
    convert(copy, tmp_path / "out", to="hf", progress=False)
    changed = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(changed, load_file(copy / "model.safetensors")["model.layers.1.mlp.up_proj.weight"])


def test_a_damaged_manifest_is_an_error_for_both(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "files": {"model.safetensors": {"bytes": 1}}}))
    for check in (check_manifest, lambda folder: check_weights(folder, progress=False)):
        with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
            check(copy)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("norm.weight", lambda t: torch.full_like(t, float("nan")), "holds NaN"),
        ("norm.weight", lambda t: t[:-1].clone(), "has shape"),
        ("midlayer.mlp.up_proj.weight", lambda t: t + 1, r"not what mtp_heads\.2\.mlp\.up_proj\.weight makes"),
    ],
)
def test_a_draft_of_another_model_is_told(copy, key, change, message):
    """Even where the manifest was made anew."""
    damage(copy / "eagle3-head2", key, change)
    write_manifest(copy)
    check_manifest(copy)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(copy)


def test_nan_in_the_model_is_named(copy):
    damage(copy, "model.layers.1.mlp.up_proj.weight", lambda t: torch.full_like(t, float("inf")))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        check_tensors(copy)


def test_choice_of_draft_and_heads(whole, tmp_path):
    assert choose_draft(whole, "auto", None) == ("mtp-heads", 3)
    assert choose_draft(whole, "auto", 2) == ("mtp-heads", 1)
    assert choose_draft(whole, "eagle3-head2", None) == ("eagle3-head2", 1)
    assert choose_draft(whole, "none", None) == (None, 0)
    with pytest.raises(ConfigError, match="2 to 4"):
        choose_draft(whole, "auto", 5)
    with pytest.raises(ConfigError, match="2 to 2"):
        choose_draft(whole, "eagle3-head2", 3)
    with pytest.raises(CheckpointError, match="not a serving bundle"):
        choose_draft(tmp_path, "auto", None)
    for name in ("manifest.json", "mtp-heads/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match=r"mtp-heads/config\.json: missing or damaged"):
        choose_draft(tmp_path, "auto", None)


def test_serve_prints_the_command(whole, capsys):
    assert cli.main(["serve", str(whole), "--print", "--heads", "3", "--port", "8123", "--", "--dtype", "float32"]) == 0
    line = capsys.readouterr().out.strip()
    assert "-m vllm.entrypoints.openai.api_server --model" in line
    assert '"num_speculative_tokens": 2, "parallel_drafting": true' in line
    assert line.endswith("--dtype float32")


def test_convert_to_bundle_from_the_command_line(source, tmp_path, capsys):
    assert cli.main(["convert", str(source), "--to", "bundle", "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert "mtp-heads, eagle3-head2" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path), "--to", "bundle", "--output", str(tmp_path / "other"), "--quiet"]) == 2
    assert not (tmp_path / "other").exists()
