"""Preprocessing as a function: splits, megatron's files, the manifest's checks, all or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mtp_megatron.data import journal, sample
from mtp_megatron.data import preprocess as module
from mtp_megatron.data.atomic import new_folder
from mtp_megatron.data.manifest import check_vocab, load_manifest
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.data.reading import Document
from mtp_megatron.data.scan import Reader, scan_in
from mtp_megatron.data.splits import begin, write_splits
from mtp_megatron.data.tokenizer import ByteTokenizer
from mtp_megatron.data.work_folder import work_folder
from mtp_megatron.data.writer import SplitWriter, optimal_dtype, split_writer
from mtp_megatron.errors import ConfigError, DataError

SPLITS = ("train", "valid")


def corpus_of(folder, count=40):
    folder.mkdir()
    for i in range(count):
        (folder / f"f{i:03}.py").write_text(f"def function_{i}(x):\n\treturn x + {i * i}\r\n" * (1 + i % 5))
    return folder


@pytest.fixture(autouse=True)
def _keep_nothing(monkeypatch):
    """As after a few seconds, however slow the machine is."""
    monkeypatch.setattr(journal, "EVERY", 1000.0)


@pytest.fixture
def options(tmp_path):
    source = corpus_of(tmp_path / "src")
    return PreprocessOptions(output=tmp_path / "out", paths=(source,), valid_fraction=0.1, quiet=True)


def read_back(folder):
    """Every document of both splits, decoded, through megatron-core's own reader."""
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_manifest(folder).load_tokenizer()
    texts = {}
    for split in SPLITS:
        dataset = IndexedDataset(str(folder / split))
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
        texts[split] = []
        for i in range(len(dataset)):
            ids = dataset[i].tolist()
            assert ids[-1] == tokenizer.eod
            assert tokenizer.eod not in ids[:-1]
            texts[split].append(tokenizer.decode(ids))
    return texts


@pytest.mark.parametrize("train_vocab", [None, 320])
def test_every_document_is_in_exactly_one_split(options, train_vocab):
    result = preprocess(replace(options, train_vocab=train_vocab))
    texts = read_back(options.output)
    originals = [path.read_bytes().decode() for path in sorted(options.paths[0].iterdir())]
    assert sorted(texts["train"] + texts["valid"]) == sorted(originals)
    assert [text for text in originals if text in texts["train"]] == texts["train"]  # in the corpus's order
    manifest = result.manifest
    assert (len(texts["train"]), len(texts["valid"])) == (36, 4) == (manifest.train.documents, manifest.valid.documents)
    assert manifest.dtype == "uint16"
    assert manifest.valid.text_bytes == sum(len(t.encode()) for t in texts["valid"])
    assert manifest.valid.tokens * 2 == manifest.valid.bin_bytes == (options.output / "valid.bin").stat().st_size
    assert load_manifest(options.output) == manifest
    assert (options.output / "tokenizer.model").exists() == (train_vocab is not None)


def test_a_trained_tokenizer_has_not_seen_the_held_out_documents(options, monkeypatch):
    seen = []
    real = module.train_tokenizer
    monkeypatch.setattr(module, "train_tokenizer", lambda texts, size: real(seen.extend(texts) or seen, size))
    preprocess(replace(options, train_vocab=320))
    texts = read_back(options.output)
    assert seen == texts["train"]


def test_a_large_corpus_is_sampled_for_the_tokenizer(options, monkeypatch):
    seen = []
    real = module.train_tokenizer
    monkeypatch.setattr(module, "train_tokenizer", lambda texts, size: real(seen.extend(texts) or seen, size))
    monkeypatch.setattr(sample, "_MOST_BYTES", 1500)
    preprocess(replace(options, train_vocab=300))
    texts = read_back(options.output)
    assert set(seen) < set(texts["train"])
    assert 500 < sum(map(len, seen)) < 3000


def test_the_split_follows_the_content_and_the_seed(options, tmp_path):
    preprocess(options)
    held_out = set(read_back(options.output)["valid"])
    for path in list(options.paths[0].iterdir()):  # other names, so another order
        path.rename(path.with_name(f"{hash(path.name) % 997:03}{path.name}"))
    moved = replace(options, output=tmp_path / "moved")
    preprocess(moved)
    assert set(read_back(moved.output)["valid"]) == held_out
    other = replace(options, output=tmp_path / "other", seed=7)
    preprocess(other)
    assert set(read_back(other.output)["valid"]) != held_out


