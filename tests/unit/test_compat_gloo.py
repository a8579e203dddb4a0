"""Process groups of a CPU job share one gloo device."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroupGloo

from mtp_megatron.compat import gloo

GROUPS = 8


def threads_of(groups: int) -> int:
    """Threads that so many groups of one rank add to this process while they live."""
    before = set(os.listdir("/proc/self/task"))
    made = [ProcessGroupGloo(HashStore(), 0, 1, timeout=timedelta(seconds=30)) for _ in range(groups)]
    after = set(os.listdir("/proc/self/task"))
    del made
    return len(after - before)  # threads of groups that are gone may still be in both


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch):
    """Torch's own constructor, whatever earlier tests have installed."""
    init = ProcessGroupGloo.__init__
    while hasattr(init, "__wrapped__"):
        init = init.__wrapped__
    monkeypatch.setattr(ProcessGroupGloo, "__init__", init)
    return init


def test_a_group_brings_no_device_of_its_own(original, monkeypatch: pytest.MonkeyPatch) -> None:
    gloo._devices.cache_clear()
    alone = threads_of(GROUPS)
    monkeypatch.setattr(ProcessGroupGloo, "__init__", gloo.share_device(original))
    shared = threads_of(GROUPS)
    assert shared == alone - GROUPS + 1, "one device in place of one for each group"
    assert threads_of(GROUPS) == shared - 1, "it stays"


def test_the_interfaces_of_the_environment_are_kept(original, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroupGloo, "__init__", gloo.share_device(original))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    group = ProcessGroupGloo(HashStore(), 0, 1, timeout=timedelta(seconds=7))
    assert len(group.options._devices) == 2
    assert group.options._timeout == timedelta(seconds=7)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(RuntimeError, match="no-such-interface"):
        ProcessGroupGloo(HashStore(), 0, 1, timeout=timedelta(seconds=7))


def test_options_that_somebody_chose_are_left_alone(original, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroupGloo, "__init__", gloo.share_device(original))
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_default_device()]
    options._timeout = timedelta(seconds=9)
    group = ProcessGroupGloo(HashStore(), 0, 1, options)
    assert group.options._timeout == timedelta(seconds=9)
