"""The manifest of a data set, and the checks that catch a damaged one before any work (neither torch nor megatron)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from mtp_megatron.data.megatron_index import DTYPE_CODES, HEADER, MAGIC
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.data.tokenizer_store import copy_tokenizer, entry, stored_tokenizer
from mtp_megatron.errors import ConfigError, DataError

MANIFEST_FILE = "dataset.json"
FORMAT: Final = "mtp_megatron data set"
VERSION = 1
_REBUILD = (
    "Remove the folder and run the `mtp-megatron preprocess` or `adopt` that made it, or copy the data set here again."
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerInfo(_Part):
    """Which tokenizer made the ids; of Hugging Face's also which further ids begin and end a text."""

    kind: Literal["bytes", "sentencepiece", "huggingface"]
    sha256: str
    bos: int | None = None
    more_ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerInfo:
        """What a manifest says of a tokenizer."""
        if tokenizer.kind != "huggingface":  # the others' files say it
            return cls(kind=tokenizer.kind, sha256=tokenizer.sha256)
        return cls(kind=tokenizer.kind, sha256=tokenizer.sha256, bos=tokenizer.bos, more_ends=tokenizer.more_ends)

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialise(self).items() if value not in (None, [], ())}


class SplitInfo(_Part):
    """One split: counts, and the sizes of its files in bytes. ``tokens`` counts the end-of-document tokens too.

    ``text_bytes`` is None where the text was never seen. ``skipped_tokens`` are tokens of the ``.bin`` that its index
    leaves out, since they are held out of it; the last document is never left out.
    """

    documents: int
    tokens: int
    text_bytes: int | None
    bin_bytes: int
    idx_bytes: int
    skipped_tokens: int = 0

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = serialise(self)
        if not self.skipped_tokens:  # the name of the index of samples is made of this
            del said["skipped_tokens"]
        return said


class SourceInfo(_Part):
    """The corpus: how many files, what was left out (the first names of it), and the identity of its content."""

    files: int
    rejected: int
    rejected_examples: tuple[str, ...]
    empty: int
    sha256: str


