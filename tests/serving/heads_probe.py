"""What the plugin builds, without an engine: a script for the interpreter that has vLLM.

    python -P heads_probe.py BUNDLE RESULT.json

Writes the hashes that name compiled graphs for each number of speculative tokens, and how the heads' layers of each
family are quantised beside a quantised target.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def engine_config(bundle: Path, tokens: int) -> Any:
    """vLLM's configuration of an engine that drafts with the bundle's heads."""
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "eagle3", "model": str(bundle / "mtp-heads"), "parallel_drafting": True}
    return EngineArgs(
        model=str(bundle),
        dtype="float32",
        skip_tokenizer_init=True,
        speculative_config={**speculative, "num_speculative_tokens": tokens},
    ).create_engine_config()


class _NoLayers(nn.Module):
    """In place of the heads' layers: says under which name their compiled graph would be kept."""

    def __init__(self, *, vllm_config: Any, prefix: str, first_layer: int, count: int) -> None:
        super().__init__()
        self.hash = vllm_config.compute_hash()


def graph_names(bundle: Path, numbers: range) -> list[str]:
    """The hash that vLLM has at the time when the heads' layers are built, for each number of speculative tokens."""
    from vllm.config import set_current_vllm_config

    from mtp_megatron.serving.vllm_plugin import heads

    names, layers = [], heads.HeadLayers
    heads.HeadLayers = _NoLayers
    try:
        for number in numbers:
            config = engine_config(bundle, number)
            with set_current_vllm_config(config):
                names.append(heads.MTPHeadsEagle3(vllm_config=config).model.hash)
    finally:
        heads.HeadLayers = layers
    return names


def quantisation(bundle: Path, families: tuple[str, ...]) -> dict[str, list[str]]:
    """How the projections of a head of each family are computed where the target is quantised and the draft is not."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    from mtp_megatron.serving.vllm_plugin import heads

    config, made = engine_config(bundle, 1), {}
    config.quant_config = Fp8Config()
    with set_current_vllm_config(config):
        store = Path(sys.argv[2]).absolute().with_suffix(".store")
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        for number, family in enumerate(families):
            draft = config.speculative_config.draft_model_config.hf_config
            draft.mtp_layers, draft.target_layer_count = family, 100 + number
            with torch.device("meta"):
                layer = heads._layer(draft, config, f"model.layers.{100 + number}")
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
            made[family] = [type(projection.quant_method).__name__ for projection in projections]
    return made


def main() -> None:
    """Ask both, write the answers."""
    from mtp_megatron.serving.vllm_plugin import register

    register()
    bundle = Path(sys.argv[1])
    result = {
        "graphs": graph_names(bundle, range(1, 4)),
        "quantisation": quantisation(bundle, ("llama", "qwen2", "qwen3")),
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
