"""A preprocess that was interrupted: what it goes on with, that the data set is the same, and what it refuses."""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from mtp_megatron.data import journal, reading
from mtp_megatron.data import preprocess as module
from mtp_megatron.data.corpus import Corpus, Tally
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.data.reading import Cursor, Document, Source
from mtp_megatron.data.scan import _Scanner
from mtp_megatron.data.sources import find_sources
from mtp_megatron.data.work_folder import work_folder
from mtp_megatron.data.writer import SplitWriter
from mtp_megatron.errors import ConfigError, DataError


def json_lines(name, count):
    """Documents, and between them what is none."""
    lines = []
    for i in range(count):
        lines.append(json.dumps({"text": f"{name} {i} é\n" * (1 + i % 4)}))
        lines += [["", "   "], ["not JSON"], ['{"text": ""}'], ['{"id": 3}'], []][i % 5]
    return "\n".join(lines)  # the last line has no end


@pytest.fixture
def source(tmp_path):
    """Files of every kind, some of them damaged in their middle."""
    folder = tmp_path / "src"
    folder.mkdir()
    for i in range(6):
        (folder / f"f{i}.py").write_text(f"def function_{i}(x):\n\treturn x + {i}\r\n" * 3)
    (folder / "empty.py").write_text("")
    (folder / "latin.py").write_bytes(b"\xe9")
    (folder / "a.jsonl").write_text(json_lines("plain", 25))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines("zipped", 13).encode()))
    (folder / "c.json").write_text(json_lines("records", 6))
    (folder / "d.json.bz2").write_bytes(bz2.compress(b'{\n"one": "document"\n}\n'))
    torn = [json.dumps({"text": random.Random(i).randbytes(400).hex()}) for i in range(40)]
    packed = bytearray(gzip.compress("\n".join(torn).encode()))
    packed[len(packed) // 2] ^= 0xFF
    (folder / "torn.jsonl.gz").write_bytes(packed)
    frames = [zstandard.compress(line.encode()) for line in json_lines("frames", 6).splitlines(keepends=True)]
    (folder / "e.jsonl.zst").write_bytes(b"".join(frames))
    frames = [zstandard.compress(f"{line}\n".encode()) for line in torn[:7]]
    (folder / "t.jsonl.zst").write_bytes(b"".join(frames)[:-9])
    rows = [f"row {i} é\n" * (1 + i % 4) if i % 5 else [None, ""][i % 2] for i in range(16)]
    parquet.write_table(pyarrow.table({"text": rows}), folder / "p.parquet", row_group_size=6)
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in torn[:20]]})
    pages = {"data_page_size": 1, "write_batch_size": 1, "write_page_checksum": True, "write_statistics": False}
    path = folder / "r.parquet"
    parquet.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False, **pages)
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    (folder / "q.parquet").write_bytes(b"PAR1")
    (folder / "bad\udcff.py").write_text("# a name that is not UTF-8\n")
    (folder / "bad\udcff-too.py").write_bytes(b"\xe9")
    return folder


