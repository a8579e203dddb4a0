"""megatron-core's ``.idx`` files, read and written without megatron: where each document lies in a ``.bin``."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

import numpy as np

from mtp_megatron.errors import DataError

# megatron.core.datasets.indexed_dataset._IndexWriter: magic, version, dtype code, sequences, document boundaries; then
# int32 lengths, int64 byte offsets, int64 boundaries, and with images int8 modes.
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES: Final[dict[str, int]] = {"int32": 4, "uint16": 8}
_OTHER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}
MOST_TOKENS = 2**31 - 1  # of a document: lengths are int32
_BLOCK = 1 << 16  # documents


@dataclass(frozen=True)
class Places:
    """Where documents lie: the first byte of each and its number of tokens, both int64 ``[documents]``."""

    starts: np.ndarray
    tokens: np.ndarray

    def take(self, choice: slice | np.ndarray) -> Places:
        """Those that a slice, mask or array of numbers chooses."""
        return Places(self.starts[choice], self.tokens[choice])


class MegatronIndex:
    """A ``.bin``/``.idx`` pair that Megatron-LM's ``tools/preprocess_data.py`` or megatron-core wrote, checked.

    Memory is that of a block of documents: the index is mapped.

    Args:
        prefix: the path without ``.bin`` and ``.idx``; either of the two files means it as well.

    Attributes:
        dtype: of the ids, ``"uint16"`` or ``"int32"``.
        documents: how many, empty ones included; a document of several sequences (``--split-sentences``) is one.
        bin_bytes: size of the ``.bin``.

    Raises:
        DataError: a file is missing, is no such index, holds other things than ids of text, or is another ``.bin``'s.
    """

    def __init__(self, prefix: Path) -> None:
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        self.bin, self.idx = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
        try:
            self.bin_bytes, size = self.bin.stat().st_size, self.idx.stat().st_size
            with self.idx.open("rb") as stream:
                head = stream.read(HEADER.size)
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}). Give the common path of a .bin and an .idx, "
                "say data/corpus_text_document."
            ) from error
        code, sequences, boundaries = self._header(head)
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if not self.bin_bytes:
            raise self._unusable(
                f"{self.bin.name} beside it is empty", "Copy that again, or give documents that are not all empty."
            )
        if size == expected + sequences:
            raise self._unusable("it has a mode for each sequence: data with images", "Give data of text alone.")
        if size != expected:
            raise self._unusable(
                f"{size} bytes, where its header of {sequences} sequences and {boundaries} boundaries takes {expected}",
                "It is truncated or damaged: copy it again.",
            )
        self.dtype: Literal["uint16", "int32"] = "uint16" if code == DTYPE_CODES["uint16"] else "int32"
        self.item = np.dtype(self.dtype).itemsize
        self.documents = boundaries - 1
        self._sequences = sequences
        at = HEADER.size
        self._lengths = np.memmap(self.idx, np.int32, "r", at, (sequences,))
        self._pointers = np.memmap(self.idx, np.int64, "r", at + 4 * sequences, (sequences,))
        self._boundaries = np.memmap(self.idx, np.int64, "r", at + 12 * sequences, (boundaries,))
        self._check_places()

    def blocks(self) -> Iterator[Places]:
        """Every document, in the order of the ``.bin``, a block at a time."""
        for first in range(0, self.documents, _BLOCK):
            ends = self._boundaries[first : first + _BLOCK + 1]
            edges = self._start_of(np.asarray(ends))
            yield Places(edges[:-1], np.diff(edges) // self.item)

    def first_sequences(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of the first sequence of each of these documents, 0 of one without any."""
        firsts, behind = self._boundaries[documents], self._boundaries[documents + 1]
        tokens = np.zeros(len(documents), dtype=np.int64)
        tokens[firsts < behind] = self._lengths[firsts[firsts < behind]]
        return tokens

    def _start_of(self, sequences: np.ndarray) -> np.ndarray:
        """First bytes of sequences; of the one behind the last, the end of the ``.bin``."""
        inside = sequences < self._sequences
        starts = np.full(len(sequences), self.bin_bytes, dtype=np.int64)
        starts[inside] = self._pointers[sequences[inside]]
        return starts

    def _header(self, head: bytes) -> tuple[int, int, int]:
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise self._unusable(f"it begins with {head[:9]!r}, no index of megatron-core", "Preprocess anew.")
        _, version, code, sequences, boundaries = HEADER.unpack(head)
        if version != 1:
            raise self._unusable(f"version {version} of the format", "Version 1 is read.")
        if code not in DTYPE_CODES.values():
            name = _OTHER_DTYPES.get(code, f"the unknown code {code}")
            raise self._unusable(f"its ids are stored as {name}", f"Ids of text are {' or '.join(DTYPE_CODES)}.")
        if sequences < 1 or boundaries < 2:
            raise self._unusable("it has no document", "Give another one.")
        return code, sequences, boundaries

    def _check_places(self) -> None:
        """Sequences fill the ``.bin`` one after another, and documents the sequences: both files belong together."""
        end = 0
        for first in range(0, self._sequences, _BLOCK):
            lengths = np.asarray(self._lengths[first : first + _BLOCK], dtype=np.int64)
            pointers = self._pointers[first : first + _BLOCK]
            expected = end + self.item * np.concatenate(([0], np.cumsum(lengths)))
            wrong = np.flatnonzero((pointers != expected[:-1]) | (lengths < 0))
            if len(wrong):
                at = int(wrong[0])
                raise self._unusable(
                    f"sequence {first + at} begins at byte {pointers[at]} of the .bin where the one before ends at "
                    f"{expected[at]}",
                    "An index that leaves parts of a .bin out is not adopted: give the whole one.",
                )
            end = int(expected[-1])
        if end != self.bin_bytes:
            raise self._unusable(
                f"its last sequence ends at byte {end}, but {self.bin.name} has {self.bin_bytes}",
                "Give the .bin that it was written with, whole.",
            )
        end = 0
        for first in range(0, len(self._boundaries), _BLOCK):
            edges = np.concatenate(([end], self._boundaries[first : first + _BLOCK]))
            if (np.diff(edges) < 0).any():
                raise self._unusable("its documents overlap", "It is damaged: copy it again.")
            end = int(edges[-1])
        if int(self._boundaries[0]) != 0 or end != self._sequences:
            raise self._unusable(
                f"its documents are of the sequences {self._boundaries[0]} to {end}, and there are {self._sequences}",
                "It is damaged: copy it again.",
            )

    def _unusable(self, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.idx}: {problem}. {remedy}")


