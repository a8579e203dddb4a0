"""All further heads as one vLLM draft: n - 1 layers side by side, each reading z with its own key/value cache.

Shapes: ``T`` rows of a batch, ``h`` hidden, ``k`` heads in use (the speculative tokens). Under tensor parallelism each
layer is sharded as vLLM's own layers are; z and what is returned are whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, get_draft_quant_config, maybe_prefix

from mtp_megatron.serving.vllm_plugin import MASK_TOKEN_ID

# vLLM's fused projections: (name in the layer, which part).
_STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


class _LlamaLayer(LlamaDecoderLayer):
    """Quantised as the draft is, not as the target: a quantised model's heads are in the type they were exported in."""

    def get_quant_config(self, vllm_config: VllmConfig) -> Any:
        return get_draft_quant_config(vllm_config)


def _layer(config: Any, target: VllmConfig, prefix: str) -> nn.Module:
    """vLLM's own layer of the model's family; a head is a layer as the trunk's are."""
    # Not model_type: vLLM wraps a draft's configuration in one of its own.
    family = {"qwen2": Qwen2DecoderLayer, "qwen3": Qwen3DecoderLayer}.get(config.mtp_layers)
    if family is None:  # Llama, and Mistral without its window
        return _LlamaLayer(target, prefix=prefix, config=config)
    return family(config, target.cache_config, get_draft_quant_config(target), prefix)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0})
class HeadLayers(nn.Module):
    """Heads 2 to k + 1 and the final norm.

    vLLM's parallel drafting puts k - 1 mask slots behind each request's last token and reads draft j at slot j, the
    last token itself being slot 0. Every head runs on every row (so that its cache is complete), and slot j is then
    filled with head j + 2's output *at the last token*. What a head computes at a mask slot is never used, and its
    keys and values there lie beyond the sequence's end, where the next tokens overwrite them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", first_layer: int, count: int) -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        target = get_current_vllm_config()
        # Numbered after the target's layers: vLLM tells caches apart by the number in the layer's name.
        self.layers = nn.ModuleList(
            _layer(self.config, target, maybe_prefix(prefix, f"layers.{first_layer + i}")) for i in range(count)
        )
        self.norm = RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        # The heads read no token. vLLM replaces this by the target's embedding, which it expects to find.
        self.embed_tokens = nn.Embedding(1, self.config.hidden_size)

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[T]`` tokens (read only to find mask slots), positions and z ``[T, h]`` -> ``[T, h]``, twice."""
        outputs = []
        for layer in self.layers:
            hidden, residual = layer(positions, hidden_states, None)
            outputs.append(self.norm(hidden, residual)[0])
        if len(outputs) == 1:
            return outputs[0], outputs[0]
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        masked = input_ids == MASK_TOKEN_ID
        last_real = torch.cummax(torch.where(masked, torch.zeros_like(rows), rows), 0).values
        # Beyond the last request vLLM pads with what its buffers held before: any head will do there.
        head = (rows - last_real).clamp(max=len(outputs) - 1)
        drafted = torch.stack(outputs)[head, last_real]
        return drafted, drafted


class MTPHeadsEagle3(Eagle3LlamaForCausalLM):
    """The draft model: ``{"method": "eagle3", "num_speculative_tokens": k, "parallel_drafting": true}``.

    A subclass because vLLM's proposer accepts only its own EAGLE-3 classes; nothing of their computation is used.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.config = speculative.draft_model_config.hf_config
        count = speculative.num_speculative_tokens
        if not 1 <= count <= self.config.num_mtp_heads:
            raise ValueError(
                f"num_speculative_tokens={count}: the export has {self.config.num_mtp_heads} heads to draft with. Set "
                f"it to 1 to {self.config.num_mtp_heads}."
            )
        if count > 1 and not speculative.parallel_drafting:
            raise ValueError(
                "parallel_drafting=false: the heads draft side by side, not one after another. Add "
                '"parallel_drafting": true to the speculative config.'
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "pipeline_parallel_size > 1: not supported by vLLM's parallel drafting. Use tensor parallelism."
            )
        first_layer = vllm_config.model_config.get_total_num_hidden_layers()
        self.config.target_layer_count = first_layer
        # The compiled graph has one branch for each head in use. vLLM's cache of graphs tells them apart by the draft's
        # configuration, and not by num_speculative_tokens.
        self.config.num_mtp_heads_in_use = count
        self.model = HeadLayers(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), first_layer=first_layer, count=count
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.draft_id_to_target_id = None
        self.use_parallel_drafting = speculative.parallel_drafting
        # z of the mask slots; never used, but it must be finite.
        self.register_buffer("mask_hidden", torch.zeros(1, self.config.hidden_size), persistent=False)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """z comes as it is: one layer's output, and the heads have their own norms."""
        return hidden_states

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`HeadLayers.forward`; ``inputs_embeds`` is not read."""
        return self.model(input_ids, positions, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the draft that ``mtp-megatron convert --to bundle`` wrote; heads that are not used stay out.

        Raises:
            ValueError: a tensor has no place, or one of the model's was not in the folder.
        """
        prefixes: dict[str, str | None] = {"model.norm.": "model.norm."}
        for number in range(2, self.config.num_mtp_heads + 2):
            used = number - 2 < len(self.model.layers)
            prefixes[f"mtp_heads.{number}."] = f"model.layers.{number - 2}." if used else None
        mapper: Any = WeightsMapper(orig_to_new_prefix=prefixes, orig_to_new_stacked=_STACKED)
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        missing = {name for name, _ in self.named_parameters()} - loaded - {"model.embed_tokens.weight"}
        if missing:
            raise ValueError(f"{min(missing)} is not in the draft's folder. Convert the checkpoint again.")
        return loaded | {"model.embed_tokens.weight"}