def test_copies_of_a_document_are_held_out_together(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(12):
        (tmp_path / "src" / f"{i}.py").write_text(f"text {i % 3}\n")
    options = PreprocessOptions(output=tmp_path / "out", paths=(tmp_path / "src",), valid_fraction=0.01, quiet=True)
    manifest = preprocess(options).manifest
    assert (manifest.train.documents, manifest.valid.documents) == (8, 4)
    for path in (tmp_path / "src").iterdir():
        path.write_text("the same")
    with pytest.raises(DataError, match="all 12 documents have the same text"):
        preprocess(replace(options, output=tmp_path / "out2"))


def test_worker_processes_write_the_same_bytes(options, tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_megatron.data.encode._BATCH_BYTES", 300)
    one = preprocess(replace(options, train_vocab=320))
    two = preprocess(replace(options, train_vocab=320, workers=2, output=tmp_path / "two"))
    assert one.manifest.model_dump() == two.manifest.model_dump()
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model", "dataset.json"):
        assert (options.output / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_large_vocabulary_is_stored_wider(options, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 70_000)
    monkeypatch.setattr(ByteTokenizer, "eod", 69_999)
    manifest = preprocess(options).manifest
    assert manifest.dtype == "int32"
    read_back(options.output)


def test_the_same_again_is_up_to_date_and_anything_else_is_refused(options):
    first = preprocess(options)
    before = {path.name: path.stat().st_mtime_ns for path in options.output.iterdir()}
    again = preprocess(options)
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert before == {path.name: path.stat().st_mtime_ns for path in options.output.iterdir()}
    with pytest.raises(DataError, match=r"another data set \(valid_fraction=0.1, now 0.2\)"):
        preprocess(replace(options, valid_fraction=0.2))
    (options.paths[0] / "f000.py").write_text("changed")
    with pytest.raises(DataError, match=r"\(made from other text\)"):
        preprocess(options)
    (options.paths[0] / "new.md").write_text("as when another release reads more formats")
    files = first.manifest.source.files
    with pytest.raises(DataError, match=rf"\(made from other text: {files} files then, {files + 1} now\)"):
        preprocess(options)


def test_a_folder_with_something_else_is_refused(options):
    options.output.mkdir()
    (options.output / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"out: exists and is not a data set"):
        preprocess(options)
    assert (options.output / "thesis.tex").read_text() == "precious"
    (options.output / "thesis.tex").unlink()
    assert not preprocess(options).up_to_date  # an empty folder is fine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_fraction": 0.0}, "--valid-fraction=0.0"),
        ({"train_vocab": 100}, "--train-tokenizer=100"),
        ({"workers": 0}, "--workers=0"),
        ({"max_documents": 1}, "--max-documents=1"),
        ({"seed": -1}, "--seed=-1"),
    ],
)
def test_impossible_options_are_refused_by_name(options, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(options, **change)


def test_nothing_is_written_when_the_input_is_refused(options, tmp_path):
    with pytest.raises(DataError, match="1 usable documents"):
        preprocess(replace(options, paths=(options.paths[0] / "f000.py",)))
    with pytest.raises(DataError, match=r"gone\.model"):
        preprocess(replace(options, tokenizer=str(tmp_path / "gone.model")))
    with pytest.raises(ConfigError, match="more than the text supports"):
        preprocess(replace(options, train_vocab=30_000))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_too_few_usable_records_name_their_fields(options, tmp_path):
    path = tmp_path / "src" / "d.jsonl"
    path.write_text(json.dumps({f"field{i}": i for i in range(12)}))
    with pytest.raises(
        DataError, match=r"(?s)0 usable documents \(1 rejected.*its fields: field0 \(int\), .*field7.*, \.\.\."
    ):
        preprocess(replace(options, paths=(path,)))


def test_a_corpus_that_changes_underway_is_refused(options, monkeypatch, tmp_path):
    real = module.hold_out

    def edit_meanwhile(*args):
        (options.paths[0] / "f020.py").write_text("edited")
        return real(*args)

    monkeypatch.setattr(module, "hold_out", edit_meanwhile)
    with pytest.raises(DataError, match=r"src/f020\.py: changed while"):
        preprocess(options)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")])
def test_a_new_folder_that_is_interrupted_leaves_nothing(tmp_path, stop):
    def interrupted():
        with new_folder(tmp_path / "out") as folder:
            assert folder == tmp_path / ".out.partial"
            (folder / "train.bin").write_bytes(b"half")
            raise stop

    with pytest.raises(DataError if isinstance(stop, OSError) else stop):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_of_a_new_folder_is_replaced(tmp_path):
    left = tmp_path / ".out.partial"
    (left / "cache").mkdir(parents=True)
    (left / "stale.bin").write_bytes(b"x")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert not left.exists()


def test_two_runs_at_once_do_not_mix(tmp_path):
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "mine").write_text("1")
        with pytest.raises(DataError, match="another process is writing"), new_folder(target):
            pass
        assert (folder / "mine").exists()
    assert (target / "mine").exists()


@pytest.mark.parametrize("third", [False, True])
def test_a_folder_renamed_between_opening_and_locking_is_left_alone(tmp_path, monkeypatch, third):
    """Another run finishes in that moment, and perhaps a third one starts: neither's files may be touched."""
    target, partial = tmp_path / "out", tmp_path / ".out.partial"
    real = fcntl.flock

    def another_run_finishes(descriptor, how):
        (partial / "theirs").write_text("1")
        os.rename(partial, target)
        if third:
            partial.mkdir()
            (partial / "third").write_text("1")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", another_run_finishes)
    with pytest.raises(DataError, match="another process"), new_folder(target):
        pass
    assert (target / "theirs").exists()
    assert (partial / "third").exists() == third


def test_an_output_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be created"), new_folder(tmp_path / "file" / "out"):
        pass


def test_an_output_in_the_corpus_is_no_part_of_it(tmp_path):
    """`preprocess . --output data` twice: the manifest, or a tokenizer's files, have an extension that is taken."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    options = PreprocessOptions(
        output=tmp_path / "data" / "set", paths=(tmp_path,), extensions=(".txt", ".json"), quiet=True
    )
    first = preprocess(options)
    again = preprocess(options)
    assert again.up_to_date
    assert again.manifest == first.manifest


@pytest.mark.parametrize("folder", [new_folder, work_folder])
def test_a_name_that_no_folder_can_get_is_refused_before_the_work(tmp_path, monkeypatch, folder):
    """Renaming fails there: not a directory, and busy. That was said at the end."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to("scratch")
    with pytest.raises(DataError, match=r"out: a link \(to scratch\).*Give the folder that it leads to"):
        folder(tmp_path / "out").__enter__()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(DataError, match=r"volume: a file system is mounted there.*Give a folder in it, say .*/out"):
        folder(tmp_path / "volume").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch"]


def edit_manifest(folder, **changes):
    path = folder / "dataset.json"
    record = json.loads(path.read_text())
    for key, value in changes.items():
        record[key] = value if not isinstance(value, dict) else {**record[key], **value}
    path.write_text(json.dumps(record))


def truncate(path, by):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - by)


