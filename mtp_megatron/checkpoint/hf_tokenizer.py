"""The tokenizer files of a Hugging Face folder, with the ids that the model was trained on.

``tokenizer.json`` is written as data rather than left to transformers' own conversion of ``tokenizer.model``: that one
prepends a space and a ``<s>``, and reads the text ``<s>`` as the special token, none of which training data has. So the
class named is the generic one, which takes ``tokenizer.json`` at its word, and special tokens in a text are text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mtp_megatron.data.huggingface import HuggingFaceTokenizer
from mtp_megatron.data.tokenizer import MODEL_FILE, ByteTokenizer, Tokenizer

_SPACE = "\u2581"  # sentencepiece's visible space
_END_OF_DOCUMENT = "<|endoftext|>"
_BPE_MODEL, _CONTROL, _UNKNOWN, _NORMAL, _BYTE = 2, 3, 2, 1, 6  # TrainerSpec.ModelType and SentencePiece.Type


def tokenizer_files(tokenizer: Tokenizer, context: int) -> tuple[dict[str, bytes], str | None]:
    """Content of the tokenizer's files by name, and a notice for the user when ``tokenizer.json`` could not be exact.

    Args:
        tokenizer: what the model was trained with.
        context: positions of the model, transformers' ``model_max_length``.
    """
    files = dict(tokenizer.files())
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return files, None if files else "the model came without a tokenizer, so the folder has none"
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": context,
    }
    notice = None
    if isinstance(tokenizer, ByteTokenizer):
        described: dict[str, Any] | None = _bytes_json()
        settings |= {"eos_token": _END_OF_DOCUMENT}
    else:
        described, names, obstacle = _sentencepiece_json(files[MODEL_FILE])
        settings |= names
        if obstacle:
            settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
            notice = (
                f"no tokenizer.json: {obstacle}. transformers converts {MODEL_FILE} by itself and its ids may differ "
                "from those of training; encode with sentencepiece where that matters."
            )
    if described is not None:
        files["tokenizer.json"] = json.dumps(described, ensure_ascii=False).encode("utf-8")
    files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode("utf-8")
    return files, notice


def _described(
    special: list[tuple[int, str]], normalizer: Any, pre_tokenizer: Any, decoder: Any, model: dict[str, Any]
) -> dict[str, Any]:
    """A ``tokenizer.json`` of the tokenizers library, format version 1.0."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **model,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": text, **flags} for token, text in special],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _bytes_json() -> dict[str, Any]:
    """Ids 0 to 255 are bytes: a byte-level BPE without a merge."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    vocab[_END_OF_DOCUMENT] = ByteTokenizer.eod
    special = [(ByteTokenizer.eod, _END_OF_DOCUMENT)]
    return _described(special, None, level, level, {"vocab": vocab, "merges": []})


def _byte_alphabet() -> Iterator[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    unprintable = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield chr(byte)
        else:
            yield chr(256 + unprintable)
            unprintable += 1


def _sentencepiece_json(content: bytes) -> tuple[dict[str, Any] | None, dict[str, str], str | None]:
    """``tokenizer.json`` of a sentencepiece model or None, its special tokens' names, and why it is None."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    trainer, normalizer, pieces = model.trainer_spec, model.normalizer_spec, model.pieces
    names = {
        f"{name}_token": pieces[token].piece
        for name, token in (("unk", trainer.unk_id), ("bos", trainer.bos_id), ("eos", trainer.eos_id))
        if token >= 0
    }
    known = {_NORMAL, _CONTROL, _UNKNOWN, _BYTE}
    obstacle = next(
        (
            reason
            for applies, reason in (
                (trainer.model_type != _BPE_MODEL, "the sentencepiece model is not a BPE model"),
                (bool(normalizer.precompiled_charsmap), "the sentencepiece model rewrites characters"),
                (normalizer.remove_extra_whitespaces, "the sentencepiece model removes spaces"),
                (trainer.treat_whitespace_as_suffix, "the sentencepiece model puts spaces at the end of words"),
                (any(piece.type not in known for piece in pieces), "the sentencepiece model has user defined pieces"),
            )
            if applies
        ),
        None,
    )
    if obstacle:
        return None, names, obstacle
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    special = [(token, piece.piece) for token, piece in enumerate(pieces) if piece.type in (_CONTROL, _UNKNOWN)]
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    settings = {
        "unk_token": names["unk_token"],
        "fuse_unk": True,
        "byte_fallback": any(piece.type == _BYTE for piece in pieces),
        "vocab": {piece.piece: token for token, piece in enumerate(pieces)},
        "merges": _merges(scores),
    }
    normalized = {"type": "Sequence", "normalizers": normalizers}
    return _described(special, normalized, None, {"type": "Sequence", "decoders": decoders}, settings), names, None


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Every way to make a piece of two others, best piece first: sentencepiece merges by the score of the result."""
    found = [
        (-score, length, piece)
        for piece, score in scores.items()
        for length in range(1, len(piece))
        if piece[:length] in scores and piece[length:] in scores
    ]
    return [[piece[:length], piece[length:]] for _, length, piece in sorted(found)]
