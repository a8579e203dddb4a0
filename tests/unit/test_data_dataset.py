"""Samples through megatron-core's GPTDataset: the right tokens, a cache that is whole, the same on every rank."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch

from mtp_megatron.data.blend import load_blend
from mtp_megatron.data.dataset import build_datasets
from mtp_megatron.data.manifest import load_manifest
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.errors import ConfigError, DataError
from tests.harness import run_world


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    (root / "src").mkdir()
    for i in range(30):
        (root / "src" / f"{i:02}.py").write_text(f"value_{i} = {i}\n" * (3 + i))
    preprocess(PreprocessOptions(root / "data", (root / "src",), valid_fraction=0.2, quiet=True))
    return root / "data"


@pytest.fixture
def data(original, tmp_path):
    """A copy without a cache."""
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data"


def build(data, **changes):
    arguments = {"seq_length": 64, "train_samples": 100, "seed": 1, **changes}
    return build_datasets(load_blend([(None, str(data))]), **arguments)


def test_a_sample_is_consecutive_text_and_its_labels_are_one_ahead(data):
    train, valid = build(data)
    manifest = load_manifest(data)
    tokenizer = manifest.load_tokenizer()
    stream = (data / "train.bin").read_bytes()
    assert len(train) == 100
    assert train.samples_per_epoch == (manifest.train.tokens - 1) // 64
    assert len(valid) == (manifest.valid.tokens - 1) // 64
    inside = 0
    for i in range(train.samples_per_epoch):
        sample = train[i]
        assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
        assert {value.shape for value in sample.values()} == {(64,)}
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["position_ids"], torch.arange(64))
        assert sample["loss_mask"].sum() == 64  # end-of-document tokens are learned too
        inside += sample["tokens"].numpy().astype("uint16").tobytes() in stream
    assert inside > 5  # those that lie within one document
    assert tokenizer.eod in torch.cat([train[i]["tokens"] for i in range(train.samples_per_epoch)])


def test_an_epoch_covers_the_data(data):
    train, _ = build(data)
    manifest = load_manifest(data)
    seen = torch.cat([train[i]["tokens"] for i in range(train.samples_per_epoch)])
    eods = int((seen == manifest.eod).sum())
    assert manifest.train.documents - 2 <= eods <= manifest.train.documents  # the last partial sample is dropped
    assert len(seen) > manifest.train.tokens - 65


def test_the_order_depends_on_the_seed_but_not_on_the_number_of_samples(data):
    short, _ = build(data, train_samples=10)
    long, _ = build(data, train_samples=1000)
    other, _ = build(data, train_samples=10, seed=2)
    assert all(torch.equal(short[i]["tokens"], long[i]["tokens"]) for i in range(10))
    assert not all(torch.equal(short[i]["tokens"], other[i]["tokens"]) for i in range(10))
    assert len(long) == 1000
    assert torch.is_tensor(long[999]["tokens"])


def test_held_out_samples_do_not_repeat(data):
    _, everything = build(data)
    _, few = build(data, valid_samples=3)
    _, many = build(data, valid_samples=10_000)
    assert (len(few), len(many)) == (3, len(everything))
    assert few[None]["loss_mask"].sum() == 0  # fills up a batch


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"seq_length": 2000},
            DataError,
            r"valid\.bin: \d+ tokens in 6 documents are too few .*needs 2001.*valid-f",
        ),
        ({"seq_length": 99_999}, DataError, r"train\.bin: \d+ tokens .*seq_length=99999 \(needs 100000.*more text"),
        ({"seq_length": 0}, ConfigError, r"model\.seq_length=0"),
        ({"train_samples": 0}, ConfigError, r"train_samples=0"),
        ({"valid_samples": 0}, ConfigError, r"valid_samples=0"),
        ({"seed": 2**32}, ConfigError, r"data\.seed=4294967296"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(data, change, error, message):
    with pytest.raises(error, match=message):
        build(data, **change)
    assert not (data / "cache").exists()


def test_the_cache_is_whole_or_absent(data, monkeypatch):
    import numpy

    saved = []

    def save(path, *args, **kwargs):
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        real = numpy.save
        patch.setattr(numpy, "save", save)
        with pytest.raises(KeyboardInterrupt):
            build(data)
    assert len(saved) == 3
    assert list((data / "cache").iterdir()) == []
    build(data)
    (key,) = (data / "cache").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in key.iterdir()}
    build(data)  # reads it
    assert {path.name: path.stat().st_mtime_ns for path in key.iterdir()} == before


def test_another_data_set_at_the_same_path_does_not_meet_the_old_cache(data, tmp_path):
    cache = tmp_path / "cache"
    before, _ = build(data, cache_dir=cache)
    (tmp_path / "more").mkdir()
    for i in range(30):
        (tmp_path / "more" / f"{i}.txt").write_text(f"another text {i}\n" * 9)
    shutil.rmtree(data)
    preprocess(PreprocessOptions(data, (tmp_path / "more",), quiet=True))
    after, _ = build(data, cache_dir=cache)
    assert after.samples_per_epoch == (load_manifest(data).train.tokens - 1) // 64 != before.samples_per_epoch


def test_the_index_comes_along_with_a_copy_of_the_data(data, tmp_path):
    """As it is found on a host that mounts the folder elsewhere."""
    first, _ = build(data)
    shutil.copytree(data, tmp_path / "elsewhere")
    (key,) = (tmp_path / "elsewhere" / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in (key, *key.iterdir())}
    second, _ = build(tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere" / "cache").iterdir()) == [key]
    assert {path: path.stat().st_mtime_ns for path in (key, *key.iterdir())} == before
    assert all(torch.equal(first[i]["tokens"], second[i]["tokens"]) for i in range(100))


def test_an_index_with_a_missing_file_is_written_again(data):
    train, _ = build(data)
    expected = train[7]["tokens"]
    (key,) = (data / "cache").iterdir()
    others = sorted(path.name for path in key.iterdir())
    next(iter(key.glob("*shuffle*"))).unlink()  # by what sweeps a scratch disk
    stale = next(iter(key.glob("*sample_index*")))
    stale.write_bytes(b"")  # not read again
    train, _ = build(data)
    assert torch.equal(train[7]["tokens"], expected)
    assert sorted(path.name for path in key.iterdir()) == others
    assert [path for path in (data / "cache").iterdir() if not path.name.startswith(".")] == [key]


def test_what_killed_jobs_left_goes_when_it_is_a_day_old(data):
    cache = data / "cache"
    old, young, foreign = cache / f".{'0' * 16}.abc", cache / f".{'1' * 16}.abc", cache / ".snapshot"
    for folder in (old, young, foreign):
        folder.mkdir(parents=True)
        (folder / "x").write_text("")
    for path in (
        old,
        old / "x",
        young,
        foreign,
        foreign / "x",
    ):  # what is being written has a new file in an old folder
        os.utime(path, (0, 0))
    build(data)
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()


def test_a_cache_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="index of samples cannot be written"):
        build(data, cache_dir=tmp_path / "file")


def test_samples_can_be_sent_to_another_process(data):
    train, _ = build(data)
    assert torch.equal(pickle.loads(pickle.dumps(train))[5]["tokens"], train[5]["tokens"])


def _build_on_rank(rank, world_size, data, cache):
    train, valid = build(data, cache_dir=cache)
    return os.getpid(), [train[i]["tokens"].tolist() for i in range(0, 100, 9)], len(valid)


def test_every_rank_gets_the_same_samples(data, tmp_path):
    first, second = run_world(_build_on_rank, 2, data, tmp_path / "cache")
    assert first[0] != second[0]
    assert first[1:] == second[1:]
    (key,) = (tmp_path / "cache").iterdir()
    assert len(list(key.iterdir())) == 8


def _refused_on_rank(rank, world_size, data, cache):
    try:
        build(data, cache_dir=cache)
    except DataError as error:
        return str(error)
    return None


def test_a_problem_on_rank_zero_is_raised_on_every_rank(data, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = run_world(_refused_on_rank, 2, data, tmp_path / "file")
    assert "index of samples cannot be written" in first
    assert first == second
