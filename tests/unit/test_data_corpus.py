"""The corpus: a stable order, documents kept apart, nothing dropped without being counted."""

from __future__ import annotations

import errno
import io
import json
import os

import pytest

from mtp_megatron.data import reading
from mtp_megatron.data.corpus import Corpus, Tally
from mtp_megatron.data.sources import find_sources, standard_library
from mtp_megatron.errors import ConfigError, DataError


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def names(sources):
    return [source.name for source in sources]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "code"
    write(root, b_dot_py="b", a__z_dot_py="z", a__y_dot_md="y", c_dot_bin="c", _dot_hidden_dot_py="no", noext="no")
    write(root, _dot_git__x_dot_py="no", a____pycache___dot_py="kept")
    return root


def test_folders_are_searched_recursively_in_a_stable_order(folder):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.py").write_text("no")
    found = names(find_sources([folder]))
    assert found == sorted(found)
    assert {"code/b.py", "code/a/z.py", "code/a/y.md"} <= set(found)
    assert not [name for name in found if "hidden" in name or ".git" in name or name.startswith("code/__pycache__")]


def test_extensions_filter_folders_but_not_files_given_by_name(folder):
    assert names(find_sources([folder], [".MD"])) == ["code/a/y.md"]
    assert names(find_sources([folder / "c.bin", folder], [".md"])) == ["c.bin", "code/a/y.md"]


def test_a_file_reachable_twice_is_one_document(folder):
    once = find_sources([folder])
    assert len(find_sources([folder, folder / "b.py", folder / "a"])) == len(once)


def test_nothing_found_names_what_is_there(folder):
    with pytest.raises(DataError, match=r"no file with the extension \.rs; found .*1 x \.bin.*--extensions"):
        find_sources([folder], [".rs"])
    with pytest.raises(DataError, match="nowhere: no such file"):
        find_sources([folder / "nowhere"])
    with pytest.raises(ConfigError, match=r"--extensions='py'"):
        find_sources([folder], ["py"])


def test_rejected_and_empty_documents_are_counted(tmp_path):
    write(tmp_path, a_dot_py="fine\r\n\ttext", b_dot_py=b"caf\xe9", c_dot_py="", d_dot_py="\ufeffmark")
    tally = Tally()
    documents = list(Corpus(find_sources([tmp_path])).documents(tally))
    assert [document.text for document in documents] == ["fine\r\n\ttext", "\ufeffmark"]
    assert tally.empty == 1
    assert [str(item) for item in tally.examples] == [f"{tmp_path.name}/b.py: not UTF-8 (byte 0xe9 at offset 3)"]


def test_json_lines_give_one_document_each(tmp_path):
    lines = [
        json.dumps({"text": "one\nline"}),
        "",
        "{broken",
        json.dumps({"other": "x"}),
        json.dumps(["text"]),
        json.dumps({"text": "\ud800"}),
        json.dumps({"text": ""}),
        json.dumps({"text": "zwei ü"}, ensure_ascii=False),
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    tally = Tally()
    documents = list(Corpus(find_sources([path])).documents(tally))
    assert [(d.name, d.text) for d in documents] == [("d.jsonl:1", "one\nline"), ("d.jsonl:8", "zwei ü")]
    assert [item.name for item in tally.examples] == ["d.jsonl:3", "d.jsonl:4", "d.jsonl:5", "d.jsonl:6"]
    assert tally.empty == 1
    assert [d.text for d in Corpus(find_sources([path]), json_key="other").documents()] == ["x"]


def test_a_json_line_that_python_cannot_read_is_left_out_and_does_not_end_the_run(tmp_path):
    odd = ['{"text": "a", "n": ' + "9" * 5000 + "}", '{"text": "a", "n": ' + "[" * 200_000 + "]" * 200_000 + "}"]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(['{"text": "one"}', *odd, '{"text": "two"}']))
    tally = Tally()
    assert [d.text for d in Corpus(find_sources([path])).documents(tally)] == ["one", "two"]
    number, nesting = map(str, tally.examples)
    assert number.startswith("d.jsonl:2: holds a number that cannot be read (Exceeds the limit (4300 digits)")
    assert nesting == "d.jsonl:3: lists or objects nested too deeply to be read"


def records(path, count, **record):
    path.write_text((json.dumps(record) + "\n") * count)
    return path


def test_of_what_is_left_out_only_the_first_is_kept(tmp_path):
    path = records(tmp_path / "d.jsonl", 1, text="fine")
    path.write_text(path.read_text() + "{broken\n" * 30_000)
    tally = Tally()
    assert len(list(Corpus(find_sources([path])).documents(tally))) == 1
    assert (tally.rejected, len(tally.examples)) == (30_000, 20)
    assert tally.examples[0].name == "d.jsonl:2"


