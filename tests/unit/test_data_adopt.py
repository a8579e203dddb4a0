"""`mtp-megatron adopt`: upstream's files become a data set without being copied, or are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_megatron.cli import main
from mtp_megatron.data import adopt_checks
from mtp_megatron.data.adopt import AdoptOptions, AdoptResult, adopt
from mtp_megatron.data.adopt_checks import scan_ids
from mtp_megatron.data.blend import load_blend
from mtp_megatron.data.dataset import build_datasets
from mtp_megatron.data.manifest import Manifest, load_manifest
from mtp_megatron.data.megatron_index import HEADER, IndexWriter, MegatronIndex, Places
from mtp_megatron.data.tokenizer import ByteTokenizer
from mtp_megatron.data.tokenizer_store import choose_tokenizer
from mtp_megatron.errors import ConfigError, DataError
from tests.hf_tokenizers import BEGIN, END, TURN, write_tokenizer_folder
from tests.upstream_data import write_upstream

EOD = ByteTokenizer.eod


def texts(count: int = 40) -> list[str]:
    return [f"document {number}: {'word ' * (number % 7)}" for number in range(count)]


def as_bytes(text: str) -> list[list[int]]:
    return [[*text.encode(), EOD]]


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    return write_upstream(tmp_path / "up" / "corpus_text_document", map(as_bytes, texts()))


def adopted(prefix: Path, output: Path, tokenizer: object = "bytes", **more: Any) -> AdoptResult:
    return adopt(AdoptOptions(prefix=prefix, output=output, tokenizer=str(tokenizer), quiet=True, **more))


def documents_of(manifest: Manifest, split: Any) -> list[str]:
    """By megatron-core's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = []
    for document in IndexedDataset(manifest.prefix(split)):
        assert document[-1] == EOD
        found.append(bytes(document[:-1].tolist()).decode())
    return found


def test_every_document_is_in_one_split_and_the_bin_is_not_copied(upstream: Path, tmp_path: Path) -> None:
    result = adopted(upstream, tmp_path / "data", valid_fraction=0.2)
    manifest = load_manifest(tmp_path / "data")
    train, valid = documents_of(manifest, "train"), documents_of(manifest, "valid")
    assert sorted([*train, *valid]) == sorted(texts())
    assert len(valid) == 8
    assert [text for text in texts() if text in train] == train, "in their order"
    assert os.path.samefile(tmp_path / "data" / "train.bin", f"{upstream}.bin")
    assert manifest.train.skipped_tokens == manifest.valid.tokens == sum(len(text) + 1 for text in valid)
    assert manifest.valid.skipped_tokens == 0
    assert manifest.train.text_bytes is None
    assert (result.inner_ends, result.sampled, result.same) == (0, 40, 40)


def test_samples_are_those_of_the_documents_that_are_left(upstream: Path, tmp_path: Path) -> None:
    """By the data set that trains: the index skips what is held out."""
    adopted(upstream, tmp_path / "data", valid_fraction=0.2)
    manifest = load_manifest(tmp_path / "data")
    train, valid = build_datasets(load_blend([(None, str(tmp_path / "data"))]), seq_length=8, train_samples=1, seed=1)
    for samples, split in ((train, "train"), (valid, "valid")):
        stream = "\0".join(documents_of(manifest, split))
        seen = 0
        for index in range(samples.samples_per_epoch):
            tokens = samples.dataset[index]["tokens"].tolist()
            pieces = bytes(token if token != EOD else 0 for token in tokens).decode().split("\0")
            assert all(piece in stream for piece in pieces)
            seen += len(tokens)
        assert seen > 0.8 * len(stream)


def test_the_original_may_be_removed_unless_it_is_a_symbolic_link(upstream: Path, tmp_path: Path) -> None:
    adopted(upstream, tmp_path / "linked")
    adopted(upstream, tmp_path / "copied", naming="copy")
    adopted(upstream, tmp_path / "pointed", naming="symlink")
    before = documents_of(load_manifest(tmp_path / "pointed"), "train")
    for path in (Path(f"{upstream}.bin"), Path(f"{upstream}.idx")):
        path.unlink()
    for name in ("linked", "copied"):
        assert documents_of(load_manifest(tmp_path / name), "train") == before
    with pytest.raises(DataError, match=rf"train.bin \(a link to {upstream}.bin\): unreadable"):
        load_manifest(tmp_path / "pointed")


