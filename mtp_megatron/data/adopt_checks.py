"""Whether ids that came without their text are a tokenizer's: by a sample that is encoded again, then by every id."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mtp_megatron.data.huggingface import HuggingFaceTokenizer
from mtp_megatron.data.megatron_index import MegatronIndex, Places
from mtp_megatron.data.progress import byte_bar
from mtp_megatron.data.scan import key_of
from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.errors import DataError

_CHUNK_BYTES = 1 << 26
_SAMPLE = 64  # documents that are decoded and encoded again
_SAMPLE_TOKENS = 20_000  # of each at most
_SAME = 0.5  # of the sample, with a tokenizer that loses nothing: related tokenizers agree on some documents


@dataclass(frozen=True)
class Scan:
    """One pass over a ``.bin``: ``keys[i]`` is a number drawn from the ids of document i and the seed, ``sha256`` is of
    all ids and of where documents end."""

    keys: np.ndarray  # uint64 [documents]
    sha256: str
    inner_ends: int


def compare_sample(index: MegatronIndex, tokenizer: Tokenizer) -> tuple[int, int]:
    """Documents from all over the data that were decoded and encoded again, and how many came back the same.

    Of a document of several sequences, whose texts were encoded one by one, the first is taken. A text may still differ
    for the sake of special tokens that it spells, and those with unknown characters do where a tokenizer loses them.

    Raises:
        DataError: one does not end with the end-of-document id, an id is outside the vocabulary, or too few came back:
            none, or less than half where the tokenizer is lossless.
    """
    ids = np.memmap(index.bin, index.dtype, "r")
    wanted = np.unique(np.linspace(0, index.documents - 1, _SAMPLE).astype(np.int64))
    last: list[int] = []
    cut: list[tuple[list[int], bool]] = []  # without the last token, and whether more of it was left out
    first = 0
    for places in index.blocks():
        numbers = wanted[(wanted >= first) & (wanted < first + len(places.tokens))]
        chosen = places.take(numbers - first)
        first += len(places.tokens)
        starts, sequences = (chosen.starts // index.item).tolist(), index.first_sequences(numbers).tolist()
        for start, tokens, sequence in zip(starts, chosen.tokens.tolist(), sequences, strict=True):
            if tokens:
                last.append(int(ids[start + tokens - 1]))
            if (whole := min(sequence, tokens - 1)) > 0:  # an empty document has -1
                beginning = np.array(ids[start : start + min(whole, _SAMPLE_TOKENS)])
                _check_ids(beginning, start, index, tokenizer)
                cut.append((beginning.tolist(), whole > _SAMPLE_TOKENS))
    ended = last.count(tokenizer.eod)
    if ended < len(last):
        raise _not_ended(index, tokenizer, ended, len(last), last)
    same = sum(_comes_back(document, tokenizer, incomplete) for document, incomplete in cut)
    if cut and same < (max(1, _SAME * len(cut)) if tokenizer.lossless else 1):
        text = tokenizer.decode(cut[0][0][:40])
        raise DataError(
            f"{index.bin}: {same or 'none'} of {len(cut)} documents {'have' if same > 1 else 'has'} the ids that "
            f"{tokenizer.name} gives to its text, so they are another tokenizer's. The first begins with {text!r}. "
            "Give the one that made them with --tokenizer."
        )
    return len(cut), same


def _comes_back(document: list[int], tokenizer: Tokenizer, incomplete: bool) -> bool:
    def same(again: list[int], text: list[int]) -> bool:
        half = len(text) // 2  # where a text was cut its last ids may be others
        return again[:half] == text[:half] if incomplete else again == text

    text = document[1:] if tokenizer.bos is not None and document[0] == tokenizer.bos else document
    try:
        if same(tokenizer.encode(tokenizer.decode(text)), text):
            return True
    except DataError:  # a text that encodes to the end of a document
        pass
    return isinstance(tokenizer, HuggingFaceTokenizer) and same(tokenizer.encode_again(document), document)


def scan_ids(index: MegatronIndex, tokenizer: Tokenizer, seed: int, *, quiet: bool) -> Scan:
    """Read every id: in the vocabulary, and the end-of-document id at the end of every document."""
    keys, inner, documents = array("Q"), 0, 0
    whole, cuts = hashlib.sha256(), hashlib.sha256()
    with index.bin.open("rb") as stream, byte_bar(f"check {index.bin.name}", index.bin_bytes, quiet=quiet) as bar:
        for places in _chunks(index):
            data = stream.read(int(places.tokens.sum()) * index.item)
            ids = np.frombuffer(data, index.dtype)
            if len(ids) != int(places.tokens.sum()):
                raise DataError(f"{index.bin}: was shortened while it was read. Adopt it again when it is complete.")
            _check_ids(ids, int(places.starts[0]) // index.item, index, tokenizer)
            ends = np.cumsum(places.tokens)
            last = ids[ends[places.tokens > 0] - 1]
            if (last != tokenizer.eod).any():
                ended = int((last == tokenizer.eod).sum())
                raise _not_ended(index, tokenizer, ended, len(last), last[last != tokenizer.eod].tolist(), documents)
            inner += int((ids == tokenizer.eod).sum()) - len(last)
            whole.update(data)
            cuts.update(places.tokens.tobytes())
            view = memoryview(data)
            for end, tokens in zip((ends * index.item).tolist(), (places.tokens * index.item).tolist(), strict=True):
                keys.append(key_of(bytes(view[end - tokens : end]), seed))
            documents += len(places.tokens)
            bar.update(len(data))
    identity = hashlib.sha256(whole.digest() + cuts.digest()).hexdigest()
    return Scan(np.frombuffer(keys, dtype=np.uint64), identity, inner)


def _chunks(index: MegatronIndex) -> Iterator[Places]:
    """Every document, as many at a time as make about 64 MB; at least one."""
    for places in index.blocks():
        first = 0
        while first < len(places.tokens):
            end = int(places.starts[first]) + _CHUNK_BYTES
            stop = max(first + 1, int(np.searchsorted(places.starts, end)))
            yield places.take(slice(first, stop))
            first = stop


def _check_ids(ids: np.ndarray, first: int, index: MegatronIndex, tokenizer: Tokenizer) -> None:
    wrong = ids >= tokenizer.vocab_size
    if index.dtype == "int32":
        wrong |= ids < 0
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"{index.bin}: id {ids[at]} (token {first + at}) is outside the vocabulary of {tokenizer.name} (0 to "
            f"{tokenizer.vocab_size - 1}). Give the tokenizer that made the ids with --tokenizer."
        )


def _not_ended(
    index: MegatronIndex, tokenizer: Tokenizer, ended: int, looked_at: int, last: list[int], before: int = 0
) -> DataError:
    ((found, _),) = Counter(token for token in last if token != tokenizer.eod).most_common(1)
    name = f" ({tokenizer.token_of(found)})" if isinstance(tokenizer, HuggingFaceTokenizer) else ""
    where = f" from document {before} on" if before else ""
    return DataError(
        f"{index.bin}: of {looked_at} documents{where} {ended} end with the end-of-document id {tokenizer.eod}, others "
        f"with {found}{name}. Preprocess with upstream's --append-eod, or name the token that ends them with --eod."
    )
