"""Tokenizers: raw bytes, or a sentencepiece model (Hugging Face's: :mod:`.huggingface`). Neither torch nor megatron is
needed.

The byte tokenizer and every model that :mod:`.train_tokenizer` makes are lossless: ``decode(encode(text)) == text`` for
every text, white space, tabs and line ends included.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mtp_megatron.errors import DataError

MODEL_FILE = "tokenizer.model"
# sentencepiece writes a space as this character, and so cannot tell the two apart by itself.
_SPACE_MARK = "\u2581"
_PROBE = "\tif x:\r\n\t\treturn  'é \U0001f600'   \n\n    # end \n"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: ``"bytes"``, ``"sentencepiece"`` or ``"huggingface"``.
        name: for people: ``"bytes"`` or the model's path.
        vocab_size: ids are 0 .. vocab_size - 1.
        eod: the id that ends every document; no text encodes to it.
        more_ends: further ids that end a text, where a model's makers name several.
        bos: the id that a model's makers put before a text, or None. Data sets and prompts do not use it.
        sha256: identity; equal exactly when the ids of every text are.
    """

    kind: ClassVar[Literal["bytes", "sentencepiece", "huggingface"]]
    name: str
    vocab_size: int
    eod: int
    more_ends: tuple[int, ...] = ()
    bos: int | None
    sha256: str

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text (UTF-8 when given as bytes), without any special token.

        Raises:
            DataError: the text is not valid Unicode.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, as engines read it."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give nothing, bytes that are not UTF-8 give U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What has to lie beside a data set, checkpoint or export to load this tokenizer: file name to content."""

    def is_of(self, sha256: str) -> bool:
        """Whether a record of this identity means this tokenizer."""
        return self.sha256 == sha256

    def encode_document(self, data: bytes) -> np.ndarray:
        """Token ids of one document with ``eod`` at its end, int32 ``[tokens]``."""
        return np.array([*self.encode(data), self.eod], dtype=np.int32)

    @cached_property
    def lossless(self) -> bool:
        """Whether white space, line ends and rare characters survive ``decode(encode(text))`` (tried on a probe)."""
        return self.decode(self.encode(_PROBE)) == _PROBE

    def _check_ids(self, ids: Sequence[int]) -> None:
        for position, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"tokenizer {self.name}: id {token} at position {position} is outside the vocabulary "
                    f"(0 to {self.vocab_size - 1}). Decode ids of this tokenizer only, without padded rows."
                )


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8, 256 ends a document."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 257
    eod = 256
    bos = None
    sha256 = hashlib.sha256(b"mtp_megatron bytes: ids 0..255 are bytes, 256 ends a document").hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else _utf8(text))

    def encode_document(self, data: bytes) -> np.ndarray:
        ids = np.empty(len(data) + 1, dtype=np.int32)
        ids[:-1] = np.frombuffer(data, dtype=np.uint8)
        ids[-1] = self.eod
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return bytes(token for token in ids if token != self.eod).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model whose end-of-sentence id ends documents.

    Args:
        model: the content of the ``.model`` file.
        name: where it came from, for messages.

    Raises:
        DataError: not a sentencepiece model, or one without an end-of-sentence token.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        if not model:  # sentencepiece accepts it and fails at the first use
            raise DataError(f"{name}: an empty file, not a sentencepiece model. {_MODEL_REMEDY}")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{name}: not a sentencepiece model ({error}). {_MODEL_REMEDY}") from error
        self.name = name
        self.vocab_size = self._processor.vocab_size()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(
                f"{name}: this sentencepiece model has no end-of-sentence token (eos_id={self.eod}), which ends every "
                "document. Train the model with eos_id >= 0, or let --train-tokenizer make one."
            )
        self.bos = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self._model = model
        self._space_mark_ids = self._byte_pieces(_SPACE_MARK)

    def _byte_pieces(self, character: str) -> list[int] | None:
        """Ids of the character's bytes, where the model has bytes and text may be cut at any place; None elsewhere."""
        processor = self._processor
        ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode("utf-8")]
        adds_prefix = processor.id_to_piece(processor.encode("a")[0]).startswith(_SPACE_MARK)
        return ids if all(map(processor.is_byte, ids)) and not adds_prefix else None

    def encode(self, text: str | bytes) -> list[int]:
        text = text_of(text)
        if self._space_mark_ids is None or _SPACE_MARK not in text:
            return list(self._processor.encode(text))
        first, *others = text.split(_SPACE_MARK)
        ids = self.encode(first)
        for part in others:
            ids += self._space_mark_ids
            ids += self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return str(self._processor.decode(list(ids)))

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}


_MODEL_REMEDY = "Give the .model file that sentencepiece wrote, 'bytes', or train one with --train-tokenizer."


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: ``"bytes"``, or the path of a sentencepiece ``.model`` file.

    Raises:
        DataError: no such file, not a sentencepiece model, or one without an end-of-sentence token.
    """
    if str(spec) == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(spec)
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer cannot be read ({error.strerror}). {_MODEL_REMEDY} Of Hugging Face's, give the "
            "folder on disk: nothing is downloaded."
        ) from error
    return SentencePieceTokenizer(model, str(path))


def text_of(text: str | bytes) -> str:
    """The text of UTF-8, or the same text where it is valid.

    Raises:
        DataError: not valid Unicode.
    """
    if isinstance(text, str):
        _utf8(text)
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the text is not UTF-8 (offset {error.start}). Convert it to UTF-8 first.") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate at position {error.start}, which is no character. "
            "Read or type it as valid UTF-8."
        ) from error