def overwrite(path, offset, data):
    with path.open("r+b") as stream:
        stream.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        stream.write(data)


DAMAGE = {
    "missing .bin": (lambda d: (d / "train.bin").unlink(), r"train\.bin: .*No such file.*expected \d+ bytes"),
    "truncated .bin": (lambda d: truncate(d / "train.bin", 2), r"train\.bin: truncated: \d+ bytes, expected \d+"),
    "grown .bin": (lambda d: overwrite(d / "valid.bin", -1, b"xx"), r"valid\.bin: longer than"),
    "missing .idx": (lambda d: (d / "valid.idx").unlink(), r"valid\.idx: .*No such file"),
    "truncated .idx": (lambda d: truncate(d / "train.idx", 8), r"train\.idx: truncated"),
    "not an index": (lambda d: overwrite(d / "train.idx", 0, b"NOTMIDX"), r"train\.idx: its header is .*NOTMIDX"),
    "other dtype": (lambda d: overwrite(d / "train.idx", 17, b"\x04"), r"train\.idx: its header is"),
    "index of other data": (lambda d: overwrite(d / "train.idx", 34 + 4 * 35, b"\x01"), r"last document ends at byte"),
    "no manifest": (lambda d: (d / "dataset.json").unlink(), r"dataset\.json: missing, so .* is not a data set"),
    "half a manifest": (lambda d: truncate(d / "dataset.json", 30), r"dataset\.json: cannot be read as a manifest"),
    "foreign json": (lambda d: (d / "dataset.json").write_text("[]"), r"dataset\.json: not the manifest"),
    "newer version": (lambda d: edit_manifest(d, version=9), r"version 9; this release reads version 1"),
    "damaged manifest": (lambda d: edit_manifest(d, train={"tokens": "many"}), r"damaged manifest \(train\.tokens"),
    "other counts": (lambda d: edit_manifest(d, train={"tokens": 5}), r"5 tokens make 10 bytes, but train\.bin has"),
    "other vocabulary": (lambda d: edit_manifest(d, vocab_size=5), r"vocab_size=5, eod=2, but the tokenizer has 320"),
    "missing tokenizer": (lambda d: (d / "tokenizer.model").unlink(), r"tokenizer\.model: .*No such file"),
    "other tokenizer": (
        lambda d: edit_manifest(d, tokenizer={"sha256": "0" * 64}),
        r"tokenizer\.model: not the tokenizer that made this data set \(sha256 \w{12}, expected 000000000000",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    source = corpus_of(root / "src")
    options = PreprocessOptions(root / "out", (source,), train_vocab=320, valid_fraction=0.1, quiet=True)
    preprocess(options)
    return root / "out"


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_at_loading(whole, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    load_manifest(copy)  # the control: a copy is as good as the original
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(DataError, match=message):
        load_manifest(copy)


def test_no_data_set_at_all(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such data set folder"):
        load_manifest(tmp_path / "nowhere")


def test_a_model_with_too_small_a_vocabulary_is_refused(whole):
    manifest = load_manifest(whole)
    check_vocab(manifest, 320)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=319: .*tokenizer's vocabulary of 320"):
        check_vocab(manifest, 319)


def test_loading_needs_neither_torch_nor_megatron(whole):
    code = (
        "import sys; from mtp_megatron.data.manifest import load_manifest; import mtp_megatron.data.cli; "
        f"load_manifest({str(whole)!r}); assert not {{'torch', 'megatron'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_indexed_lengths_match_the_manifest(whole):
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = load_manifest(whole)
    assert int(np.sum(IndexedDataset(manifest.prefix("train")).sequence_lengths)) == manifest.train.tokens


def test_worker_processes_are_fed_only_as_fast_as_results_are_taken(monkeypatch):
    from mtp_megatron.data.encode import encode_documents

    monkeypatch.setattr("mtp_megatron.data.encode._BATCH_BYTES", 1)
    drawn = []
    results = encode_documents((drawn.append(i) or b"%d" % i for i in range(200)), ByteTokenizer(), workers=2)
    assert next(results).tolist() == [ord("0"), 256]
    assert len(drawn) < 10
    assert [ids[:-1].tolist() for ids in results] == [list(b"%d" % i) for i in range(1, 200)]


class ManyDocuments:
    """A corpus of many small documents, made when asked for."""

    def __init__(self, count):
        self.count = count

    sources = ()

    def documents(self, tally=None, cursor=None):
        for i in range(self.count):
            cursor.documents += 1
            yield Document("f", b"%d" % i * 60)


def peak_memory(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_a_key_for_each_document_and_no_more(options, tmp_path, monkeypatch):
    """Corpora have 1e9 documents: a Python integer for each is 40 GB. (the index is not counted.)"""
    reader = Reader(ManyDocuments(20_000), options.seed, quiet=True)
    count = reader.corpus.count
    with work_folder(options.output) as work:
        scans = []
        assert peak_memory(lambda: scans.append(scan_in(work, reader, {}))) < 20 * count
        written = Counter()
        monkeypatch.setattr(SplitWriter, "add", lambda self, ids, size, name: written.update(bytes=size))
        monkeypatch.setattr(SplitWriter, "finish", lambda self: None)
        optimal_dtype(257)  # imports megatron-core before memory is looked at
        begin(work, ByteTokenizer(), {})
        arguments = (work, reader, scans[0], np.zeros(count, dtype=bool), ByteTokenizer(), 1)
        assert peak_memory(lambda: write_splits(*arguments)) < 20 * count
    assert written["bytes"] == scans[0].text_bytes


def test_memory_grows_by_the_index_for_each_document_that_is_written(tmp_path):
    """Beside what megatron-core makes at the end: a length of 4 bytes and a boundary of 8."""
    ids, count = np.zeros(3, dtype=np.int32), 20_000
    with split_writer(tmp_path / "train", "uint16", tmp_path / "lengths") as writer:
        assert peak_memory(lambda: [writer.add(ids, 2, "f") for _ in range(count)] and None) < 8 * count + 20 * count


def test_a_document_that_the_index_cannot_hold_is_refused_by_name(tmp_path, monkeypatch):
    """Its length alone matters, so no memory is taken for it, and no disk where this fails."""
    with split_writer(tmp_path / "train", "uint16", tmp_path / "lengths") as writer:
        writer.add(np.zeros(3, dtype=np.int32), 2, "small")
        written = []
        monkeypatch.setattr(writer._builder, "add_document", lambda ids, lengths: written.append(lengths))
        writer.add(np.broadcast_to(np.int32(7), (2**31 - 1,)), 2**31, "fits")
        with pytest.raises(DataError, match=r"dump\.txt: 2,147,483,648 tokens.*at most 2,147,483,647\. Split it"):
            writer.add(np.broadcast_to(np.int32(7), (2**31,)), 2**31, "dump.txt")
        assert written == [[2**31 - 1]]
