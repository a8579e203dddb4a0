"""The heads never wait for the GPU: CUDA itself raises where they would. tests/unit/test_no_synchronisation.py counts
operations instead, without a GPU.

Passed on an H200, 2026-11-27 (without Transformer Engine).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mtp_megatron.targets import future_targets
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.fp8_runs import skip_without_transformer_engine

pytestmark = pytest.mark.gpu
VOCAB = 300


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_of(model: Any) -> Any:
    """Forward and backward of the heads from a fresh z, on tensors that are on the device already."""
    sequence, batch = 64, 2
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(sequence, batch, model.config.hidden_size, generator=generator).cuda().bfloat16()
    labels = torch.randint(VOCAB, (batch, sequence), generator=generator)
    labels[:, ::7] = -100
    targets = future_targets(labels, model.heads_config.n).cuda()
    kwargs = {"attention_mask": None, "rotary_pos_emb": model.rotary_pos_emb(sequence)}

    def step() -> Any:
        leaf = z.detach().requires_grad_()
        loss, report = model.future_heads_loss(leaf, targets, kwargs)
        loss.backward()
        return leaf.grad, report

    return step


@pytest.mark.parametrize("arrangement", ["parallel", "causal"])
@pytest.mark.parametrize("engine", [False, True], ids=["local", "transformer_engine"])
def test_no_head_and_no_chunk_waits(arrangement: str, engine: bool) -> None:
    if engine:
        skip_without_transformer_engine()
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.world import model_parallel_world

    tree = {
        "model": {"num_trunk_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "seq_length": 64},
        "heads": {"n": 3, "arrangement": arrangement, "loss_chunk_tokens": 32},  # four chunks
        "train": {"precision": "bf16", "transformer_engine": engine},
    }
    recipe = check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)
    with model_parallel_world(recipe):
        (model,) = build_trainable(recipe).models
        step = step_of(model)
        step()  # what is made, compiled or looked up once
        with waiting_is_an_error():
            gradient, report = step()
        assert bool(gradient.isfinite().all())
        assert float(report.tokens.sum()) > 0


def test_control_a_read_raises() -> None:
    value = torch.ones(2).cuda()
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()
