"""From a corpus to a data set folder: scan, split, tokenize, write, all or nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_megatron import __version__
from mtp_megatron.data.corpus import Corpus, Tally
from mtp_megatron.data.huggingface import HuggingFaceTokenizer
from mtp_megatron.data.manifest import MANIFEST_FILE, VERSION, Manifest, SourceInfo, TokenizerInfo, load_manifest
from mtp_megatron.data.reading import Rejected
from mtp_megatron.data.sample import discard_sample, draw_sample
from mtp_megatron.data.scan import Reader, Scan, check_holding_out, hold_out, scan, scan_in
from mtp_megatron.data.sources import DEFAULT_EXTENSIONS, find_sources
from mtp_megatron.data.splits import begin, has_begun, put_tokenizer, write_splits
from mtp_megatron.data.tokenizer import MODEL_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mtp_megatron.data.tokenizer_store import choose_tokenizer
from mtp_megatron.data.train_tokenizer import MIN_VOCAB, train_tokenizer
from mtp_megatron.data.work_folder import WorkFolder, differences, remove_published, work_folder
from mtp_megatron.errors import ConfigError, DataError
from mtp_megatron.signals import die_on_signal

_RELEASE = {"release": __version__}  # another one may read or tokenize otherwise


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
        json_key: field of a JSON line, or column of a table, that holds the text.
        max_documents: take only the first so many documents.
        with_tests: take the standard library's tests too.
        skip_unreadable: leave out what cannot be read, in place of the error.
        workers: processes that tokenize.
        restart: remove what an interrupted call did, in place of going on with it.
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
    restart: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_holding_out(self.valid_fraction, self.seed)
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


@dataclass(frozen=True)
class PreprocessResult:
    """The data set, what was left out of it, and whether it was already there."""

    manifest: Manifest
    tokenizer: Tokenizer
    tally: Tally
    up_to_date: bool


def preprocess(options: PreprocessOptions) -> PreprocessResult:
    """Write the data set, or find that it is already there.

    The folder appears whole or not at all. What was done stays when this ends early, however it ends, and the next call
    with the same options and input goes on there (see :func:`.work_folder`); the data set is the same, byte for byte.

    Raises:
        ConfigError: options that cannot work, such as a vocabulary that the text does not support.
        DataError: paths, tokenizer or output folder that cannot be used, the interrupted work of other options or
            input, a corpus with fewer than two documents, or what :meth:`.Corpus.documents` refuses.
    """
    old = data_set_there(options.output)
    given = None if options.train_vocab is not None else choose_tokenizer(options.tokenizer, options.eod)
    listed = Tally()
    sources = find_sources(
        options.paths,
        options.extensions,
        with_tests=options.with_tests,
        skip_unreadable=options.skip_unreadable,
        tally=listed,
    )
    if old is not None:  # it may lie in a folder of the corpus, with a manifest and a tokenizer's merges.txt
        own = options.output.resolve()
        sources = tuple(source for source in sources if own not in source.path.resolve().parents)
    corpus = Corpus(sources, options.json_key, options.max_documents, options.skip_unreadable)
    reader = Reader(corpus, options.seed, options.quiet)
    recorded = _recorded_options(options, given)
    if old is not None:
        found = scan(reader)
        if old.fingerprint != fingerprint_of(recorded, found.sha256):
            files = "" if old.source.files == len(sources) else f": {old.source.files} files then, {len(sources)} now"
            changes = differences(old.options, recorded) or f"made from other text{files}"
            raise DataError(
                f"{options.output}: holds another data set ({changes}). Choose another --output, or remove the folder."
            )
        remove_published(options.output)
        return PreprocessResult(old, old.load_tokenizer(), listed.and_then(found.tally), up_to_date=True)

    with work_folder(options.output, restart=options.restart) as work:
        found = scan_in(work, reader, _options_of_scan(options))
        held_out = hold_out(found.keys, options.valid_fraction)
        release = {**recorded, **_RELEASE}
        if has_begun(work, release):
            tokenizer = given or load_tokenizer(work.data / MODEL_FILE)
            if given is not None:  # its templates, say, which decide no id, may have changed
                put_tokenizer(work, given)
        else:
            tokenizer = given or _train(work, reader, found, held_out, options)
            begin(work, tokenizer, release)
            discard_sample(work)
        splits, dtype = write_splits(work, reader, found, held_out, tokenizer, options.workers)
        tally = listed.and_then(found.tally)
        manifest = Manifest(
            fingerprint=fingerprint_of(recorded, found.sha256),
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            dtype=dtype,
            tokenizer=TokenizerInfo.of(tokenizer),
            source=SourceInfo(
                files=len(sources),
                rejected=tally.rejected,
                rejected_examples=tuple(map(_printable, tally.examples)),
                empty=tally.empty,
                sha256=found.sha256,
            ),
            options=recorded,
            **splits,
        )
        manifest.write(work.data)
        load_manifest(work.data)  # what is published has passed the checks that training makes
    return PreprocessResult(manifest.at(options.output), tokenizer, tally, up_to_date=False)


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


def _options_of_scan(options: PreprocessOptions) -> dict[str, Any]:
    """Those that decide what the scan finds."""
    names = ("seed", "json_key", "max_documents", "skip_unreadable")
    return {name: getattr(options, name) for name in names} | _RELEASE


def _printable(item: Rejected) -> str:
    """A file's name may have bytes that are not UTF-8, and the manifest is."""
    return str(item).encode("utf-8", "backslashreplace").decode()


def _train(
    work: WorkFolder, reader: Reader, found: Scan, held_out: np.ndarray, options: PreprocessOptions
) -> Tokenizer:
    assert options.train_vocab is not None
    choice = {"seed": options.seed, "valid_fraction": options.valid_fraction} | _RELEASE
    texts = draw_sample(work, reader, found, held_out, choice)
    with die_on_signal():
        return train_tokenizer(texts, options.train_vocab)
