"""Where prompts come from: the command line, a file, or the held-out split of a data set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtp_megatron import compat
from mtp_megatron.data.manifest import Manifest, load_manifest
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.errors import ConfigError, DataError


def from_file(path: str | Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts of a text file, separated by lines that hold ``---`` alone; a file without any is one prompt.

    Raises:
        DataError: the file cannot be read, or holds no text.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # what an editor marks the encoding with is no part of a prompt
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a text file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (offset {error.start}). Convert it to UTF-8.") from error
    prompts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.rstrip("\r\n") == "---":
            prompts.append([])
        else:
            prompts[-1].append(line)
    # The line end before a separator, or before the end of the file, is the editor's, not the prompt's.
    texts = ["".join(lines).removesuffix("\n").removesuffix("\r") for lines in prompts]
    encoded = [tokenizer.encode_prompt(text) for text in texts if text]
    if not encoded:
        raise DataError(f"{path}: holds no prompt. Write text, and lines of --- between several prompts.")
    return encoded


def from_held_out(folder: str | Path, tokenizer: Tokenizer, count: int, prompt_tokens: int) -> list[list[int]]:
    """Prompts of ``prompt_tokens`` tokens from the validation documents of a data set, none of them overlapping.

    First the beginning of every document, then the second piece of every document, and so on.

    Raises:
        ConfigError: the split does not hold so many.
        DataError: the data set cannot be read or has another tokenizer.
    """
    manifest = load_manifest(folder)
    if not tokenizer.is_of(manifest.tokenizer.sha256):
        raise DataError(
            f"{manifest.path}: made with another tokenizer than the model's. Give the data set it was trained on."
        )
    documents = _valid_documents(manifest)
    available = sum(len(document) // prompt_tokens for document in documents)
    if available < count:
        raise ConfigError(
            "--num-prompts",
            count,
            f"the held-out documents of {manifest.path} make {available} prompts of {prompt_tokens} tokens",
            "Ask for fewer or shorter ones, or preprocess with a larger --valid-fraction.",
        )
    return [piece.tolist() for piece in itertools.islice(_round_robin(documents, prompt_tokens), count)]


def _round_robin(documents: list[np.ndarray], length: int) -> Iterator[np.ndarray]:
    for number in itertools.count():
        pieces = [document[number * length : (number + 1) * length] for document in documents]
        whole = [piece for piece in pieces if len(piece) == length]
        if not whole:
            return
        yield from whole


def _valid_documents(manifest: Manifest) -> list[np.ndarray]:
    """Tokens of every held-out document, without the end-of-document token."""
    compat.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(manifest.prefix("valid"))
    # Copies: what it returns points into a file mapping that ends with the data set.
    documents = [np.array(dataset[index]) for index in range(len(dataset))]
    return [document[:-1] if len(document) and document[-1] == manifest.eod else document for document in documents]
