"""Exports: read by transformers with the same logits, whole or absent, and refused where they would be wrong."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mtp_megatron.checkpoint import convert, hf
from mtp_megatron.checkpoint.convert import convert_to_hf
from mtp_megatron.checkpoint.sharded import read_sharded
from mtp_megatron.cli import main
from mtp_megatron.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from mtp_megatron.data.train_tokenizer import train_tokenizer
from mtp_megatron.errors import CheckpointError, MTPError
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from tests.checkpoints import SHAPE, random_tensors, write_checkpoint

TOKENS = torch.randint(0, SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(3))


def export(tmp_path: Path, shape: Any = SHAPE, *, dtype: str | None = None, shard: int = 10**9, **options: Any) -> Path:
    write_checkpoint(tmp_path / "run", shape, **options)
    convert_to_hf(tmp_path / "run", tmp_path / "hf", dtype=dtype, max_shard_bytes=shard, progress=False)
    return tmp_path / "hf"


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens[None]).logits[0]
    return logits


@torch.inference_mode()
def decoder_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = HeadsLlama.load(open_export(folder), dtype)
    return model.run(tokens, model.new_caches(len(tokens)), rows=len(tokens))[1]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_reads_the_same_model(tmp_path: Path, tied: bool) -> None:
    folder = export(tmp_path, dataclasses.replace(SHAPE, tied_embeddings=tied))
    theirs, ours = transformers_logits(folder, TOKENS), decoder_logits(folder, TOKENS)
    assert theirs.shape == (len(TOKENS), SHAPE.vocab_size)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert theirs.abs().max() > 0.5


def test_each_further_head_is_what_a_llama_with_it_as_last_layer_says(tmp_path: Path) -> None:
    """Head i in place of head 1, read by transformers: its logits are the decoder's for head i."""
    folder = export(tmp_path)
    model = HeadsLlama.load(open_export(folder))
    with torch.inference_mode():
        caches = model.new_caches(len(TOKENS))
        z, _ = model.run(TOKENS, caches, rows=1)
        ours = model.run_further_heads(z, caches, rows=len(TOKENS))
    tensors = random_tensors()
    for head in range(1, SHAPE.num_heads):
        swapped = tensors | {key.replace(f"heads.{head}.", "heads.0."): value for key, value in tensors.items()}
        other = export(tmp_path / f"head{head}", tensors=swapped)
        torch.testing.assert_close(transformers_logits(other, TOKENS), ours[head - 1], atol=1e-4, rtol=0)
        assert (ours[head - 1] - decoder_logits(folder, TOKENS)).abs().max() > 0.1, "control: heads differ"


def test_shards_with_an_index_hold_the_same_tensors(tmp_path: Path) -> None:
    whole, cut = export(tmp_path / "a"), export(tmp_path / "b", shard=20_000)
    shards = sorted(file.name for file in cut.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(file.name for file in whole.glob("*.safetensors")) == ["model.safetensors", "mtp_heads.safetensors"]
    # One file has an index too, for engines that otherwise load every *.safetensors of a folder.
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert (cut / shards[0]).stat().st_mode & 0o444 == 0o444
    assert torch.equal(transformers_logits(whole, TOKENS), transformers_logits(cut, TOKENS))
    a, b = dict(open_export(whole).tensors()), dict(open_export(cut).tensors())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("weight_map", [{"model.norm.weight": "../a/model.safetensors"}, ["model.safetensors"], None])
def test_an_index_that_leaves_the_folder_is_refused(weight_map: Any, tmp_path: Path) -> None:
    """An export may come from anybody: the file that it names lies there, and holds that tensor alone."""
    (tmp_path / "a").mkdir()
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "a" / "model.safetensors")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json: damaged, no weight_map of files in this folder"):
        next(read_sharded(tmp_path / "b", "model"))


