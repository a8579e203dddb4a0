"""Hugging Face tokenizers: the library's ids, no token that the text only spells, one identity for data and models."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_megatron.data.encode import encode_documents
from mtp_megatron.data.huggingface import HuggingFaceTokenizer, open_tokenizer, read_files
from mtp_megatron.data.manifest import load_manifest
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.data.tokenizer import load_tokenizer
from mtp_megatron.data.tokenizer_store import choose_tokenizer, entry_of, write_tokenizer
from mtp_megatron.data.train_tokenizer import train_tokenizer
from mtp_megatron.errors import ConfigError, DataError
from tests.hf_tokenizers import BEGIN, END, TURN, byte_level, change_json, write_tokenizer_folder
from tests.unit.test_data_tokenizer import HARD

pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer_folder(tmp_path / "model")


@pytest.fixture
def tokenizer(folder: Path) -> HuggingFaceTokenizer:
    return open_tokenizer(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents some of which spell the end of a document."""
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}{END if number % 2 else ''}\n")
    return source


def options(output: Path, corpus: Path, tokenizer: object, **more: Any) -> PreprocessOptions:
    return PreprocessOptions(output=output, paths=(corpus,), tokenizer=str(tokenizer), quiet=True, **more)


@pytest.mark.parametrize("text", [*HARD, f"a{END}b{BEGIN}{TURN}", END, f" {TURN} "])
def test_hard_text_comes_back_and_spells_no_token(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids
    assert not {tokenizer.token_ids[token] for token in (BEGIN, END, TURN)} & set(ids)


def test_the_ids_are_those_of_transformers(tokenizer: HuggingFaceTokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in HARD:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.encode(f"a{END}", add_special_tokens=False)[-1] == tokenizer.eod, "control: there it is the token"
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (
        tokenizer.eod,
        tokenizer.bos,
        tokenizer.vocab_size,
    )


def test_a_prompt_is_read_as_engines_read_it(tokenizer: HuggingFaceTokenizer, folder: Path) -> None:
    turn = tokenizer.token_ids[TURN]
    assert turn in tokenizer.encode_prompt(f"hello{TURN}")
    assert turn not in tokenizer.encode(f"hello{TURN}"), "the one setting does not stay for the other"
    change_json(folder / "tokenizer_config.json", split_special_tokens=True)
    assert turn not in open_tokenizer(folder).encode_prompt(f"hello{TURN}")


@pytest.mark.parametrize(
    ("settings", "model", "generation", "given", "end", "more", "begin"),
    [
        ({}, None, None, None, END, [], BEGIN),
        ({"eos_token": {"content": TURN}}, {"eos_token_id": [1, 2]}, None, None, TURN, [1, 2], BEGIN),
        ({"eos_token": TURN}, None, {"eos_token_id": 7}, END, END, [TURN, 7], BEGIN),
        ({"eos_token": None, "bos_token": None}, {"eos_token_id": 5, "bos_token_id": 4}, None, None, 5, [], 4),
        ({"eos_token": None}, None, {"eos_token_id": [3, 9]}, None, 3, [9], BEGIN),
    ],
)
def test_which_token_ends_a_document(
    folder: Path, settings: Any, model: Any, generation: Any, given: Any, end: Any, more: Any, begin: Any
) -> None:
    change_json(folder / "tokenizer_config.json", **settings)
    for name, content in (("config.json", model), ("generation_config.json", generation)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    # ids of the vocabulary, which texts encode to, are not refused for what they are in this test only
    found = _opened_without_probe(folder, given)
    ids = found.token_ids
    assert found.eod == ids.get(end, end)
    assert list(found.more_ends) == [ids.get(token, token) for token in more]
    assert found.bos == ids.get(begin, begin)


def _opened_without_probe(folder: Path, eod: str | None) -> HuggingFaceTokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceTokenizer, "encode", lambda self, text: [])
        return open_tokenizer(folder, eod)


def test_without_an_end_token_it_is_asked_for(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(DataError, match=r"names no token that ends a text .*--eod TOKEN"):
        open_tokenizer(folder)
    assert open_tokenizer(folder, TURN).eod == open_tokenizer(folder, TURN).token_ids[TURN]
    with pytest.raises(ConfigError, match=r"--eod='<end>': is no token of .*<\|end_of_text\|>"):
        open_tokenizer(folder, "<end>")


def test_tokens_that_the_model_has_no_embeddings_for_are_none_of_its_ids(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """As a [PAD] that was added to Llama 2's tokenizer: the data still is the model's."""
    most = open_tokenizer(folder).token_ids[TURN]
    assert open_tokenizer(folder).vocab_size == most + 1
    (folder / "config.json").write_text(json.dumps({"vocab_size": most}))
    found = open_tokenizer(folder)
    assert found.vocab_size == preprocess(options(tmp_path / "data", corpus, folder)).manifest.vocab_size == most
    with pytest.raises(
        DataError, match=rf"'<\|eot_id\|>', whose id {most} is outside the model's vocabulary of {most}"
    ):
        found.encode_prompt(f"x{TURN}")
    assert most not in found.encode(TURN)
    with pytest.raises(DataError, match=r"'<\|eot_id\|>', has the id .*--eod"):
        open_tokenizer(folder, TURN)

    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    described = {"tokenizer": entry_of(found), "vocab_size": most}
    (checkpoint / "mtp_config.json").write_text(json.dumps(described))
    write_tokenizer(found, checkpoint)
    assert choose_tokenizer(checkpoint).vocab_size == most
    (folder / "config.json").write_text(json.dumps({"vocab_size": most + 90}))
    assert open_tokenizer(folder).vocab_size == most + 1


def test_an_end_token_that_the_file_lacks_is_named(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", eos_token={"content": "<|nowhere|>"})
    with pytest.raises(
        DataError, match=r"its eos_token in tokenizer_config.json, '<\|nowhere\|>', is no token of .*--eod"
    ):
        open_tokenizer(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_the_library_cannot_encode_is_an_error_that_says_so(folder: Path, workers: int) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "<unk>"}
    ends = {"id": 2, "content": "<end>", "special": True, "normalized": False}
    ends |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    change_json(folder / "tokenizer.json", model=model, added_tokens=[ends], post_processor=None)
    plain = HuggingFaceTokenizer(
        {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}, vocab_size=None, eod=2, bos=None, name="plain"
    )
    with pytest.raises(DataError, match=r"plain: .*cannot encode a text that begins with 'c d' .*\[UNK\]"):
        list(encode_documents([b"c d"], plain, workers))


def test_an_end_token_that_is_not_marked_special_is_one_all_the_same(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(described))
    found = open_tokenizer(folder)
    assert found.eod not in found.encode(f"a{END}b")
    assert found.token_ids[TURN] in found.encode(TURN), "an added token that is not special is part of the vocabulary"


def test_an_end_token_that_texts_encode_to_is_refused(folder: Path, tmp_path: Path) -> None:
    """As where the vocabulary itself has it: no library option keeps such a text apart."""
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((chr(code), -1.0) for code in range(32, 127))]
    write_tokenizer_folder(tmp_path / "unigram", Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token="</s>")
    with pytest.raises(DataError, match=r"a text that spells '</s>' encodes to the end-of-document id 1.*--eod"):
        open_tokenizer(tmp_path / "unigram")
    with pytest.raises(DataError, match=r"a text that spells 'x'"):
        open_tokenizer(folder, "x")


def test_truncation_and_padding_of_the_file_cut_nothing(folder: Path) -> None:
    library = byte_level()
    library.enable_truncation(5)
    library.enable_padding(length=50)
    library.save(str(folder / "tokenizer.json"))
    text = "def f(x): return x"
    assert open_tokenizer(folder).decode(open_tokenizer(folder).encode(text)) == text
    assert len(open_tokenizer(folder).encode("d")) == 1


def test_random_ids_are_refused(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"dropout=0.1.*Set it to null"):
        open_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"vocab": {}}}', '{"model": {"vocab": {"a": 0}}}'])
def test_a_damaged_file_is_named(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"model: tokenizer.json"):
        open_tokenizer(folder, "a")


def test_what_is_no_tokenizer_is_refused_with_what_to_give(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: the tokenizer cannot be read"):
        choose_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere.json: cannot be read"):
        choose_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no tokenizer.json in it. Give the folder"):
        choose_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"--tokenizer .*empty/tokenizer.model"):
        choose_tokenizer(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"--eod='x': bytes has an end-of-document token of its own"):
        choose_tokenizer("bytes", "x")
    with pytest.raises(ConfigError, match=r"--eod='x': a tokenizer that is trained"):
        PreprocessOptions(output=tmp_path, eod="x", train_vocab=300)


def test_without_the_library_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"takes the library tokenizers.*pip install 'PATH_TO_CHECKOUT\[hf\]'"):
        open_tokenizer(folder)


def test_the_file_and_its_folder_are_the_same(tokenizer: HuggingFaceTokenizer, folder: Path, tmp_path: Path) -> None:
    by_file = choose_tokenizer(folder / "tokenizer.json")
    assert (by_file.sha256, by_file.files()) == (tokenizer.sha256, tokenizer.files())
    other = tmp_path / "llama.json"
    other.write_bytes((folder / "tokenizer.json").read_bytes())
    alone = choose_tokenizer(other, END)
    assert list(alone.files()) == ["tokenizer.json"]
    assert tokenizer.same_ids(alone)


@pytest.mark.parametrize("parts", [False, True])
def test_the_same_ids_are_known_however_the_file_is_written(
    tokenizer: HuggingFaceTokenizer, folder: Path, tmp_path: Path, parts: bool
) -> None:
    """As an older release writes it: merges as one text, settings left out that have their defaults."""
    described = json.loads((folder / "tokenizer.json").read_text())
    model = described["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del model["ignore_merges"], described["post_processor"]
    if parts:
        del described["pre_tokenizer"]["use_regex"]
    again = tmp_path / "again"
    again.mkdir()
    (again / "tokenizer.json").write_text(json.dumps(described, indent=1))
    older = open_tokenizer(again, END)
    assert older.encode("def f(x): w1") == tokenizer.encode("def f(x): w1")
    assert older.sha256 != tokenizer.sha256
    assert tokenizer.same_ids(older)
    model["merges"][:2] = model["merges"][1::-1]
    (again / "tokenizer.json").write_text(json.dumps(described))
    assert not tokenizer.same_ids(open_tokenizer(again, END))
    assert not tokenizer.same_ids(load_tokenizer("bytes"))


def test_a_sentencepiece_model_beside_it_is_known(tokenizer: HuggingFaceTokenizer, folder: Path) -> None:
    piece = train_tokenizer(["def f(x): return x + 1\n"] * 40, 275)
    assert not tokenizer.same_ids(piece)
    (folder / "tokenizer.model").write_bytes(piece.files()["tokenizer.model"])
    assert open_tokenizer(folder).same_ids(piece)


def test_ids_past_the_tokenizers_are_padding_of_the_model(tokenizer: HuggingFaceTokenizer) -> None:
    padded = HuggingFaceTokenizer(tokenizer.files(), vocab_size=512, eod=tokenizer.eod, bos=None, name="padded")
    assert padded.decode([*tokenizer.encode("w1"), 511]) == "w1"
    with pytest.raises(DataError, match="outside the vocabulary"):
        tokenizer.decode([511])


def test_invalid_unicode_is_refused(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="not UTF-8"):
        tokenizer.encode(b"\xff")


def test_it_is_lossless_unless_it_normalises(tokenizer: HuggingFaceTokenizer, folder: Path) -> None:
    from tokenizers import normalizers

    assert tokenizer.lossless
    library = byte_level()
    library.normalizer = normalizers.Strip()
    library.save(str(folder / "tokenizer.json"))
    assert not open_tokenizer(folder).lossless


def test_workers_give_the_same_ids(tokenizer: HuggingFaceTokenizer) -> None:
    texts = [f"def f{number}(x): {END}\n".encode() * 2000 for number in range(60)]
    alone = [tokenizer.encode_document(text) for text in texts]
    assert sum(map(len, texts)) > 2 << 20, "more than one batch for each worker"
    together = list(encode_documents(texts, tokenizer, workers=2))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len(pickle.dumps(tokenizer)) < 1.2 * sum(map(len, tokenizer.files().values())), "not with the library's copy"


def test_a_data_set_carries_its_tokenizer(folder: Path, corpus: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [300, 301]}')
    result = preprocess(options(tmp_path / "out", corpus, folder, workers=2))
    manifest = load_manifest(tmp_path / "out")
    given, kept = open_tokenizer(folder), manifest.load_tokenizer()
    assert kept.files() == given.files() == read_files(folder)
    for field in ("eod", "bos", "more_ends", "vocab_size", "sha256"):
        assert getattr(kept, field) == getattr(given, field) == getattr(result.tokenizer, field), field
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [
        np.array(document) for split in ("train", "valid") for document in IndexedDataset(manifest.prefix(split))
    ]
    ends = np.concatenate([document == kept.eod for document in documents])
    assert ends.sum() == len(documents) == 8, "a text that spells the token does not end its document"
    assert all(document[-1] == kept.eod for document in documents)
    assert sorted(kept.decode(document.tolist()) for document in documents) == sorted(
        path.read_text() for path in corpus.iterdir()
    )


def test_the_same_command_is_up_to_date_and_another_end_is_another_data_set(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    assert not preprocess(options(tmp_path / "out", corpus, folder)).up_to_date
    assert preprocess(options(tmp_path / "out", corpus, folder)).up_to_date
    with pytest.raises(DataError, match=r"holds another data set \(tokenizer='huggingface"):
        preprocess(options(tmp_path / "out", corpus, folder, eod=TURN))


def test_a_changed_tokenizer_in_the_data_set_is_noticed(folder: Path, corpus: Path, tmp_path: Path) -> None:
    preprocess(options(tmp_path / "out", corpus, folder))
    (tmp_path / "out" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    load_manifest(tmp_path / "out")
    change_json(tmp_path / "out" / "tokenizer" / "tokenizer.json", normalizer={"type": "NFC"})
    with pytest.raises(DataError, match="not the tokenizer that made this data set"):
        load_manifest(tmp_path / "out")


def test_training_does_not_need_the_library(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """What a rank reads of a data set takes neither the library nor the time to read the vocabulary."""
    preprocess(options(tmp_path / "out", corpus, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        patch.setattr("mtp_megatron.data.huggingface._table", lambda *_: pytest.fail("the vocabulary was read"))
        manifest = load_manifest(tmp_path / "out")
        manifest.copy_tokenizer(tmp_path / "corpus")
    assert read_files(tmp_path / "corpus" / "tokenizer") == read_files(folder)
    assert manifest.tokenizer_entry["folder"] == "tokenizer"


def test_a_manifest_of_another_kind_is_written_as_before(corpus: Path, tmp_path: Path) -> None:
    preprocess(options(tmp_path / "out", corpus, "bytes"))
    assert set(json.loads((tmp_path / "out" / "dataset.json").read_text())["tokenizer"]) == {"kind", "sha256"}
