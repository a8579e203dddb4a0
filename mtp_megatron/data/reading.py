"""How one file is cut into documents, with a reason for everything that is no document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_JSON_LINES = ".jsonl"


@dataclass(frozen=True)
class Source:
    """One file of the corpus; ``name`` is independent of where the corpus lies, so that moving it changes nothing."""

    path: Path
    name: str


@dataclass(frozen=True)
class Document:
    """One text; a line of a ``.jsonl`` file or a whole file. ``data`` is its UTF-8 encoding, never empty."""

    name: str
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")


@dataclass(frozen=True)
class Rejected:
    """A file or line that is not in the data set, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read(source: Source, json_key: str) -> Iterator[Document | Rejected]:
    try:
        if source.path.suffix.lower() == _JSON_LINES:
            yield from _read_json_lines(source, json_key)
            return
        data = source.path.read_bytes()
    except OSError as error:
        yield Rejected(source.name, f"cannot be read ({error.strerror})")
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Rejected(source.name, f"not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})")
    else:
        yield Document(source.name, data)


def _read_json_lines(source: Source, json_key: str) -> Iterator[Document | Rejected]:
    with source.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            name = f"{source.name}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield Rejected(name, f"not JSON ({error})")
                continue
            except ValueError as error:  # JSON, but Python refuses to read a number of more than 4300 digits
                yield Rejected(name, f"holds a number that cannot be read ({error})")
                continue
            except RecursionError:
                yield Rejected(name, "lists or objects nested too deeply to be read")
                continue
            text = record.get(json_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                yield Rejected(name, f"no text under the key {json_key!r}")
                continue
            try:
                yield Document(name, text.encode("utf-8"))
            except UnicodeEncodeError:  # JSON can spell a lone surrogate, which is not a character
                yield Rejected(name, "holds a lone surrogate, which UTF-8 cannot encode")