def test_bf16_export(tmp_path: Path) -> None:
    folder = export(tmp_path, dtype="bf16")
    with safe_open(folder / "mtp_heads.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118 (not a dict)
        assert "mtp_heads.3.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118
    theirs = transformers_logits(folder, TOKENS)
    assert theirs.dtype == torch.bfloat16
    exact = decoder_logits(folder, TOKENS)  # fp32 arithmetic on the bf16 weights
    error = (theirs.float() - exact).abs().mean()
    assert 0 < error < 0.05
    # bf16 rounds somewhere else in each implementation; ours is as near to the exact result as theirs.
    assert (decoder_logits(folder, TOKENS, torch.bfloat16).float() - exact).abs().mean() < 1.5 * error


def test_configuration_says_what_readers_need(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = export(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 10000
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.vocab_size, config.num_key_value_heads) == (4, 257, 2)
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.max_position_embeddings == 128
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 256
    heads = json.loads((folder / "mtp_config.json").read_text())
    assert (heads["num_heads"], heads["num_trunk_layers"], heads["source"]["step"]) == (3, 3, 7)


def test_one_head_is_a_plain_llama(tmp_path: Path) -> None:
    folder = export(tmp_path, dataclasses.replace(SHAPE, num_heads=1))
    torch.testing.assert_close(transformers_logits(folder, TOKENS), decoder_logits(folder, TOKENS), atol=1e-4, rtol=0)
    assert not list(folder.glob("mtp_heads*.safetensors"))


# Tokenizers.


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Real source code: every 12th file of the standard library's top folder; and every kind of white space."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::12]
    texts = [file.read_bytes().decode("utf-8") for file in files]
    assert len(texts) > 10
    return [*texts, "\tif x:\r\n\t\treturn  'é 😀'   \n\n\x00    # <s> </s> <unk> <|endoftext|> end \n", " ", "  a", ""]


@pytest.fixture(scope="module")
def sentencepiece(sources: list[str]) -> SentencePieceTokenizer:
    return train_tokenizer(sources, 600)


def check_ids(folder: Path, tokenizer: Any, sources: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.eod
    for text in sources:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text == tokenizer.decode(ids)
    assert theirs.decode([*tokenizer.encode("x"), tokenizer.eod], skip_special_tokens=True) == "x"


def test_byte_ids_in_transformers(tmp_path: Path, sources: list[str]) -> None:
    folder = export(tmp_path)
    check_ids(folder, ByteTokenizer(), sources)
    assert not (folder / "tokenizer.model").exists()


def test_sentencepiece_ids_in_transformers(
    tmp_path: Path, sources: list[str], sentencepiece: SentencePieceTokenizer
) -> None:
    shape = dataclasses.replace(SHAPE, vocab_size=600, padded_vocab_size=640)
    folder = export(tmp_path, shape, tokenizer=sentencepiece)
    check_ids(folder, sentencepiece, sources)
    assert (folder / "tokenizer.model").read_bytes() == sentencepiece.files()["tokenizer.model"]
    # Control: transformers' own conversion of tokenizer.model adds what training did not have.
    from transformers import LlamaTokenizer

    (folder / "tokenizer.json").unlink()
    converted = LlamaTokenizer.from_pretrained(folder)
    assert any(converted(text)["input_ids"] != sentencepiece.encode(text) for text in sources[:3])


def test_a_tokenizer_that_adds_a_space_like_llama_2(tmp_path: Path, sources: list[str]) -> None:
    tokenizer = _sentencepiece(sources, model_type="bpe", add_dummy_prefix=True, byte_fallback=True)
    shape = dataclasses.replace(SHAPE, vocab_size=500, padded_vocab_size=512)
    folder = export(tmp_path, shape, tokenizer=tokenizer)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in sources:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_a_tokenizer_without_an_exact_equivalent_is_pointed_out(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = _sentencepiece(sources, model_type="unigram", add_dummy_prefix=True, byte_fallback=True)
    shape = dataclasses.replace(SHAPE, vocab_size=500, padded_vocab_size=512)
    write_checkpoint(tmp_path / "run", shape, tokenizer=tokenizer)
    assert main(["convert", str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--quiet"]) == 0
    assert "not a BPE model" in capsys.readouterr().err
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert open_export(tmp_path / "hf").tokenizer.encode("a b") == tokenizer.encode("a b")


def _sentencepiece(sources: list[str], **settings: Any) -> SentencePieceTokenizer:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [line for text in sources for line in text.splitlines() if "\x00" not in line]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=3,
        **settings,
    )
    return SentencePieceTokenizer(model.getvalue(), "test")


# Whole or absent.


def test_nothing_is_left_when_a_conversion_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write_checkpoint(run)

    def interrupt(*args: Any) -> None:
        # Everything but the last file is there, under a name that nothing takes for an export.
        (folder,) = tmp_path.glob(".hf.partial")
        assert (folder / "model.safetensors").exists()
        assert not (folder / "config.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(run, tmp_path / "hf", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_output_folder_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    arguments = ["convert", str(tmp_path / "run"), "--output", str(folder), "--quiet"]
    assert main(arguments) == 0
    assert "already: nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--dtype", "bf16"]) == 2
    assert "holds another export" in capsys.readouterr().err
    write_checkpoint(tmp_path / "other", tensors=random_tensors(seed=1))
    assert main(["convert", str(tmp_path / "other"), "--output", str(folder), "--quiet"]) == 2
    assert "holds another export" in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert main(["convert", str(tmp_path / "run"), "--output", str(tmp_path / "mine"), "--quiet"]) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["convert", str(tmp_path / "run"), "--output", str(tmp_path / "file"), "--quiet"]) == 2
    assert "is a file" in capsys.readouterr().err


def refused(tmp_path: Path, message: str, **options: Any) -> None:
    write_checkpoint(tmp_path / "run", **options)
    with pytest.raises(MTPError, match=message):
        convert_to_hf(tmp_path / "run", tmp_path / "hf", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"], "something was left behind"


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["heads.2.mlp.linear_fc1.weight"][5, 5] = float("nan")
    refused(tmp_path, r"heads\.2\.mlp\.linear_fc1\.weight holds NaN", tensors=tensors)


def test_a_value_that_the_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["final_norm.weight"][0] = 1e6
    write_checkpoint(tmp_path / "run", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight does not fit torch\.float16"):
        convert_to_hf(tmp_path / "run", tmp_path / "hf", dtype="fp16", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["heads.1.mlp.linear_fc2.weight"]
    refused(tmp_path, r"missing: heads\.1\.mlp\.linear_fc2\.weight", tensors=tensors)
    tensors = random_tensors() | {"decoder.final_layernorm.weight": torch.ones(32)}
    refused(tmp_path, r"no place in the target: decoder\.final_layernorm\.weight", tensors=tensors)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    wide = dataclasses.replace(SHAPE, hidden_size=64)
    refused(tmp_path, "shape .* a checkpoint of another architecture", tensors=random_tensors(wide))
    heads = {"n": 3, "kind": "transformer", "arrangement": "causal", "unembedding": "shared"}
    refused(tmp_path, r"heads\.arrangement=causal cannot be written in another layout", heads=heads)
    refused(tmp_path, "incomplete or of another version", heads={"n": 3})
    refused(tmp_path, "is below its tokenizer's 257", vocab_size=200)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    entry = {"kind": "bytes", "sha256": "0" * 64, "eod": 256, "file": None}
    folder = write_checkpoint(tmp_path / "run")
    config = json.loads((folder / "mtp_config.json").read_text()) | {"tokenizer": entry}
    (folder / "mtp_config.json").write_text(json.dumps(config))
    (folder / "files.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the tokenizer that the checkpoint was trained with"):
        convert_to_hf(tmp_path / "run", tmp_path / "hf", progress=False)


def test_a_damaged_export_is_refused_by_the_decoder(tmp_path: Path) -> None:
    folder = export(tmp_path)
    weights = folder / "mtp_heads.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"mtp_heads\.safetensors: missing, truncated or damaged"):
        HeadsLlama.load(open_export(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"mtp_heads\.safetensors: missing"):
        HeadsLlama.load(open_export(folder))
    (folder / "mtp_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not an export's"):
        open_export(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_export(tmp_path)


def test_sizes_on_the_command_line() -> None:
    from argparse import ArgumentTypeError

    from mtp_megatron.checkpoint.cli import parse_size

    assert [parse_size(text) for text in ("5GB", "1.5mb", "12", "7 KB")] == [5 * 10**9, 1_500_000, 12, 7000]
    for text in ("", "-1GB", "big", "0"):
        with pytest.raises(ArgumentTypeError):
            parse_size(text)
    assert parse_size("5GB") == convert.DEFAULT_SHARD_BYTES
