"""The drafts of a serving bundle: which exported tensor is which draft tensor (data), and each draft's configuration.

Source keys are those of an exported folder: ``model.*``, ``lm_head.weight`` and ``mtp_heads.{i}.*`` (i = 2..n).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_megatron.checkpoint.hf_config import EXPERT_SETTINGS
from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.vllm_plugin import ARCHITECTURE, MASK_TOKEN_ID

HEADS_FOLDER, EAGLE3_FOLDER, MEDUSA_FOLDER = "mtp-heads", "eagle3-head2", "medusa"
# Whose layer an EAGLE-3 draft is: engines' stock class has neither Qwen2's biases nor Qwen3's query and key norms.
_EAGLE3_FAMILIES = ("llama", "mistral")
# Heads are dense. Beside a trunk with experts they are layers of this family, without the experts' settings.
_DENSE = {"qwen3_moe": "qwen3"}


class DraftRule(NamedTuple):
    """One draft tensor: its key, the exported keys it is made of (none: sizes alone), and the transform's name."""

    draft: str
    sources: tuple[str, ...]
    transform: str = "copy"


@dataclass(frozen=True)
class Draft:
    """One folder of the bundle.

    Attributes:
        folder: its name.
        config: its ``config.json``.
        rules: its tensors, in the order of writing.
    """

    folder: str
    config: dict[str, Any]
    rules: tuple[DraftRule, ...]


