"""Parquet tables: the same documents and complaints as JSON lines, in bounded memory, and going on within a table."""

from __future__ import annotations

import bz2
import gzip
import json
from types import SimpleNamespace

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from mtp_megatron.data import reading
from mtp_megatron.data.corpus import Corpus, Tally
from mtp_megatron.data.formats import UnreadableError
from mtp_megatron.data.parquet import TextColumn
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.data.reading import Cursor
from mtp_megatron.data.sources import find_sources
from mtp_megatron.errors import DataError


def read(*paths, cursor=None, **options):
    """Texts and what was left out."""
    tally = Tally()
    corpus = Corpus(find_sources(paths), **options)
    return [document.text for document in corpus.documents(tally, cursor)], tally


def put(path, column, **options):
    """A table with the column ``text``, and another."""
    table = pyarrow.table({"id": pyarrow.nulls(len(column), pyarrow.int64()), "text": column})
    parquet.write_table(table, path, **{"row_group_size": 7} | options)
    return path


TEXTS = ["one", None, "zwei é", "", "one", None, "three\nlines\r\n\t"] * 6
KINDS = {
    "string": pyarrow.array(TEXTS),
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
    "view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "categorical": pyarrow.array(TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_json_lines_with_the_same_text_are(tmp_path, kind):
    table = put(tmp_path / "d.parquet", KINDS[kind])
    assert parquet.read_schema(table).field("text").type == KINDS[kind].type
    lines = tmp_path / "d.jsonl"
    lines.write_text("".join(json.dumps({"id": None, "text": text}) + "\n" for text in TEXTS))
    (texts, tally), (expected, expected_tally) = read(table), read(lines)
    assert texts == expected
    assert (tally.empty, tally.rejected) == (expected_tally.empty, expected_tally.rejected) == (6, 12)
    for item, other in zip(tally.examples, expected_tally.examples, strict=True):
        assert str(item) == str(other).replace(".jsonl", ".parquet")
    assert tally.examples[0].explanation == (
        "d.parquet:2: no text under the key 'text'; its fields: id (int64), text (null)"
    )


@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "json.bz2", "jsonl.zst", "ndjson.zst", "parquet"])
def test_the_same_documents_make_the_same_data_set_in_every_format(tmp_path, format):
    texts = [f"document {i} é\n" * (1 + i % 3) for i in range(30)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.compress}
    data = {}
    for name in ("jsonl", format):
        path = tmp_path / name / f"d.{name}"
        path.parent.mkdir(exist_ok=True)
        if name == "parquet":
            put(path, pyarrow.array(texts))
        else:
            path.write_bytes(compress.get(name.rpartition(".")[2], bytes)(lines))
        out = path.parent / "out"
        preprocess(PreprocessOptions(out, (path,), valid_fraction=0.2, train_vocab=285, quiet=True))
        data[name] = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "dataset.json"}
    assert set(data[format]) == {"train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model"}
    assert data[format] == data["jsonl"]


@pytest.mark.parametrize(
    "column", [pyarrow.array([1, 2, 3]), pyarrow.array([["a"], [], None]), pyarrow.array([b"x"] * 3), pyarrow.nulls(3)]
)
def test_a_column_that_is_no_text_is_left_out_row_by_row(tmp_path, column):
    texts, tally = read(put(tmp_path / "d.parquet", column))
    kind = str(parquet.read_schema(tmp_path / "d.parquet").field("text").type)
    assert (texts, tally.rejected) == ([], 3)
    assert tally.examples[2].explanation == (
        f"d.parquet:3: no text under the key 'text'; its fields: id (int64), text ({kind})"
    )


def test_a_wrong_column_of_the_right_name_ends_the_pass_early(tmp_path):
    path = put(tmp_path / "d.parquet", pyarrow.nulls(20_000), row_group_size=20_000)
    with pytest.raises(DataError, match=r"the first 10,000 JSON lines or rows are all unusable \(d\.parquet:1: no te"):
        read(path)


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    path = put(tmp_path / "d.parquet", pyarrow.array(["x"]))
    message = (
        r"d\.parquet: has no column 'body'; its columns: id \(int64\), text \(string\)\. .*--json-key; .*--extensions"
    )
    for options in ({}, {"skip_unreadable": True}):  # nothing of it is unreadable
        with pytest.raises(DataError, match=message):
            read(path, json_key="body", **options)
    twice = pyarrow.table([["x"], ["y"]], names=["text", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"d\.parquet: has 2 columns 'text'; its columns: text \(string\), text \("):
        read(path)


def test_a_dot_in_a_columns_name_is_no_path(tmp_path):
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"a": [{"b": "inner"}], "a.b": ["outer"]}), path)
    assert read(path, json_key="a.b")[0] == ["outer"]
    parquet.write_table(pyarrow.table({"a": [{"b": "inner"}]}), path)
    with pytest.raises(DataError, match=r"has no column 'a\.b'"):
        read(path, json_key="a.b")


def test_what_calls_itself_text_and_is_not_utf8_is_left_out(tmp_path):
    broken = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"fine", b"caf\xe9"]).buffers()[1:])
    texts, tally = read(put(tmp_path / "d.parquet", broken))
    assert texts == ["fine"]
    assert list(map(str, tally.examples)) == ["d.parquet:2: not UTF-8 (byte 0xe9 at offset 3)"]