@pytest.fixture
def options(tmp_path, source, monkeypatch):
    """With a record after each document."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    monkeypatch.setattr(journal, "_SHARE", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here, and it is slow
    return PreprocessOptions(
        tmp_path / "out",
        (source,),
        valid_fraction=0.2,
        extensions=(".py", ".jsonl", ".json", ".parquet"),
        skip_unreadable=True,
        quiet=True,
    )


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def uninterrupted(options):
    whole = replace(options, output=options.output.with_name("whole"))
    preprocess(whole)
    return content(whole.output)


def killed_until_done(options, tmp_path, *, most_events, seed):
    """How often it was killed."""
    fields = {**vars(options), "output": str(options.output), "paths": [str(path) for path in options.paths]}
    setting = tmp_path / "setting.json"
    setting.write_text(json.dumps({"options": fields, "most_events": most_events, "seed": seed}))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.interrupted_preprocess", str(setting)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("train_vocab", "workers", "most_events", "least_kills"),
    [(None, 1, 150, 20), (None, 1, 900, 2), (300, 1, 200, 20), (300, 2, 1000, 3)],
)
def test_killed_anywhere_and_again_and_again_it_makes_the_same_bytes(
    options, tmp_path, train_vocab, workers, most_events, least_kills
):
    options = replace(options, train_vocab=train_vocab, workers=workers)
    kills = killed_until_done(options, tmp_path, most_events=most_events, seed=most_events + workers)
    assert kills >= least_kills
    assert content(options.output) == uninterrupted(replace(options, workers=1))
    assert not (tmp_path / ".out.preprocess").exists()


class Stopped(BaseException):
    """Nothing in the package catches this by name."""


def preprocess_until(options, place, call):
    """A preprocess that ends in the given call of a function."""
    owner, name = place
    real, calls = getattr(owner, name), 0

    def stop(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Stopped):
            preprocess(options)


SCANNING = (_Scanner, "add")
TOKENIZING = (SplitWriter, "add")


def count_calls(monkeypatch, owner, name):
    calls = []
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    return calls


def test_nothing_is_scanned_or_tokenized_twice(options, monkeypatch, capsys):
    options = replace(options, quiet=False)
    whole = uninterrupted(options)
    documents = sum(json.loads(whole["dataset.json"])[split]["documents"] for split in ("train", "valid"))
    capsys.readouterr()
    preprocess_until(options, SCANNING, 31)
    assert f"{options.output.parent}/.out.preprocess: keeps what was done. The same" in capsys.readouterr().err
    scanned = count_calls(monkeypatch, *SCANNING)
    preprocess_until(options, TOKENIZING, 41)
    assert "going on with the scan at document 30 (file " in capsys.readouterr().err
    assert len(scanned) == documents - 30
    tokenized = count_calls(monkeypatch, *TOKENIZING)
    preprocess(options)
    said = capsys.readouterr().err
    assert f"the corpus was scanned before: {documents} documents" in said
    assert f"going on at document 40 of {documents} (" in said
    assert len(scanned) == documents - 30
    assert len(tokenized) == documents - 40
    assert content(options.output) == whole


def test_what_was_tokenized_is_not_parsed_again(options, source, monkeypatch):
    for name in [path.name for path in source.iterdir() if path.name != "a.jsonl"]:
        (source / name).unlink()
    preprocess_until(options, TOKENIZING, 21)
    parsed = count_calls(monkeypatch, reading, "_json_line")
    preprocess(options)
    lines = [number for number, line in enumerate((source / "a.jsonl").read_text().split("\n"), 1) if line.strip()]
    before = [number for number in lines if number > int(parsed[0][0].rpartition(":")[2]) - 1]
    assert [int(name.rpartition(":")[2]) for name, *_ in parsed] == before
    assert 0 < len(before) < len(lines) // 2


def everything(corpus, cursor, tally):
    return [(document, Cursor(*cursor.place())) for document in corpus.documents(tally, cursor)]


@pytest.mark.parametrize("most", [None, 64])
def test_a_corpus_goes_on_after_any_document(source, most):
    sources = find_sources([source], (".py", ".jsonl", ".json", ".parquet"), skip_unreadable=True)
    corpus = Corpus(sources, max_documents=most, skip_unreadable=True)
    tally = Tally()
    whole = everything(corpus, Cursor(), tally)
    assert {name.partition(":")[0] for name in (document.name for document, _ in whole)} >= {"src/a.jsonl"}
    if most is None:
        assert len({document.name.partition(":")[0] for document, _ in whole}) == 16
        for damaged, records in {"torn.jsonl.gz": 40, "t.jsonl.zst": 7, "r.parquet": 20}.items():
            assert 0 < sum(document.name.startswith(f"src/{damaged}:") for document, _ in whole) < records
    for count, (_, place) in enumerate(whole, 1):
        assert place.documents == count
        assert everything(corpus, Cursor(*place.place()), Tally()) == whole[count:]


def test_lines_without_text_after_the_place_do_not_speak_against_the_key(tmp_path):
    """Ten thousand from the beginning on are an error; here the key was right before."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "first"}\n' + '{"body": ""}\n' * 10_000 + '{"text": "last"}\n')
    corpus = Corpus((Source(path, "d.jsonl"),))
    cursor = Cursor()
    documents = corpus.documents(cursor=cursor)
    next(documents)
    again = corpus.documents(cursor=Cursor(*cursor.place()))
    assert list(again) == [Document("d.jsonl:10002", b"last", from_json_line=True)]


def test_tokenizer_and_sample_are_made_once(options, monkeypatch):
    options = replace(options, train_vocab=300)
    whole = uninterrupted(options)
    preprocess_until(options, (module, "train_tokenizer"), 1)
    with pytest.raises(ConfigError, match="more than the text supports"):
        preprocess(replace(options, train_vocab=60_000))
    parsed = count_calls(monkeypatch, reading, "_json_line")
    trained = count_calls(monkeypatch, module, "train_tokenizer")
    preprocess_until(options, TOKENIZING, 1)
    read = len(parsed)
    preprocess_until(options, TOKENIZING, 2)
    preprocess(options)
    assert len(trained) == 1
    assert read < 100  # the last pass had begun, the others did not read anything
    assert content(options.output) == whole


