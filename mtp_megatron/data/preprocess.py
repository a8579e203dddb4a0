"""From a corpus to a data set folder: scan, split, tokenize, write, all or nothing."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from mtp_megatron.data.atomic import new_folder
from mtp_megatron.data.corpus import Corpus, Tally, digest
from mtp_megatron.data.encode import encode_documents
from mtp_megatron.data.huggingface import HuggingFaceTokenizer
from mtp_megatron.data.manifest import MANIFEST_FILE, VERSION, Manifest, SourceInfo, TokenizerInfo, load_manifest
from mtp_megatron.data.reading import Document
from mtp_megatron.data.sources import DEFAULT_EXTENSIONS, find_sources
from mtp_megatron.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_megatron.data.tokenizer_store import choose_tokenizer, write_tokenizer
from mtp_megatron.data.train_tokenizer import MIN_VOCAB, train_tokenizer
from mtp_megatron.errors import ConfigError, DataError

_TOKENIZER_SAMPLE_BYTES = 200_000_000  # sentencepiece holds its training text in memory
_T = TypeVar("_T")


@dataclass(frozen=True)
class PreprocessOptions:
    """What ``mtp-megatron preprocess`` may be told.

    Args:
        output: folder to make; must not exist, be empty, or hold the data set that these options would make.
        paths: files and folders; the standard library's source when empty.
        tokenizer: what :func:`.tokenizer_store.choose_tokenizer` takes; ignored with ``train_vocab``.
        eod: the token that ends every document, for a Hugging Face tokenizer; None: the tokenizer's own.
        train_vocab: train a sentencepiece model with this many tokens on the training split.
        valid_fraction: share of the documents that are held out (at least one is, at least one is not).
        seed: which documents are held out.
        extensions: which files to take from folders.
        json_key: field of a JSON line that holds the text.
        max_documents: take only the first so many documents.
        with_tests: take the standard library's tests too.
        skip_unreadable: leave out what cannot be read, in place of the error.
        workers: processes that tokenize.
        quiet: no progress bars.
    """

    output: Path
    paths: tuple[Path, ...] = ()
    tokenizer: str = ByteTokenizer.name
    eod: str | None = None
    train_vocab: int | None = None
    valid_fraction: float = 0.01
    seed: int = 1234
    extensions: tuple[str, ...] = DEFAULT_EXTENSIONS
    json_key: str = "text"
    max_documents: int | None = None
    with_tests: bool = False
    skip_unreadable: bool = False
    workers: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.valid_fraction < 1.0:
            raise ConfigError(
                "--valid-fraction", self.valid_fraction, "must lie between 0 and 1, both excluded", "Try 0.01."
            )
        if self.train_vocab is not None and self.train_vocab < MIN_VOCAB:
            remedy = f"256 bytes and 3 special tokens need {MIN_VOCAB} or more."
            raise ConfigError("--train-tokenizer", self.train_vocab, "is too small", remedy)
        if self.max_documents is not None and self.max_documents < 2:
            remedy = "Two documents are the least: one to train on, one to hold out."
            raise ConfigError("--max-documents", self.max_documents, "is too small", remedy)
        if self.workers < 1:
            raise ConfigError("--workers", self.workers, "must be 1 or more", "1 tokenizes in the main process.")
        if self.eod is not None and self.train_vocab is not None:
            raise ConfigError(
                "--eod", self.eod, "a tokenizer that is trained has one of its own", "Leave out one of the two."
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError("--seed", self.seed, "must fit 64 bits without sign", "Try 1234.")


@dataclass(frozen=True)
class PreprocessResult:
    """The data set, what was left out of it, and whether it was already there."""

    manifest: Manifest
    tokenizer: Tokenizer
    tally: Tally
    up_to_date: bool


@dataclass(frozen=True)
class _Scan:
    """One pass over the corpus: ``keys[i]`` is a number drawn from the content of document i and the seed."""

    keys: np.ndarray  # uint64 [documents]
    text_bytes: int
    sha256: str
    tally: Tally


def preprocess(options: PreprocessOptions) -> PreprocessResult:
    """Write the data set, or find that it is already there.

    Everything that can be refused is refused before anything is written; the folder appears whole or not at all.

    Raises:
        ConfigError: options that cannot work, such as a vocabulary that the text does not support.
        DataError: paths, tokenizer or output folder that cannot be used, a corpus with fewer than two documents, or
            what :meth:`.Corpus.documents` refuses.
    """
    old = data_set_there(options.output)
    given = None if options.train_vocab is not None else choose_tokenizer(options.tokenizer, options.eod)
    tally = Tally()
    sources = find_sources(
        options.paths,
        options.extensions,
        with_tests=options.with_tests,
        skip_unreadable=options.skip_unreadable,
        tally=tally,
    )
    corpus = Corpus(sources, options.json_key, options.max_documents, options.skip_unreadable)
    scan = _scan(corpus, options, tally)
    recorded = _recorded_options(options, given)
    fingerprint = fingerprint_of(recorded, scan.sha256)
    if old is not None:
        if old.fingerprint != fingerprint:
            raise DataError(
                f"{options.output}: holds another data set ({difference_of(old, recorded)}). "
                "Choose another --output, or remove the folder."
            )
        return PreprocessResult(old, old.load_tokenizer(), scan.tally, up_to_date=True)

    held_out = hold_out(scan.keys, options.valid_fraction)
    with new_folder(options.output) as folder:
        tokenizer = given or _train(corpus, scan, held_out, options)
        write_tokenizer(tokenizer, folder)
        splits, dtype = _write_splits(folder, corpus, scan, held_out, tokenizer, options)
        manifest = Manifest(
            fingerprint=fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            dtype=dtype,
            tokenizer=TokenizerInfo.of(tokenizer),
            source=SourceInfo(
                files=len(sources),
                rejected=scan.tally.rejected,
                rejected_examples=tuple(map(str, scan.tally.examples)),
                empty=scan.tally.empty,
                sha256=scan.sha256,
            ),
            options=recorded,
            **splits,
        )
        manifest.write(folder)
        load_manifest(folder)  # what is published has passed the checks that training makes
    return PreprocessResult(manifest.at(options.output), tokenizer, scan.tally, up_to_date=False)


def data_set_there(output: Path) -> Manifest | None:
    """The data set in ``output``, None where there is nothing.

    Raises:
        DataError: it holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST_FILE).is_file():
        raise DataError(
            f"{output}: exists and is not a data set (no {MANIFEST_FILE}). Choose another --output, or remove it."
        )
    return load_manifest(output)


