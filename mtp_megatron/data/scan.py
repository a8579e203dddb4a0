"""The first pass over a corpus: what identifies it and each document, so that later passes can be held against it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mtp_megatron.data import journal
from mtp_megatron.data.corpus import Corpus, Tally, digest
from mtp_megatron.data.progress import document_bar, say
from mtp_megatron.data.reading import Cursor, Document
from mtp_megatron.data.work_folder import WorkFolder
from mtp_megatron.errors import ConfigError, DataError

_RECORD, _KEYS, _HASHED = "scan.json", "scan.keys", "scan.hashed"
_KEY_BYTES = 8
_PART_BYTES = 1 << 16


class Reader(NamedTuple):
    """How to pass over a corpus."""

    corpus: Corpus
    seed: int
    quiet: bool


@dataclass(frozen=True)
class Scan:
    """What the pass found: ``keys[i]`` is a number drawn from the content of document i and the seed."""

    keys: np.ndarray  # uint64 [documents]
    text_bytes: int
    sha256: str
    tally: Tally


class _ScanRecord(journal.Record):
    options: dict[str, Any]
    cursor: Cursor
    text_bytes: int
    hashed_bytes: int
    tally: Tally
    sha256: str | None  # of a pass that is complete


class _Scanner:
    """A pass, at any place of it."""

    def __init__(self) -> None:
        self.keys = array("Q")  # 8 bytes a document, where a list of integers takes 40
        self.text_bytes = 0
        self.whole = hashlib.sha256()
        self.tally, self.cursor = Tally(), Cursor()

    def add(self, document: Document, seed: int) -> bytes:
        """Count one more document; returns what was hashed of it."""
        self.keys.append(key_of(document.data, seed))
        self.text_bytes += len(document.data)
        hashed = document.name.encode("utf-8", "surrogateescape") + b"\0" + digest(document.data)
        self.whole.update(hashed)
        return hashed

    def result(self) -> Scan:
        """Of a pass that is complete.

        Raises:
            DataError: fewer than two documents.
        """
        keys, tally = self.keys, self.tally
        if len(keys) < 2:
            lost = "".join(f"\n  {item.explanation}" for item in tally.examples[:5])
            raise DataError(
                f"the corpus has {len(keys)} usable documents ({tally.rejected} rejected, {tally.empty} empty); at "
                f"least 2 are needed, one to train on and one to hold out. Give more files.{lost}"
            )
        return Scan(np.frombuffer(keys, dtype=np.uint64), self.text_bytes, self.whole.hexdigest(), tally)


def scan(reader: Reader) -> Scan:
    """Read the corpus once.

    Raises:
        DataError: what :meth:`.Corpus.documents` refuses, or fewer than two documents.
    """
    scanner = _Scanner()
    documents = reader.corpus.documents(scanner.tally, scanner.cursor)
    for document in document_bar(documents, "scan", None, quiet=reader.quiet):
        scanner.add(document, reader.seed)
    return scanner.result()


def scan_in(work: WorkFolder, reader: Reader, options: dict[str, Any]) -> Scan:
    """The same in a work folder, in which the pass is kept, and gone on with where it is there already.

    What the running hash has taken in is kept as a file until the pass is complete: a hash itself cannot be.

    Args:
        options: those that decide what the pass finds.

    Raises:
        DataError: as :func:`scan`, or the folder has the work on another corpus or with other options.
    """
    record = journal.read_record(work.path / _RECORD, _ScanRecord)
    sources = reader.corpus.sources
    if record is not None:
        work.refuse_other(record.options, options)
        complete = record.sha256 is not None
        work.refuse_changed(sources, None if complete else record.cursor.source + 1)
        if record.sha256 is not None:
            say(f"the corpus was scanned before: {record.cursor.documents:,} documents", quiet=reader.quiet)
            return Scan(_load_keys(work, record), record.text_bytes, record.sha256, record.tally)
        say(
            f"going on with the scan at document {record.cursor.documents:,} "
            f"(file {record.cursor.source + 1:,} of {len(sources):,})",
            quiet=reader.quiet,
        )
    work.note_inputs(sources)
    return _scan_on(work, reader, options, record)


def _scan_on(work: WorkFolder, reader: Reader, options: dict[str, Any], record: _ScanRecord | None) -> Scan:
    scanner = _Scanner()
    if record is not None:
        scanner.text_bytes, scanner.tally, scanner.cursor = record.text_bytes, record.tally, record.cursor
    recorded = scanner.cursor.documents
    with (
        journal.open_at(work.path / _KEYS, recorded * _KEY_BYTES) as keys,
        journal.open_at(work.path / _HASHED, record.hashed_bytes if record else 0) as hashed,
    ):
        with (work.path / _KEYS).open("rb") as stream:
            scanner.keys.fromfile(stream, recorded)
        with (work.path / _HASHED).open("rb") as stream:
            while part := stream.read(_PART_BYTES):
                scanner.whole.update(part)

        def write(sha256: str | None = None) -> None:
            nonlocal recorded
            keys.write(memoryview(scanner.keys)[recorded:])
            recorded = len(scanner.keys)
            for file in (keys, hashed):
                journal.flush(file)
            _ScanRecord(
                options=options,
                cursor=scanner.cursor,
                text_bytes=scanner.text_bytes,
                hashed_bytes=hashed.tell(),
                tally=scanner.tally,
                sha256=sha256,
            ).write(work.path / _RECORD)

        pace = journal.Pace(write)
        documents = reader.corpus.documents(scanner.tally, scanner.cursor)
        for document in document_bar(documents, "scan", None, done=recorded, quiet=reader.quiet):
            hashed.write(scanner.add(document, reader.seed))
            pace.tick()
        found = scanner.result()
        write(found.sha256)
    (work.path / _HASHED).unlink()
    return found


def _load_keys(work: WorkFolder, record: _ScanRecord) -> np.ndarray:
    count = record.cursor.documents
    journal.open_at(work.path / _KEYS, count * _KEY_BYTES).close()  # which checks its size
    return np.fromfile(work.path / _KEYS, dtype=np.uint64, count=count)


def key_of(data: bytes, seed: int) -> int:
    """Uniform in 0 .. 2^64 - 1, by content: copies of a text fall on the same side of the split, wherever they lie."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def check_holding_out(fraction: float, seed: int) -> None:
    """Refuse options that :func:`hold_out` and :func:`key_of` cannot take.

    Raises:
        ConfigError: naming ``--valid-fraction`` or ``--seed``.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError("--valid-fraction", fraction, "must lie between 0 and 1, both excluded", "Try 0.01.")
    if not 0 <= seed < 2**64:
        raise ConfigError("--seed", seed, "must fit 64 bits without sign", "Try 1234.")


def hold_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, bool ``[documents]``: those with the smallest keys, ties together.

    Raises:
        DataError: it would be all of them.
    """
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    held_out: np.ndarray = keys <= np.partition(keys, count - 1)[count - 1]
    if held_out.all():
        raise DataError(
            f"all {len(keys)} documents have the same text, or too few differ to hold some out. Give more varied files."
        )
    return held_out


def reread(reader: Reader, found: Scan, cursor: Cursor) -> Iterator[Document]:
    """The documents again from ``cursor`` on, which is moved along, refusing a corpus that is not the one that was
    scanned.

    Raises:
        DataError: a document differs, or there are more or fewer.
    """
    remedy = "Run preprocess again, with --restart."
    for document in reader.corpus.documents(cursor=cursor):
        number = cursor.documents - 1
        if number >= len(found.keys) or key_of(document.data, reader.seed) != int(found.keys[number]):
            raise DataError(f"{document.name}: changed while the corpus was being read. {remedy}")
        yield document
    if cursor.documents != len(found.keys):
        raise DataError(
            f"the corpus shrank from {len(found.keys)} to {cursor.documents} documents while it was read. {remedy}"
        )