def test_another_file_system_asks_what_to_do(upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    with pytest.raises(DataError, match=r"Invalid cross-device link.*--bin symlink .*--bin copy"):
        adopted(upstream, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["up"]
    assert Path(f"{upstream}.bin").stat().st_size > 0


def test_the_same_command_is_up_to_date_and_other_data_is_not(upstream: Path, tmp_path: Path) -> None:
    assert not adopted(upstream, tmp_path / "data").data.up_to_date
    assert adopted(upstream, tmp_path / "data").data.up_to_date
    with pytest.raises(DataError, match=r"holds another data set \(seed=1234, now 5\)"):
        adopted(upstream, tmp_path / "data", seed=5)
    other = write_upstream(tmp_path / "other", map(as_bytes, texts(39)))
    with pytest.raises(DataError, match=r"holds another data set \(adopted="):
        adopted(other, tmp_path / "data")
    one, two = ([*text.encode(), EOD] for text in texts()[:2])  # the same bytes, cut otherwise
    joined = write_upstream(tmp_path / "joined", [[[*one, *two]], *map(as_bytes, texts()[2:])])
    assert Path(f"{joined}.bin").read_bytes() == Path(f"{upstream}.bin").read_bytes()
    with pytest.raises(DataError, match=r"holds another data set \(adopted="):
        adopted(joined, tmp_path / "data")


def test_held_out_data_in_files_of_their_own(upstream: Path, tmp_path: Path) -> None:
    valid = write_upstream(tmp_path / "up" / "valid", map(as_bytes, ["one", "two"]))
    adopted(upstream, tmp_path / "data", valid=valid)
    manifest = load_manifest(tmp_path / "data")
    assert documents_of(manifest, "train") == texts()
    assert documents_of(manifest, "valid") == ["one", "two"]
    assert manifest.train.skipped_tokens == 0
    for split, prefix in (("train", upstream), ("valid", valid)):
        assert os.path.samefile(f"{manifest.prefix(split)}.bin", f"{prefix}.bin")
        assert Path(f"{manifest.prefix(split)}.idx").read_bytes() == Path(f"{prefix}.idx").read_bytes()
    wide = write_upstream(tmp_path / "up" / "wide", map(as_bytes, ["one"]), "int32")
    with pytest.raises(DataError, match="ids are int32, and uint16 in"):
        adopted(upstream, tmp_path / "other", valid=wide)


def test_copies_of_a_document_fall_on_the_same_side_and_the_last_stays(tmp_path: Path) -> None:
    for seed in range(6):
        prefix = write_upstream(tmp_path / "up" / str(seed), map(as_bytes, ["same", *texts(6), "same"] * 2))
        adopted(prefix, tmp_path / str(seed), valid_fraction=0.3, seed=seed)
        manifest = load_manifest(tmp_path / str(seed))
        train, valid = documents_of(manifest, "train"), documents_of(manifest, "valid")
        assert not set(train) & set(valid)
        assert train[-1] == "same"


def test_a_document_of_several_sequences_is_one_and_an_empty_one_is_left_out(tmp_path: Path) -> None:
    """As `--split-sentences` writes them."""
    split = [[list(b"First. "), [*b"Second.", EOD]], [], *map(as_bytes, texts(5)), [[]], [[*b"a"], [*b"b"], [EOD]]]
    prefix = write_upstream(tmp_path / "up", split)
    result = adopted(prefix, tmp_path / "data", valid_fraction=0.3)
    manifest = load_manifest(tmp_path / "data")
    found = [*documents_of(manifest, "train"), *documents_of(manifest, "valid")]
    assert sorted(found) == sorted(["First. Second.", *texts(5), "ab"])
    assert result.data.manifest.source.empty == 2
    assert manifest.train.documents + manifest.valid.documents == 7


def test_empty_documents_are_no_part_of_the_sample(tmp_path: Path) -> None:
    """Not decoded: a tokenizer that begins texts looks at the first id, and the first place is 0 up to -1."""
    prefix = write_upstream(tmp_path / "up", [[], *map(as_bytes, texts(5)), [], [[]]])
    result = adopted(prefix, tmp_path / "data")
    assert (result.sampled, result.same) == (5, 5)
    folder = write_tokenizer_folder(tmp_path / "model")
    tokenizer = choose_tokenizer(folder)
    assert tokenizer.bos is not None
    encoded = [[[*tokenizer.encode(text), tokenizer.eod]] for text in texts(5)]
    result = adopted(write_upstream(tmp_path / "hf", [[], *encoded, [[]]]), tmp_path / "of_hf", folder)
    assert (result.sampled, result.same) == (5, 5)


def test_a_bin_of_empty_documents_is_refused(upstream: Path, tmp_path: Path) -> None:
    empty = write_upstream(tmp_path / "empty", [[], [[]]])
    for prefix, options in ((empty, {}), (upstream, {"valid": empty})):
        with pytest.raises(DataError, match=r"empty\.bin beside it is empty"):
            adopted(prefix, tmp_path / "data", **options)


def test_blocks_and_chunks_of_any_size_give_the_same_files(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted(upstream, tmp_path / "one", valid_fraction=0.2)
    monkeypatch.setattr("mtp_megatron.data.megatron_index._BLOCK", 7)
    monkeypatch.setattr(adopt_checks, "_CHUNK_BYTES", 100)
    adopted(upstream, tmp_path / "two", valid_fraction=0.2)
    for name in ("train.idx", "valid.idx", "valid.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    one, two = (load_manifest(tmp_path / name).model_dump() for name in ("one", "two"))
    assert one == two


def test_documents_without_an_end_are_refused(tmp_path: Path) -> None:
    bare = write_upstream(tmp_path / "bare", [[list(text.encode())] for text in texts(4)])
    with pytest.MonkeyPatch.context() as patch:  # a sample tells, before every id is read
        patch.setattr("mtp_megatron.data.adopt.scan_ids", lambda *_, **__: pytest.fail("all was read"))
        with pytest.raises(DataError, match=r"of 4 documents 0 end with the end-of-document id 256, others with 32"):
            adopted(bare, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    many = [as_bytes(text) for text in texts(3000)]
    many[1501][0][-1] = 10
    hidden = write_upstream(tmp_path / "hidden", many)
    with pytest.raises(DataError, match=r"of 3000 documents 2999 end .* others with 10"):
        adopted(hidden, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    documents = [as_bytes(text) for text in texts(3000)]
    documents[2000][0][3] = 300
    prefix = write_upstream(tmp_path / "up", documents)
    at = sum(len(document[0]) for document in documents[:2000]) + 3
    with pytest.raises(DataError, match=rf"id 300 \(token {at}\) is outside the vocabulary of bytes \(0 to 256\)"):
        adopted(prefix, tmp_path / "data")
    documents[2000][0][3] = -1
    with pytest.raises(DataError, match=r"id -1 \(token"):
        adopted(write_upstream(tmp_path / "signed", documents, "int32"), tmp_path / "data")


def test_ids_inside_documents_that_end_them_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [as_bytes(text) for text in texts(9)]
    documents[4][0][2] = EOD
    prefix = write_upstream(tmp_path / "up", documents)
    assert main(["adopt", str(prefix), "--tokenizer", "bytes", "--output", str(tmp_path / "data")]) == 0
    captured = capsys.readouterr()
    assert "warning: 1 end-of-document ids lie inside documents" in captured.err
    assert "8 of 9 documents, decoded and encoded again, have the same ids" in captured.out
    assert "warning: 1 of 9 documents, decoded and encoded again, have other ids" in captured.err
    assert "wrote" in captured.out


def hugging_face_ids(folder: Path, *, begin: bool) -> list[list[list[int]]]:
    """As upstream's HuggingFaceTokenizer makes them: what a text spells is a token, and a post-processor adds one."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = library.token_to_id(END)
    return [[[*library.encode(text, add_special_tokens=begin).ids, end]] for text in [*texts(), f"a {END} b{TURN}"]]


@pytest.mark.parametrize("begin", [True, False])
def test_ids_of_a_hugging_face_tokenizer(tmp_path: Path, begin: bool) -> None:
    folder = write_tokenizer_folder(tmp_path / "model")
    prefix = write_upstream(tmp_path / "up", hugging_face_ids(folder, begin=begin))
    result = adopted(prefix, tmp_path / "data", folder)
    assert (result.inner_ends, result.sampled, result.same) == (1, 41, 41)
    kept = load_manifest(tmp_path / "data").load_tokenizer()
    assert kept.files() == result.data.tokenizer.files()
    with pytest.raises(DataError, match=rf"of 41 .* 0 end .*others with {kept.eod} \(<\|end_of_text\|>\).*--eod"):
        adopted(prefix, tmp_path / "other", folder, eod=TURN)


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Of the same size, with the same end of document: only the ids of texts tell."""
    right, wrong = (write_tokenizer_folder(tmp_path / name) for name in ("right", "wrong"))
    described = json.loads((wrong / "tokenizer.json").read_text())
    special = {BEGIN, END, TURN}
    pieces = [piece for piece in described["model"]["vocab"] if piece not in special]
    described["model"]["vocab"] = {piece: number for number, piece in enumerate(reversed(pieces))}
    (wrong / "tokenizer.json").write_text(json.dumps(described))
    prefix = write_upstream(tmp_path / "up", hugging_face_ids(right, begin=False)[:-1])
    with pytest.raises(DataError, match=r"none of 40 documents has the ids that .*wrong gives to its text"):
        adopted(prefix, tmp_path / "data", wrong)
    adopted(prefix, tmp_path / "data", right)


def test_a_bin_that_is_shortened_meanwhile_ends_in_an_error(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scanned(*args: Any, **more: Any) -> Any:
        found = scan_ids(*args, **more)
        os.truncate(f"{upstream}.bin", 20)
        return found

    monkeypatch.setattr("mtp_megatron.data.adopt.scan_ids", scanned)
    with pytest.raises(DataError, match="was shortened while it was read"):
        adopted(upstream, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_ids_of_a_related_tokenizer_are_refused(tmp_path: Path) -> None:
    """It agrees on some documents, as those of a family do."""
    right, wrong = (write_tokenizer_folder(tmp_path / name) for name in ("right", "wrong"))
    described = json.loads((wrong / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    vocabulary["2"], vocabulary["x"] = vocabulary["x"], vocabulary["2"]
    described["model"]["merges"] = []
    (wrong / "tokenizer.json").write_text(json.dumps(described))
    documents = hugging_face_ids(right, begin=False)
    prefix = write_upstream(tmp_path / "up", documents)
    with pytest.raises(DataError, match=r"\d+ of 41 documents have the ids that .*wrong gives to its text"):
        adopted(prefix, tmp_path / "data", wrong)


def test_texts_that_all_spell_special_tokens_are_their_tokenizers(tmp_path: Path) -> None:
    """Chats and fill-in-the-middle data do; upstream makes tokens of them."""
    from tokenizers import Tokenizer

    folder = write_tokenizer_folder(tmp_path / "model")
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = library.token_to_id(END)
    chats = [[[*library.encode(f"{TURN}{text}{TURN} yes").ids, end]] for text in texts()]
    result = adopted(write_upstream(tmp_path / "up", chats), tmp_path / "data", folder)
    assert (result.sampled, result.same) == (40, 40)


def test_sequences_that_were_encoded_one_by_one_are_compared_so(tmp_path: Path) -> None:
    """Over the end of one, the text of the document has other ids."""
    from tokenizers import Tokenizer

    folder = write_tokenizer_folder(tmp_path / "model")
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [library.encode(part, add_special_tokens=False).ids for part in ("def ", "f(x)")]
    assert [*parts[0], *parts[1]] != library.encode("def f(x)", add_special_tokens=False).ids
    end = library.token_to_id(END)
    documents = [[parts[0], [*parts[1], end]], [parts[0], parts[1], parts[1], [end]]]
    result = adopted(write_upstream(tmp_path / "up", documents), tmp_path / "data", folder, valid_fraction=0.5)
    assert (result.sampled, result.same) == (2, 2)


def test_long_documents_are_sampled_by_their_beginnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is cut within a character comes back with U+FFFD there."""
    prefix = write_upstream(tmp_path / "up", map(as_bytes, ["aé" * 30, "abé" * 30, "é" * 40]))
    for tokens in (20, 21, 22, 23):
        monkeypatch.setattr(adopt_checks, "_SAMPLE_TOKENS", tokens)
        result = adopted(prefix, tmp_path / str(tokens))
        assert (result.sampled, result.same) == (3, 3)


def change(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_what_is_no_index_of_text_is_refused_by_name(upstream: Path, tmp_path: Path) -> None:
    idx, whole = Path(f"{upstream}.idx"), Path(f"{upstream}.idx").read_bytes()

    def refused(message: str, offset: int, data: bytes) -> None:
        idx.write_bytes(whole)
        change(idx, offset, data)
        with pytest.raises(DataError, match=message):
            MegatronIndex(upstream)

    refused(r"begins with b'TNTIDX.*no index of megatron-core", 0, b"TNTIDX\0\0\0")
    refused(r"version 2 of the format", 9, b"\2")
    refused(r"its ids are stored as int64. Ids of text are int32 or uint16", 17, b"\5")
    refused(r"stored as the unknown code 77", 17, b"\x4d")
    refused(r"takes \d+. It is truncated", 18, b"\x29")
    pointers = HEADER.size + 4 * 40
    refused(r"sequence 3 begins at byte 0 of the .bin where the one before ends", pointers + 8 * 3, bytes(8))
    refused(r"sequence 3 begins at byte", HEADER.size + 4 * 2, b"\1")
    refused(r"its documents overlap", pointers + 8 * 40 + 8 * 3, bytes(8))
    refused(r"documents are of the sequences 1 to 40", pointers + 8 * 40, b"\1")
    idx.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="truncated or damaged"):
        MegatronIndex(upstream)
    idx.write_bytes(whole + bytes(40))
    with pytest.raises(DataError, match="data with images"):
        MegatronIndex(upstream)
    idx.write_bytes(whole)
    with Path(f"{upstream}.bin").open("ab") as stream:
        stream.write(bytes(2))
    with pytest.raises(DataError, match=r"its last sequence ends at byte \d+, but corpus_text_document.bin has"):
        MegatronIndex(upstream)
    Path(f"{upstream}.bin").unlink()
    with pytest.raises(DataError, match=r"corpus_text_document.bin: cannot be read \(No such file"):
        MegatronIndex(upstream)


def test_either_file_may_be_named(upstream: Path) -> None:
    for suffix in ("", ".bin", ".idx"):
        assert MegatronIndex(Path(f"{upstream}{suffix}")).documents == 40
    dotted = write_upstream(upstream.with_name("v1.5_text"), map(as_bytes, texts(3)))
    assert MegatronIndex(dotted).documents == 3


def test_an_index_of_other_data_is_noticed_later_too(upstream: Path, tmp_path: Path) -> None:
    """What load_manifest asserts holds where the index leaves documents out."""
    adopted(upstream, tmp_path / "data", valid_fraction=0.2)
    idx = tmp_path / "data" / "train.idx"
    manifest = load_manifest(tmp_path / "data")
    last = HEADER.size + 4 * manifest.train.documents + 8 * (manifest.train.documents - 1)
    change(idx, last, bytes(8))
    with pytest.raises(DataError, match="the last document ends at byte"):
        load_manifest(tmp_path / "data")


def test_a_split_that_leaves_nothing_out_says_so_in_no_word(upstream: Path, tmp_path: Path) -> None:
    """The name of the index of samples is made of what a split says: that of older data sets stays."""
    adopted(upstream, tmp_path / "data")
    manifest = load_manifest(tmp_path / "data")
    assert "skipped_tokens" in manifest.train.model_dump_json()
    assert "skipped_tokens" not in manifest.valid.model_dump_json()


def test_options_that_cannot_work_are_refused(upstream: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--valid-fraction=1.5"):
        adopted(upstream, tmp_path / "data", valid_fraction=1.5)
    with pytest.raises(ConfigError, match=r"--seed=-1"):
        adopted(upstream, tmp_path / "data", seed=-1)
    lonely = write_upstream(tmp_path / "lonely", map(as_bytes, ["one"]))
    with pytest.raises(DataError, match="1 documents with text, and two are needed"):
        adopted(lonely, tmp_path / "data")
    alike = write_upstream(tmp_path / "alike", map(as_bytes, ["one"] * 3))
    with pytest.raises(DataError, match="all 3 documents have the same text"):
        adopted(alike, tmp_path / "data")


def test_a_document_too_long_for_the_index_is_refused(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "x.idx", "uint16")
    with pytest.raises(DataError, match="a document has 2,147,483,648 tokens"):
        writer.add(Places(np.array([0]), np.array([2**31])))
    writer.close()


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Chunks of the .bin are read one after another: with 48 times the bytes of a chunk, a few chunks at a time."""
    import tracemalloc

    prefix = tmp_path / "up"
    writer = IndexWriter(prefix.with_suffix(".idx"), "uint16")
    document = np.full(1000, 97, np.uint16)
    with prefix.with_suffix(".bin").open("wb") as stream:
        for number in range(24_000):
            document[:5] = list(f"{number:05}".encode())
            document[-1] = EOD
            stream.write(document.tobytes())
    writer.add(Places(np.arange(24_000) * 2000, np.full(24_000, 1000)))
    writer.finish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adopt_checks, "_CHUNK_BYTES", 1 << 20)
        tracemalloc.start()
        adopted(prefix, tmp_path / "data")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20 << 20


def test_its_library_is_not_megatron() -> None:
    """Adopting is a matter of files: it works where neither torch nor megatron is."""
    import subprocess
    import sys

    code = "import sys, mtp_megatron.data.adopt; print({'torch', 'megatron'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
