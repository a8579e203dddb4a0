"""Which documents a corpus holds, in a stable order, with everything that was left out accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mtp_megatron.data.reading import Document, Rejected, Source, read


@dataclass
class Tally:
    """What a pass over the corpus left out."""

    rejected: list[Rejected] = field(default_factory=list)
    empty: int = 0


@dataclass(frozen=True)
class Corpus:
    """Files in a stable order, and how to cut them into documents.

    Args:
        sources: the files.
        json_key: the field that holds the text in each line of a ``.jsonl`` file.
        max_documents: stop after this many documents; all of them when None.
    """

    sources: tuple[Source, ...]
    json_key: str = "text"
    max_documents: int | None = None

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the documents in order; what is rejected or empty is added to ``tally``."""
        tally = Tally() if tally is None else tally
        count = 0
        for source in self.sources:
            if count == self.max_documents:
                return
            for item in read(source, self.json_key):
                if isinstance(item, Rejected):
                    tally.rejected.append(item)
                elif not item.data:
                    tally.empty += 1
                else:
                    yield item
                    count += 1
                    if count == self.max_documents:
                        return


def digest(data: bytes) -> bytes:
    """The identity of a document's content: 32 bytes."""
    return hashlib.sha256(data).digest()
