"""Rotary frequencies lowered for contexts longer than those of pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered; the fields bear Hugging Face's meanings.

    Attributes:
        kind: ``"linear"``: all by ``factor``; ``"llama3"``: low ones by ``factor``, high ones not at all, those
            between by an interpolation of the two.
        low_freq_factor: turns within ``original_context`` below which a frequency is low.
        high_freq_factor: turns within ``original_context`` above which a frequency is high.
        original_context: positions that the model was pretrained on.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def apply(self, frequencies: Tensor) -> Tensor:
        """Lowered frequencies ``[d/2]``, radians per position, from those that the rotary base gives."""
        lowered = frequencies / self.factor
        if self.kind == "linear":
            return lowered
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(lowered, frequencies, kept.clamp(0, 1))
