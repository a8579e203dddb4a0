"""`mtp-megatron preprocess` from the command line: the default corpus, messages, signals."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from mtp_megatron.cli import main
from mtp_megatron.data.manifest import load_manifest


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
    (tmp_path / "x.arrow").write_bytes(b"ARROW1")
    out = tmp_path / "out"
    assert preprocess(tmp_path, "--extensions", ".json", "--output", out) == 0
    captured = capsys.readouterr()
    assert f"left out: {tmp_path.name}/gone: a link that leads nowhere (to nowhere)" in captured.err
    assert f"left out: {tmp_path.name}/x.arrow: is an Arrow table, which is not read. Write it as" in captured.err
    assert "2 files; left out: 2 unusable, 0 empty" in captured.out
    manifest = load_manifest(out)
    assert manifest.train.documents + manifest.valid.documents == 12
    assert manifest.train.text_bytes + manifest.valid.text_bytes == 6 * len("record 0") + 6 * len("text 0")
    assert preprocess(tmp_path / "x.arrow", "--output", out) == 2
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


def started(every, *arguments, **options):
    """The command, which makes a record every so many seconds, and pauses after each of the last pass: a fast machine
    would be at its end before a signal comes. It waits where it opens a file ``stuck.py`` a second time."""
    code = f"""
import sys, time
from mtp_megatron.cli import main
from mtp_megatron.data import journal, reading
opened, names = reading.opened, []
def wait_at_the_second(path):
    names.append(path.name)
    time.sleep(600 * (names.count("stuck.py") > 1))
    return opened(path)
reading.opened = wait_at_the_second
journal.EVERY, journal._SHARE, whole = {every}, 0, journal.write_whole
def write_whole(path, content):
    whole(path, content)
    time.sleep(0.03 * (path.name == "tokenize.json"))
journal.write_whole = write_whole
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "preprocess", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed_signals, **options)


def heed_signals():
    """Whoever started pytest may ignore them (nohup, a shell's ``&``), and so would the command."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(params=[0, 1000])
def stuck(tmp_path, request):
    """A preprocess that has begun to write and waits for its last document, which the scan has read."""
    files = [tmp_path / name for name in ("0.py", "1.py", "2.py", "3.py", "4.py", "stuck.py")]
    for number, file in enumerate(files):
        file.write_text(f"x = {number}\n")
    process = started(request.param, *files, "--output", tmp_path / "out")
    try:
        wait_for((tmp_path / ".out.preprocess" / "data" / "train.bin").exists, process)
        yield process, tmp_path, files, request.param
    finally:
        process.kill()
        process.communicate()


def test_sigterm_ends_at_once_and_keeps_what_took_long_enough(stuck):
    process, folder, _, every = stuck
    assert not (folder / "out").exists()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert not (folder / "out").exists()
    assert (folder / ".out.preprocess").exists() == (every == 0)
    assert ("keeps what was done. The same command goes on" in said) == (every == 0)


def test_after_kill_nothing_looks_finished(stuck, capsys):
    process, folder, files, _ = stuck
    process.kill()
    process.wait(timeout=20)
    assert not (folder / "out").exists()
    assert (folder / ".out.preprocess").exists()
    files[-1].write_text("y = 10\n")
    assert preprocess(*files, "--output", folder / "out") == 2
    assert "on other files (stuck.py had 6 bytes, now 7)" in capsys.readouterr().err
    assert preprocess(*files, "--output", folder / "out", "--restart") == 0
    assert load_manifest(folder / "out").train.documents == 5
    assert not (folder / ".out.preprocess").exists()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A corpus that takes a while, and the data set of it."""
    folder = tmp_path_factory.mktemp("long")
    with (folder / "corpus.jsonl").open("w") as stream:
        for i in range(150):
            stream.write(json.dumps({"text": f"line {i} of a long text\n" * 4000}) + "\n")
    assert preprocess(folder / "corpus.jsonl", "--output", folder / "whole") == 0
    return folder / "corpus.jsonl", folder / "whole"


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGHUP, 2), (signal.SIGUSR1, 2)],
)
def test_a_signal_to_all_processes_ends_them_and_the_same_command_goes_on(tmp_path, long, capsys, number, workers):
    """As a terminal's Ctrl-C, a terminal that closes, and SLURM's signals to a job step."""
    corpus, whole = long
    arguments = (corpus, "--workers", workers, "--output", tmp_path / "out")
    process = started(0, *arguments, start_new_session=True)
    try:
        wait_for(lambda: b'"documents": 2,' in read_if_there(tmp_path / ".out.preprocess/tokenize.json"), process)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert "keeps what was done. The same command goes on" in said
    wait_until_gone(process.pid)
    assert preprocess(*arguments) == 0
    said = re.search(r"going on at document (\d+) of 150 \((.*)%\)", capsys.readouterr().err)
    assert 2 <= int(said[1]) < 150
    assert float(said[2]) == pytest.approx(int(said[1]) / 1.5, abs=2)
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def read_if_there(path):
    return path.read_bytes() if path.exists() else b""


def wait_until_gone(group):
    """Until the group has no process: the tokenizing ones have ended."""
    deadline = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)
