"""The column of text of a Parquet file, a few rows at a time (the extra ``parquet``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mtp_megatron.data.formats import UnreadableError, import_package
from mtp_megatron.errors import DataError

_BUFFER_BYTES = 1 << 20  # read of a column at once; without a buffer, that is all of a row group
_ROWS = 16  # decoded at once; each may have a text of 1 GiB
_INDICES = 1 << 16  # decoded at once where rows are numbers of texts, for each batch comes with all of these


class TextColumn:
    """The column ``key`` of the table in ``stream``.

    Memory is that of the pages and texts that are being read, however many rows a row group has; only where the file
    says that the column was categorical, all different texts of a row group are there at once.

    ``fields`` are the first columns of a row without text, with their types, for messages.

    Args:
        path: where the table lies, for messages.
        stream: its bytes.
        key: name of a column at the top level.

    Raises:
        DataError: there is no such column or more than one, or no pyarrow.
        UnreadableError: no Parquet, or damaged.
    """

    def __init__(self, path: Path, stream: BinaryIO, key: str) -> None:
        import_package(path)
        from pyarrow.parquet import ParquetFile

        self._key = key
        with _explained():
            # pre_buffer reads whole row groups.
            self._file = ParquetFile(
                stream, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            fields = [(field.name, field.type) for field in self._file.schema_arrow]
            groups = range(self._file.num_row_groups)
            self._group_rows = [self._file.metadata.row_group(group).num_rows for group in groups]
        types = [kind for name, kind in fields if name == key]
        if len(types) != 1:
            problem = f"has {len(types)} columns {key!r}" if types else f"has no column {key!r}"
            raise DataError(
                f"{path}: {problem}; its columns: {_listed(fields, 50)}. Name the one that holds the text with "
                "--json-key; to leave such files out of a folder, name the extensions to take with --extensions."
            )
        self._type = types[0]
        null = [(name, "null" if name == key and _is_text(kind) else kind) for name, kind in fields]
        self.fields = _listed(null, 8)

    def values(self, begin: int) -> Iterator[bytes | None]:
        """What each row from ``begin`` on has in the column, UTF-8 or not; None: no text.

        Of a row group that was begun, what comes before is decoded again, in the same steps: in a damaged one these
        decide how far it is read.

        Raises:
            UnreadableError: damaged.
        """
        for group, rows in enumerate(self._group_rows):
            if begin >= rows:
                begin -= rows
                continue
            found = 0
            for value in self._of_group(group) if _is_text(self._type) else (None for _ in range(rows)):
                found += 1
                if begin < found <= rows:
                    yield value
            begin = 0
            if found != rows:
                raise UnreadableError(f"row group {group} has {found} rows, {rows} by the file's footer")

    def _of_group(self, group: int) -> Iterator[bytes | None]:
        import pyarrow

        categorical = pyarrow.types.is_dictionary(self._type)
        with _explained():
            for batch in self._file.iter_batches(
                _INDICES if categorical else _ROWS, row_groups=[group], columns=[self._key], use_threads=False
            ):
                column = batch.column(batch.schema.get_field_index(self._key))
                texts = column.dictionary if categorical else column
                # Without a look at it: not all that calls itself text is UTF-8.
                texts = texts.cast(pyarrow.binary() if texts.type == pyarrow.string() else pyarrow.large_binary())
                if categorical:
                    for index in column.indices.to_pylist():
                        if index is not None and not 0 <= index < len(texts):
                            raise UnreadableError(f"a row has text {index} of {len(texts)}")
                        yield None if index is None else texts[index].as_py()
                else:
                    yield from texts.to_pylist()


def _listed(fields: list[tuple[str, Any]], most: int) -> str:
    shown = [f"{name[:40]} ({str(kind)[:40]})" for name, kind in fields[:most]]
    return ", ".join([*shown, "..."] if len(fields) > len(shown) else shown)


def _is_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What pyarrow says of a file that it cannot read."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # the last is of a column's name
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UnreadableError(reason) from error
