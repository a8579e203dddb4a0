"""What a checkpoint says about its model, and whether a recipe describes the same one. Imports neither torch nor
megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtp_megatron import __version__, compat
from mtp_megatron.data.blend import Blend
from mtp_megatron.errors import CheckpointError
from mtp_megatron.training import checkpoint_files as files
from mtp_megatron.training.recipe import ModelSection, Recipe, padded_vocab_size

_ROPE_NUMBERS = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context")
_EXPERTS = ("num_experts", "moe_top_k", "moe_ffn_hidden_size")
_YOUNGER = ("head_size", "qkv_bias", "qk_norm", "rope_scaling", *_ROPE_NUMBERS, *_EXPERTS)
# Of mtp_config.json: what decides which tensors a model has. The rest may differ between training and use.
_ARCHITECTURE = {
    "model": (
        *("num_trunk_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"),
        *("vocab_size", "rotary_base", "norm_epsilon", "tied_embeddings", *_YOUNGER),
    ),
    "heads": ("n", "kind", "arrangement", "unembedding"),
}


def model_description(recipe: Recipe, data: Blend, step: int) -> dict[str, Any]:
    """Content of ``mtp_config.json``: everything that is needed to rebuild the model without the recipe."""
    manifest = data.first
    return {
        "format": 1,
        "step": step,
        "model": recipe.model.model_dump(mode="json"),
        "heads": recipe.heads.model_dump(mode="json"),
        "vocab_size": recipe.model.vocab_size,
        "padded_vocab_size": padded_vocab_size(recipe),
        "tokenizer": manifest.tokenizer_entry,
        "data_fingerprint": data.fingerprint,
        "data": data.record(recipe.train.batch_sizes.samples(step)),
        "precision": recipe.train.precision,
        "parallel": recipe.parallel.model_dump(mode="json"),
        "megatron_core": str(compat.MCORE_VERSION),
        "mtp_megatron": __version__,
    }


def check_architecture(folder: Path, recipe: Recipe, *, initial: bool = False) -> None:
    """Refuse a checkpoint of another architecture before anything of it is loaded; the recipe must be resolved.

    With ``initial`` the checkpoint only gives initial weights and may have more or fewer heads: the first ones are
    taken over, see :mod:`.initial_weights`. Of an anticausal chain that would change head 1, so there n must be the
    same.

    Raises:
        CheckpointError: lists the fields that differ.
    """
    there, here = files.read_mtp_config(folder), recipe.model_dump(mode="json")
    here_kept, there_kept = _architecture(here), _architecture(there)
    if initial:
        _forgive_number_of_heads(there_kept["heads"], here_kept["heads"])
    changes = list(files.differences(there_kept, here_kept))
    if there.get("padded_vocab_size") != padded_vocab_size(recipe):
        changes.append(
            f"padded vocabulary is {there.get('padded_vocab_size')} there and {padded_vocab_size(recipe)} here"
        )
    if changes:
        raise CheckpointError(
            f"{folder}: a checkpoint of another architecture ({'; '.join(changes)}). "
            "Set these fields as they are there, or name another checkpoint."
        )


def _architecture(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a description or recipe decides the model; settings that mean the same become the same."""
    kept = {section: {key: tree.get(section, {}).get(key) for key in keys} for section, keys in _ARCHITECTURE.items()}
    model = kept["model"]
    for key in _YOUNGER:  # checkpoints written before there was such a setting
        if key not in tree.get("model", {}):
            model[key] = ModelSection.model_fields[key].default
    if model["head_size"] is None and model["hidden_size"] and model["num_attention_heads"]:
        model["head_size"] = model["hidden_size"] // model["num_attention_heads"]
    if model["num_experts"] is None:
        model["moe_top_k"] = None
    if model["rope_scaling"] is None:
        for key in _ROPE_NUMBERS:
            model[key] = None
    return kept


def _forgive_number_of_heads(there: dict[str, Any], here: dict[str, Any]) -> None:
    if "anticausal" in (there["arrangement"], here["arrangement"]):
        return
    if 1 in (there["n"], here["n"]):  # only head 1 is in both: how heads hang together says nothing about it
        for key in ("arrangement", "unembedding"):
            there[key] = here[key]
    there["n"] = here["n"]
