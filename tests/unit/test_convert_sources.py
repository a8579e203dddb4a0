"""Models from elsewhere, without megatron: told apart, read exactly, refused by name, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_megatron.checkpoint.convert import convert
from mtp_megatron.checkpoint.kinds import detect, open_source
from mtp_megatron.cli import main
from mtp_megatron.config import HeadsConfig
from mtp_megatron.data.tokenizer_store import choose_tokenizer
from mtp_megatron.errors import MTPError
from mtp_megatron.serving.bundle import write_bundle
from tests.checkpoints import (
    MEGATRON_LM_ARGUMENTS,
    SHAPE,
    random_tensors,
    stack_trunk,
    write_checkpoint,
    write_torch_dist,
)
from tests.foreign_models import FAMILIES, PARAMS, hf_logits, meta_logits, tokenizer_model, write_hf, write_meta
from tests.serving.models import random_weights, write_export

TOKENS = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return tokenizer_model()


def quiet(source: Path, output: Path, to: str, **options: Any) -> Path:
    if to == "bundle":
        write_bundle(source, output, progress=False, **options)
    else:
        convert(source, output, to=to, progress=False, **options)
    return output


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def release(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(folder / "consolidated.00.pth", weights_only=True, mmap=True)
    return tensors


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", FAMILIES)
def test_hugging_face_to_megatron_and_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", case, dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    megatron = quiet(source, tmp_path / "megatron", "megatron")
    back = quiet(megatron, tmp_path / "back", "hf")
    assert same(load_file(source / "model.safetensors"), load_file(back / "model.safetensors"))
    assert (back / "tokenizer.json").read_text() == "{}"
    if dtype == torch.float32:
        torch.testing.assert_close(hf_logits(back, TOKENS), hf_logits(source, TOKENS), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("given", "kept"), [([2, 7], [2, 7]), ([2], 2), (2, 2), ([], None), (None, None)])
def test_every_id_that_ends_a_text_is_kept(given: Any, kept: Any, tmp_path: Path) -> None:
    """By way of a Megatron checkpoint; the settings of generation are made of the same ids."""
    source = write_hf(tmp_path / "source")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": given}))
    back = quiet(quiet(source, tmp_path / "megatron", "megatron"), tmp_path / "back", "hf")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((back / name).read_text())["eos_token_id"] == kept


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_papers_release_to_megatron_and_back(n: int, shards: int, tokenizer: bytes, tmp_path: Path) -> None:
    dtype = torch.float32 if shards == 1 else torch.bfloat16
    tensors = write_meta(tmp_path / "source", tokenizer, shards=shards, dtype=dtype, n_future_tokens=n)
    megatron = quiet(tmp_path / "source", tmp_path / "megatron", "megatron")
    back = quiet(megatron, tmp_path / "back", "meta")
    assert same(release(back), tensors)
    assert (back / "tokenizer.model").read_bytes() == tokenizer
    again = quiet(back, tmp_path / "again", "meta")
    assert same(release(again), tensors)
    params = json.loads((back / "params.json").read_text())
    assert {key: params[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "n_future_tokens")} == {
        key: PARAMS[key] if key != "n_future_tokens" else n
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "n_future_tokens")
    }


def test_metas_layout_with_another_tokenizer_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw bytes, and a Hugging Face tokenizer: that layout knows sentencepiece's alone."""
    write_checkpoint(tmp_path / "bytes")
    hf = write_hf(tmp_path / "hf")
    (hf / "tokenizer.json").write_text("{}")
    for source in (tmp_path / "bytes", hf):
        meta = tmp_path / f"{source.name}-meta"
        assert main(["convert", str(source), "--to", "meta", "--output", str(meta), "--quiet"]) == 0
        assert "no tokenizer.model" in capsys.readouterr().err
        back = quiet(meta, tmp_path / f"{source.name}-back", "meta")
        assert same(release(back), release(meta))
        tokenizer, expected = (open_source(folder)[1].tokenizer for folder in (back, source))
        assert (tokenizer.kind, tokenizer.sha256, tokenizer.eod) == (expected.kind, expected.sha256, expected.eod)
        assert tokenizer.files() == expected.files()
    assert choose_tokenizer(tmp_path / "bytes-meta").kind == "bytes", "what preprocess --tokenizer takes it for"
    edit(meta / "mtp_config.json", tokenizer={"kind": "huggingface"})
    refused(meta, "mtp_config.json: incomplete")


