"""The data of a run: one data set, or several that are blended by weight (neither torch nor megatron)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
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
        since: samples that the run had used when it went on with this blend; 0: it began with it.
        before: how many of these each part gave: its next one is the first that it gives now.
        left: how many data sets gave that have no part in it now, as ``(folder, fingerprint, samples)``.
    """

    parts: tuple[Manifest, ...]
    weights: tuple[float, ...]
    since: int
    before: tuple[int, ...]
    left: tuple[tuple[str, str, int], ...] = ()

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
        content = [[weight, part.fingerprint] for weight, part in zip(self.weights, self.parts, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each part: as much of the end of its folder's path as tells it from the others."""
        paths = [part.path.absolute().parts for part in self.parts]
        labels = [""] * len(paths)
        for depth in range(1, 1 + max(map(len, paths))):
            ends = [str(Path(*path[-depth:])) for path in paths]
            taken = Counter(ends)
            labels = [label or (end if taken[end] == 1 else "") for label, end in zip(labels, ends, strict=True)]
        return tuple(labels)

    def used(self, samples: int) -> tuple[int, ...]:
        """How many samples each part has given when the run has used so many, not fewer than ``since``."""
        if len(self.parts) == 1:
            return (self.before[0] + samples - self.since,)
        from mtp_megatron.data.blend_order import BlendOrder  # imports megatron: not needed before a training

        given = BlendOrder(self.weights).counts(samples - self.since)
        return tuple(before + int(count) for before, count in zip(self.before, given, strict=True))

    def record(self, samples: int) -> dict[str, Any]:
        """What a checkpoint says of the data when the run has used so many samples; see :func:`resumed`."""
        rows = zip(self.parts, self.weights, self.before, self.used(samples), strict=True)
        return {
            "since": self.since,
            "folders": [
                {
                    "folder": str(part.path),
                    "fingerprint": part.fingerprint,
                    "weight": weight,
                    "before": before,
                    "samples": used,
                }
                for part, weight, before, used in rows
            ],
            "left": [
                {"folder": folder, "fingerprint": fingerprint, "samples": used}
                for folder, fingerprint, used in self.left
            ],
        }


def load_blend(parts: Sequence[tuple[float | None, str]]) -> Blend:
    """Read the manifests of ``(weight, folder)`` pairs and check that they can be trained on together.

    Args:
        parts: weights are positive and of any sum, or None for all of them: then a folder's weight is the number of its
            training tokens.

    Raises:
        DataError: a folder that is no whole data set (:func:`.manifest.load_manifest`).
        ConfigError: two that differ in tokenizer, or were made of the same documents; too many.
    """
    if len(parts) > MOST_PARTS:
        raise ConfigError(
            FIELD, f"{len(parts)} folders", f"more than {MOST_PARTS}", "Preprocess some of them together."
        )
    manifests = tuple(load_manifest(folder) for _, folder in parts)
    seen: dict[str, Manifest] = {}
    for manifest in manifests:
        _check_tokenizer(manifests[0], manifest)
        twin = seen.setdefault(manifest.source.sha256, manifest)
        if twin is not manifest:
            split = "" if twin.fingerprint == manifest.fingerprint else ", and what one holds out the other trains on"
            raise ConfigError(
                FIELD,
                str(manifest.path),
                f"made of the same documents as {twin.path}: they would come twice{split}",
                "Give one of them, with the weight of both.",
            )
    weights = [
        Fraction(manifest.train.tokens) if weight is None else Fraction(repr(weight))
        for (weight, _), manifest in zip(parts, manifests, strict=True)
    ]
    # Fractions of the numbers as they are written: [7, 3] and [0.7, 0.3] give the same shares, to the last bit.
    total = sum(weights)
    return Blend(manifests, tuple(float(weight / total) for weight in weights), 0, (0,) * len(manifests))


def resumed(record: dict[str, Any], here: Blend) -> tuple[Blend, list[str]]:
    """``here`` as it goes on from a checkpoint's :meth:`Blend.record`, and in what it is another blend, in words.

    The same blend goes on where it was. Another one begins here, and in it every data set with the sample that would
    have been its next one, whatever the weights were: one that is new begins at its first.
    """
    folders, left = record["folders"], record["left"]
    found = _changes(folders, here)
    if not found:
        rest = tuple((old["folder"], old["fingerprint"], old["samples"]) for old in left)
        return replace(here, since=record["since"], before=tuple(old["before"] for old in folders), left=rest), []
    known = {old["fingerprint"]: old for old in [*left, *folders]}
    since = sum(old["samples"] for old in known.values())
    before = tuple(known.pop(part.fingerprint, {"samples": 0})["samples"] for part in here.parts)
    rest = tuple((old["folder"], old["fingerprint"], old["samples"]) for old in known.values())
    return replace(here, since=since, before=before, left=rest), found


def _changes(folders: Sequence[dict[str, Any]], here: Blend) -> list[str]:
    former = {old["fingerprint"]: old for old in folders}
    current = {part.fingerprint: part for part in here.parts}
    gone = [old["folder"] for fingerprint, old in former.items() if fingerprint not in current]
    texts = []
    for part, weight in zip(here.parts, here.weights, strict=True):
        old = former.get(part.fingerprint)
        if old is not None and old["weight"] != weight:
            texts.append(f"{part.path} had a weight of {old['weight']:.6g}, and has {weight:.6g}")
        elif old is None and str(part.path) in gone:
            gone.remove(str(part.path))
            texts.append(f"{part.path} has other content")
        elif old is None:
            texts.append(f"{part.path} is new")
    texts += [f"{folder} is gone" for folder in gone]
    if not texts and list(former) != list(current):
        texts.append("the folders come in another order")
    return texts


def _check_tokenizer(first: Manifest, other: Manifest) -> None:
    compared = {
        "tokenizer": (other.tokenizer.kind, first.tokenizer.kind),
        "sha256": (other.tokenizer.sha256, first.tokenizer.sha256),
        "vocabulary": (other.vocab_size, first.vocab_size),
        "eod": (other.eod, first.eod),
    }
    differing = [f"{name} {theirs} and not {mine}" for name, (theirs, mine) in compared.items() if theirs != mine]
    if differing:
        raise ConfigError(
            FIELD,
            str(other.path),
            f"made with another tokenizer than {first.path} ({', '.join(differing)})",
            "Preprocess both with the same one (mtp-megatron preprocess --tokenizer), or leave one out.",
        )
