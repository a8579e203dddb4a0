"""Write one split as megatron-core's indexed data set."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mtp_megatron import compat
from mtp_megatron.data import journal
from mtp_megatron.data.manifest import SplitInfo
from mtp_megatron.data.megatron_index import MOST_TOKENS
from mtp_megatron.errors import DataError


def optimal_dtype(vocab_size: int) -> str:
    """The integer type that megatron-core would choose for ids below ``vocab_size``: ``"uint16"`` or ``"int32"``."""
    compat.prepare()
    from megatron.core.datasets.indexed_dataset import DType

    return str(np.dtype(DType.optimal_dtype(vocab_size)).name)


class SplitCounts(BaseModel):
    """How much of a split was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class SplitWriter:
    """One ``.bin``/``.idx`` pair being written (``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder``).

    Args:
        prefix: of the pair.
        dtype: of the ids.
        lengths: the file for the documents' lengths, which the builder holds in memory and writes at the end.
        begun: what was written before, and is gone on with; the rest of the files is cut off.

    Raises:
        DataError: less than ``begun`` is there.
    """

    def __init__(self, prefix: Path, dtype: str, lengths: Path, begun: SplitCounts | None = None) -> None:
        compat.prepare()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        begun = SplitCounts() if begun is None else begun
        self.documents, self.tokens, self.text_bytes = begun.documents, begun.tokens, begun.text_bytes
        self._bin, self._idx = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
        self._builder = IndexedDatasetBuilder(os.devnull, dtype=np.dtype(dtype).type)  # it empties the file it is given
        self._builder.data_file.close()
        self._builder.data_file = journal.open_at(self._bin, self.tokens * np.dtype(dtype).itemsize)
        # As arrays, its lists take 12 bytes a document; a list of integers alone takes 36.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", np.arange(self.documents + 1, dtype=np.int64).tobytes())
        self._lengths = journal.open_at(lengths, self.documents * self._builder.sequence_lengths.itemsize)
        with lengths.open("rb") as stream:
            self._builder.sequence_lengths.fromfile(stream, self.documents)
        self._kept = self.documents

    def add(self, ids: np.ndarray, text_bytes: int, name: str) -> None:
        """Append one document, which must end with its end-of-document token.

        Raises:
            DataError: it has more tokens than the index can say; found here, not when the index is written at the end.
        """
        if len(ids) > MOST_TOKENS:
            raise DataError(
                f"{name}: {len(ids):,} tokens; megatron-core's index holds documents of at most {MOST_TOKENS:,}. "
                "Split it into several files, or lines of a .jsonl file."
            )
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def keep(self) -> SplitCounts:
        """Put what was written on the disk, and return what that is."""
        journal.flush(self._builder.data_file)
        self._lengths.write(memoryview(self._builder.sequence_lengths)[self._kept :])
        journal.flush(self._lengths)
        self._kept = self.documents
        return SplitCounts(documents=self.documents, tokens=self.tokens, text_bytes=self.text_bytes)

    def finish(self) -> SplitInfo:
        """Write the index and return the counts."""
        self._builder.finalize(str(self._idx))
        return SplitInfo(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            bin_bytes=self._bin.stat().st_size,
            idx_bytes=self._idx.stat().st_size,
        )

    def close(self) -> None:
        """Let go of the files; for a split that will not be finished."""
        self._builder.data_file.close()
        self._lengths.close()


@contextlib.contextmanager
def split_writer(prefix: Path, dtype: str, lengths: Path, begun: SplitCounts | None = None) -> Iterator[SplitWriter]:
    """A :class:`SplitWriter` whose files are closed however the block ends."""
    writer = SplitWriter(prefix, dtype, lengths, begun)
    try:
        yield writer
    finally:
        writer.close()
