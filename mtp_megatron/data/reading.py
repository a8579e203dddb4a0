"""How one file is cut into documents, with a reason for everything that is no document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from mtp_megatron.data.formats import JSON, JSON_LINES, PARQUET, UnreadableError, decompressed, extension, opened
from mtp_megatron.data.parquet import TextColumn
from mtp_megatron.errors import DataError

UNREADABLE_REMEDY = (
    "Copy it again or give yourself the permission, or leave out what cannot be read with --skip-unreadable."
)
_MOST_BYTES = 1 << 30  # sentencepiece takes about 47 bytes of memory for each byte of a document
_MOST = "1 GiB"
_PART_BYTES = 1 << 20  # read(n) takes n bytes at once, whatever the file has
_FIRST_OBJECT = re.compile(r"\ufeff?\s*(?P<list>\[\s*)?(?=\{)")
_SECOND_OBJECT = re.compile(r"^\}\s*\{", re.MULTILINE)  # as jq writes them without -c


@dataclass(frozen=True)
class Source:
    """One file of the corpus; ``name`` is independent of where the corpus lies, so that moving it changes nothing."""

    path: Path
    name: str


Place = tuple[int, int, int, int, bool]  # the attributes of a Cursor


@dataclass(slots=True)
class Cursor:
    """How far a pass over a corpus has come; it begins there, and moves it along.

    Attributes:
        source: number of the file.
        byte: how much of that file (decompressed) was read.
        line: how many lines of it, where it has JSON lines, or rows, where it is a table.
        documents: how many were drawn from it and the files before.
        json_text: whether a line of JSON or a row had text, which shows that the key is right.
    """

    source: int = 0
    byte: int = 0
    line: int = 0
    documents: int = 0
    json_text: bool = False

    def place(self) -> Place:
        """Where it is now: ``Cursor(*place)`` begins there. A tuple, since one is taken for each document."""
        return self.source, self.byte, self.line, self.documents, self.json_text


@dataclass(frozen=True)
class Document:
    """One text; a line of JSON lines, a row of a table or a whole file. ``data`` is its UTF-8 encoding."""

    name: str
    data: bytes
    from_json_line: bool = False  # or a row

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")


@dataclass(frozen=True)
class Rejected:
    """A file, line or row that is not in the data set, and why; ``fields`` are those of a record without text."""

    name: str
    reason: str
    from_json_line: bool = False  # or a row
    fields: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"

    @property
    def explanation(self) -> str:
        """The same, with the fields."""
        return f"{self}; its fields: {self.fields}" if self.fields else str(self)


def read(
    source: Source, json_key: str, cursor: Cursor | None = None, *, skip_unreadable: bool = False
) -> Iterator[Document | Rejected]:
    """Yield the documents of one file, and what of it is none.

    Args:
        source: the file.
        json_key: the field of a JSON line, or the column of a table, that holds the text.
        cursor: where in the file to begin: at its beginning, or after an item that was drawn before.
        skip_unreadable: what cannot be read is left out, in place of the error.

    Raises:
        DataError: the file cannot be read, which says nothing about its text; a table has no such column; or a text
            is longer than 1 GiB.
    """
    cursor = Cursor() if cursor is None else cursor
    try:
        with opened(source.path) as stream:
            kind = extension(source.path)
            if kind == PARQUET:
                yield from _rows(source, stream, json_key, cursor)
                return
            lines = _lines(source, stream, cursor)
            begun = cursor.byte > 0  # in its lines, or at its end
            head = _head(lines) if kind == JSON and not begun else []
            if begun or kind in JSON_LINES or _are_records(head, json_key):
                for line in chain(head, lines):
                    cursor.byte += len(line)
                    cursor.line += 1
                    if line.strip():
                        yield _json_line(f"{source.name}:{cursor.line}", line, json_key)
            else:
                data = _whole(source, head, stream)
                cursor.byte = len(data)
                yield _one_text(source, data, json_key)
    except UnreadableError as error:
        reason = f"cannot be read ({error})"
        if not skip_unreadable:
            raise DataError(f"{source.path}: {reason}. {UNREADABLE_REMEDY}") from error
        yield Rejected(source.name, reason)


def _rows(source: Source, stream: BinaryIO, json_key: str, cursor: Cursor) -> Iterator[Document | Rejected]:
    """What the rows of a table from the cursor on are."""
    column = TextColumn(source.path, stream, json_key)
    for data in column.values(cursor.line):
        cursor.line += 1
        name = f"{source.name}:{cursor.line}"
        if data is None:
            yield _without_text(name, json_key, column.fields)
        elif len(data) > _MOST_BYTES:
            raise DataError(
                f"{source.path}: the text of row {cursor.line} is longer than {_MOST}, the most that one document may "
                "have. Split it, or check that the column is one of text."
            )
        elif reason := _not_utf8(data):
            yield Rejected(name, reason, from_json_line=True)
        else:
            yield Document(name, data, from_json_line=True)


def _lines(source: Source, stream: BinaryIO, cursor: Cursor) -> Iterator[bytes]:
    """The lines from the cursor on."""
    number, passed = 0, cursor.byte
    if cursor.byte and decompressed(source.path) is None:
        number, passed = cursor.line, 0
        stream.seek(cursor.byte)
    # Compressed files are read from the beginning, in the same steps: in a damaged one these decide how far it is read.
    while line := stream.readline(_MOST_BYTES + 1):
        number += 1
        if len(line) > _MOST_BYTES:
            raise DataError(
                f"{source.path}: line {number} is longer than {_MOST}, the most that one document may have. Split it, "
                "or check that the file has one JSON object a line."
            )
        if passed > 0:
            passed -= len(line)
        else:
            yield line


def _whole(source: Source, head: list[bytes], stream: BinaryIO) -> bytes:
    """What was read already, and the rest."""
    parts = list(head)
    size = sum(map(len, head))
    while size <= _MOST_BYTES and (part := stream.read(_PART_BYTES)):
        parts.append(part)
        size += len(part)
    if size > _MOST_BYTES:
        raise DataError(
            f"{source.path}: longer than {_MOST}, the most that one document may have, and a file that is not JSON "
            "lines is one document. Split it, or write it as JSON lines (.jsonl), one document a line."
        )
    return b"".join(parts)


def _head(lines: Iterator[bytes]) -> list[bytes]:
    """The lines up to the second that is not blank."""
    head: list[bytes] = []
    filled = 0
    for line in lines:
        head.append(line)
        filled += bool(line.strip())
        if filled == 2:
            break
    return head


def _are_records(head: list[bytes], json_key: str) -> bool:
    """Whether a ``.json`` file begins like JSON lines: an object on a line of its own that has the key or is not alone.

    The second line counts as well as the first, which a cut at a byte may have damaged (``split -b``).
    """
    records = [_parsed(line) for line in head if line.strip()]
    return any(isinstance(record, dict) and json_key in record for record in records) or (
        len(records) == 2 and isinstance(records[0], dict)
    )


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _one_text(source: Source, data: bytes, json_key: str) -> Document | Rejected:
    if reason := _not_utf8(data):
        return Rejected(source.name, reason)
    if extension(source.path) == JSON and (query := _unfold(data.decode("utf-8"), json_key)):
        name = source.path.name
        return Rejected(source.name, f"its records are not one a line; write them so: jq -c '{query}' {name} > {name}l")
    return Document(source.name, data)


def _not_utf8(data: bytes) -> str | None:
    """Why it is no text; None where it is."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})"
    return None


