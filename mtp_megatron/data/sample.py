"""The text that a tokenizer is trained on: a pass over the corpus that takes some of it, kept in the work folder."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_megatron.data import journal
from mtp_megatron.data.progress import document_bar, say
from mtp_megatron.data.reading import Cursor
from mtp_megatron.data.scan import Reader, Scan, reread
from mtp_megatron.data.work_folder import WorkFolder

_MOST_BYTES = 200_000_000  # sentencepiece holds its training text in memory
_RECORD, _TEXTS = "sample.json", "sample.texts"
_LENGTH = struct.Struct("<I")  # before each text; a document has at most 1 GiB


class _SampleRecord(journal.Record):
    options: dict[str, Any]
    cursor: Cursor
    texts_bytes: int


def draw_sample(
    work: WorkFolder, reader: Reader, found: Scan, held_out: np.ndarray, options: dict[str, Any]
) -> Iterator[str]:
    """Documents that are not held out: all of them, or about 200 MB chosen by their content.

    Args:
        options: those that decide which.

    Raises:
        DataError: the corpus is not the one that was scanned, or the folder has a sample drawn with other options.
    """
    share = min(1.0, _MOST_BYTES / found.text_bytes)
    # Keys are uniform, so the largest ones are a fair sample; held-out documents have the smallest.
    chosen = ~held_out if share == 1.0 else ~held_out & (found.keys >= np.quantile(found.keys, 1.0 - share))
    record = journal.read_record(work.path / _RECORD, _SampleRecord)
    if record is not None:
        work.refuse_other(record.options, options)
        say(
            f"going on with the tokenizer's sample at document {record.cursor.documents:,} of {len(found.keys):,}",
            quiet=reader.quiet,
        )
    cursor = record.cursor if record else Cursor()
    with journal.open_at(work.path / _TEXTS, record.texts_bytes if record else 0) as texts:

        def write() -> None:
            journal.flush(texts)
            _SampleRecord(options=options, cursor=cursor, texts_bytes=texts.tell()).write(work.path / _RECORD)

        pace = journal.Pace(write)
        documents = reread(reader, found, cursor)
        done, total = cursor.documents, len(found.keys)
        for document in document_bar(documents, "sample for the tokenizer", total, done=done, quiet=reader.quiet):
            if chosen[cursor.documents - 1]:
                texts.write(_LENGTH.pack(len(document.data)) + document.data)
            pace.tick()
        write()
    total = int(chosen.sum())
    return document_bar(_texts(work), "train tokenizer", total, quiet=reader.quiet)


def discard_sample(work: WorkFolder) -> None:
    """Remove it once the tokenizer is kept."""
    for name in (_RECORD, _TEXTS):
        (work.path / name).unlink(missing_ok=True)


def _texts(work: WorkFolder) -> Iterator[str]:
    with (work.path / _TEXTS).open("rb") as stream:
        while head := stream.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(head)
            yield stream.read(length).decode("utf-8")
