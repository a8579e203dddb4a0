"""What a run takes from each data set of a blend, as lines for the person who starts it."""

from __future__ import annotations

from mtp_megatron.data.blend import FIELD, Blend
from mtp_megatron.data.dataset import BlendedSamples

# Muennighoff et al. 2023 (arXiv:2305.16264): up to about 4 passes over a text teach nearly what new text would.
MANY_PASSES = 4.0


def blend_lines(data: Blend, train: BlendedSamples, valid: BlendedSamples, valid_wanted: int) -> list[str]:
    """A table of the data sets and of how often the whole run reads each, and what is odd about it.

    Args:
        data, train, valid: of one run.
        valid_wanted: held-out samples that an evaluation would use; fewer are odd. 0: it does not matter.
    """
    rows = [("weight", "tokens", "samples", "passes", "folder")]
    unused, often, odd = [], [], []
    for manifest, weight, samples in zip(data.parts, data.weights, train.parts, strict=True):
        passes = len(samples) / samples.samples_per_epoch
        shown = f"{passes:.2f}" if passes >= 0.01 or not passes else f"{passes:.1g}"
        rows.append((f"{weight:.4g}", f"{manifest.train.tokens:,}", f"{len(samples):,}", shown, str(manifest.path)))
        if not len(samples):
            unused.append(str(manifest.path))
        if passes > MANY_PASSES:
            often.append(f"{manifest.path} ({passes:.1f})")
    if unused:
        odd.append(f"{FIELD}: weights too small for {len(train):,} samples, so that no sample comes: {_some(unused)}")
    if often:
        odd.append(
            f"{FIELD}: read more than {MANY_PASSES:g} times in this run, beyond which the same text teaches less "
            f"(arXiv:2305.16264): {_some(often)}"
        )
    if len(valid) < valid_wanted:
        scarce = [
            str(manifest.path)
            for manifest, samples in zip(data.parts, valid.parts, strict=True)
            if len(samples) == samples.samples_per_epoch
        ]
        odd.append(
            f"{FIELD}: {len(valid):,} of {valid_wanted:,} held-out samples are used for evaluation: in the blend's "
            f"proportions there are no more of {_some(scarce)}"
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]) for row in rows
    ]
    begins = f", this blend from sample {data.since:,} on" if data.since else ""
    return [f"{FIELD}, over all {len(train):,} samples of the run{begins}:", *table, *odd]


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
