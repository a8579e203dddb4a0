"""What of Megatron's the heads cannot work with is refused by name before a model is built; the report lists it."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtp_megatron import compat
from mtp_megatron.compat.report import ALWAYS_REFUSED
from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.model_checks import check_config, check_forward, check_mask, check_spread

REFUSED: dict[str, Any] = {
    "cuda_graph_impl": "local",
    "mtp_num_layers": 1,
    "defer_embedding_wgrad_compute": True,
}


def config_with(**settings: Any) -> Any:
    compat.prepare()
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, **compat.fusions()
    )
    for name, value in settings.items():
        setattr(config, name, value)  # the constructor wants Transformer Engine for some of them
    return config


def test_plain_settings_pass() -> None:
    check_config(config_with(), 61, 64)
    check_forward(None)


@pytest.mark.parametrize("field", REFUSED)
def test_a_setting_is_refused_by_name(field: str) -> None:
    from mtp_megatron.model import build_model

    config = config_with(**{field: REFUSED[field]})
    with pytest.raises(ConfigError) as caught:  # no parallel state is up: nothing can have been built
        build_model(config, HeadsConfig(), vocab_size=61, padded_vocab_size=64, max_sequence_length=8)
    assert caught.value.field == field
    assert caught.value.value == REFUSED[field]
    assert caught.value.remedy


def test_an_unembedding_in_pieces_is_refused() -> None:
    """Of megatron-core 0.19, whose constructor makes the second number of the first."""
    with pytest.raises(ConfigError, match="2 pieces") as caught:
        check_config(config_with(tensor_model_parallel_size=4, gtp_weight_remat_size=2), 61, 64)
    assert (caught.value.field, caught.value.value) == ("tensor_parallel_num_weight_shards", 8)


@pytest.mark.parametrize(
    ("owned", "post_process"), [([1, 2], False), ([0], True), ([0, 1, 2], False)], ids=["first", "last", "all_early"]
)
def test_spread_heads_need_the_per_token_loss(owned: list[int], post_process: bool) -> None:
    """Megatron's default is off: the last stage's loss alone would be divided, and the gradients silently wrong."""
    from mtp_megatron.model import build_model

    stage = {"vocab_size": 61, "padded_vocab_size": 64, "max_sequence_length": 8, "post_process": post_process}
    with pytest.raises(ConfigError) as caught:  # no parallel state is up: nothing can have been built
        build_model(config_with(), HeadsConfig(n=3), **stage, owned_heads=owned)
    assert (caught.value.field, caught.value.value) == ("calculate_per_token_loss", False)
    assert str([head + 1 for head in owned]) in str(caught.value)
    check_spread(config_with(calculate_per_token_loss=True), 3, owned, post_process)


@pytest.mark.parametrize(("owned", "post_process"), [(None, True), (None, False), ([0, 1, 2], True), ([], False)])
def test_heads_on_the_last_stage_need_no_per_token_loss(owned: list[int] | None, post_process: bool) -> None:
    check_spread(config_with(), 3, owned, post_process)


def test_packed_sequences_are_refused_by_name() -> None:
    """But for those of a GPTModel of Transformer Engine's layers (tests/transformer_engine)."""
    from mtp_megatron.model import MTPGPTModel

    plain = SimpleNamespace(transformer_engine=False, config=SimpleNamespace(context_parallel_size=1))
    with pytest.raises(ConfigError, match=r"packed_seq_params.*document_mask"):
        MTPGPTModel.forward(plain, None, None, None, packed_seq_params=object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "context", "says"),
    [("thd", 1, None), ("thd", 2, "context_parallel_size=2"), ("sbhd", 1, "'sbhd'"), (None, 1, "None")],
)
def test_which_packed_sequences_transformer_engines_layers_take(layout: str, context: int, says: str | None) -> None:
    packed = SimpleNamespace(qkv_format=layout)
    refused = pytest.raises(ConfigError, match=says) if says else contextlib.nullcontext()
    with refused:
        check_forward(packed, transformer_engine=True, context=context)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_mask_that_would_not_be_looked_at_is_refused(by_name: bool) -> None:
    """Megatron-core's own layers obey one (tests/unit/test_documents.py)."""
    from mtp_megatron.model import MTPGPTModel

    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    engine = SimpleNamespace(transformer_engine=True, config=SimpleNamespace(context_parallel_size=1))
    told: tuple[Any, ...] = (None, None) if by_name else (None, None, mask)
    with pytest.raises(ConfigError, match=r"attention_mask=\(1, 1, 8, 8\).*packed_seq_params"):
        MTPGPTModel.forward(engine, *told, **({"attention_mask": mask} if by_name else {}))  # type: ignore[arg-type]
    check_mask(mask, transformer_engine=False)
    check_mask(None, transformer_engine=True)


def test_the_report_names_what_is_refused() -> None:
    named = {
        name for line in ALWAYS_REFUSED for names in re.findall(r"\(([\w, ]+)\)", line) for name in names.split(", ")
    }
    assert named == {*REFUSED, "packed_seq_params"} - {"defer_embedding_wgrad_compute"}
