"""A Hugging Face tokenizer: ``tokenizer.json`` gives the ids, and all files of its folder travel with data and model.

The ids are those of the library ``tokenizers`` without what a post-processor adds. Nothing is downloaded and no code of
a folder is run. Neither torch nor megatron is needed, and the library only where text is encoded or decoded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mtp_megatron.data.tokenizer import MODEL_FILE, Tokenizer, text_of
from mtp_megatron.errors import ConfigError, DataError
from mtp_megatron.install import EXPLANATION, install_command

TOKENIZER_JSON = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_MODEL_CONFIG = "config.json"
_GENERATION = "generation_config.json"
# Everything that Hugging Face's tokenizers read and write, and the settings of generation.
FILES = (
    *(TOKENIZER_JSON, SETTINGS, MODEL_FILE, _SPECIAL_TOKENS, "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", _GENERATION),
)
# Of these, what people add or change later: none of it decides the ids of a text.
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# What may have another size than it was written with: a template is often in the settings, whose rest ``is_of`` checks.
MAY_CHANGE = (*_TEMPLATES, _GENERATION, SETTINGS)


class HuggingFaceTokenizer(Tokenizer):
    """Files of a Hugging Face tokenizer, with the ids that begin and end a text.

    Args:
        content: the files by name; may be empty, for a model that came without a tokenizer.
        vocab_size: ids of the model, which may have more than the tokenizer, or less, where tokens were added to it
            that the model has no embeddings for; None: those of ``tokenizer.json``.
        eod: the id that ends a text, -1 where the model has none.
        bos: the id that begins one.
        name: where it came from, for messages.
        more_ends: further ids that end a text.

    Raises:
        DataError: ``vocab_size`` is None and ``tokenizer.json`` is not of the library ``tokenizers``.
    """

    kind = "huggingface"

    def __init__(
        self,
        content: Mapping[str, bytes],
        *,
        vocab_size: int | None,
        eod: int,
        bos: int | None,
        name: str,
        more_ends: Sequence[int] = (),
    ) -> None:
        self.name, self.eod, self.bos, self.more_ends = name, eod, bos, tuple(more_ends)
        self._content = dict(content)
        self.vocab_size = 1 + max(self.token_ids.values()) if vocab_size is None else vocab_size
        self.sha256 = _digest(
            {file: _without_template(file, data) for file, data in self._without(*_TEMPLATES, _GENERATION).items()}
        )

    def is_of(self, sha256: str) -> bool:
        """Whether a record means this tokenizer; until 2026-11 it was of all files that the model came with."""
        left_out = ((), _TEMPLATES, (_GENERATION,), (*_TEMPLATES, _GENERATION))
        return sha256 == self.sha256 or any(sha256 == _digest(self._without(*names)) for names in left_out)

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids, as far as their files tell: the same files, the same
        ``tokenizer.json`` but for how it is written, or the same sentencepiece model."""
        if self.is_of(other.sha256) or other.is_of(self.sha256):
            return True
        if not isinstance(other, HuggingFaceTokenizer):
            model = self._content.get(MODEL_FILE)
            return model is not None and hashlib.sha256(model).hexdigest() == other.sha256
        if TOKENIZER_JSON not in self._content or TOKENIZER_JSON not in other._content:
            return False
        if _what_decides(self._described()) == _what_decides(other._described()):
            return True
        return _what_decides(self._as_written_now()) == _what_decides(other._as_written_now())

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text in which special tokens are text like any other.

        Raises:
            DataError: not valid Unicode; no library; a text that encodes to ``eod`` all the same, as it can where the
                vocabulary of ``tokenizer.json`` itself has it; or one that the library cannot encode or that has ids
                outside the model's vocabulary.
        """
        ids = self._encode(text_of(text), special_tokens_are_text=True)
        if self.eod in ids:
            raise DataError(
                f"{self.name}: a text that spells {self.token_of(self.eod)!r} encodes to the end-of-document id "
                f"{self.eod}, and would end a document where it does not end. Name another token with --eod."
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """As engines read a prompt: special tokens that it spells are tokens, unless the settings say otherwise."""
        return self._encode(text_of(text), special_tokens_are_text=bool(self.settings.get("split_special_tokens")))

    def encode_again(self, ids: Sequence[int]) -> list[int]:
        """Ids of the text of ``ids``, special tokens kept: what Megatron-LM's loops gave to texts that spell some."""
        self._check_ids(ids)
        text = str(self._library.decode(list(ids), skip_special_tokens=False))
        return self._encode(text, special_tokens_are_text=False)

    def decode(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return str(self._library.decode(list(ids)))

    def files(self) -> dict[str, bytes]:
        return dict(self._content)

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """The id of each token of ``tokenizer.json``.

        Raises:
            DataError: it is not of the library ``tokenizers``.
        """
        described = self._described()
        try:
            vocab = described["model"]["vocab"]
            listed = vocab if isinstance(vocab, dict) else {piece: token for token, (piece, _) in enumerate(vocab)}
            added = {token["content"]: token["id"] for token in described.get("added_tokens") or ()}
            ids = {str(piece): int(token) for piece, token in {**listed, **added}.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"no vocabulary: {error!r}") from error
        if not ids:
            raise self._damaged("an empty vocabulary")
        return ids

    def token_of(self, number: int) -> str:
        """The token of an id as ``tokenizer.json`` spells it; the number where it has none."""
        return next((token for token, other in self.token_ids.items() if other == number), str(number))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Content of ``tokenizer_config.json``, empty where there is none."""
        return _table(self._content.get(SETTINGS), f"{self.name}: {SETTINGS}")

    def _encode(self, text: str, *, special_tokens_are_text: bool) -> list[int]:
        library = self._library
        library.encode_special_tokens = special_tokens_are_text
        # 1.4 to 2 times as fast as encode(), which also keeps the place of each token in the text.
        try:
            (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # the library raises no other
            raise DataError(
                f"{self.name}: the library tokenizers cannot encode a text that begins with {text[:40]!r} ({error}). "
                f"Of an unknown token: {TOKENIZER_JSON} names none for characters that its vocabulary lacks."
            ) from error
        ids = list(encoding.ids)
        if (largest := max(ids, default=0)) >= self.vocab_size:
            raise DataError(
                f"{self.name}: a text has the token {self.token_of(largest)!r}, whose id {largest} is outside the "
                f"model's vocabulary of {self.vocab_size}. Remove it from {TOKENIZER_JSON}, or leave that text out."
            )
        return ids

    def _without(self, *names: str) -> dict[str, bytes]:
        return {file: data for file, data in self._content.items() if file not in names}

    def __getstate__(self) -> dict[str, Any]:
        """For processes that encode: each makes its own library object of the files."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_library", "token_ids")}

    def _described(self) -> dict[str, Any]:
        if TOKENIZER_JSON not in self._content:
            raise DataError(f"{self.name}: no {TOKENIZER_JSON}, so texts cannot be encoded. Put one beside the model.")
        return _table(self._content[TOKENIZER_JSON], f"{self.name}: {TOKENIZER_JSON}")

    def _as_written_now(self) -> dict[str, Any]:
        """``tokenizer.json`` as the library here would write it, where there is one: older ones name some settings of
        their parts otherwise, or not at all (``add_prefix_space`` of Metaspace, ``use_regex`` of ByteLevel)."""
        described = self._described()
        if importlib.util.find_spec("tokenizers") is None:
            return described
        from tokenizers import Tokenizer as Library

        try:
            return dict(json.loads(Library.from_str(json.dumps(described, ensure_ascii=False)).to_str()))
        except Exception as error:
            raise self._damaged(str(error)) from error

    @cached_property
    def _library(self) -> Any:
        described = self._described()
        if importlib.util.find_spec("tokenizers") is None:
            raise DataError(
                f"{self.name}: reading {TOKENIZER_JSON} takes the library tokenizers, which is not installed. Install "
                f"it: {install_command('hf')} ({EXPLANATION})."
            )
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: processes share the work
        from tokenizers import Tokenizer as Library

        model = described.get("model")
        if isinstance(model, dict) and model.get("dropout"):
            raise DataError(
                f"{self.name}: {TOKENIZER_JSON} has dropout={model['dropout']}: the ids of a text are drawn at random. "
                "Set it to null."
            )
        # The library takes the text of an added token for the token, unless that is a special one.
        try:
            for token in described.get("added_tokens") or ():
                token["special"] |= token["id"] == self.eod
            library = Library.from_str(json.dumps(described, ensure_ascii=False))
        except Exception as error:
            raise self._damaged(str(error)) from error
        library.no_truncation()  # either may be stored in the file, and would change documents without a word
        library.no_padding()
        return library

    def _damaged(self, problem: str) -> DataError:
        return DataError(
            f"{self.name}: {TOKENIZER_JSON} is not of the library tokenizers ({problem}). Give the file that came with "
            "the model; a slow tokenizer's is written by transformers: AutoTokenizer.from_pretrained(...)."
            "save_pretrained(FOLDER)."
        )


