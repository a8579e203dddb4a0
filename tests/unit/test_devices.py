"""GPUs that torch cannot use: said in torch's words, and no reason to train on the CPU unless that was asked for."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from mtp_megatron import compat, train
from mtp_megatron.compat import __main__ as command
from mtp_megatron.compat import cpu, devices, megatron_lm, report
from mtp_megatron.compat.versions import EnvironmentUnsupported, UnusableGPUs
from mtp_megatron.training import low_precision, world
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.smoke import smoke_recipe

OLD = "The NVIDIA driver on your system is too old\n(found version 12040)."


def _refuse() -> None:
    raise RuntimeError(OLD)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with NVIDIA's driver, which is too old for the CUDA that torch is built for."""
    file = tmp_path / "nvidiactl"
    file.touch()
    monkeypatch.setattr(devices, "_DRIVER", file)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", _refuse)
    monkeypatch.setattr(cpu, "installed", lambda: False)
    return file


@pytest.fixture
def recipe() -> Recipe:
    return smoke_recipe()


SAID = r"built for CUDA 13\.0 .*too old \(found version 12040\)\. Update.*CUDA_VISIBLE_DEVICES= \(empty\) trains on the"


def test_an_old_driver_ends_every_way_to_train(recipe: Recipe, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_lm, "missing", lambda: None)
    monkeypatch.setattr(compat, "prepare", lambda: pytest.fail("it went on"))
    fp8 = recipe.model_copy(update={"train": recipe.train.model_copy(update={"fp8": "hybrid"})})
    for start in (
        devices.require_usable_gpu,
        compat.backend,
        world.model_parallel_world(recipe).__enter__,
        megatron_lm.prepare,
        lambda: low_precision.check_machine(fp8),
    ):
        with pytest.raises(UnusableGPUs, match=SAID):
            start()


def test_the_report_says_so(driver: Path) -> None:
    assert report._device() == f"none: torch cannot use this machine's GPUs ({' '.join(OLD.split())})"
    assert any("12040" in problem for problem in report.problems())


@pytest.mark.parametrize(
    ("visible", "file", "count", "refused"),
    [
        (None, True, 0, True),
        ("0,1", True, 0, True),
        (None, False, 1, True),  # the driver's library counts them without the device file
        ("", True, 1, False),
        (" ", True, 1, False),
        ("-1", True, 1, False),
        (None, False, 0, False),
    ],
)
def test_only_gpus_that_are_there_and_not_hidden(
    visible: str | None, file: bool, count: int, refused: bool, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if not file:
        driver.unlink()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert (devices.why_no_gpu() is not None) is refused


def test_what_torch_can_use_is_not_started(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices.require_usable_gpu()  # and does not call torch.cuda.init, which raises here
    assert compat.backend() == "nccl"


def test_the_stand_ins_count_is_not_believed(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Megatron-LM's loop on a CPU ``device_count`` is the number of local ranks."""
    driver.unlink()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(cpu, "installed", lambda: True)
    assert devices.why_no_gpu() is None
    devices.require_usable_gpu()


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_torch_for_cpus_beside_gpus_is_one_line_a_node(
    local_rank: str, lines: int, recipe: Recipe, driver: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(compat, "prepare", lambda: 1 / 0)  # as far as this test goes
    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError), world.model_parallel_world(recipe):
        pass
    said = [record.getMessage() for record in caplog.records if record.name == world.__name__]
    assert len(said) == lines
    assert all("is a CPU build: this machine's GPUs are not used" in line and "\n" not in line for line in said)
    assert "CPU build" in report._device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.gpus_left_out() is None


@pytest.mark.parametrize(
    ("local_rank", "error", "said"),
    [
        ("0", UnusableGPUs("old driver"), "error: old driver\n"),
        ("3", UnusableGPUs("old driver"), ""),
        ("3", EnvironmentUnsupported("its Apex does not import"), "[rank 3] error: its Apex does not import\n"),
    ],
)
def test_the_ranks_of_a_node_say_it_once(
    local_rank: str,
    error: EnvironmentUnsupported,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What one of them alone may meet, it says by itself."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("RANK", local_rank)
    train._report(error)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("cuda", "visible", "available", "said"),
    [
        (None, None, False, "is a CPU build"),
        ("13.0", "", False, "CUDA_VISIBLE_DEVICES='' leaves no GPU"),
        ("13.0", None, False, "there is no CUDA device here"),
        ("13.0", None, True, None),
    ],
)
def test_require_gpu(
    cuda: str | None, visible: str | None, available: bool, said: str | None,
    driver: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    driver.unlink()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(report, "lines", lambda verbose: ["the report"])
    monkeypatch.setattr(command, "_smoke", lambda: 0)
    for options, status in ((["--smoke"], 0), (["--smoke", "--require-gpu"], 0 if said is None else 2)):
        monkeypatch.setattr(sys, "argv", ["compat", *options])
        assert command.main() == status
    printed = capsys.readouterr().out
    assert (said in printed and "error: --require-gpu: " in printed) if said else "error" not in printed
