"""The recorder of living tensors, and the fake rank that it watches in a trace."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.distributed as dist

from mtp_megatron.planning.live_memory import LiveMemory

KIB = 256  # fp32 elements


def test_it_counts_storages_from_their_making_to_their_end() -> None:
    with LiveMemory() as memory:
        kept = torch.ones(KIB)
        view = kept.view(16, 16)[3]
        assert memory.current == 1024  # a view is no storage of its own
        temporary = torch.ones(3 * KIB)
        assert memory.current == memory.peak == 4096
        del temporary
        assert (memory.current, memory.peak) == (1024, 4096)
        kept.add_(1)  # in place
        assert memory.current == 1024
        del kept
        assert memory.current == 1024  # the view holds it
        del view
    assert (memory.current, memory.peak) == (0, 4096)
    assert sorted(entry.nbytes for entry in memory.at_peak()) == [1024, 3072]


def test_a_peak_after_a_restart_is_the_peak_since_then() -> None:
    with LiveMemory() as memory:
        large = torch.ones(8 * KIB)
        del large
        memory.restart_peak()
        small = torch.ones(2 * KIB)
        assert memory.peak == 2048
        assert [entry.nbytes for entry in memory.at_peak()] == [2048]
        del small


def test_backward_passes_count_too_and_categories_stay() -> None:
    weight = torch.ones(KIB, requires_grad=True)  # made outside: not the recorder's
    with LiveMemory(maker=lambda: ("me",)) as memory:
        loss = (weight * weight).sum()
        loss.backward()
        assert weight.grad is not None
        memory.mark([weight.grad], "gradients")
        memory.mark([weight.grad, weight], "something else")
        (gradient,) = [entry for entry in memory.at_peak() if entry.category == "gradients"]
    assert (gradient.nbytes, gradient.maker) == (1024, ("me",))
    assert memory.of(weight) is None


def test_a_fake_rank_takes_no_memory_and_leaves_nothing_behind() -> None:
    from mtp_megatron import compat

    compat.prepare()
    from mtp_megatron.compat import fake

    def attribute(owner: str, name: str) -> object:
        try:
            return getattr(importlib.import_module(owner), name)
        except ModuleNotFoundError:
            module, _, cls = owner.rpartition(".")
            return getattr(getattr(importlib.import_module(module), cls), name)

    rows = (*fake.REPLACEMENTS, *fake.FUSED_KERNELS)
    before = [attribute(row.owner, row.name) for row in rows]

    def be_a_rank_and_fail() -> None:
        with fake.fake_rank(5, 64, fused_kernels=True):
            assert (dist.get_rank(), dist.get_world_size()) == (5, 64)
            assert all(attribute(row.owner, row.name) is not old for row, old in zip(rows, before, strict=True))
            huge = torch.zeros(1 << 40)  # 4 TiB
            dist.all_reduce(huge)
            assert huge.sum().item() == 1.0  # what a fake number is
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        be_a_rank_and_fail()
    assert not dist.is_initialized()
    assert [attribute(row.owner, row.name) for row in rows] == before
    assert torch.zeros(()).item() == 0.0


def test_a_rank_of_a_real_job_cannot_be_a_fake_one() -> None:
    from mtp_megatron.compat.fake import fake_rank

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="a real job"), fake_rank(0, 2, fused_kernels=False):
            pass
    finally:
        dist.destroy_process_group()
