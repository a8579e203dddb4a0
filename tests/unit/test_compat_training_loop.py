"""The stand-ins for Megatron-LM's loop on a machine without CUDA: there when asked for, gone without a trace."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from packaging.version import Version

from mtp_megatron.compat import cpu, megatron_lm, versions
from tests.harness import run_world
from tests.megatron_lm import needs_megatron_lm


def current() -> dict[str, Any]:
    rows = (*cpu.TRAINING_LOOP, megatron_lm.HELPERS)
    return {f"{row.owner}.{row.name}": getattr(importlib.import_module(row.owner), row.name) for row in rows}


def body(rank: int, world_size: int) -> list[str]:
    """For ``run_world``: names that are replaced while the stand-ins are there, in a process that had none."""
    megatron_lm.undo()
    cpu.uninstall()
    megatron_lm.prepare()  # imports what it replaces
    megatron_lm.undo()
    cpu.uninstall()
    before = current()
    megatron_lm.prepare()
    megatron_lm.prepare()  # a second time changes nothing
    inside = current()
    assert torch.cuda.device_count() == 1
    megatron_lm.undo()
    cpu.uninstall()
    assert {name: id(value) for name, value in current().items()} == {name: id(v) for name, v in before.items()}
    return [name for name in before if inside[name] is not before[name]]


@needs_megatron_lm
def test_every_row_is_replaced_and_put_back() -> None:
    (replaced,) = run_world(body, 1)
    wanted = {f"{row.owner}.{row.name}" for row in (*cpu.TRAINING_LOOP, megatron_lm.HELPERS)}
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device there are no stand-ins")
    assert set(replaced) == wanted


def test_a_release_without_the_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "megatron.training" else find(name, *more)
    )
    problem = megatron_lm.missing()
    assert problem is not None
    assert "comes without megatron.training" in problem
    assert "PYTHONPATH" in problem
    with pytest.raises(megatron_lm.EnvironmentUnsupported, match=r"without megatron\.training"):
        megatron_lm.prepare()


def test_a_package_that_the_loop_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of 0.16.1 imports six, which nothing installs."""

    def fails() -> None:
        raise ModuleNotFoundError("No module named 'six'", name="six")

    monkeypatch.setattr(megatron_lm, "missing", lambda: None)
    monkeypatch.setattr(megatron_lm.devices, "prepare", lambda: None)
    monkeypatch.setattr(cpu, "install_training_loop", fails)
    with pytest.raises(megatron_lm.EnvironmentUnsupported, match=r"needs the package six, which is not installed"):
        megatron_lm.prepare()


def test_a_checkout_of_the_same_minor_release_gets_the_wheels_compiled_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = versions.wheel_folder()
    assert wheel is not None
    assert list((wheel / "datasets").glob("helpers_cpp.*")), "the wheel brings them"
    monkeypatch.setattr(versions, "megatron_core_version", lambda: Version("0.17.1"))
    assert versions.wheel_folder() is None