STAGES = {"scan": SCANNING, "sample": (module, "train_tokenizer"), "tokenize": TOKENIZING}


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("scan", {"json_key": "body"}, r"json_key='text', now 'body'"),
        ("scan", {"seed": 5}, r"seed=1234, now 5"),
        ("scan", {"max_documents": 9}, r"max_documents=None, now 9"),
        ("scan", {"skip_unreadable": False}, r"cannot be read|skip_unreadable=True, now False"),
        ("sample", {"valid_fraction": 0.3}, r"valid_fraction=0.2, now 0.3"),
        ("tokenize", {"valid_fraction": 0.3}, r"valid_fraction=0.2, now 0.3"),
        ("tokenize", {"train_vocab": None}, r"tokenizer='trained 300', now 'bytes \w+'"),
        ("tokenize", {"train_vocab": 310}, r"tokenizer='trained 300', now 'trained 310'"),
    ],
)
def test_other_options_are_refused_by_name_and_destroy_nothing(options, stage, change, message):
    options = replace(options, train_vocab=300)
    preprocess_until(options, STAGES[stage], 12 if stage != "sample" else 1)
    work = options.output.with_name(".out.preprocess")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=rf"\.out\.preprocess: .*interrupted.*\({message}\).*--restart removes"):
        preprocess(replace(options, **change))
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    preprocess(options)
    assert content(options.output) == uninterrupted(options)


def test_another_release_is_refused(options, monkeypatch):
    preprocess_until(options, TOKENIZING, 12)
    monkeypatch.setattr(module, "_RELEASE", {"release": "9.9"})
    with pytest.raises(DataError, match=r"release='.*', now '9\.9'"):
        preprocess(options)


def test_what_cannot_be_read_may_be_skipped_later(options, source):
    """An error in the middle of the scan names --skip-unreadable; what was read before needs no second reading."""
    (source / "torn.jsonl.gz").rename(source / "e.jsonl.gz")
    strict = replace(options, skip_unreadable=False)
    with pytest.raises(DataError, match=r"e\.jsonl\.gz: cannot be read"):
        preprocess(strict)
    with pytest.MonkeyPatch.context() as patch:
        scanned = count_calls(patch, *SCANNING)
        preprocess(options)
    manifest = json.loads((options.output / "dataset.json").read_text())
    assert 0 < len(scanned) < manifest["train"]["documents"]
    assert content(options.output) == uninterrupted(options)


@pytest.mark.parametrize("restart", [False, True])
def test_a_restart_removes_the_work_and_nothing_else(options, restart, monkeypatch):
    preprocess_until(options, TOKENIZING, 12)
    (options.output.parent / "neighbour").write_text("")
    other = replace(options, valid_fraction=0.3, restart=restart)
    if not restart:
        with pytest.raises(DataError, match="--restart"):
            preprocess(other)
        return
    scanned = count_calls(monkeypatch, *SCANNING)
    preprocess(other)
    assert scanned
    assert content(options.output) == uninterrupted(replace(other, restart=False))
    assert (options.output.parent / "neighbour").exists()
    assert preprocess(other).up_to_date  # a data set is not the work on one


def rewrite(path):
    path.write_bytes(path.read_bytes())


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: rewrite(folder / "f0.py"), r"src/f0\.py was written again since"),
        (lambda folder: grow(folder / "f0.py"), r"src/f0\.py had \d+ bytes, now \d+"),
        (lambda folder: (folder / "f0.py").unlink(), r"src/f0\.py then, src/f1\.py in its place now"),
        (lambda folder: (folder / "zz.py").write_text("new"), r"nothing then, src/zz\.py in its place now"),
        (lambda folder: (folder / "torn.jsonl.gz").unlink(), r"src/torn.jsonl.gz then, nothing in its place now"),
    ],
)
def test_a_corpus_that_changed_after_the_scan_is_refused(options, source, change, message):
    preprocess_until(options, TOKENIZING, 3)
    change(source)
    with pytest.raises(DataError, match=rf"\.out\.preprocess: .*on other files \({message}\).*--restart"):
        preprocess(options)
    preprocess(replace(options, restart=True))
    assert content(options.output) == uninterrupted(options)


def test_what_the_scan_had_not_read_may_change(options, source):
    """A file that ended the scan with an error is put right, and the scan goes on."""
    preprocess_until(options, SCANNING, 30)
    rewrite(source / "f5.py")
    grow(source / "f5.py")
    (source / "zz.py").write_text("new")
    with pytest.MonkeyPatch.context() as patch:
        scanned = count_calls(patch, *SCANNING)
        preprocess_until(options, SCANNING, 31)
        assert len(scanned) == 30
    grow(source / "a.jsonl")  # this one had been read
    with pytest.raises(DataError, match=r"src/a\.jsonl had"):
        preprocess(options)