def _scan(corpus: Corpus, options: PreprocessOptions, tally: Tally) -> _Scan:
    keys = array("Q")  # 8 bytes a document, where a list of integers takes 40
    text_bytes = 0
    whole = hashlib.sha256()
    for document in _bar(corpus.documents(tally), "scan", None, options):
        keys.append(document_key(document.data, options.seed))
        text_bytes += len(document.data)
        whole.update(document.name.encode("utf-8", "surrogateescape") + b"\0" + digest(document.data))
    if len(keys) < 2:
        lost = "".join(f"\n  {item.explanation}" for item in tally.examples[:5])
        raise DataError(
            f"the corpus has {len(keys)} usable documents ({tally.rejected} rejected, {tally.empty} empty); at "
            f"least 2 are needed, one to train on and one to hold out. Give more files.{lost}"
        )
    return _Scan(np.frombuffer(keys, dtype=np.uint64), text_bytes, whole.hexdigest(), tally)


def document_key(data: bytes, seed: int) -> int:
    """Uniform in 0 .. 2^64 - 1, by content: copies of a text fall on the same side of the split, wherever they lie."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def hold_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, bool ``[documents]``: those with the smallest keys, ties together.

    Raises:
        DataError: all keys are the same.
    """
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    held_out: np.ndarray = keys <= np.partition(keys, count - 1)[count - 1]
    if held_out.all():
        raise DataError(
            f"all {len(keys)} documents have the same text, or too few differ to hold some out. Give more varied files."
        )
    return held_out


