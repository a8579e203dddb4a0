"""Which documents a corpus holds, in a stable order, with everything that was left out accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mtp_megatron.data.reading import Document, Rejected, Source, read
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


@dataclass(frozen=True)
class Corpus:
    """Files in a stable order, and how to cut them into documents.

    Args:
        sources: the files.
        json_key: the field that holds the text of a JSON line.
        max_documents: stop after this many documents; all of them when None.
        skip_unreadable: leave out files that cannot be read, in place of the error.
    """

    sources: tuple[Source, ...]
    json_key: str = "text"
    max_documents: int | None = None
    skip_unreadable: bool = False

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the documents in order; what is rejected or empty is added to ``tally``.

        Raises:
            DataError: a file cannot be read, a document is longer than 1 GiB, or the first 10,000 JSON lines are all
                unusable, so that the key is most likely wrong.
        """
        tally = Tally() if tally is None else tally
        count = 0
        unusable: _Unusable | None = _Unusable(self.json_key)  # None once a line has text
        for source in self.sources:
            if count == self.max_documents:
                return
            for item in read(source, self.json_key, skip_unreadable=self.skip_unreadable):
                if unusable is not None and item.from_json_line:
                    unusable = unusable.add(item) if isinstance(item, Rejected) else None
                if isinstance(item, Rejected):
                    tally.reject(item)
                elif not item.data:
                    tally.empty += 1
                else:
                    yield item
                    count += 1
                    if count == self.max_documents:
                        return


@dataclass
class _Unusable:
    """The JSON lines before the first that has text: a wrong key should not cost a pass over terabytes."""

    json_key: str
    count: int = 0
    first: Rejected | None = None

    def add(self, item: Rejected) -> _Unusable:
        """Count one more, and end the pass when it is one too many."""
        self.count += 1
        if self.first is None or (item.fields and not self.first.fields):
            self.first = item
        if self.count == _HOPELESS:
            raise DataError(
                f"--json-key={self.json_key!r}: the first {_HOPELESS:,} JSON lines are all unusable "
                f"({self.first.explanation}). Name the field that holds the text with --json-key."
            )
        return self


def digest(data: bytes) -> bytes:
    """The identity of a document's content: 32 bytes."""
    return hashlib.sha256(data).digest()
