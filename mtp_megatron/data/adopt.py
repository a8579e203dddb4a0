"""A data set folder of ids that Megatron-LM's ``tools/preprocess_data.py`` made: checked, not copied.

The ``.bin`` gets a second name in the folder. Documents that are held out are left out by the index of the training
split, which is written anew, and copied to files of their own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtp_megatron.data.adopt_checks import Scan, compare_sample, scan_ids
from mtp_megatron.data.atomic import new_folder
from mtp_megatron.data.corpus import Tally
from mtp_megatron.data.manifest import Manifest, SourceInfo, SplitInfo, TokenizerInfo, load_manifest
from mtp_megatron.data.megatron_index import IndexWriter, MegatronIndex, Places
from mtp_megatron.data.preprocess import PreprocessResult, data_set_there, fingerprint_of, identity_of
from mtp_megatron.data.scan import check_holding_out, hold_out
from mtp_megatron.data.tokenizer_store import choose_tokenizer, write_tokenizer
from mtp_megatron.data.work_folder import differences
from mtp_megatron.errors import DataError

Naming = Literal["link", "symlink", "copy"]
_COPIED_BYTES = 1 << 24  # at once


@dataclass(frozen=True)
class AdoptOptions:
    """What ``mtp-megatron adopt`` may be told.

    Args:
        prefix: path of the ``.bin`` and ``.idx`` without these.
        output: folder to make; must not exist, be empty, or hold the data set that these options would make.
        tokenizer: what :func:`.tokenizer_store.choose_tokenizer` takes: the one that made the ids.
        eod: the token that ends every document, for a Hugging Face tokenizer; None: the tokenizer's own.
        valid: path of held-out data in files of their own; None: hold documents out.
        valid_fraction: share of the documents that are held out (at least one is, at least one is not).
        seed: which documents are held out.
        naming: how the folder gets the ``.bin``: a hard link, a symbolic link, or a copy.
        quiet: no progress bars.
    """

    prefix: Path
    output: Path
    tokenizer: str
    eod: str | None = None
    valid: Path | None = None
    valid_fraction: float = 0.01
    seed: int = 1234
    naming: Naming = "link"
    quiet: bool = False

    def __post_init__(self) -> None:
        check_holding_out(self.valid_fraction, self.seed)


@dataclass(frozen=True)
class AdoptResult:
    """The data set, and what was found in it.

    Attributes:
        data: the data set; its tally counts empty documents, which are left out.
        inner_ends: end-of-document ids that are not the last of their document.
        sampled: documents that were decoded and encoded again.
        same: those of them whose ids came back.
    """

    data: PreprocessResult
    inner_ends: int
    sampled: int
    same: int


def adopt(options: AdoptOptions) -> AdoptResult:
    """Make the folder, or find that it is already there. Every id is read once before anything is written.

    Raises:
        ConfigError: a tokenizer or token that cannot be.
        DataError: files that are no whole index and ids of text, ids outside the tokenizer's vocabulary or of another
            tokenizer, documents that do not end with its end-of-document id, or a folder that cannot be written.
    """
    old = data_set_there(options.output)
    tokenizer = choose_tokenizer(options.tokenizer, options.eod)
    train = MegatronIndex(options.prefix)
    valid = None if options.valid is None else MegatronIndex(options.valid)
    indices = [train] if valid is None else [train, valid]
    if valid is not None and valid.dtype != train.dtype:
        raise DataError(f"{valid.idx}: ids are {valid.dtype}, and {train.dtype} in {train.idx}. Preprocess both alike.")
    samples = [compare_sample(index, tokenizer) for index in indices]
    scans = [scan_ids(index, tokenizer, options.seed, quiet=options.quiet) for index in indices]
    recorded = {
        "tokenizer": identity_of(tokenizer),
        "valid_fraction": options.valid_fraction if valid is None else None,
        "seed": options.seed,
        "adopted": [scan.sha256[:16] for scan in scans],
    }
    fingerprint = fingerprint_of(recorded, "".join(scan.sha256 for scan in scans))
    empty = sum(_empty(index) for index in indices)

    def result(manifest: Manifest, *, up_to_date: bool) -> AdoptResult:
        data = PreprocessResult(manifest, tokenizer, Tally(empty=empty), up_to_date)
        inner = sum(scan.inner_ends for scan in scans)
        return AdoptResult(data, inner, *(sum(count) for count in zip(*samples, strict=True)))

    if old is not None:
        if old.fingerprint != fingerprint:
            changes = differences(old.options, recorded) or "made from other ids"
            raise DataError(
                f"{options.output}: holds another data set ({changes}). Choose another --output, or remove the folder."
            )
        return result(old, up_to_date=True)
    with new_folder(options.output) as folder:
        write_tokenizer(tokenizer, folder)
        _put(train.bin, folder / "train.bin", options.naming)
        if valid is None:
            train_split, valid_split = _split(train, scans[0], folder, options)
        else:
            _put(valid.bin, folder / "valid.bin", options.naming)
            train_split, valid_split = _whole(train, folder / "train"), _whole(valid, folder / "valid")
        manifest = Manifest(
            fingerprint=fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            dtype=train.dtype,
            tokenizer=TokenizerInfo.of(tokenizer),
            source=SourceInfo(
                files=2 * len(indices),
                rejected=0,
                rejected_examples=(),
                empty=empty,
                sha256=hashlib.sha256("".join(scan.sha256 for scan in scans).encode()).hexdigest(),
            ),
            options=recorded | {"from": [str(index.bin.absolute()) for index in indices], "naming": options.naming},
            train=train_split,
            valid=valid_split,
        )
        manifest.write(folder)
        load_manifest(folder)  # what is published has passed the checks that training makes
    return result(manifest.at(options.output), up_to_date=False)


def _empty(index: MegatronIndex) -> int:
    return sum(int((places.tokens == 0).sum()) for places in index.blocks())


def _put(source: Path, target: Path, naming: Naming) -> None:
    """Give the folder the ``.bin``."""
    source = source.resolve()
    if naming == "copy":
        shutil.copyfile(source, target)
        return
    if naming == "symlink":
        target.symlink_to(source)
        return
    try:
        os.link(source, target)
    except OSError as error:
        raise DataError(
            f"{source}: cannot get a second name (a hard link) in {target.parent} ({error.strerror}). Choose an "
            "--output on the same file system, --bin symlink (the data set then needs the original where it is), or "
            "--bin copy."
        ) from error


def _whole(index: MegatronIndex, prefix: Path) -> SplitInfo:
    writer = IndexWriter(prefix.with_suffix(".idx"), index.dtype)
    try:
        for places in index.blocks():
            writer.add(places.take(places.tokens > 0))
        return _finished(writer, prefix, index.bin_bytes)
    finally:
        writer.close()


def _split(index: MegatronIndex, scan: Scan, folder: Path, options: AdoptOptions) -> tuple[SplitInfo, SplitInfo]:
    """The training split by an index that leaves out what is held out, and that copied.

    The last document stays: where it ends is how a data set tells that its index belongs to its ``.bin``.
    """
    used = np.concatenate([places.tokens > 0 for places in index.blocks()])
    keys = scan.keys[used]
    if len(keys) < 2:
        raise DataError(
            f"{index.idx}: {len(keys)} documents with text, and two are needed: one to train on, one to hold out."
        )
    keys[keys == keys[-1]] = np.iinfo(np.uint64).max  # with its copies
    held_out = np.zeros(index.documents, dtype=bool)
    held_out[used] = hold_out(keys, options.valid_fraction)
    train, valid = (IndexWriter(folder / f"{name}.idx", index.dtype) for name in ("train", "valid"))
    try:
        first, end = 0, 0
        with index.bin.open("rb") as source, (folder / "valid.bin").open("wb") as target:
            for places in index.blocks():
                out = held_out[first : first + len(places.tokens)]
                first += len(places.tokens)
                train.add(places.take(~out & (places.tokens > 0)))
                for start, count in zip(places.starts[out].tolist(), places.tokens[out].tolist(), strict=True):
                    source.seek(start)
                    _copy(source, target, count * index.item)
                sizes = places.tokens[out] * index.item
                valid.add(Places(end + np.cumsum(sizes) - sizes, places.tokens[out]))
                end += int(sizes.sum())
        return _finished(train, folder / "train", index.bin_bytes), _finished(valid, folder / "valid", end)
    finally:
        train.close()
        valid.close()


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        data = source.read(min(size, _COPIED_BYTES))
        if not data:
            raise DataError(f"{source.name}: was shortened while it was read. Adopt it again when it is complete.")
        target.write(data)
        size -= len(data)


def _finished(writer: IndexWriter, prefix: Path, bin_bytes: int) -> SplitInfo:
    writer.finish()
    return SplitInfo(
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=None,
        bin_bytes=bin_bytes,
        idx_bytes=prefix.with_suffix(".idx").stat().st_size,
        skipped_tokens=bin_bytes // writer.item - writer.tokens,
    )