class IndexWriter:
    """Writes the ``.idx`` of documents that lie anywhere in a ``.bin``, a block at a time.

    The three tables go to files of their own first, since how many documents there are is known at the end.

    Args:
        path: the file; the folder must be there.
        dtype: of the ids.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype, self.item = path, dtype, np.dtype(dtype).itemsize
        self.documents = self.tokens = 0
        self._parts = [path.with_name(f"{path.name}.{part}") for part in ("lengths", "pointers")]
        self._streams: list[BinaryIO] = [part.open("wb") for part in self._parts]

    def add(self, places: Places) -> None:
        """Append documents.

        Raises:
            DataError: one has more tokens than the index can say.
        """
        if not len(places.tokens):
            return
        if (longest := int(places.tokens.max())) > MOST_TOKENS:
            raise DataError(
                f"{self._path}: a document has {longest:,} tokens; megatron-core's index holds documents of at most "
                f"{MOST_TOKENS:,}. Split it."
            )
        self._streams[0].write(places.tokens.astype("<i4").tobytes())
        self._streams[1].write(places.starts.astype("<i8").tobytes())
        self.documents += len(places.tokens)
        self.tokens += int(places.tokens.sum())

    def finish(self) -> None:
        """Put the file together."""
        for stream in self._streams:
            stream.close()
        boundaries = self.documents + 1
        with self._path.open("wb") as target:
            target.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[self._dtype], self.documents, boundaries))
            for part in self._parts:
                with part.open("rb") as source:
                    while block := source.read(1 << 24):
                        target.write(block)
                part.unlink()
            for first in range(0, boundaries, 1 << 20):
                target.write(np.arange(first, min(first + (1 << 20), boundaries), dtype="<i8").tobytes())

    def close(self) -> None:
        """Let go of the files; for an index that will not be finished."""
        for stream in self._streams:
            stream.close()
