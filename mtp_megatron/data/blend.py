"""The data of a run: one data set, or several that are blended by weight (neither torch nor megatron)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from mtp_megatron.data.manifest import Manifest, load_manifest
from mtp_megatron.errors import ConfigError

FIELD = "data.blend"
MOST_PARTS = 32_766  # megatron-core counts data sets in 16 bits (megatron.core.datasets.blended_dataset)


@dataclass(frozen=True)
class Blend:
    """Data sets with one tokenizer, and the share of the training samples that each gives.

    Attributes:
        parts: one or more, in the order in which the user named them.
        weights: their shares; they add up to 1.
    """

    parts: tuple[Manifest, ...]
    weights: tuple[float, ...]

    @property
    def first(self) -> Manifest:
        """The one to ask for what all have in common: tokenizer, vocabulary, end of document."""
        return self.parts[0]

    @property
    def eod(self) -> int:
        return self.first.eod

    @property
    def fingerprint(self) -> str:
        """Equal exactly when content, weights and order are; of one data set it is that one's own."""
        if len(self.parts) == 1:
            return self.first.fingerprint
        return hashlib.sha256(
            json.dumps([[part["weight"], part["fingerprint"]] for part in self.record()]).encode()
        ).hexdigest()

    def record(self) -> list[dict[str, Any]]:
        """Every part as plain data, for checkpoints and for comparisons: folder, weight, fingerprint."""
        return [
            {"folder": str(part.path), "weight": weight, "fingerprint": part.fingerprint}
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]


def load_blend(parts: Sequence[tuple[float | None, str]]) -> Blend:
    """Read the manifests of ``(weight, folder)`` pairs and check that they can be trained on together.

    Args:
        parts: weights are positive and of any sum, or None for all of them: then a folder's weight is the number of its
            training tokens.

    Raises:
        DataError: a folder that is no whole data set (:func:`.manifest.load_manifest`).
        ConfigError: two that differ in tokenizer, or have the same content; too many.
    """
    if len(parts) > MOST_PARTS:
        raise ConfigError(
            FIELD, f"{len(parts)} folders", f"more than {MOST_PARTS}", "Preprocess some of them together."
        )
    manifests = tuple(load_manifest(folder) for _, folder in parts)
    seen: dict[str, Manifest] = {}
    for manifest in manifests:
        _check_tokenizer(manifests[0], manifest)
        twin = seen.setdefault(manifest.fingerprint, manifest)
        if twin is not manifest:
            raise ConfigError(
                FIELD,
                str(manifest.path),
                f"it has the content of {twin.path}: the same samples would come twice",
                "Give one of them, with the weight of both.",
            )
    weights = [
        Fraction(manifest.train.tokens) if weight is None else Fraction(repr(weight))
        for (weight, _), manifest in zip(parts, manifests, strict=True)
    ]
    # Fractions of the numbers as they are written: [7, 3] and [0.7, 0.3] give the same shares, to the last bit.
    return Blend(manifests, tuple(float(weight / sum(weights)) for weight in weights))


def changes(there: Sequence[dict[str, Any]], here: Blend) -> list[str]:
    """In what ``here`` is another blend than the recorded one (:meth:`Blend.record`), in words."""
    texts = []
    for number, (old, new) in enumerate(zip_longest(there, here.record()), start=1):
        if old is None:
            texts.append(f"folder {number}, {new['folder']}, is new")
        elif new is None:
            texts.append(f"folder {number} was {old['folder']}, and is gone")
        elif old["fingerprint"] != new["fingerprint"]:
            texts.append(f"folder {number} was {old['folder']}, and {new['folder']} has other content")
        elif old["weight"] != new["weight"]:
            texts.append(f"{new['folder']} had a weight of {old['weight']:.6g}, and has {new['weight']:.6g}")
    return texts


def _check_tokenizer(first: Manifest, other: Manifest) -> None:
    mine, theirs = (
        {
            "tokenizer": part.tokenizer.kind,
            "sha256": part.tokenizer.sha256,
            "vocabulary": part.vocab_size,
            "eod": part.eod,
        }
        for part in (first, other)
    )
    differing = [f"{name} {theirs[name]} and not {mine[name]}" for name in mine if theirs[name] != mine[name]]
    if differing:
        raise ConfigError(
            FIELD,
            str(other.path),
            f"made with another tokenizer than {first.path} ({', '.join(differing)})",
            "Preprocess both with the same one (mtp-megatron preprocess --tokenizer), or leave one out.",
        )
