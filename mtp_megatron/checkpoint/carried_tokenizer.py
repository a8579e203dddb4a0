"""A tokenizer that came with a Hugging Face folder: its files travel with the model, unchanged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.errors import CheckpointError, DataError

FOLDER = "tokenizer"  # inside a checkpoint
TOKENIZER_JSON = "tokenizer.json"
# Everything that Hugging Face's tokenizers read and write, and the settings of generation.
FILES = (
    *(TOKENIZER_JSON, "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
# Of these, what people add or change later: none of it decides the ids of a text.
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_GENERATION = ("generation_config.json",)


class CarriedTokenizer(Tokenizer):
    """Files of a Hugging Face tokenizer, with the ids that the model's configuration names.

    Args:
        content: the files by name; may be empty, for a model that came without a tokenizer.
        vocab_size: of the model.
        eod: the id that ends a text, -1 where the model has none.
        bos: the id that begins one.
        name: where it came from, for messages.
        more_ends: further ids that end a text.
    """

    kind = "huggingface"  # type: ignore[assignment]  # data sets are made with the other kinds

    def __init__(
        self,
        content: dict[str, bytes],
        *,
        vocab_size: int,
        eod: int,
        bos: int | None,
        name: str,
        more_ends: Sequence[int] = (),
    ) -> None:
        self.name, self.vocab_size, self.eod, self.bos, self.more_ends = name, vocab_size, eod, bos, tuple(more_ends)
        self._content = content
        self.sha256 = _digest(
            {file: _without_template(file, data) for file, data in self._without(*_TEMPLATES, *_GENERATION).items()}
        )

    def is_of(self, sha256: str) -> bool:
        """Whether a record means this tokenizer; until 2026-11 it was of all files that the model came with."""
        left_out = ((), _TEMPLATES, _GENERATION, (*_TEMPLATES, *_GENERATION))
        return sha256 == self.sha256 or any(sha256 == _digest(self._without(*names)) for names in left_out)

    def encode(self, text: str | bytes) -> list[int]:
        return list(
            self._library.encode(text if isinstance(text, str) else text.decode(), add_special_tokens=False).ids
        )

    def decode(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return str(self._library.decode(list(ids)))

    def files(self) -> dict[str, bytes]:
        return dict(self._content)

    def _without(self, *names: str) -> dict[str, bytes]:
        return {file: data for file, data in self._content.items() if file not in names}

    @cached_property
    def _library(self) -> Any:
        if TOKENIZER_JSON not in self._content:
            raise DataError(f"{self.name}: no {TOKENIZER_JSON}, so texts cannot be encoded. Put one beside the model.")
        if importlib.util.find_spec("tokenizers") is None:
            raise DataError(f"{self.name}: reading {TOKENIZER_JSON} takes the tokenizers library. Install tokenizers.")
        from tokenizers import Tokenizer as Library

        return Library.from_buffer(self._content[TOKENIZER_JSON])


def _digest(content: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for file, data in sorted(content.items()):
        digest.update(f"{file}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _without_template(file: str, data: bytes) -> bytes:
    """The settings of a tokenizer may hold the chat template, too; a file that cannot be read counts as it is."""
    if file != "tokenizer_config.json":
        return data
    try:
        settings = json.loads(data)
    except ValueError:
        return data
    if isinstance(settings, dict):
        settings.pop("chat_template", None)
    return json.dumps(settings, sort_keys=True).encode()


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in ``folder`` by name.

    Raises:
        CheckpointError: one cannot be read.
    """
    try:
        return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: cannot be read ({error.strerror}). Give a readable folder."
        ) from error
