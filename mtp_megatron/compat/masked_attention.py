"""Megatron-core's own attention with masks that it honours whatever kernel takes the softmax."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mtp_megatron.errors import ConfigError


class MaskedAttention(DotProductAttention):
    """DotProductAttention that is causal without a mask, and obeys the mask where one is given.

    Upstream's layer specs say "causal", and then the fused softmax (Apex's, in half precision on a GPU) builds the
    triangle itself and drops the mask in silence, where torch's operations apply it
    (``FusedScaleMaskSoftmax.forward_fused_softmax``). As "arbitrary" both apply it, but without a mask nothing at all.
    So the type follows the call. A sliding window takes the place of any mask, so the two are refused together.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        softmax = self.scale_mask_softmax
        if attention_mask is not None and softmax.window_size is not None:
            raise ConfigError(
                "window_size",
                softmax.window_size,
                "megatron-core's own attention drops an attention mask for it",
                "Leave it out, or pass attention_mask=None",
            )
        softmax.attn_mask_type = AttnMaskType.causal if attention_mask is None else AttnMaskType.arbitrary
        output: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return output
