"""Heads for a model from Hugging Face, with its own tokenizer from the corpus to the bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtp_megatron.cli import main
from mtp_megatron.data.manifest import load_manifest
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training.checkpoint_files import find_checkpoint
from tests.foreign_models import hf_logits, write_hf
from tests.harness import run_world
from tests.hf_tokenizers import BEGIN, END, TURN, byte_level, write_tokenizer_folder
from tests.training_runs import metrics, tiny_tree, train_body
from tests.upstream_data import write_upstream

VOCABULARY = 320  # of the model, padded past the tokenizer's as Qwen's are
TRAIN = [sys.executable, "-m", "mtp_megatron", "train"]
PROMPT = "w3 w7 w11"


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with everything that one has."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    library = byte_level()
    end, begin, turn = (library.token_to_id(token) for token in (END, BEGIN, TURN))
    ends: dict[str, Any] = {"eos_token_id": [end, turn], "bos_token_id": begin}
    write_tokenizer_folder(write_hf(folder, vocab_size=VOCABULARY, **ends), library)
    (folder / "generation_config.json").write_text(json.dumps({**ends, "temperature": 0.6}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert library.get_vocab_size() < VOCABULARY
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        words = " ".join(f"w{number * j % 30}" for j in range(60))
        (folder / f"{number}.txt").write_text(f"{words} {END} {words}")
    return folder


@pytest.fixture(scope="module")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint."""
    folder = tmp_path_factory.mktemp("start") / "megatron"
    command("convert", model, "--to", "megatron", "--output", folder, "--quiet")
    return folder


def training(data: Path, run: Path, start: Path, **settings: Any) -> dict[str, Any]:
    """The recipe of a run that starts from the checkpoint and trains new heads alone."""
    two_steps = {"train__steps": 2, "train__save_interval": 2, "optimizer__warmup_steps": 0, "train__seq_length": 32}
    tree = tiny_tree(data, run, run__load=str(start), **two_steps, **settings)
    tree["model"] = yaml.safe_load((start / "model_recipe.yaml").read_text())["model"]
    tree["heads"] = {"n": 3, "new_heads": "copy", "trainable": "new_heads"}
    return tree


def test_from_a_hugging_face_model_to_a_bundle_with_heads(
    model: Path, corpus: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    data, run, bundle = tmp_path / "data", tmp_path / "run", tmp_path / "bundle"
    made = ("preprocess", corpus, "--extensions", ".txt", "--valid-fraction", 0.4, "--workers", 2, "--output", data)
    command(*made, "--tokenizer", model)
    assert f"({END})" in capsys.readouterr().out
    heads = ("heads.n=3", "heads.new_heads=copy", "heads.trainable=new_heads")
    short = ("train.seq_length=32", "train.steps=2", "train.global_batch_size=4", "optimizer.warmup_steps=0")
    places = (f"run.load={start}", f"data.path={data}", f"run.path={run}", "run.tensorboard=false")
    trained = subprocess.run(
        [*TRAIN, str(start / "model_recipe.yaml"), *places, *heads, *short], capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr
    command("report", run)
    command("convert", run, "--to", "bundle", "--output", bundle, "--quiet")

    carried = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    for name in carried:
        assert (bundle / name).read_bytes() == (model / name).read_bytes(), name
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (bundle, model))
    for key in ("vocab_size", "eos_token_id", "bos_token_id", "max_position_embeddings"):
        assert config[key] == before[key], key
    theirs, original = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (bundle, model))
    manifest = load_manifest(data)
    for text in (PROMPT, f"{PROMPT}{END}", "é \U0001f600\n\tx"):
        assert theirs(text)["input_ids"] == original(text)["input_ids"]
    assert theirs(PROMPT, add_special_tokens=False)["input_ids"] == manifest.load_tokenizer().encode(PROMPT)
    assert manifest.eod == theirs.eos_token_id

    tokens = torch.tensor([manifest.load_tokenizer().encode(f"{PROMPT} w2 w4 w6")])
    torch.testing.assert_close(hf_logits(bundle, tokens), hf_logits(model, tokens), atol=0, rtol=0)
    export = json.loads((bundle / "mtp_config.json").read_text())
    assert export["num_heads"] == 3
    assert export["tokenizer"]["more_ends"] == [original.convert_tokens_to_ids(TURN)]

    command("generate", bundle, "--prompt", PROMPT, "--max-new-tokens", 4, "--quiet")
    few = ("--prompt-tokens", 8, "--max-new-tokens", 12)
    command("generate", bundle, "--prompts-from", data, "--num-prompts", 2, *few, "--quiet")
    assert "2 of 2 texts identical" in capsys.readouterr().out
    command("verify", bundle, "--no-vllm", "--prompts-from", data, "--num-prompts", 12, *few, "--quiet")