class Manifest(_Part):
    """What ``dataset.json`` says. ``fingerprint`` is equal exactly when inputs and options were."""

    format: Literal["mtp_megatron data set"] = FORMAT
    version: int = VERSION
    fingerprint: str
    vocab_size: int
    eod: int
    dtype: Literal["uint16", "int32"]
    tokenizer: TokenizerInfo
    train: SplitInfo
    valid: SplitInfo
    source: SourceInfo
    options: dict[str, Any]
    _path: Path = PrivateAttr(default=Path())

    @property
    def path(self) -> Path:
        """The folder (absolute)."""
        return self._path

    def prefix(self, split: Literal["train", "valid"]) -> str:
        """Path of a split without ``.bin``/``.idx``, as megatron-core takes it."""
        return str(self._path / split)

    @property
    def tokenizer_entry(self) -> dict[str, Any]:
        """What a checkpoint says of the tokenizer (:mod:`.tokenizer_store`)."""
        info = self.tokenizer
        return entry(info.kind, info.sha256, eod=self.eod, bos=info.bos, more_ends=info.more_ends)

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files into a checkpoint."""
        copy_tokenizer(self.tokenizer.kind, self._path, folder)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            DataError: it is missing, unreadable, or another one.
        """
        tokenizer = stored_tokenizer(self._path, self.tokenizer_entry, self.vocab_size)
        if not tokenizer.is_of(self.tokenizer.sha256):
            raise DataError(
                f"{tokenizer.name}: not the tokenizer that made this data set (sha256 {tokenizer.sha256[:12]}, "
                f"expected {self.tokenizer.sha256[:12]}). {_REBUILD}"
            )
        if (tokenizer.vocab_size, tokenizer.eod) != (self.vocab_size, self.eod):
            raise DataError(
                f"{self._path / MANIFEST_FILE}: vocab_size={self.vocab_size}, eod={self.eod}, but the tokenizer has "
                f"{tokenizer.vocab_size} and {tokenizer.eod}. {_REBUILD}"
            )
        return tokenizer

    def at(self, folder: Path) -> Manifest:
        """The same manifest, for the data set in ``folder``."""
        copy = self.model_copy()
        copy._path = folder.resolve()
        return copy

    def write(self, folder: Path) -> None:
        """Write ``dataset.json`` into the folder."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def load_manifest(folder: str | Path) -> Manifest:
    """Read a data set's manifest and check that its files are whole; reads a few bytes of each, whatever their size.

    Raises:
        DataError: the folder, its manifest, a ``.bin``, an ``.idx`` or the tokenizer is missing, damaged, or does not
            belong to the others; the message names the file, what was found and what was expected.
    """
    folder = Path(folder)
    manifest = _parse(folder / MANIFEST_FILE).at(folder)
    splits: tuple[tuple[Literal["train", "valid"], SplitInfo], ...]
    splits = (("train", manifest.train), ("valid", manifest.valid))
    for name, split in splits:
        _check_split(Path(manifest.prefix(name)), split, manifest.dtype)
    manifest.load_tokenizer()
    return manifest


def check_vocab(manifest: Manifest, model_vocab_size: int) -> None:
    """Refuse a model whose vocabulary (without padding) does not hold every id of the data set.

    Raises:
        ConfigError: naming ``model.vocab_size``.
    """
    if model_vocab_size < manifest.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            model_vocab_size,
            f"is smaller than the tokenizer's vocabulary of {manifest.vocab_size} ({manifest.path})",
            f"Set model.vocab_size to {manifest.vocab_size} or more, or leave it null to take the tokenizer's.",
        )


def _parse(path: Path) -> Manifest:
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such data set folder. Make one with `mtp-megatron preprocess --output`.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing, so {path.parent} is not a data set. Make one with `mtp-megatron preprocess --output`."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a manifest ({error}). {_REBUILD}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a data set (no format={FORMAT!r}). {_REBUILD}")
    if record.get("version") != VERSION:
        raise DataError(
            f"{path}: data set version {record.get('version')!r}; this release reads version {VERSION}. "
            "Preprocess again with this release, or use the release that wrote it."
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:4])
        raise DataError(f"{path}: damaged manifest ({details}). {_REBUILD}") from error


def _check_split(prefix: Path, split: SplitInfo, dtype: str) -> None:
    data, index = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    _check_size(data, split.bin_bytes)
    _check_size(index, split.idx_bytes)
    item = np.dtype(dtype).itemsize
    expected = (MAGIC, 1, DTYPE_CODES[dtype], split.documents, split.documents + 1)
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
        found = HEADER.unpack(head) if len(head) == HEADER.size else (head,)
        if found != expected:
            raise DataError(f"{index}: its header is {found}, expected {expected}. {_REBUILD}")
        # Only the last document is looked up: when it ends where the .bin ends, the index belongs to this .bin.
        lengths = HEADER.size
        pointers = lengths + 4 * split.documents
        stream.seek(lengths + 4 * (split.documents - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(pointers + 8 * (split.documents - 1))
        (pointer,) = struct.unpack("<q", stream.read(8))
    tokens = split.tokens + split.skipped_tokens
    if pointer + length * item != split.bin_bytes or tokens * item != split.bin_bytes:
        raise DataError(
            f"{index}: the last document ends at byte {pointer + length * item} and {tokens} tokens make "
            f"{tokens * item} bytes, but {data.name} has {split.bin_bytes}. {_REBUILD}"
        )


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        what = f"{path} (a link to {path.readlink()})" if path.is_symlink() else str(path)
        raise DataError(f"{what}: unreadable ({error.strerror}), expected {expected} bytes. {_REBUILD}") from error
    if found != expected:
        state = "truncated" if found < expected else "longer than it was written"
        raise DataError(f"{path}: {state}: {found} bytes, expected {expected}. {_REBUILD}")