def test_a_file_that_changed_unnoticed_is_found_by_its_content(options, source):
    preprocess_until(options, TOKENIZING, 3)
    state = (source / "f5.py").stat()
    (source / "f5.py").write_bytes((source / "f5.py").read_bytes().replace(b"5", b"7"))
    os.utime(source / "f5.py", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DataError, match=r"src/f5\.py: changed while the corpus was being read.*--restart"):
        preprocess(options)


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("data/train.bin", shorten, r"train\.bin: \d+ bytes, but \d+ were recorded"),
        ("valid.lengths", shorten, r"valid\.lengths: \d+ bytes, but"),
        ("scan.keys", shorten, r"scan\.keys: \d+ bytes, but"),
        ("tokenize.json", shorten, r"tokenize\.json: not a record"),
        ("scan.json", lambda path: path.write_text('{"options": 3}'), r"scan\.json: not a record"),
    ],
)
def test_damaged_work_is_an_error_that_names_the_file(options, name, damage, message):
    preprocess_until(options, TOKENIZING, 60)
    damage(options.output.with_name(".out.preprocess") / name)
    with pytest.raises(DataError, match=message + r"(?s:.*)--restart"):
        preprocess(options)


def test_after_a_few_seconds_nothing_is_kept(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(journal, "EVERY", 1000.0)
    for stage in (SCANNING, TOKENIZING):
        preprocess_until(options, stage, 12)
        assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert not capsys.readouterr().err
    monkeypatch.setattr(journal, "EVERY", 0.0)
    preprocess_until(options, TOKENIZING, 12)
    monkeypatch.setattr(journal, "EVERY", 1000.0)
    preprocess_until(options, TOKENIZING, 1)  # it had something before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.preprocess", "src"]


def test_records_take_a_small_part_of_the_time(monkeypatch):
    now, records = 0.0, []
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)

    def slow():
        nonlocal now
        records.append(now)
        now += 3.0

    pace = journal.Pace(slow)
    while now < 1000:
        now += 0.5
        pace.tick()
    assert records[0] == journal.EVERY
    assert 6 <= len(records) <= 7  # 3 s in every 150


def test_a_second_process_is_refused(options):
    with work_folder(options.output) as work:
        (work.path / "mine").write_text("")
        with pytest.raises(DataError, match=r"\.out\.preprocess/lock: another process is writing"):
            preprocess(replace(options, restart=True))
        assert (work.path / "mine").exists()


def test_a_folder_that_was_published_while_its_lock_was_waited_for_is_left_alone(options, monkeypatch):
    real = fcntl.flock
    work = options.output.with_name(".out.preprocess")

    def another_run_finishes(descriptor, how):
        work.rename(work.with_name("theirs"))
        work.mkdir()
        (work / "lock").write_text("")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", another_run_finishes)
    with pytest.raises(DataError, match="another process"), work_folder(options.output):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(options, monkeypatch, caplog, code):
    def none(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    preprocess(options)
    assert ".out.preprocess/lock: its file system has no locks" in caplog.text


def test_a_lock_that_fails_otherwise_is_an_error(options, monkeypatch):
    def broken(descriptor, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(DataError, match="cannot be locked"):
        preprocess(options)


def test_what_a_crash_after_publishing_left_is_removed(options):
    preprocess_until(options, TOKENIZING, 12)
    work = options.output.with_name(".out.preprocess")
    kept = work.with_name("kept")
    work.rename(kept)
    whole = uninterrupted(options)
    options.output.with_name("whole").rename(options.output)
    kept.rename(work)
    (work / "data").rename(work / "gone")
    assert preprocess(options).up_to_date
    assert not work.exists()
    assert content(options.output) == whole


def test_a_file_whose_name_is_not_utf8_may_be_left_out(options, source):
    for path in source.iterdir():
        if path.suffix != ".py":
            path.unlink()
    preprocess_until(options, TOKENIZING, 3)
    preprocess(options)
    left_out = json.loads((options.output / "dataset.json").read_text())["source"]["rejected_examples"]
    assert left_out == [
        r"src/bad\udcff-too.py: not UTF-8 (byte 0xe9 at offset 0)",
        "src/latin.py: not UTF-8 (byte 0xe9 at offset 0)",
    ]


def test_a_full_disk_keeps_the_work(options, monkeypatch, capsys):
    whole = uninterrupted(options)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "finish", full)
        with pytest.raises(DataError, match=r"could not be written.*No space left on device"):
            preprocess(options)
    assert "keeps what was done" in capsys.readouterr().err
    tokenized = count_calls(monkeypatch, *TOKENIZING)
    preprocess(options)
    assert not tokenized
    assert content(options.output) == whole


def test_an_unusable_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be created"), work_folder(tmp_path / "file" / "out"):
        pass
