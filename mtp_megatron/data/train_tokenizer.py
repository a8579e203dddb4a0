"""Train a sentencepiece model that suits source code: lossless, and standard enough for every Llama loader."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

from mtp_megatron.data.tokenizer import SentencePieceTokenizer
from mtp_megatron.errors import ConfigError

SPECIAL_TOKENS = 3  # <unk>, <s>, </s>
MIN_VOCAB = 256 + SPECIAL_TOKENS + 1
# Reserved inside sentencepiece (tab, U+2581, U+2585), or better not in a piece (line ends, NUL): encoded as bytes.
_NEVER_IN_A_PIECE = re.compile("[\t\r\n\0\u2581\u2585]+")
_LONGEST_LINE = 65536  # characters; sentencepiece drops longer ones without a word, so they are cut here


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a byte-pair model with byte fallback on documents; the same documents give the same model.

    Text is taken as it is: no normalisation, no added or removed spaces. A line end, a tab and every character outside
    the learned alphabet become byte tokens (Llama's convention), runs of spaces become pieces of their own. Ids: 0
    ``<unk>``, 1 ``<s>``, 2 ``</s>`` (ends documents), 3 to 258 the bytes.

    Args:
        documents: the texts to learn from.
        vocab_size: number of ids in all.

    Raises:
        ConfigError: a size that cannot be reached with this text.
    """
    from sentencepiece import SentencePieceTrainer

    field = "--train-tokenizer"
    if vocab_size < MIN_VOCAB:
        remedy = f"256 bytes and 3 special tokens need {MIN_VOCAB} or more."
        raise ConfigError(field, vocab_size, "is too small", remedy)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=8 * _LONGEST_LINE,  # bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # stored in the model, so it must not depend on the machine
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _explain(field, vocab_size, str(error)) from error
    return SentencePieceTokenizer(model.getvalue(), f"sentencepiece model with {vocab_size} tokens")


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in _NEVER_IN_A_PIECE.split(document):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _explain(field: str, vocab_size: int, message: str) -> ConfigError:
    if found := re.search(r"too high .*value <= (\d+)", message):
        remedy = f"At most {found[1]} tokens can be learned from this text: ask for fewer, or give more text."
        return ConfigError(field, vocab_size, "is more than the text supports", remedy)
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(field, vocab_size, "is too small for this text's alphabet", f"Ask for {found[1]} or more.")
    return ConfigError(field, vocab_size, f"sentencepiece could not train ({message.strip()})", "Give more text.")