def _recorded_options(options: PreprocessOptions, given: Tokenizer | None) -> dict[str, Any]:
    """The options that decide what the data set contains, as the manifest records them."""
    return {
        "tokenizer": f"trained {options.train_vocab}" if given is None else identity_of(given),
        "valid_fraction": options.valid_fraction,
        "seed": options.seed,
        "json_key": options.json_key,
        "max_documents": options.max_documents,
    }


def identity_of(tokenizer: Tokenizer) -> str:
    """A tokenizer as manifests record it among the options."""
    identity = f"{tokenizer.kind} {tokenizer.sha256[:16]}"
    # The others' files say which id ends a document.
    return f"{identity} {tokenizer.eod}" if tokenizer.kind == HuggingFaceTokenizer.kind else identity


def fingerprint_of(recorded: dict[str, Any], corpus_sha256: str) -> str:
    """The identity of a data set made of this corpus with these options."""
    identity = {"version": VERSION, "corpus": corpus_sha256, **recorded}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference_of(old: Manifest, recorded: dict[str, Any]) -> str:
    """In words, what options a data set was made with where they are others now."""
    changes = [f"{k}={old.options.get(k)!r}, now {v!r}" for k, v in recorded.items() if old.options.get(k) != v]
    return "; ".join(changes) if changes else "made from other text"


def _train(corpus: Corpus, scan: _Scan, held_out: np.ndarray, options: PreprocessOptions) -> Tokenizer:
    assert options.train_vocab is not None
    share = min(1.0, _TOKENIZER_SAMPLE_BYTES / scan.text_bytes)
    # Keys are uniform, so the largest ones are a fair sample; held-out documents have the smallest.
    sampled = scan.keys >= np.quantile(scan.keys, 1.0 - share) if share < 1.0 else np.ones(len(scan.keys), dtype=bool)
    chosen = sampled & ~held_out
    total = int(chosen.sum())
    documents = (d.text for d, use in zip(_reread(corpus, scan, options), chosen, strict=True) if use)
    return train_tokenizer(_bar(documents, "train tokenizer", total, options), options.train_vocab)


def _write_splits(
    folder: Path, corpus: Corpus, scan: _Scan, held_out: np.ndarray, tokenizer: Tokenizer, options: PreprocessOptions
) -> tuple[dict[str, Any], Any]:
    from mtp_megatron.data.writer import optimal_dtype, split_writer  # imports megatron: not needed when up to date

    dtype = optimal_dtype(tokenizer.vocab_size)
    read: deque[tuple[int, str]] = (
        deque()
    )  # size and name of those read whose ids, made by other processes, are to come

    def texts() -> Iterator[bytes]:
        for document in _reread(corpus, scan, options):
            read.append((len(document.data), document.name))
            yield document.data

    with (
        split_writer(folder / "train", dtype) as train,
        split_writer(folder / "valid", dtype) as valid,
        _byte_bar("tokenize", scan.text_bytes, options) as bar,
    ):
        for index, ids in enumerate(encode_documents(texts(), tokenizer, options.workers)):
            size, name = read.popleft()
            (valid if held_out[index] else train).add(ids, size, name)
            bar.update(size)
        return {"train": train.finish(), "valid": valid.finish()}, dtype


def _reread(corpus: Corpus, scan: _Scan, options: PreprocessOptions) -> Iterator[Document]:
    """The documents again, refusing a corpus that is not the one that was scanned."""
    count = 0
    for document in corpus.documents():
        if count == len(scan.keys) or document_key(document.data, options.seed) != int(scan.keys[count]):
            raise DataError(f"{document.name}: changed while the corpus was being read. Run preprocess again.")
        count += 1
        yield document
    if count != len(scan.keys):
        raise DataError(
            f"the corpus shrank from {len(scan.keys)} to {count} documents while it was read. Run preprocess again."
        )


def _hidden(options: PreprocessOptions) -> bool:
    return options.quiet or not sys.stderr.isatty()


def _bar(items: Iterator[_T], label: str, total: int | None, options: PreprocessOptions) -> Iterator[_T]:
    yield from tqdm(items, desc=label, total=total, unit=" documents", disable=_hidden(options), leave=False)


def _byte_bar(label: str, total: int, options: PreprocessOptions) -> Any:
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=_hidden(options), leave=False)