def _zero_embedding_half(sources: Sequence[Tensor], config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """``[rows, h]`` -> ``[rows, 2 h]``: EAGLE-3 puts the token's embedding before z; the heads do not read it."""
    (weight,) = sources
    return torch.cat([torch.zeros_like(weight), weight], dim=1)


def _last_layer_only(sources: Sequence[Tensor], config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """``[h, layers h]``: of the hidden states concatenated, the last as it is."""
    size, layers = config["hidden_size"], config["num_aux_hidden_states"]
    return torch.cat([torch.zeros(size, (layers - 1) * size, dtype=dtype), torch.eye(size, dtype=dtype)], dim=1)


def _fold(sources: Sequence[Tensor], config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Unembedding ``[V, h]`` and a linear head ``[h, h]`` -> the head's own unembedding ``[V, h]``."""
    unembedding, head = (tensor.to(torch.float32) for tensor in sources)
    return (unembedding @ head).to(dtype)


# Each takes the source tensors, the draft's configuration, and the model's type.
TRANSFORMS: dict[str, Callable[[Sequence[Tensor], dict[str, Any], torch.dtype], Tensor]] = {
    "copy": lambda sources, config, dtype: sources[0],
    "zero_embedding_half": _zero_embedding_half,
    "last_layer_only": _last_layer_only,
    "fold_into_unembedding": _fold,
    "ones": lambda sources, config, dtype: torch.ones(config["hidden_size"], dtype=dtype),
}

# Head 2 as the one layer of an EAGLE-3 draft: its norm is EAGLE's norm of the hidden state, the embedding's is unused.
_EAGLE3_LAYER = (
    DraftRule("midlayer.hidden_norm.weight", ("input_layernorm.weight",)),
    DraftRule("midlayer.self_attn.q_proj.weight", ("self_attn.q_proj.weight",), "zero_embedding_half"),
    DraftRule("midlayer.self_attn.k_proj.weight", ("self_attn.k_proj.weight",), "zero_embedding_half"),
    DraftRule("midlayer.self_attn.v_proj.weight", ("self_attn.v_proj.weight",), "zero_embedding_half"),
    DraftRule("midlayer.self_attn.o_proj.weight", ("self_attn.o_proj.weight",)),
    DraftRule("midlayer.post_attention_layernorm.weight", ("post_attention_layernorm.weight",)),
    DraftRule("midlayer.mlp.gate_proj.weight", ("mlp.gate_proj.weight",)),
    DraftRule("midlayer.mlp.up_proj.weight", ("mlp.up_proj.weight",)),
    DraftRule("midlayer.mlp.down_proj.weight", ("mlp.down_proj.weight",)),
)
_HEAD_PREFIX = "mtp_heads."


def drafts_of(llama: dict[str, Any], export: dict[str, Any], keys: Collection[str]) -> list[Draft]:
    """Every draft that an export's heads can be served as: EAGLE-3 only where head 2 is a Llama layer.

    Args:
        llama: its ``config.json``.
        export: its ``mtp_config.json``.
        keys: all of its tensors.

    Raises:
        CheckpointError: it has no further heads, or they lack a tensor or hold one for which a draft has no place; or
            vLLM would read another model.
    """
    if export["num_heads"] < 2:
        raise CheckpointError(
            "heads.n=1: there is nothing to draft with. Use --to hf, or train with heads.n of 2 or more."
        )
    width, heads, head_size = (llama[key] for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if llama["model_type"] == "qwen2" and head_size * heads != width:
        raise CheckpointError(
            f"model.head_size={head_size} with model.qkv_bias=true: vLLM's Qwen2 reads no head_dim, and takes "
            f"hidden_size / num_attention_heads ({width} / {heads}). Use --to hf, for transformers; or train with one "
            "of the two."
        )
    kind = export["heads"]["kind"]
    if kind != "transformer":
        return [_medusa(llama, export, kind, keys)]
    drafts = [_mtp_heads(llama, export, keys)]
    if llama["model_type"] in _EAGLE3_FAMILIES:
        drafts.append(_eagle3(llama, export, keys))
    return drafts


def drafts_in(bundle: Path) -> list[str]:
    """Folder names of the drafts that a bundle holds, the one with all heads first."""
    names = (HEADS_FOLDER, MEDUSA_FOLDER, EAGLE3_FOLDER)
    return [name for name in names if (bundle / name / "config.json").is_file()]


def _mtp_heads(llama: dict[str, Any], export: dict[str, Any], keys: Collection[str]) -> Draft:
    heads = export["num_heads"] - 1
    rules = [DraftRule("model.norm.weight", ("model.norm.weight",))]
    rules += [DraftRule(key, (key,)) for key in keys if key.startswith(_HEAD_PREFIX)]
    layer_type = _DENSE.get(llama["model_type"], llama["model_type"])
    config = {
        **{key: value for key, value in llama.items() if key not in EXPERT_SETTINGS},
        "architectures": [ARCHITECTURE],
        "model_type": layer_type,
        "num_hidden_layers": heads,
        "num_mtp_heads": heads,
        "mtp_layers": layer_type,
        "mask_token_id": MASK_TOKEN_ID,
        "eagle_aux_hidden_state_layer_ids": [export["num_trunk_layers"]],
        "num_aux_hidden_states": 1,
    }
    draft = Draft(HEADS_FOLDER, config, tuple(rules))
    # Every head has the tensors that head 1, the model's last layer, has.
    last = f"model.layers.{export['num_trunk_layers']}."
    layer = [key.removeprefix(last) for key in keys if key.startswith(last)]
    _check(draft, keys, {f"{_HEAD_PREFIX}{i}.{key}" for i in range(2, heads + 2) for key in layer})
    return draft


def _eagle3(llama: dict[str, Any], export: dict[str, Any], keys: Collection[str]) -> Draft:
    """Layer numbers differ by reader: see :func:`eagle3_layers`."""
    trunk = export["num_trunk_layers"]
    ids = eagle3_layers(trunk)
    config = {
        **llama,
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": llama["vocab_size"],
        "target_hidden_size": llama["hidden_size"],
        # The unembedding is written out even when the model ties it: readers that see it tied would want an embedding.
        "tie_word_embeddings": False,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": ids,
        "num_aux_hidden_states": len(ids),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in ids],
        },
    }
    prefix = f"{_HEAD_PREFIX}2."
    unembedding = "model.embed_tokens.weight" if llama["tie_word_embeddings"] else "lm_head.weight"
    rules = (
        DraftRule("fc.weight", (), "last_layer_only"),
        DraftRule("midlayer.input_layernorm.weight", (), "ones"),
        *(rule._replace(sources=tuple(prefix + key for key in rule.sources)) for rule in _EAGLE3_LAYER),
        DraftRule("norm.weight", ("model.norm.weight",)),
        DraftRule("lm_head.weight", (unembedding,)),
    )
    draft = Draft(EAGLE3_FOLDER, config, rules)
    _check(draft, keys, {key for key in keys if key.startswith(prefix)})
    return draft


def eagle3_layers(num_trunk_layers: int) -> list[int]:
    """How many of the target's layers have run where each hidden state is taken; the last is z.

    vLLM (``EagleModelMixin``) and llama.cpp (a layer's input) count so at the top level of the configuration. SGLang
    reads ``eagle_config`` and adds one (``set_eagle3_layers_to_capture``). SGLang's ``fc`` has three inputs, llama.cpp
    demands three layers, and SGLang cannot take the embedding for one: hence two layers before z, with weight zero.
    """
    return [layer for layer in range(num_trunk_layers - 2, num_trunk_layers + 1) if layer > 0][-3:]


def _medusa(llama: dict[str, Any], export: dict[str, Any], kind: str, keys: Collection[str]) -> Draft:
    """vLLM's Medusa (vllm.model_executor.models.medusa): residual blocks on the normed output, no cache."""
    heads = export["num_heads"] - 1
    unembedding = "model.embed_tokens.weight" if llama["tie_word_embeddings"] else "lm_head.weight"
    rules: list[DraftRule] = []
    wanted = set()
    for head in range(heads):
        source = f"{_HEAD_PREFIX}{head + 2}.linear"
        wanted.add(f"{source}.weight")
        if kind == "medusa":
            wanted.add(f"{source}.bias")
            block = f"blocks.{head}.layers.0"
            rules += [DraftRule(f"{block}.{part}", (f"{source}.{part}",)) for part in ("weight", "bias")]
        else:
            rules.append(
                DraftRule(f"lm_heads.{head}.weight", (unembedding, f"{source}.weight"), "fold_into_unembedding")
            )
    if kind == "medusa":
        rules.append(DraftRule("lm_head.weight", (unembedding,)))
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": llama["hidden_size"],
        "vocab_size": llama["vocab_size"],
        "truncated_vocab_size": llama["vocab_size"],
        "num_heads": heads,
        "num_hidden_layers": 1 if kind == "medusa" else 0,
        "medusa_fc_bias": kind == "medusa",
        "original_lm_head": kind == "medusa",
        "dtype": llama["dtype"],
        "torch_dtype": llama["torch_dtype"],
    }
    draft = Draft(MEDUSA_FOLDER, config, tuple(rules))
    _check(draft, keys, wanted)
    return draft


def _check(draft: Draft, keys: Collection[str], wanted: Collection[str]) -> None:
    """Refuse a draft whose sources are not all there, or a head's tensor that it does not take."""
    sources = {key for rule in draft.rules for key in rule.sources}
    heads = {key for key in keys if key.startswith(_HEAD_PREFIX)} if draft.folder != EAGLE3_FOLDER else set(wanted)
    missing, unmapped = sorted((sources | set(wanted)) - set(keys)), sorted(heads - (sources & set(wanted)))
    if missing or unmapped:
        problem = f"{missing[0]} is missing" if missing else f"{unmapped[0]} has no place in it"
        raise CheckpointError(f"{draft.folder}: {problem}. Nothing was written; use --to hf to export without drafts.")
