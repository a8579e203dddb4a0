"""Write one split as megatron-core's indexed data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtp_megatron import compat
from mtp_megatron.data.manifest import SplitInfo
from mtp_megatron.errors import DataError

_MOST_TOKENS = 2**31 - 1  # the index holds lengths as int32


def optimal_dtype(vocab_size: int) -> str:
    """The integer type that megatron-core would choose for ids below ``vocab_size``: ``"uint16"`` or ``"int32"``."""
    compat.prepare()
    from megatron.core.datasets.indexed_dataset import DType

    return str(np.dtype(DType.optimal_dtype(vocab_size)).name)


class SplitWriter:
    """One ``.bin``/``.idx`` pair being written (``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder``)."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        compat.prepare()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._bin, self._idx = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
        self._builder = IndexedDatasetBuilder(str(self._bin), dtype=np.dtype(dtype).type)
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, ids: np.ndarray, text_bytes: int, name: str) -> None:
        """Append one document, which must end with its end-of-document token.

        Raises:
            DataError: it has more tokens than the index can say; found here, not when the index is written at the end.
        """
        if len(ids) > _MOST_TOKENS:
            raise DataError(
                f"{name}: {len(ids):,} tokens; megatron-core's index holds documents of at most {_MOST_TOKENS:,}. "
                "Split it into several files, or lines of a .jsonl file."
            )
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes

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
        """Let go of the file; for a split that will not be finished."""
        self._builder.data_file.close()


@contextlib.contextmanager
def split_writer(prefix: Path, dtype: str) -> Iterator[SplitWriter]:
    """A :class:`SplitWriter` whose file is closed however the block ends."""
    writer = SplitWriter(prefix, dtype)
    try:
        yield writer
    finally:
        writer.close()
