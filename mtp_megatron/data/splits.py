"""The last pass over a corpus: tokenize, and write what is trained on and what is held out."""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_megatron.data import journal
from mtp_megatron.data.atomic import empty, sync, sync_all
from mtp_megatron.data.encode import encode_documents
from mtp_megatron.data.progress import byte_bar, say
from mtp_megatron.data.reading import Cursor, Place
from mtp_megatron.data.scan import Reader, Scan, reread
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.data.tokenizer_store import FOLDER, write_tokenizer
from mtp_megatron.data.work_folder import WorkFolder
from mtp_megatron.data.writer import SplitCounts, optimal_dtype, split_writer

_RECORD = "tokenize.json"


class _TokenizeRecord(journal.Record):
    options: dict[str, Any]
    cursor: Cursor = Cursor()
    train: SplitCounts = SplitCounts()
    valid: SplitCounts = SplitCounts()


def has_begun(work: WorkFolder, options: dict[str, Any]) -> bool:
    """Whether the pass has begun in this folder, so that the tokenizer lies in it.

    Args:
        options: those that decide what the pass writes.

    Raises:
        DataError: it has, with other options.
    """
    record = journal.read_record(work.path / _RECORD, _TokenizeRecord)
    if record is not None:
        work.refuse_other(record.options, options)
    return record is not None


def begin(work: WorkFolder, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    """Put the tokenizer in the folder, and say that the pass has begun."""
    empty(work.data)  # of a tokenizer that was being put there
    put_tokenizer(work, tokenizer)
    sync_all(work.data)
    _TokenizeRecord(options=options).write(work.path / _RECORD)


def put_tokenizer(work: WorkFolder, tokenizer: Tokenizer) -> None:
    """Put the tokenizer's files in the folder, in place of those that lie there."""
    if (work.data / FOLDER).exists():
        shutil.rmtree(work.data / FOLDER)
    write_tokenizer(tokenizer, work.data)


def write_splits(
    work: WorkFolder, reader: Reader, found: Scan, held_out: np.ndarray, tokenizer: Tokenizer, workers: int
) -> tuple[dict[str, Any], Any]:
    """Write both splits, from where the record of the pass says; returns what is in them and the type of the ids.

    Raises:
        DataError: the corpus is not the one that was scanned, a document that the index cannot hold, a worker died, or
            the folder has less than was recorded.
    """
    dtype = optimal_dtype(tokenizer.vocab_size)
    record = journal.read_record(work.path / _RECORD, _TokenizeRecord)
    assert record is not None
    done, written = record.cursor, record.train.text_bytes + record.valid.text_bytes
    if done.documents:
        say(
            f"going on at document {done.documents:,} of {len(found.keys):,} ({written / found.text_bytes:.1%})",
            quiet=reader.quiet,
        )
    place = done.place()
    # Size and name of those read whose ids, made by other processes, are to come, and the place behind each.
    read: deque[tuple[int, str, Place]] = deque()

    def texts() -> Iterator[bytes]:
        cursor = Cursor(*place)
        for document in reread(reader, found, cursor):
            read.append((len(document.data), document.name, cursor.place()))
            yield document.data

    with (
        split_writer(work.data / "train", dtype, work.path / "train.lengths", record.train) as train,
        split_writer(work.data / "valid", dtype, work.path / "valid.lengths", record.valid) as valid,
        byte_bar("tokenize", found.text_bytes, done=written, quiet=reader.quiet) as bar,
        contextlib.closing(encode_documents(texts(), tokenizer, workers)) as encoded,
    ):
        sync(work.data)

        def write() -> None:
            now = _TokenizeRecord(options=record.options, cursor=Cursor(*place), train=train.keep(), valid=valid.keep())
            now.write(work.path / _RECORD)

        pace = journal.Pace(write)
        for number, ids in enumerate(encoded, start=done.documents):
            size, name, place = read.popleft()
            (valid if held_out[number] else train).add(ids, size, name)
            bar.update(size)
            pace.tick()
        write()  # the index of many documents takes minutes
        return {"train": train.finish(), "valid": valid.finish()}, dtype
