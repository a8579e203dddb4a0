"""How a rank joins and leaves its job. NCCL, which waits for the other ranks, is a stand-in here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mtp_megatron.errors import ConfigError
from mtp_megatron.training import world
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import VOCAB, tiny_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe() -> Recipe:
    tree = tiny_tree(Path("data"), Path("run"))
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)


@pytest.mark.parametrize(("backend", "size", "waits"), [("nccl", 2, True), ("nccl", 1, False), ("gloo", 2, False)])
def test_what_waits_for_other_ranks(backend: str, size: int, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not world.waits_for_others(), "there is no job"
    for name, value in (("is_initialized", True), ("get_backend", backend), ("get_world_size", size)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    assert world.waits_for_others() is waits


@pytest.mark.parametrize("waits", [False, True])
def test_after_an_error_nothing_is_destroyed_that_waits(
    waits: bool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "waits_for_others", lambda: waits)
    with pytest.raises(ZeroDivisionError), world.model_parallel_world(recipe):
        raise ZeroDivisionError
    assert dist.is_initialized() is waits
    if waits:
        world._leave(owns_group=True)
    with world.model_parallel_world(recipe):
        assert dist.is_initialized()
    assert not dist.is_initialized()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("rank", "status", "said"), [("lambda: 2", 2, ""), ("lambda: 1 / 0", 1, "ZeroDivisionError"), ("lambda: 0", 0, "")]
)
def test_a_failed_rank_ends_without_the_others(waits: bool, rank: str, status: int, said: str) -> None:
    code = f"""
import atexit
from mtp_megatron import train
from mtp_megatron.training import world
world.waits_for_others = lambda: {waits}
atexit.register(print, "cleaned up")
train.end({rank})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == status
    assert said in result.stderr
    assert ("cleaned up" in result.stdout) is not (waits and status != 0)


def test_more_ranks_than_devices_is_told_by_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(ConfigError, match="processes per node=4: this node has 2 CUDA devices"):
            world._check_local_rank()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    world._check_local_rank()
