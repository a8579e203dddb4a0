"""Which tokenizer is meant by a name, and where its files lie in a data set, a checkpoint or an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_megatron.data.huggingface import HuggingFaceTokenizer, open_tokenizer, read_files
from mtp_megatron.data.tokenizer import MODEL_FILE, ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from mtp_megatron.errors import ConfigError, DataError

FOLDER = "tokenizer"  # a Hugging Face tokenizer's, inside a checkpoint or data set
_DESCRIPTION = "mtp_config.json"  # of a checkpoint or an export


def choose_tokenizer(spec: str | Path, eod: str | None = None) -> Tokenizer:
    """The tokenizer that a user names, to encode a corpus.

    Args:
        spec: ``"bytes"``, a sentencepiece ``.model`` file, a Hugging Face folder or ``tokenizer.json``, or a checkpoint
            (``iter_*``) or export of this package, which means its model's tokenizer.
        eod: the token that ends every document, of a Hugging Face tokenizer.

    Raises:
        ConfigError: ``eod`` is no token of it, or the tokenizer is of a kind that has its own.
        DataError: there is no tokenizer, or none that can end a document.
    """
    path = Path(spec)
    if str(spec) != ByteTokenizer.name and (path.is_dir() or path.suffix == ".json"):
        entry, vocab_size = _described(path)
        if entry is None:
            return open_tokenizer(path, eod)
        if entry.get("kind") == HuggingFaceTokenizer.kind:
            place = path / FOLDER if (path / FOLDER).is_dir() else path
            known = [entry["eod"], *entry.get("more_ends", ())] if entry["eod"] >= 0 else None
            return open_tokenizer(place, eod, ends=known, bos=entry.get("bos"), model_vocab_size=vocab_size)
        spec = ByteTokenizer.name if entry.get("kind") == ByteTokenizer.kind else path / MODEL_FILE
    if eod is not None:
        raise ConfigError(
            "--eod",
            eod,
            f"{spec} has an end-of-document token of its own",
            "Leave --eod out.",
        )
    return load_tokenizer(spec)


def _described(folder: Path) -> tuple[dict[str, Any] | None, int | None]:
    """What a checkpoint or export says of its tokenizer, and a checkpoint of its vocabulary; None in a folder that is
    neither."""
    try:
        described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        entry, vocab_size = described.get("tokenizer"), described.get("vocab_size")
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / _DESCRIPTION}: cannot be read ({error}). Copy it again.") from error
    return entry if isinstance(entry, dict) else None, vocab_size


def entry_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint or an export says about a tokenizer."""
    return entry(
        tokenizer.kind, tokenizer.sha256, eod=tokenizer.eod, bos=tokenizer.bos, more_ends=tuple(tokenizer.more_ends)
    )


def entry(kind: str, sha256: str, *, eod: int, bos: int | None, more_ends: tuple[int, ...]) -> dict[str, Any]:
    """:func:`entry_of` of a tokenizer that is not at hand."""
    described: dict[str, Any] = {
        "kind": kind,
        "sha256": sha256,
        "eod": eod,
        "file": MODEL_FILE if kind == SentencePieceTokenizer.kind else None,
    }
    if kind == HuggingFaceTokenizer.kind:
        described |= {"bos": bos, "folder": FOLDER, "more_ends": list(more_ends)}
    return described


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put its files into a data set or checkpoint."""
    place = folder
    if tokenizer.kind == HuggingFaceTokenizer.kind:
        place = folder / FOLDER
        place.mkdir()
    for name, content in tokenizer.files().items():
        (place / name).write_bytes(content)


def copy_tokenizer(kind: str, source: Path, target: Path) -> None:
    """Copy the files of a tokenizer from one data set or checkpoint to another, unread."""
    if kind == SentencePieceTokenizer.kind:
        shutil.copyfile(source / MODEL_FILE, target / MODEL_FILE)
    elif kind == HuggingFaceTokenizer.kind:
        shutil.copytree(source / FOLDER, target / FOLDER, copy_function=shutil.copyfile)


def stored_tokenizer(folder: Path, record: Mapping[str, Any], vocab_size: int, *, flat: bool = False) -> Tokenizer:
    """The tokenizer in a data set, checkpoint or export; whether it is the one that the record means is not checked.

    Args:
        folder: of the data set, checkpoint or export.
        record: see :func:`entry`.
        vocab_size: of the model or data set, for a Hugging Face tokenizer, which is not read for it.
        flat: the files of a Hugging Face tokenizer lie in the folder itself, as in an export.

    Raises:
        DataError: its files are missing or cannot be read.
        KeyError: the record lacks something.
    """
    if record["kind"] == HuggingFaceTokenizer.kind:
        place = folder if flat else folder / str(record["folder"])
        return HuggingFaceTokenizer(
            read_files(place),
            vocab_size=vocab_size,
            eod=record["eod"],
            bos=record.get("bos"),
            name=str(folder),
            more_ends=record.get("more_ends", ()),
        )
    return load_tokenizer(ByteTokenizer.name if record["kind"] == ByteTokenizer.kind else folder / MODEL_FILE)