def _unfold(text: str, json_key: str) -> str | None:
    """Where JSON holds records (objects with the key) in a list or one after another: what makes jq take them apart."""
    start = _FIRST_OBJECT.match(text)
    if start is None or not (start["list"] or _SECOND_OBJECT.search(text)):
        return None
    try:
        record, _ = json.JSONDecoder().raw_decode(text, start.end())
    except (ValueError, RecursionError):
        return None
    return (".[]" if start["list"] else ".") if json_key in record else None


def _json_line(name: str, line: bytes, json_key: str) -> Document | Rejected:
    try:
        record = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return Rejected(name, f"not JSON ({error})", from_json_line=True)
    except ValueError as error:  # JSON, but Python refuses to read a number of more than 4300 digits
        return Rejected(name, f"holds a number that cannot be read ({error})", from_json_line=True)
    except RecursionError:
        return Rejected(name, "lists or objects nested too deeply to be read", from_json_line=True)
    text = record.get(json_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return _without_text(name, json_key, _fields(record))
    try:
        return Document(name, text.encode("utf-8"), from_json_line=True)
    except UnicodeEncodeError:  # JSON can spell a lone surrogate, which is not a character
        return Rejected(name, "holds a lone surrogate, which UTF-8 cannot encode", from_json_line=True)


def _without_text(name: str, json_key: str, fields: str) -> Rejected:
    return Rejected(name, f"no text under the key {json_key!r}", from_json_line=True, fields=fields)


def _fields(record: object) -> str:
    """The first fields of a record with their types, for messages."""
    if not isinstance(record, dict):
        return ""
    shown = [f"{key[:40]} ({type(value).__name__})" for key, value in islice(record.items(), 8)]
    return ", ".join([*shown, "..."] if len(record) > len(shown) else shown)
