"""A GPU that runs out of memory, by stand-ins: what the error says, and the settings that would help."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.advice import _options
from mtp_megatron.planning.presets import read_plan
from mtp_megatron.training.out_of_memory import OutOfMemory, check_memory_snapshot, explained, remedies
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.run_folder import RunFolder

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Rank 0 of one with a GPU of 80 GiB; what was recorded of its memory."""
    done: list[Any] = []
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(cuda, "memory_allocated", lambda: 70 * GIB)
    monkeypatch.setattr(cuda, "memory_reserved", lambda: 79 * GIB)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 75 * GIB)
    monkeypatch.setattr(cuda.memory, "_record_memory_history", lambda **of: done.append(of))
    monkeypatch.setattr(cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("pickled"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield done
    dist.destroy_process_group()


def run_out(recipe: Recipe, run: Path) -> None:
    with explained(recipe, RunFolder(run), 16, lambda: "step 12"):
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nSee the documentation")
        error.add_note("in the backward of head 2 of 4 (deferred sequential heads)")
        raise error


def test_the_error_says_where_how_much_and_what_to_do(gpu: list[Any], tmp_path: Path) -> None:
    recipe = parse_recipe({})
    with pytest.raises(OutOfMemory) as caught:
        run_out(recipe, tmp_path)
    text = str(caught.value)
    assert text.startswith("rank 0 on ")
    assert (
        "out of GPU memory in step 12 (70.00 GiB allocated, 79.00 GiB reserved, 75.00 GiB allocated at the peak of "
        "80.00 GiB; CUDA out of memory. Tried to allocate 12.00 GiB.; See the documentation; in the backward of head 2 "
        "of 4 (deferred sequential heads))"
    ) in text
    assert "nearest first: optimizer.distributed=true; a smaller heads.loss_chunk_tokens" in text
    assert "'mtp-megatron plan RECIPE --gpus 16 --memory 86' says" in text
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert gpu == [], "nothing is recorded unasked"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(OutOfMemory, match=f"plan {tmp_path}/recipe.yaml --gpus 16"):
        run_out(recipe, tmp_path)


def test_other_errors_pass(gpu: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), explained(parse_recipe({}), RunFolder(tmp_path), 1, lambda: "step 1"):
        raise ZeroDivisionError


def test_a_snapshot_is_kept_where_it_was_asked_for(gpu: list[Any], tmp_path: Path) -> None:
    recipe = parse_recipe({"train": {"memory_snapshot": True}})
    with pytest.raises(OutOfMemory, match=r"rank0-step-12\.pickle shows what was allocated where"):
        run_out(recipe, tmp_path)
    assert (tmp_path / "memory" / "rank0-step-12.pickle").read_text() == "pickled"
    assert [recorded.get("enabled", "on") for recorded in gpu] == ["on", None]
    with pytest.raises(OutOfMemory, match=r"rank0-step-12\.2\.pickle shows"):  # the one before stays
        run_out(recipe, tmp_path)
    assert gpu[0]["max_entries"] <= 100_000, "a few KB each"


def test_a_snapshot_that_cannot_be_written_hides_no_error(
    gpu: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "memory").touch()
    with caplog.at_level(logging.WARNING), pytest.raises(OutOfMemory) as caught:
        run_out(parse_recipe({"train": {"memory_snapshot": True}}), tmp_path)
    assert "was not written: FileExistsError" in caplog.text
    assert "memory_viz" not in str(caught.value)


def test_without_a_gpu_there_is_nothing_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"train": {"memory_snapshot": True}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.memory_snapshot=True: .* there is none"):
        check_memory_snapshot(recipe)
    check_memory_snapshot(parse_recipe({}))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["parallel.tensor=2", "parallel.pipeline=2", "optimizer.distributed=false", "train.micro_batch_size=4"],
        ["parallel.tensor=2", "parallel.sequence_parallel=true", "train.recompute=selective"],
        ["train.recompute=full"],
    ],
    ids=str,
)
def test_remedies_are_those_of_the_plan_in_its_order(changes: list[str]) -> None:
    recipe = read_plan("7B", changes).resolved(vocab_size=32000)
    ways = [(distance, settings) for way in _options(recipe, 8) for distance, settings in way if settings]
    planned: list[str] = []
    for _, settings in sorted(ways, key=lambda way: way[0]):
        key = next(iter(settings)).replace("rebalance", "parallel.layout")
        if key != (planned or [""])[-1]:
            planned.append(key)
    told: list[str] = []
    for text in remedies(recipe):
        key = next(word for word in text.replace("(", " ").replace(")", " ").replace("=", " ").split() if "." in word)
        if key != (told or [""])[-1]:
            told.append(key)
    for keys in (planned, told):  # of the parallel sizes the plan tries several, in turn
        del keys[keys.index("parallel.tensor") + 1 :]
    assert told == planned


@pytest.mark.parametrize(
    ("tree", "first"),
    [
        ({"heads": {"execution": "joint"}}, "heads.execution=deferred"),
        ({"run": {"deepspeed": "zero1.json"}}, "a higher ZeRO stage in zero1.json"),
        ({"optimizer": {"distributed": True}}, "a smaller heads.loss_chunk_tokens (null, chosen by the package now)"),
    ],
    ids=["joint", "deepspeed", "distributed"],
)
def test_the_first_remedy(tree: dict[str, Any], first: str) -> None:
    assert remedies(parse_recipe(tree))[0] == first