def open_tokenizer(
    path: Path,
    eod: str | None = None,
    *,
    ends: Sequence[int] | None = None,
    bos: int | None = None,
    model_vocab_size: int | None = None,
) -> HuggingFaceTokenizer:
    """The tokenizer in a Hugging Face folder, or in a ``tokenizer.json`` alone, for texts that are to be encoded.

    Args:
        path: the folder; its ``tokenizer.json``, which means the folder; or such a file of another name.
        eod: the token that ends every document; None: the ``eos_token`` of the folder's settings.
        ends: ids that end a text, the one that ends documents first, where they are known; None: what the files say.
        bos: the id that begins one, where ``ends`` is given.
        model_vocab_size: ids that its model has; None: what a ``config.json`` beside it says.

    Raises:
        ConfigError: ``eod`` is no token of it.
        DataError: no ``tokenizer.json``, a damaged file, no token that ends a document, one that texts encode to, or
            no library ``tokenizers``.
    """
    folder = path.parent if path.name == TOKENIZER_JSON else path
    content = read_files(folder) if folder.is_dir() else {TOKENIZER_JSON: _read(path)}
    if TOKENIZER_JSON not in content:
        if MODEL_FILE in content:
            remedy = f"Give its sentencepiece model, --tokenizer {folder / MODEL_FILE}."
        else:
            remedy = "Give the folder of a Hugging Face tokenizer, or iter_* of a run or converted checkpoint."
        raise DataError(f"{folder}: no {TOKENIZER_JSON} in it. {remedy}")
    plain = HuggingFaceTokenizer(content, vocab_size=None, eod=-1, bos=None, name=str(path))
    if ends is None:
        ends, bos = _ends_and_begin(plain, folder)
    if eod is not None:
        if eod not in plain.token_ids:
            near = [token for token in plain.token_ids if "end" in token and token.startswith("<")][:5]
            hint = f"Its tokens are in {TOKENIZER_JSON}" + (f", among them {', '.join(near)}." if near else ".")
            raise ConfigError("--eod", eod, f"is no token of {path}", hint)
        ends = [plain.token_ids[eod], *ends]
    ends = [token for token in dict.fromkeys(ends) if token >= 0]
    if not ends:
        named = plain.settings.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        problem = f"names no token that ends a text (eos_token in {SETTINGS}, eos_token_id in {_MODEL_CONFIG})"
        if named is not None:
            problem = f"its eos_token in {SETTINGS}, {named!r}, is no token of {TOKENIZER_JSON}"
        raise DataError(f"{path}: {problem}, and every document is to end with one. Name it with --eod TOKEN.")
    if ends[0] not in plain.token_ids.values():
        raise DataError(
            f"{path}: the id that ends a text, {ends[0]}, is none of its tokens. Name one with --eod TOKEN."
        )
    if model_vocab_size is None:
        model_vocab_size = _model_vocab_size(folder)
    vocab_size = min(plain.vocab_size, model_vocab_size or plain.vocab_size)
    if ends[0] >= vocab_size:
        raise DataError(
            f"{path}: the token that ends a text, {plain.token_of(ends[0])!r}, has the id {ends[0]}, and the model's "
            f"vocabulary is of {vocab_size}. Name another with --eod TOKEN."
        )
    found = HuggingFaceTokenizer(
        content, vocab_size=vocab_size, eod=ends[0], bos=bos, name=str(path), more_ends=ends[1:]
    )
    found.encode(found.token_of(found.eod))  # refuses it where text can be taken for the end of a document
    return found


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in ``folder`` by name.

    Raises:
        DataError: one cannot be read.
    """
    return {name: _read(folder / name) for name in FILES if (folder / name).is_file()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a readable file.") from error


def _model_vocab_size(folder: Path) -> int | None:
    if not (folder.is_dir() and (folder / _MODEL_CONFIG).is_file()):
        return None
    size = _table(_read(folder / _MODEL_CONFIG), f"{folder}: {_MODEL_CONFIG}").get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def _ends_and_begin(tokenizer: HuggingFaceTokenizer, folder: Path) -> tuple[list[int], int | None]:
    """Ids that end a text, the tokenizer's own first, and the one that begins it, by all files that say so."""
    files = dict(tokenizer.files())
    if folder.is_dir() and (folder / _MODEL_CONFIG).is_file():
        files[_MODEL_CONFIG] = _read(folder / _MODEL_CONFIG)
    named = (tokenizer.settings, _table(files.get(_SPECIAL_TOKENS), f"{folder}: {_SPECIAL_TOKENS}"))
    numbered = [_table(files.get(name), f"{folder}: {name}") for name in (_MODEL_CONFIG, _GENERATION)]
    found: dict[str, list[int]] = {}
    for role in ("eos", "bos"):
        tokens = [table.get(f"{role}_token") for table in named]
        texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        ids = [tokenizer.token_ids[text] for text in texts if text in tokenizer.token_ids]
        for table in numbered:
            value = table.get(f"{role}_token_id")
            ids += [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
        found[role] = ids
    return found["eos"], next(iter(found["bos"]), None)


def _table(data: bytes | None, what: str) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{what} is damaged ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{what} holds no settings. Copy it again.")
    return content


def _digest(content: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for file, data in sorted(content.items()):
        digest.update(f"{file}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


NO_FILES = _digest({})  # what is recorded of a model that came without a tokenizer


def _without_template(file: str, data: bytes) -> bytes:
    """The settings of a tokenizer may hold the chat template, too; a file that cannot be read counts as it is."""
    if file != SETTINGS:
        return data
    try:
        settings = json.loads(data)
    except ValueError:
        return data
    if isinstance(settings, dict):
        settings.pop("chat_template", None)
    return json.dumps(settings, sort_keys=True).encode()


def _what_decides(described: dict[str, Any]) -> dict[str, Any]:
    """Of a ``tokenizer.json`` what decides the ids of a text, the same for every release of the library that wrote it:
    older ones join the two halves of a merge by a space, and leave settings out that have their defaults."""
    model = {
        key: value
        for key, value in (described.get("model") or {}).items()
        if value not in (None, "") and value is not False
    }
    if "merges" in model:
        merges = model["merges"]
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in merges]
    added = sorted(described.get("added_tokens") or (), key=lambda token: token["id"])
    return {
        "model": model,
        "added_tokens": added,
        "normalizer": described.get("normalizer"),
        "pre_tokenizer": described.get("pre_tokenizer"),
    }
