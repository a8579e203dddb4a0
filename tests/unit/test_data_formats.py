"""Which inputs are JSON lines, which are one text, and which are refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from mtp_megatron.data import zst
from mtp_megatron.data.corpus import Corpus, Tally
from mtp_megatron.data.sources import find_sources
from mtp_megatron.errors import ConfigError, DataError

RECORDS = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("one", "two\nlines", "three"))
ZSTANDARD = zstandard.ZstdCompressor(write_checksum=True)  # as the command does
COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTANDARD.compress}


def read(*paths, **options):
    """Texts and reasons."""
    tally = Tally()
    corpus = Corpus(find_sources(paths, **options.pop("find", {}), tally=tally), **options)
    return [document.text for document in corpus.documents(tally)], list(map(str, tally.examples))


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("extension", [".jsonl", ".ndjson", ".json", ".NDJSON"])
@pytest.mark.parametrize("compression", ["", *COMPRESSORS])
def test_json_lines_by_every_name(tmp_path, extension, compression):
    compress = COMPRESSORS.get(compression, bytes)
    path = put(tmp_path / f"part-0{extension}{compression}", compress(RECORDS.encode()))
    assert read(path) == (["one", "two\nlines", "three"], [])
    assert read(tmp_path, find={"extensions": [extension.lower()]}) == read(path)
    assert read(tmp_path, find={"extensions": [extension.lower() + compression]}) == read(path)


def test_the_default_extensions_take_json_lines_and_their_compressed_forms(tmp_path):
    for name in ("a.ndjson", "b.jsonl"):
        put(tmp_path / name, RECORDS)
    put(tmp_path / "c.jsonl.gz", gzip.compress(RECORDS.encode()))
    put(tmp_path / "d.ndjson.zst", ZSTANDARD.compress(RECORDS.encode()))
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "e.parquet")
    put(tmp_path / "package.json", "{}")
    assert len(read(tmp_path)[0]) == 14


ONE_DOCUMENT = {
    "package.json": json.dumps({"name": "x", "dependencies": {"a": "1"}}, indent=2),
    "minified.json": json.dumps({"name": "x", "list": [1, {"text": "y"}]}),
    "comments.json": '{\n  // for the compiler\n  "text": true,\n}\n',
    "strings.json": '[\n  "text",\n  {"a": 1}\n]\n',
    "other_list.json": '[{"a": 1}, {"text": "b"}]',
    "pretty.json": json.dumps({"text": "a greeting", "more": {"a": {}}}, indent=2),
    "broken.json": '{"text": ',
    "deep.json": "[" * 100_000,
    "number.json": "9" * 5000,
}


@pytest.mark.parametrize("name", ONE_DOCUMENT)
def test_a_json_document_is_one_text(tmp_path, name):
    assert read(put(tmp_path / name, ONE_DOCUMENT[name])) == ([ONE_DOCUMENT[name]], [])


def test_a_json_file_with_records_is_never_read_as_it_stands(tmp_path):
    damaged = put(tmp_path / "cut.json", 'f a record"}\n' + RECORDS)  # what `split -b` makes
    texts, reasons = read(damaged)
    assert (len(texts), len(reasons)) == (3, 1)
    late = put(tmp_path / "late.json", "\n\n" + json.dumps({"meta": 1}) + "\n" + RECORDS)
    assert read(late)[1] == ["late.json:3: no text under the key 'text'"]
    assert len(read(late)[0]) == 3
    marked = put(tmp_path / "bom.json", "\ufeff" + RECORDS)
    assert len(read(marked)[0]) == 3
    for json_key, path in (("body", late), ("text", put(tmp_path / "other.json", '{"a": 1}\n{"b": 2}\n'))):
        texts, reasons = read(path, json_key=json_key)
        assert (texts, len(reasons)) == ([], path.read_text().strip().count("\n") + 1)


@pytest.mark.parametrize(
    ("content", "query"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ".[]"),
        ("\ufeff\n[\n" + json.dumps({"text": "a"}, indent=2) + "\n]", ".[]"),
        (json.dumps({"text": "a"}, indent=2) + "\n" + json.dumps({"text": "b"}, indent=2), "."),
    ],
)
def test_records_that_are_not_one_a_line_are_left_out_with_the_way_out(tmp_path, content, query):
    path = put(tmp_path / "d.json", content)
    reason = f"d.json: its records are not one a line; write them so: jq -c '{query}' d.json > d.jsonl"
    assert read(path) == ([], [reason])
    assert read(path, json_key="other") == ([content], [])
    assert read(put(tmp_path / "d.txt", content)) == ([content], [])  # a name that promises nothing


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_damaged_compressed_input_is_an_error_unless_asked_for(tmp_path, compression):
    whole = COMPRESSORS[compression](("".join(json.dumps({"text": str(i)}) + "\n" for i in range(9000))).encode())
    for content in (whole[: len(whole) // 2], whole[:300] + bytes(64) + whole[364:], b"not compressed"):
        path = put(tmp_path / f"d.jsonl{compression}", content)
        with pytest.raises(DataError, match=rf"d\.jsonl\{compression}: cannot be read \(.+\)\. .*--skip-unreadable"):
            read(path)
        assert read(path, skip_unreadable=True)[1][-1].startswith(f"d.jsonl{compression}: cannot be read (")


def test_a_python_without_a_decompressor_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    path = put(tmp_path / "d.jsonl.xz", lzma.compress(RECORDS.encode()))
    with pytest.raises(DataError, match=r"d\.jsonl\.xz: this Python was built without lzma.*Decompress the file"):
        read(path)


def test_zstandard_may_come_in_many_frames(tmp_path):
    """As `cat`, pzstd and appending programs make them; frames to be skipped hold an index, say."""
    skipped = struct.pack("<II", 0x184D2A53, 5) + b"index"
    lines = [json.dumps({"text": f"{i} " * 400}) + "\n" for i in range(300)]
    empty = ZSTANDARD.compress(b"")
    frames = [skipped, empty, *(ZSTANDARD.compress(line.encode()) for line in lines), skipped, empty]
    path = put(tmp_path / "d.jsonl.zst", b"".join(frames))
    assert path.stat().st_size > 2 * zst._PART_BYTES
    assert read(path) == ([json.loads(line)["text"] for line in lines], [])


@pytest.mark.parametrize("rest", [b"", b"\n", ZSTANDARD.compress(RECORDS.encode() * 9)[:-5], b"(\xb5/\xfd"])
def test_zstandard_that_does_not_end_with_a_frame_is_damaged(tmp_path, rest):
    whole = ZSTANDARD.compress(RECORDS.encode()) if rest else b""
    path = put(tmp_path / "d.jsonl.zst", whole + rest)
    with pytest.raises(DataError, match=r"d\.jsonl\.zst: cannot be read \(.*(truncated|Unknown frame descriptor)"):
        read(path)


def test_zstandard_with_a_long_window_is_read_up_to_a_bound(tmp_path, monkeypatch):
    """`--long=31` is the most that the command writes; its default refuses to read what is over 128 MiB."""
    settings = zstandard.ZstdCompressionParameters(window_log=31, hash_log=6, chain_log=6, strategy=1)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = put(tmp_path / "d.jsonl.zst", stream.compress(RECORDS.encode()) + stream.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert len(read(path)[0]) == 3
    monkeypatch.setattr(zst, "_MOST_WINDOW", 1 << 30)
    with pytest.raises(DataError, match=r"d\.jsonl\.zst: cannot be read \(.*requires too much memory"):
        read(path)


def test_what_zstandard_blows_up_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(zst, "_PART_BYTES", 256)
    size = 32 << 20
    path = put(tmp_path / "d.jsonl.zst", ZSTANDARD.compress(bytes(size)))
    assert path.stat().st_size > 1024
    with zst.open(path, "rb") as stream:
        left, most = size, 0
        while part := stream.read1(1 << 20):
            left -= len(part)
            most = max(most, len(stream.raw._text))
    assert left == 0
    assert most <= zst._PART_BYTES // 4 << 17


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("d.parquet", "pyarrow", "parquet"), ("d.jsonl.zst", "zstandard", "zst")]
)
def test_without_its_package_a_format_is_an_error_and_never_left_out(tmp_path, monkeypatch, name, package, extra):
    put(tmp_path / "a.py", "fine")
    path = put(tmp_path / name, b"")
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        rf"{name}: reading it takes the package {package}, which cannot be imported \(.*\)\. Install it: "
        rf"pip install 'PATH_TO_CHECKOUT\[{extra}\]'.*--extensions"
    )
    for given in (path, tmp_path):
        with pytest.raises(DataError, match=message):
            find_sources([given])
    assert read(tmp_path, find={"extensions": [".py", ".md"]}) == (["fine"], [])


@pytest.mark.parametrize(("name", "package"), [("d.parquet", "pyarrow"), ("d.jsonl.zst", "zstandard")])
def test_a_package_that_is_too_old_is_an_error_before_anything_is_read(tmp_path, monkeypatch, name, package):
    path = put(tmp_path / name, b"")
    sources = find_sources([path])
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(__version__="0.9.1"))
    for look in (lambda: find_sources([path]), lambda: list(Corpus(sources).documents())):
        with pytest.raises(DataError, match=rf"{name}: .* {package}, \S+ or newer, and 0\.9\.1 is installed\. .*pip"):
            look()


def test_other_formats_take_neither_package(tmp_path):
    put(tmp_path / "a.jsonl.gz", gzip.compress(RECORDS.encode()))
    code = (
        "import sys; from pathlib import Path; from mtp_megatron.data.corpus import Corpus; "
        "from mtp_megatron.data.sources import find_sources; import mtp_megatron.data.cli; "
        f"assert len(list(Corpus(find_sources([Path({str(tmp_path)!r})])).documents())) == 3; "
        "print({'pyarrow', 'zstandard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


NOT_READ = {
    "notes.txt.gz": "compressed, and only JSON lines are read so",
    "d.txt.zst": "zstd -d",
    "d.py.bz2": "bunzip2",
    "x.xz": "unxz",
    "d.arrow": r"Arrow table.*to_parquet",
}


@pytest.mark.parametrize("name", NOT_READ)
def test_a_format_that_is_not_read_is_refused_by_name_and_left_out_of_a_folder(tmp_path, name):
    path = put(tmp_path / name, b"PAR1\xff")
    fine = put(tmp_path / "a.py", "fine")
    with pytest.raises(DataError, match=rf"{name}: is .*{NOT_READ[name]}"):
        read(path, fine)
    texts, reasons = read(tmp_path)
    assert texts == ["fine"]
    assert [reason.startswith(f"{tmp_path.name}/{name}: is ") for reason in reasons] == [True]
    with pytest.raises(ConfigError, match=rf"--extensions='\{path.suffix}': such a file is "):
        read(tmp_path, find={"extensions": [".py", path.suffix]})
    fine.unlink()
    with pytest.raises(DataError, match=rf"(?s)no file with the extension.*{name}: is "):
        read(tmp_path)


def test_a_compressed_copy_beside_the_file_is_not_read_twice(tmp_path):
    put(tmp_path / "d.jsonl", RECORDS)
    copy = put(tmp_path / "d.jsonl.gz", gzip.compress(RECORDS.encode()))
    texts, reasons = read(tmp_path)
    assert len(texts) == 3
    assert reasons == [f"{tmp_path.name}/d.jsonl.gz: d.jsonl lies beside it and is read in its place"]
    assert len(read(tmp_path, find={"extensions": [".jsonl.gz"]})[0]) == 3  # the other one is not asked for
    assert len(read(tmp_path / "d.jsonl", copy)[0]) == 6  # both are