def test_a_wrong_key_ends_the_pass_early_and_names_the_fields(tmp_path):
    wrong = records(tmp_path / "a.jsonl", 6000, content="x", id=1), records(tmp_path / "b.jsonl", 9000, content="x")
    seen = Tally()
    with pytest.raises(DataError) as caught:
        list(Corpus(find_sources([tmp_path])).documents(seen))
    assert str(caught.value) == (
        "--json-key='text': the first 10,000 JSON lines or rows are all unusable (a.jsonl:1: no text under the key "
        "'text'; its fields: content (str), id (int)). Name the field that holds the text with --json-key."
    ).replace("a.jsonl", f"{tmp_path.name}/a.jsonl")
    # One line with text is enough to go on, and files of plain text neither help nor hurt.
    (tmp_path / "c.txt").write_text("text")
    right = records(tmp_path / "right.jsonl", 1, text="")
    tally = Tally()
    assert len(list(Corpus(find_sources([right, tmp_path / "c.txt", *wrong])).documents(tally))) == 1
    assert tally.rejected == 15_000
    with pytest.raises(DataError, match="all unusable"):
        list(Corpus(find_sources([tmp_path / "c.txt", *wrong])).documents())


@pytest.fixture
def unreadable(tmp_path):
    """A folder with a file whose reading ends in EIO (the first page of a process's memory), whoever reads it."""
    write(tmp_path, a_dot_py="a", z_dot_py="z")
    (tmp_path / "broken.py").symlink_to("/proc/self/mem")
    return tmp_path


def test_a_file_that_cannot_be_read_is_an_error_unless_asked_for(unreadable):
    sources = find_sources([unreadable])
    with pytest.raises(DataError, match=r"broken\.py: cannot be read \(Input/output error\)\. .*--skip-unreadable"):
        list(Corpus(sources).documents())
    tally = Tally()
    assert [d.text for d in Corpus(sources, skip_unreadable=True).documents(tally)] == ["a", "z"]
    assert list(map(str, tally.examples)) == [f"{unreadable.name}/broken.py: cannot be read (Input/output error)"]


def test_a_disk_that_fails_within_a_file_is_an_error_too(tmp_path, monkeypatch):
    path = records(tmp_path / "d.jsonl", 3, text="x")
    real = io.open

    class Failing:
        def __init__(self, stream):
            self.stream, self.lines = stream, 0

        def readline(self, size):
            self.lines += 1
            if self.lines == 3:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return self.stream.readline(size)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.stream.close()

    monkeypatch.setattr(io, "open", lambda file, *args: Failing(real(file, *args)))
    read = []
    with pytest.raises(DataError, match=r"d\.jsonl: cannot be read \(Stale file handle\)"):
        read.extend(Corpus(find_sources([path])).documents())


def test_a_document_has_a_most_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_BYTES", 100)
    write(tmp_path, fits_dot_txt="x" * 100, long_dot_txt="x" * 101, lines_dot_jsonl='{"text": "a"}\n' * 50)
    fits = find_sources([tmp_path / "fits.txt", tmp_path / "lines.jsonl"])
    assert len(list(Corpus(fits).documents())) == 51
    with pytest.raises(DataError, match=r"long\.txt: longer than 1 GiB, .*Split it, or write it as JSON lines"):
        list(Corpus(find_sources([tmp_path])).documents())
    write(tmp_path, lines_dot_jsonl='{"text": "a"}\n' + json.dumps({"text": "x" * 101}))
    with pytest.raises(DataError, match=r"lines\.jsonl: line 2 is longer than 1 GiB.*one JSON object a line"):
        list(Corpus(find_sources([tmp_path / "lines.jsonl"])).documents())


def test_max_documents_takes_the_first_ones(folder):
    sources = find_sources([folder])
    everything = [d.name for d in Corpus(sources).documents()]
    assert [d.name for d in Corpus(sources, max_documents=2).documents()] == everything[:2]


def test_the_default_corpus_is_the_standard_library():
    sources = find_sources([])
    found = names(sources)
    assert found == sorted(found)
    assert f"{standard_library().name}/abc.py" in found
    assert sum(source.path.stat().st_size for source in sources) > 8e6
    assert not [n for n in found if {"site-packages", "test", "tests", "idle_test"} & set(n.split("/"))]
    assert not [n for n in found if "_sysconfigdata" in n]
    if (standard_library() / "test").is_dir():
        assert len(find_sources([], with_tests=True)) > len(sources)