def _written(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_tokenizer_of_the_checkpoint_makes_the_same_data(
    model: Path, corpus: Path, start: Path, tmp_path: Path
) -> None:
    made = ("preprocess", corpus, "--extensions", ".txt", "--quiet", "--output")
    command(*made, tmp_path / "one", "--tokenizer", model)
    command(*made, tmp_path / "two", "--tokenizer", start / "iter_0000000")
    one, two = (load_manifest(tmp_path / name).model_dump() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "train.bin").read_bytes() == (tmp_path / "two" / "train.bin").read_bytes()


def test_ids_that_upstream_made_train_the_model(model: Path, start: Path, tmp_path: Path) -> None:
    """Llama's tokenizer puts a token before each text where upstream asks it for a text's ids."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(model / "tokenizer.json"))
    end = library.token_to_id(END)
    lines = [" ".join(f"w{number * j % 30}" for j in range(60)) for number in range(30)]
    write_upstream(tmp_path / "up_text_document", [[[*library.encode(line).ids, end]] for line in lines])
    arguments = ("--tokenizer", model, "--valid-fraction", 0.3, "--output", tmp_path / "data")
    command("adopt", tmp_path / "up_text_document", *arguments)
    run_world(train_body, 2, training(tmp_path / "data", tmp_path / "run", start, parallel__tensor=2))
    assert metrics(tmp_path / "run", "valid")[2]["head_loss"][2] > 0
    command("convert", tmp_path / "run", "--to", "bundle", "--output", tmp_path / "bundle", "--quiet")
    assert (tmp_path / "bundle" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_data_of_another_tokenizer_is_refused_by_name(model: Path, corpus: Path, start: Path, tmp_path: Path) -> None:
    made = ("preprocess", corpus, "--extensions", ".txt", "--valid-fraction", 0.4, "--quiet", "--output")
    command(*made, tmp_path / "bytes")
    recipe = _written(training(tmp_path / "bytes", tmp_path / "run", start), tmp_path / "recipe.yaml")
    train = [*TRAIN, str(recipe)]
    refused = subprocess.run(train, capture_output=True, text=True)
    assert refused.returncode == 2
    error = refused.stderr
    assert f"data.path='{tmp_path}/bytes': its tokenizer (bytes, sha256 " in error
    assert f"is not that of the model in run.load={start} (huggingface, sha256 " in error
    assert f"preprocess --tokenizer {start}/iter_0000000" in error
    assert not (tmp_path / "run" / "checkpoints").exists()
    accepted = subprocess.run([*train, "run.accept_changes=true", "train.steps=1"], capture_output=True, text=True)
    assert accepted.returncode == 0, accepted.stderr
    assert "run.accept_changes: data.path=" in accepted.stderr

    # The same ids from a file that is written otherwise are the model's.
    again = tmp_path / "again"
    again.mkdir()
    described = json.loads((model / "tokenizer.json").read_text())
    (again / "tokenizer.json").write_text(json.dumps(described, indent=4))
    command(*made, tmp_path / "same", "--tokenizer", again, "--eod", TURN)
    run_world(train_body, 1, training(tmp_path / "same", tmp_path / "second", start))
    written = json.loads((tmp_path / "second/checkpoints/iter_0000002/mtp_config.json").read_text())["tokenizer"]
    assert written["eod"] == load_manifest(tmp_path / "same").eod
    sizes = json.loads((tmp_path / "second/checkpoints/iter_0000002/files.json").read_text())
    assert sizes["tokenizer/tokenizer.json"] == (again / "tokenizer.json").stat().st_size


def test_a_checkpoints_chat_template_may_change_and_its_ids_may_not(model: Path, tmp_path: Path) -> None:
    command("convert", model, "--to", "megatron", "--output", tmp_path / "start", "--quiet")
    folder = tmp_path / "start" / "iter_0000000"
    settings = json.loads((folder / "tokenizer/tokenizer_config.json").read_text())
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "another"}))
    (folder / "tokenizer/chat_template.jinja").write_text("another one")
    (folder / "tokenizer/generation_config.json").unlink()
    assert find_checkpoint(tmp_path / "start") == folder
    command("convert", folder, "--to", "hf", "--output", tmp_path / "export", "--quiet")
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "another one"

    with (folder / "tokenizer/tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json has"):
        find_checkpoint(tmp_path / "start")
