"""`mtp-megatron preprocess` from the command line: the default corpus, messages, signals."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time

import pytest

from mtp_megatron.cli import main
from mtp_megatron.data.manifest import load_manifest

COMMAND = [sys.executable, "-m", "mtp_megatron", "preprocess"]


def preprocess(*arguments):
    return main(["preprocess", *map(str, arguments)])


@pytest.mark.parametrize("choice", [["--tokenizer", "bytes"], ["--train-tokenizer", "512"]])
def test_the_default_corpus(tmp_path, capsys, choice):
    out = tmp_path / "data"
    assert preprocess("--output", out, "--max-documents", 40, *choice) == 0
    first = capsys.readouterr()
    assert "split  documents" in first.out
    assert "40" not in first.err  # no bar without a terminal
    manifest = load_manifest(out)
    assert manifest.train.documents + manifest.valid.documents == 40
    assert f"{manifest.train.tokens:,}" in first.out
    assert manifest.vocab_size == (257 if "bytes" in choice else 512)
    assert preprocess("--output", out, "--max-documents", 40, *choice) == 0
    assert capsys.readouterr().out == f"{out}: already up to date\n"


def test_a_given_tokenizer_and_everything_that_was_left_out(tmp_path, capsys):
    source = tmp_path / "src"
    source.mkdir()
    for i in range(10):
        (source / f"{i}.py").write_text(f"value_{i} = number + {i}\n" * 30)
    for i in range(12):
        (source / f"latin{i:02}.py").write_bytes(b"# caf\xe9")
    (source / "empty.py").write_text("")
    assert preprocess(source, "--output", tmp_path / "a", "--train-tokenizer", 285) == 0
    captured = capsys.readouterr()
    assert "left out: src/latin00.py: not UTF-8 (byte 0xe9 at offset 5)" in captured.err
    assert "left out: 2 more, 12 in all" in captured.err
    assert "left out: 12 unusable, 1 empty" in captured.out
    model = tmp_path / "a" / "tokenizer.model"
    assert preprocess(source, "--output", tmp_path / "b", "--tokenizer", model, "--workers", 2, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b" / "train.bin").read_bytes()


def test_errors_are_one_line_and_come_before_any_work(tmp_path, capsys):
    model = tmp_path / "garbage.model"
    model.write_bytes(b"garbage" * 9)
    cases = [
        (["--tokenizer", model], "garbage.model: not a sentencepiece model"),
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        (["--valid-fraction", 2], "--valid-fraction=2.0: must lie between 0 and 1"),
        (["--max-documents", 5, "--train-tokenizer", 60000], "--train-tokenizer=60000: is more than the text supports"),
    ]
    for arguments, message in cases:
        assert preprocess("--output", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["garbage.model"]


def test_an_input_that_cannot_be_read_is_an_error_and_nothing_is_written(tmp_path, capsys):
    source = tmp_path / "src"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.py").write_text(f"x = {i}\n")
    (source / "bad.py").symlink_to("/proc/self/mem")  # reads as an input/output error
    assert preprocess(source, "--output", tmp_path / "out") == 2
    assert f"error: {source}/bad.py: cannot be read (Input/output error)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert preprocess(source, "--output", tmp_path / "out", "--skip-unreadable") == 0
    assert "left out: src/bad.py: cannot be read (Input/output error)" in capsys.readouterr().err
    assert load_manifest(tmp_path / "out").source.rejected == 1


def test_json_lines_of_upstream_are_one_document_each_from_the_command_line(tmp_path, capsys):
    lines = "".join(f'{{"text": "record {i}", "id": {i}}}\n' for i in range(6))
    (tmp_path / "part-0.json").write_text(lines)
    (tmp_path / "part-1.json.gz").write_bytes(gzip.compress(lines.replace("record", "text").encode()))
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    out = tmp_path / "out"
    assert preprocess(tmp_path, "--extensions", ".json", "--output", out) == 0
    captured = capsys.readouterr()
    assert f"left out: {tmp_path.name}/gone: a link that leads nowhere (to nowhere)" in captured.err
    assert f"left out: {tmp_path.name}/x.parquet: is a Parquet table, which is not read. Write its" in captured.err
    assert "2 files; left out: 2 unusable, 0 empty" in captured.out
    manifest = load_manifest(out)
    assert manifest.train.documents + manifest.valid.documents == 12
    assert manifest.train.text_bytes + manifest.valid.text_bytes == 6 * len("record 0") + 6 * len("text 0")
    assert preprocess(tmp_path / "x.parquet", "--output", out) == 2
    assert preprocess(tmp_path / "part-0.json", "--json-key", "body", "--output", tmp_path / "other") == 2
    assert "its fields: text (str), id (int)" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        preprocess("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: mtp-megatron preprocess" in text
    assert "mtp-megatron preprocess --output data/stdlib --train-tokenizer 4096" in text
    for name in (".jsonl", ".ndjson", ".json", ".gz", ".bz2", ".xz", ".zst", ".parquet", ".arrow", "--skip-unreadable"):
        assert name in text.partition("what is read:")[2]


@pytest.fixture
def stuck(tmp_path):
    """A preprocess that has begun to write and waits for its last document, which comes from a pipe."""
    for i in range(5):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n")
    pipe = tmp_path / "pipe.py"
    os.mkfifo(pipe)
    files = [tmp_path / f"{i}.py" for i in range(5)]
    process = subprocess.Popen([*COMMAND, *files, pipe, "--output", tmp_path / "out"], stderr=subprocess.PIPE)
    try:
        pipe.write_text("y = 1\n")  # the scan reads it, the second reading will wait
        partial = tmp_path / ".out.partial" / "train.bin"
        deadline = time.monotonic() + 60
        while not partial.exists():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, tmp_path, [*files, pipe]
    finally:
        process.kill()
        process.communicate()


def test_sigterm_leaves_nothing(stuck):
    process, folder, _ = stuck
    assert not (folder / "out").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not (folder / "out").exists()
    assert not (folder / ".out.partial").exists()


def test_after_kill_nothing_looks_finished_and_the_same_command_works(stuck, capsys):
    process, folder, files = stuck
    process.kill()
    process.wait(timeout=20)
    assert not (folder / "out").exists()
    assert (folder / ".out.partial").exists()
    files[-1].unlink()
    files[-1].write_text("y = 1\n")
    assert preprocess(*files, "--output", folder / "out") == 0
    assert load_manifest(folder / "out").train.documents == 5
    assert not (folder / ".out.partial").exists()
