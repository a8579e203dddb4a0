"""Which documents a corpus holds, in a stable order, with everything that was left out accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mtp_megatron.data.reading import Cursor, Document, Rejected, Source, read
from mtp_megatron.errors import DataError

_MOST_EXAMPLES = 20  # a line for each record of a large corpus would fill the memory
_HOPELESS = 10_000


@dataclass
class Tally:
    """What a pass over the corpus left out: how much, and the first of it by name."""

    rejected: int = 0
    examples: list[Rejected] = field(default_factory=list)
    empty: int = 0

    def reject(self, item: Rejected) -> None:
        """Count one more."""
        self.rejected += 1
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(item)

    def and_then(self, later: Tally) -> Tally:
        """Both as one."""
        examples = [*self.examples, *later.examples][:_MOST_EXAMPLES]
        return Tally(self.rejected + later.rejected, examples, self.empty + later.empty)


@dataclass(frozen=True)
class Corpus:
    """Files in a stable order, and how to cut them into documents.

    Args:
        sources: the files.
        json_key: the field of a JSON line, or the column of a table, that holds the text.
        max_documents: stop after this many documents; all of them when None.
        skip_unreadable: leave out files that cannot be read, in place of the error.
    """

    sources: tuple[Source, ...]
    json_key: str = "text"
    max_documents: int | None = None
    skip_unreadable: bool = False

    def documents(self, tally: Tally | None = None, cursor: Cursor | None = None) -> Iterator[Document]:
        """Yield the documents in order; what is rejected or empty is added to ``tally``.

        Args:
            tally: where to count; nowhere when None.
            cursor: where to begin; after each document it is moved behind that.

        Raises:
            DataError: a file cannot be read, a table has no such column, a document is longer than 1 GiB, or the first
                10,000 JSON lines and rows are all unusable, so that the key is most likely wrong.
        """
        tally = Tally() if tally is None else tally
        cursor = Cursor() if cursor is None else cursor
        unusable = _Unusable(self.json_key)
        while cursor.source < len(self.sources) and cursor.documents != self.max_documents:
            source = self.sources[cursor.source]
            for item in read(source, self.json_key, cursor, skip_unreadable=self.skip_unreadable):
                if isinstance(item, Rejected):
                    if item.from_json_line and not cursor.json_text:
                        unusable.add(item)
                    tally.reject(item)
                    continue
                cursor.json_text |= item.from_json_line
                if item.data:
                    cursor.documents += 1
                    yield item
                    if cursor.documents == self.max_documents:
                        return
                else:
                    tally.empty += 1
            cursor.source += 1
            cursor.byte = cursor.line = 0


@dataclass
class _Unusable:
    """The JSON lines and rows before the first that has text: a wrong key should not cost a pass over terabytes."""

    json_key: str
    count: int = 0
    first: Rejected | None = None

    def add(self, item: Rejected) -> None:
        """Count one more, and end the pass when it is one too many."""
        self.count += 1
        if self.first is None or (item.fields and not self.first.fields):
            self.first = item
        if self.count == _HOPELESS:
            raise DataError(
                f"--json-key={self.json_key!r}: the first {_HOPELESS:,} JSON lines or rows are all unusable "
                f"({self.first.explanation}). Name the field that holds the text with --json-key."
            )


def digest(data: bytes) -> bytes:
    """The identity of a document's content: 32 bytes."""
    return hashlib.sha256(data).digest()
