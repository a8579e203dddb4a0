"""A preprocess with a Hugging Face tokenizer that was interrupted, and a run whose data has another one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_megatron.data import journal
from mtp_megatron.data.manifest import load_manifest
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.errors import ConfigError, DataError
from mtp_megatron.training.architecture import model_description
from mtp_megatron.training.preflight import preflight
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder
from tests.hf_tokenizers import END, TURN, change_json, write_tokenizer_folder
from tests.training_runs import complete, tiny_tree
from tests.unit.test_data_resume import SCANNING, TOKENIZING, count_calls, killed_until_done, preprocess_until

pytest.importorskip("tokenizers")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreprocessOptions:
    """With a record after each document."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    monkeypatch.setattr(journal, "_SHARE", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    model = write_tokenizer_folder(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [290]}')
    lines = [json.dumps({"text": f"def f{i}(x):{END if i % 2 else ''}\n" * 9}) for i in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return PreprocessOptions(
        tmp_path / "out", (tmp_path / "text.jsonl",), tokenizer=str(model), valid_fraction=0.2, quiet=True
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uninterrupted(options: PreprocessOptions) -> dict[str, bytes]:
    whole = replace(options, output=options.output.with_name("whole"))
    preprocess(whole)
    return content(whole.output)


def test_killed_anywhere_and_again_and_again_it_makes_the_same_bytes(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    options = replace(options, eod=TURN)
    assert killed_until_done(options, tmp_path, most_events=400, seed=0) >= 3
    assert content(options.output) == uninterrupted(options)
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} < content(options.output).keys()
    assert not (tmp_path / ".out.preprocess").exists()


def test_another_end_or_tokenizer_is_refused_and_the_work_stays(options: PreprocessOptions, tmp_path: Path) -> None:
    whole, model = uninterrupted(options), Path(options.tokenizer)
    preprocess_until(options, TOKENIZING, 9)
    with pytest.raises(
        DataError, match=r"with other options \(tokenizer='huggingface \w+ 294', now 'hugg\w+ \w+ 295'\)"
    ):
        preprocess(replace(options, eod=TURN))
    shutil.copytree(model, tmp_path / "former")
    change_json(model / "tokenizer.json", normalizer={"type": "NFC"})
    with pytest.raises(DataError, match=r"with other options \(tokenizer='huggingface"):
        preprocess(options)
    with pytest.MonkeyPatch.context() as patch:
        scanned, written = count_calls(patch, *SCANNING), count_calls(patch, *TOKENIZING)
        preprocess(replace(options, tokenizer=str(tmp_path / "former")))
    assert (len(scanned), len(written)) == (0, 22), "eight documents were there"
    assert content(options.output) == whole


def test_what_decides_no_id_may_change_and_is_that_of_the_last_call(options: PreprocessOptions) -> None:
    model = Path(options.tokenizer)
    preprocess_until(options, TOKENIZING, 9)
    change_json(model / "tokenizer_config.json", chat_template="{{ another }}")
    (model / "generation_config.json").write_text('{"eos_token_id": [290, 291]}')
    preprocess(options)
    assert content(options.output) == uninterrupted(options)
    assert load_manifest(options.output).tokenizer.more_ends == (290, 291)


def stopped_run(run: Path, data: Path) -> None:
    plan = preflight(parse_recipe(tiny_tree(data, run)), 1)
    RunFolder(run).write_recipe(plan.recipe)
    folder = complete(run, 5, plan.recipe, **model_description(plan.recipe, plan.data, 5))
    plan.data.first.copy_tokenizer(folder)


def test_a_run_may_go_on_with_data_of_the_same_ids(options: PreprocessOptions, tmp_path: Path) -> None:
    """The tokenizer's file was written anew by another release of its library, and documents end with another id."""
    preprocess(options)
    run = tmp_path / "run"
    stopped_run(run, options.output)
    change_json(Path(options.tokenizer) / "tokenizer.json")  # the same, written otherwise
    again = replace(options, output=tmp_path / "again", eod=TURN)
    preprocess(again)

    def resume(**settings: Any) -> Any:
        return preflight(parse_recipe(tiny_tree(again.output, run, **settings)), 1)

    with pytest.raises(ConfigError, match="documents ended with id 294, and end with 295") as caught:
        resume()
    assert "another tokenizer" not in str(caught.value)
    assert "data: documents ended with id 294, and end with 295" in resume(run__accept_changes=True).changes
    change_json(Path(options.tokenizer) / "tokenizer.json", normalizer={"type": "NFC"})
    shutil.rmtree(again.output)
    preprocess(again)
    with pytest.raises(ConfigError, match="another tokenizer"):
        resume(run__accept_changes=True)
