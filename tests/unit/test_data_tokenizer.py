"""Tokenizers: nothing is lost on the way there and back, the models are standard, bad ones are refused."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_megatron.data.corpus import Corpus
from mtp_megatron.data.sources import find_sources
from mtp_megatron.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from mtp_megatron.data.train_tokenizer import MIN_VOCAB, train_tokenizer
from mtp_megatron.errors import ConfigError, DataError

HARD = [
    "",
    " ",
    "\n",
    "\r\n",
    "\tif x:\r\n\t\treturn  1\r\n",
    "    four\n        eight\n  \n   trailing   \n\n\n",
    "\u2581a real U+2581 \u2581\u2581 beside spaces \u2581",
    "\u2585 \u2047 \u2582",
    "<s></s><unk><0x0A><pad>",
    "\ufeffimport this",
    "nul\0inside",
    "\x0b\x0c\x1c\x85\u2028\u2029",
    "é e\u0301 ﬁ ① \u3000\xa0\u200b",
    "日本語 한국어 العربية 😀👩‍👩‍👧",
    "\U0010ffff\ufffd\ufffe",
]


def library_text(count: int) -> list[str]:
    """Source files from all over the standard library."""
    sources = find_sources([])
    return [document.text for document in Corpus(sources[:: len(sources) // count]).documents()]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_tokenizer(library_text(60), 1024)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, trained):
    return ByteTokenizer() if request.param == "bytes" else trained


def foreign_model(**options) -> bytes:
    """A sentencepiece model made with the library's own defaults, apart from ``options``."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    text = iter(["the quick brown fox", "jumps over the lazy dog"] * 10)
    arguments = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 3, **options}
    SentencePieceTrainer.train(sentence_iterator=text, model_writer=model, **arguments)
    return model.getvalue()


@pytest.mark.parametrize("text", HARD)
def test_hard_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids
    assert tokenizer.eod not in ids


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\r\n\u2581\u2585ab<>/s01é"))
def test_any_text_comes_back_with_the_trained_model(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= token < trained.vocab_size and token != trained.eod for token in ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_as_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_document(text.encode()).tolist() == [*tokenizer.encode(text), tokenizer.eod]


def test_real_source_files_come_back(tokenizer):
    texts = library_text(150)
    assert not all(text.isascii() for text in texts)
    for text in texts:
        for variant in (text, text.replace("    ", "\t").replace("\n", "\r\n")):  # the library itself has no tabs
            assert tokenizer.decode(tokenizer.encode_document(variant.encode()).tolist()) == variant


def test_lossless_is_known_and_is_not_taken_for_granted(tokenizer):
    assert tokenizer.lossless
    assert not SentencePieceTokenizer(foreign_model(), "with the library's defaults").lossless


def test_trained_model_has_llamas_ids(trained):
    assert (trained.vocab_size, trained.eod, trained.bos) == (1024, 2, 1)
    assert trained.encode("\n\t\r") == [3 + 0x0A, 3 + 0x09, 3 + 0x0D]
    assert len(trained.encode("        ")) == 1  # an indentation is one token


def test_training_is_deterministic(trained):
    again = train_tokenizer(library_text(60), 1024)
    assert again.sha256 == trained.sha256
    assert train_tokenizer(library_text(50), 1024).sha256 != trained.sha256


def test_a_line_longer_than_sentencepiece_takes_is_learned_from():
    assert train_tokenizer(["wordy " * 200_000], 266).encode("wordy") != ByteTokenizer().encode("wordy")


def test_transformers_gives_the_same_ids(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in trained.files().items():
        (tmp_path / name).write_bytes(content)
    options = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False, "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # Not covered: a literal U+2581 (a space to transformers) and special tokens spelled out in the text.
    for text in [*library_text(20), *(t for t in HARD if "\u2581" not in t and "<s>" not in t)]:
        assert other.encode(text, add_special_tokens=False) == trained.encode(text)


def test_load_by_path_and_files(trained, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained.files()["tokenizer.model"])
    loaded = load_tokenizer(path)
    assert (loaded.kind, loaded.sha256, loaded.name) == ("sentencepiece", trained.sha256, str(path))
    assert load_tokenizer("bytes").files() == {}
    assert load_tokenizer("bytes").vocab_size == 257


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, None])
def test_what_is_not_a_model_is_refused(trained, tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(trained.files()["tokenizer.model"][:5000] if content is None else content)
    with pytest.raises(DataError, match=r"bad\.model: .*not a sentencepiece model.*--train-tokenizer"):
        load_tokenizer(path)


def test_missing_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.model: .*No such file"):
        load_tokenizer(tmp_path / "nowhere.model")


def test_model_without_an_end_token_is_refused():
    with pytest.raises(DataError, match=r"no-end: .*eos_id=-1"):
        SentencePieceTokenizer(foreign_model(eos_id=-1), "no-end")


@pytest.mark.parametrize("ids", [[1024], [-1], [300, 5000]])
def test_ids_outside_the_vocabulary_are_refused(trained, ids):
    with pytest.raises(DataError, match="outside the vocabulary"):
        trained.decode(ids)
    with pytest.raises(DataError, match="outside the vocabulary"):
        ByteTokenizer().decode(ids)


def test_special_tokens_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod, *tokenizer.encode("b")]) == "ab"


def test_invalid_unicode_is_refused(tokenizer):
    with pytest.raises(DataError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("size", "message"), [(MIN_VOCAB - 1, "260 or more"), (50_000, r"At most \d+ tokens"), (262, "Ask for 2.. or more")]
)
def test_a_vocabulary_that_the_text_does_not_support_is_refused(size, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(["def f(x): return x + 1\n    pass\n"] * 20, size)