def test_a_text_has_a_most_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_BYTES", 100)
    path = put(tmp_path / "d.parquet", pyarrow.array(["x" * 100, "x" * 101]))
    with pytest.raises(DataError, match=r"d\.parquet: the text of row 2 is longer than 1 GiB"):
        read(path)


def many(count, size=400):
    return pyarrow.array([f"{i} ".ljust(size, "x") for i in range(count)])


@pytest.mark.parametrize("place", ["start", "end", "footer", "page", "nothing", "other"])
def test_a_damaged_table_is_an_error_unless_asked_for(tmp_path, place):
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "data_page_size": 4000}
    path = put(tmp_path / "d.parquet", many(300), row_group_size=100, write_batch_size=10, **options)
    whole = path.read_bytes()
    middle, last = len(whole) // 2, len(whole)
    damaged = {
        "start": whole[100:],
        "end": whole[: middle + 1000],
        "footer": whole[: last - 200] + bytes(50) + whole[last - 150 :],
        "page": whole[:middle] + b"\0" + whole[middle + 1 :],
        "nothing": b"",
        "other": b'{"text": "JSON lines by another name"}\n' * 3,
    }
    path.write_bytes(damaged[place])
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read \(.+\)\. Copy it again .*--skip-unreadable"):
        read(path)
    texts, tally = read(path, skip_unreadable=True)
    assert tally.rejected == 1
    assert str(tally.examples[0]).startswith("d.parquet: cannot be read (")
    assert len(texts) == (0 if place != "page" else pytest.approx(140, abs=20))


def test_a_name_that_is_not_utf8_is_damage(tmp_path):
    path = put(tmp_path / "d.parquet", pyarrow.array(["x"]), store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"text", b"t\xffxt"))
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read \('utf-8' codec"):
        read(path)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_of_no_text_of_a_category_is_damage(tmp_path, index):
    """pyarrow does not hold all of them against the texts."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, index]), pyarrow.array(["a", "b", "c"]), safe=False)
    path = put(tmp_path / "d.parquet", pyarrow.array(["a", "b"]).dictionary_encode())
    table = TextColumn(path, path.open("rb"), "text")
    batch = pyarrow.record_batch({"text": column})
    table._file = SimpleNamespace(iter_batches=lambda *args, **kwargs: iter([batch]))
    values = table.values(0)
    assert next(values) == b"a"
    with pytest.raises(UnreadableError, match=rf"a row has text {index} of 3"):
        next(values)


def test_a_disk_that_fails_within_a_table_is_said(tmp_path):
    (tmp_path / "d.parquet").symlink_to("/proc/self/mem")  # reads as an input/output error
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read \("):
        read(tmp_path / "d.parquet")


@pytest.fixture
def parts(monkeypatch):
    """The sizes of all that is read from files."""
    sizes = []
    real = TextColumn.__init__

    class Counting:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def read(self, size=-1):
            part = self.stream.read(size)
            sizes.append(len(part))
            return part

    monkeypatch.setattr(TextColumn, "__init__", lambda self, path, stream, key: real(self, path, Counting(stream), key))
    return sizes


def test_memory_does_not_grow_with_a_row_group(tmp_path, parts):
    pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 64}
    path = put(tmp_path / "d.parquet", many(4000, size=8000), row_group_size=4000, **pages)
    assert parquet.read_metadata(path).row_group(0).column(1).total_uncompressed_size > 30e6
    idle = most = pyarrow.total_allocated_bytes()
    documents = Corpus(find_sources([path])).documents()
    for count, _ in enumerate(documents, 1):  # noqa: B007
        most = max(most, pyarrow.total_allocated_bytes())
    assert count == 4000
    assert most - idle < 5e6
    assert sum(parts) > 30e6
    assert max(parts) < 2e6  # they are Python's, and not among Arrow's


def test_only_the_column_of_text_is_read(tmp_path, parts):
    """The others may be large, or of kinds that nobody trusts."""
    table = pyarrow.table({"image": [b"\1" * 100_000] * 50, "text": ["short"] * 50})
    parquet.write_table(table, tmp_path / "d.parquet", compression="none", use_dictionary=False)
    assert len(read(tmp_path / "d.parquet")[0]) == 50
    assert 0 < sum(parts) < 200_000


def test_going_on_decodes_no_row_group_that_is_done(tmp_path, monkeypatch):
    path = put(tmp_path / "d.parquet", many(40), row_group_size=10)
    decoded = []
    real = TextColumn._of_group
    monkeypatch.setattr(TextColumn, "_of_group", lambda self, group: decoded.append(group) or real(self, group))
    texts, _ = read(path, cursor=Cursor(line=25, documents=25))
    assert texts == many(40).to_pylist()[25:]
    assert decoded == [2, 3]


def test_a_table_whose_footer_counts_other_rows_is_damaged(tmp_path, monkeypatch):
    path = put(tmp_path / "d.parquet", many(20), row_group_size=10)
    real = TextColumn._of_group
    for odd, kept in ((lambda values: values[:-1], 9), (lambda values: [*values, b"more"], 10)):
        monkeypatch.setattr(TextColumn, "_of_group", lambda self, group, odd=odd: odd(list(real(self, group))))
        with pytest.raises(DataError, match=r"d\.parquet: cannot be read \(row group 0 has \d+ rows, 10 by the file's"):
            read(path)
        assert len(read(path, skip_unreadable=True)[0]) == kept