def test_the_papers_release_in_transformers_has_metas_logits(tokenizer: bytes, tmp_path: Path) -> None:
    """Neighbouring channels there, halves here: without the permutation these differ."""
    tensors = write_meta(tmp_path / "source", tokenizer)
    folder = quiet(tmp_path / "source", tmp_path / "hf", "hf")
    expected = meta_logits(tensors, PARAMS, TOKENS)
    torch.testing.assert_close(hf_logits(folder, TOKENS), expected, atol=1e-4, rtol=0)
    unturned = dict(tensors)
    for key in [key for key in tensors if key.endswith("wq.weight")]:
        unturned[key] = tensors[key].view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    assert (meta_logits(unturned, PARAMS, TOKENS) - expected).abs().max() > 0.1, "control"
    # Head 2 as the last layer of a plain release.
    back = quiet(folder, tmp_path / "back", "meta")
    assert same(release(back), tensors)


def test_metas_formula_gives_the_width_written(tokenizer: bytes, tmp_path: Path) -> None:
    write_meta(tmp_path / "source", tokenizer)
    params = json.loads((quiet(tmp_path / "source", tmp_path / "back", "meta") / "params.json").read_text())
    hidden = int(2 * (4 * params["dim"]) / 3)
    hidden = int(params.get("ffn_dim_multiplier", 1) * hidden)
    multiple = params["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == 96


@pytest.mark.parametrize("new", ["copy", "fresh"])
def test_more_and_fewer_heads(new: Any, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source")
    more, description = open_source(quiet(source, tmp_path / "more", "megatron", heads=3, new_heads=new))
    assert description.shape.num_heads == 3
    for key in [key for key in more.keys() if key.startswith("heads.0.")]:  # noqa: SIM118
        for head in (1, 2):
            value = more.read(key.replace("heads.0.", f"heads.{head}."))
            assert torch.equal(value, more.read(key)) == (new == "copy")
            if new == "fresh":
                assert value.std() < 0.3
                assert bool((value == 1).all()) == key.endswith("layer_norm_weight")
    back = quiet(tmp_path / "more", tmp_path / "back", "hf", heads=1)
    assert same(load_file(source / "model.safetensors"), load_file(back / "model.safetensors"))


def test_an_export_with_heads_comes_back_whole(tmp_path: Path) -> None:
    tensors = random_tensors()
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key][SHAPE.vocab_size :] = 0
    heads = {
        "n": 3,
        "loss_weights": [1.0, 0.5, 0.25],
        "curriculum_steps": 9,
        "documents": "ignore",
        "trainable": "heads",
    }
    settings = HeadsConfig.parse(heads).model_dump(mode="json")
    write_checkpoint(tmp_path / "run", tensors=tensors, heads=settings)
    folder = quiet(tmp_path / "run", tmp_path / "hf", "hf", max_shard_bytes=30_000)
    source, description = open_source(quiet(folder, tmp_path / "megatron", "megatron"))
    assert description.raw["heads"] == settings, "how they were trained"
    assert description.shape.num_heads == SHAPE.num_heads
    assert description.raw["tokenizer"]["kind"] == "bytes"
    for key in source.keys():  # noqa: SIM118
        value = source.read(key)
        assert torch.equal(
            value[:257] if value.shape[0] == 384 else value,
            tensors[key][: value.shape[0]][:257] if value.shape[0] == 384 else tensors[key],
        ), key


def test_bin_files_and_a_cast(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    back = quiet(source, tmp_path / "back", "hf", dtype="bf16")
    assert same(load_file(back / "model.safetensors"), {key: value.bfloat16() for key, value in tensors.items()})


# Plain GPTs -----------------------------------------------------------------------------------------------------------


def plain_gpt(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A Megatron-LM checkpoint with its arguments; returns its tensors under this package's keys."""
    tensors = {key: value for key, value in random_tensors().items() if not key.startswith(("heads.1.", "heads.2."))}
    plain = {key.replace("heads.0.", "decoder.layers.3."): value for key, value in tensors.items()}
    plain["decoder.final_layernorm.weight"] = plain.pop("final_norm.weight")
    write_torch_dist(folder, stack_trunk(plain))
    torch.save({"args": Namespace(**(MEGATRON_LM_ARGUMENTS | changes)), "iteration": 5}, folder / "common.pt")
    return tensors


def test_a_plain_gpt_by_its_arguments(tmp_path: Path) -> None:
    tensors = plain_gpt(tmp_path / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    source, description = open_source(quiet(tmp_path, tmp_path / "out" / "m", "megatron"))
    assert description.shape.vocab_size == 257
    assert description.shape.padded_vocab_size == SHAPE.padded_vocab_size
    assert set(source.keys()) == set(tensors)
    assert all(torch.equal(source.read(key), tensors[key]) for key in tensors)
    hf_logits(quiet(tmp_path, tmp_path / "out" / "hf", "hf"), TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm' is not supported"),
        ({"num_experts": 8}, "num_experts=8 is not supported"),
        ({"num_layers": 7}, "has 4 layers"),
        ({"hidden_size": 64}, "has shape"),
    ],
)
def test_a_plain_gpt_that_is_no_llama(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain_gpt(tmp_path / "iter_0000005", **changes)
    refused(tmp_path / "iter_0000005", message)


# Which layout ---------------------------------------------------------------------------------------------------------


def test_layouts_are_told_apart(tokenizer: bytes, tmp_path: Path) -> None:
    hf, meta, run = write_hf(tmp_path / "hf"), tmp_path / "meta", tmp_path / "run"
    write_meta(meta, tokenizer)
    write_checkpoint(run)
    found = [detect(folder) for folder in (hf, meta, run, run / "checkpoints", run / "checkpoints" / "iter_0000007")]
    assert found == ["hf", "meta", "megatron", "megatron", "megatron"]
    for file in meta.iterdir():
        (hf / file.name).write_bytes(file.read_bytes())
    refused(hf, "ambiguous, it looks like hf and meta at once. Say which with --from hf or meta")
    assert (
        main(["convert", str(hf), "--from", "meta", "--to", "megatron", "--output", str(tmp_path / "o"), "--quiet"])
        == 0
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no model in it")
    refused(tmp_path / "nowhere", "no such file or folder")
    refused(hf / "config.json", "a file")


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(source: Path, message: str, to: str = "megatron", **options: Any) -> None:
    output = source.parent / "refused-output"
    with pytest.raises(MTPError, match=message):
        quiet(source, output, to, **options)
    assert not [entry.name for entry in source.parent.iterdir() if "refused-output" in entry.name]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mistral", {"sliding_window": 32}, "sliding_window=32 is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32 is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("llama", {"model_type": "gemma3"}, "model_type='gemma3' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn' is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map=.* is not supported"),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers=1 is not supported"),
        ("llama", {"hidden_size": "wide"}, "hidden_size='wide' is missing or no number"),
        ("llama", {"num_hidden_layers": 4}, r"missing: model\.layers\.3\.input_layernorm\.weight"),
        ("llama", {"num_hidden_layers": 2}, r"no place in the target: model\.layers\.2\.input_layernorm\.weight"),
        ("llama", {"intermediate_size": 40}, r"gate_proj\.weight has shape \[48, 32\].*\[40, 32\]"),
        ("llama", {"vocab_size": 299}, r"embed_tokens\.weight has shape \[300, 32\]"),
    ],
)
def test_what_a_folder_says_it_is(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", case)
    edit(source / "config.json", **changes)
    refused(source, message)


def damage_config(source: Path) -> None:
    (source / "config.json").write_text('{"model_type":')


def truncate(source: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def corrupt(source: Path) -> None:
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[3:40] = os.urandom(37)
    weights.write_bytes(content)


def change(source: Path, key: str, value: torch.Tensor, file: str = "model.safetensors") -> None:
    tensors = load_file(source / file) | {key: value}
    save_file(tensors, source / file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_config, r"config\.json: missing or damaged"),
        (truncate, r"model\.safetensors: missing, truncated or damaged"),
        (corrupt, r"model\.safetensors: missing, truncated or damaged"),
        (lambda s: change(s, "model.norm.weight", torch.ones(31)), r"norm\.weight has shape \[31\]"),
        (lambda s: change(s, "model.norm.weight", torch.ones(32, dtype=torch.int8)), "a quantised model's type"),
        (lambda s: change(s, "model.norm.weight", torch.full((32,), torch.nan)), "final_norm.weight holds NaN"),
        (lambda s: change(s, "surprise", torch.ones(1)), "no place in the target: surprise"),
    ],
)
def test_damaged_hugging_face_folders(harm: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source")
    harm(source)
    for to in ("megatron", "hf", "meta"):
        refused(source, message, to)
    refused(source, message, "bundle", heads=2)


def lead_outside(source: Path) -> None:
    path = source / "mtp_heads.safetensors.index.json"
    edit(path, weight_map={key: f"../{name}" for key, name in json.loads(path.read_text())["weight_map"].items()})


NORM, HEADS = "mtp_heads.4.input_layernorm.weight", "mtp_heads.safetensors"


@pytest.mark.parametrize("to", ["bundle", "hf", "megatron"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_config, r"config\.json: missing or damaged"),
        (truncate, r"model\.safetensors: missing, truncated or damaged"),
        (corrupt, r"model\.safetensors: missing, truncated or damaged"),
        (lambda s: (s / HEADS).unlink(), r"mtp_heads\.safetensors: missing, truncated or damaged"),
        (lambda s: (s / HEADS).write_bytes(b""), r"mtp_heads\.safetensors: missing, truncated or damaged"),
        (lambda s: (s / f"{HEADS}.index.json").write_text("{}"), "no weight_map of files in this folder"),
        (lead_outside, "no weight_map of files in this folder"),
        (lambda s: change(s, "model.norm.weight", torch.ones(3, 3)), r"norm\.weight has shape \[3, 3\]"),
        (lambda s: change(s, NORM, torch.ones(63), HEADS), r"mtp_heads\.4\.input_layernorm\.weight has shape \[63\]"),
        (lambda s: change(s, NORM, torch.ones(64, dtype=torch.int8), HEADS), "a quantised model's type"),
        (lambda s: change(s, NORM, torch.full((64,), torch.nan), HEADS), r"heads\.3\..*holds NaN"),
        (lambda s: change(s, NORM, torch.full((64,), torch.inf), HEADS), r"heads\.3\..*holds NaN or infinity"),
        (lambda s: change(s, "mtp_heads.5.surprise", torch.ones(1), HEADS), r"disagree \(mtp_heads\.5\.surprise\)"),
        (lambda s: edit(s / "mtp_config.json", heads={"n": 5}), r"missing: mtp_heads\.5\.input_layernorm\.weight"),
        (lambda s: edit(s / "mtp_config.json", heads=4), r"mtp_config\.json: not an export's"),
        (lambda s: (s / "mtp_config.json").write_text("[]"), r"mtp_config\.json: damaged, no settings in it"),
    ],
)
def test_damaged_exports(harm: Callable[[Path], None], message: str, to: str, tmp_path: Path) -> None:
    source = write_export(tmp_path / "source", random_weights())
    harm(source)
    refused(source, message, to)


def test_the_command_line_refuses_a_damaged_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_export(tmp_path / "source", random_weights())
    arguments = ["convert", str(source), "--to", "bundle", "--quiet", "--output"]
    truncate(source)
    assert main([*arguments, str(tmp_path / "out")]) == 2
    assert "model.safetensors: missing, truncated or damaged" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    write_export(tmp_path / "whole", random_weights())
    arguments[1] = str(tmp_path / "whole")
    assert main([*arguments, str(tmp_path / "out")]) == 0, "control"


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_hostile_pickles_run_nothing(tokenizer: bytes, tmp_path: Path) -> None:
    trap, evil = tmp_path / "trap", Malicious(tmp_path / "trap")
    write_meta(tmp_path / "meta", tokenizer)
    torch.save({"tok_embeddings.weight": evil}, tmp_path / "meta" / "consolidated.pth")
    refused(tmp_path / "meta", "refused: its pickle is damaged or asks for more than tensors")
    with (tmp_path / "meta" / "consolidated.pth").open("wb") as file:
        pickle.dump(evil, file)
    refused(tmp_path / "meta", "not a file of torch.save")
    hf = write_hf(tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    torch.save({"model.norm.weight": evil}, hf / "pytorch_model.bin")
    refused(hf, "asks for more than tensors")
    plain_gpt(tmp_path / "gpt")
    torch.save({"args": evil}, tmp_path / "gpt" / "common.pt")
    refused(tmp_path / "gpt", "no complete arguments of Megatron-LM")
    assert not trap.exists()
    torch.load(tmp_path / "gpt" / "common.pt", weights_only=False)
    assert trap.exists(), "control: this pickle does run where it is let"


@pytest.mark.parametrize("where", [0.5, 0.02], ids=["values", "pickle"])
def test_a_damaged_release(where: float, tokenizer: bytes, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", tokenizer)
    weights = tmp_path / "meta" / "consolidated.pth"
    content = bytearray(weights.read_bytes())
    content[int(len(content) * where)] ^= 0x40
    weights.write_bytes(content)
    refused(tmp_path / "meta", "damaged")
    weights.write_bytes(content[:-200])
    refused(tmp_path / "meta", "truncated")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_future_tokens": 3}, r"missing: layers\.3\..*no place in the target: extra_heads\.2"),
        ({"n_layers": 7}, r"missing: layers\.3\."),
        ({"n_kv_heads": 4}, r"attention\.wk\.weight has shape \[16, 32\]"),
        ({"dim": None}, "params.json: incomplete"),
        ({"moe": {"experts": 8}}, "moe=.* is not supported"),
        ({"use_scaled_rope": True}, "use_scaled_rope=True is not supported"),
        ({"vocab_size": 17}, "has 300 rows, params.json says vocab_size=17"),
    ],
)
def test_params_that_do_not_fit(changes: dict[str, Any], message: str, tokenizer: bytes, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", tokenizer)
    edit(tmp_path / "meta" / "params.json", **changes)
    refused(tmp_path / "meta", message)


def test_what_metas_layout_cannot_say(tmp_path: Path) -> None:
    for case, message in (("qwen2", "tied_embeddings=true"), ("qwen3", "qk_norm=true"), ("linear", "rope_scaling")):
        refused(write_hf(tmp_path / case, case), message, "meta")


def test_heads_and_output_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_hf(tmp_path / "source"), tmp_path / "out"
    arguments = ["convert", str(source), "--to", "megatron", "--output", str(output), "--quiet"]
    assert main([*arguments, "--heads", "0"]) == 2
    assert "--heads=0" in capsys.readouterr().err
    assert main([*arguments, "--heads", "4", "--new-heads", "copy", "--dtype", "bf16"]) == 0
    assert "trunk and head 1 and heads 2 to 4" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert open_source(output)[1].raw["precision"] == "bf16"


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["megatron", "meta", "hf", "bundle"])
def test_memory_is_bounded_by_one_tensor(to: str, tmp_path: Path) -> None:
    """A model of 0.4 GB whose largest tensor has 17 MB and whose shards have 50, in a process of its own."""
    report = subprocess.run(
        [sys.executable, "tools/bench_convert.py", "--gigabytes", "0.4", "--folder", str(tmp_path), "--to", to],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    figures = json.loads(report.stdout.splitlines()[-1])
    assert figures["model_mb"] > 350
    assert figures["peak_above_start_mb"] < 200, figures
