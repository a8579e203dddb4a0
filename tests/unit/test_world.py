"""How a rank joins and leaves its job. NCCL, which waits for the other ranks, is a stand-in here."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.compat import devices
from mtp_megatron.compat.versions import EnvironmentUnsupported
from mtp_megatron.data.blend import Blend
from mtp_megatron.errors import ConfigError
from mtp_megatron.loss import cuda_memory
from mtp_megatron.training import agreement, cli, world
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
    ("rank", "status", "said"),
    [
        ("lambda: 2", 2, ""),
        ("lambda: 1 / 0", 1, "ZeroDivisionError"),
        ("unsaved", 1, "CheckpointException"),
        ("lambda: 0", 0, ""),
    ],
)
def test_a_failed_rank_ends_without_the_others(waits: bool, rank: str, status: int, said: str) -> None:
    code = f"""
import atexit
from mtp_megatron import train
from mtp_megatron.training import world
world.waits_for_others = lambda: {waits}
atexit.register(print, "cleaned up")

def unsaved():
    from torch.distributed.checkpoint.api import CheckpointException
    raise CheckpointException("full", {{}})

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
            devices._check_local_rank()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    devices._check_local_rank()


@pytest.mark.parametrize("local_world_size", [None, "8"])  # torchrun says it; a script around srun may not
def test_ranks_that_are_bound_to_one_device_each_are_told_of_it(
    local_world_size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "7")
    if local_world_size is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    with pytest.raises(
        ConfigError, match=r"processes per node=8: .*sees a single device.*--gpus-per-task or --gpu-bind"
    ):
        devices._check_local_rank()


def test_ranks_of_a_node_that_do_not_know_their_place_are_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would take the first GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=None: this node has 8 CUDA devices.*LOCAL_RANK=\$SLURM_LOCALID"):
        devices._check_local_rank()
    with monkeypatch.context() as several:
        several.setattr(dist, "is_initialized", lambda: True)  # by a script that has chosen a device for each
        devices._check_local_rank()
    monkeypatch.setenv("WORLD_SIZE", "1")
    devices._check_local_rank()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a scheduler has bound each to its own
    devices._check_local_rank()


@pytest.fixture
def gpu_3(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the rank that owns GPU 3 of 8 does to CUDA, of which there is none here."""
    compat.prepare()  # as on a CPU, before it passes for a GPU's machine
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("started"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    return done


@pytest.mark.parametrize("start", ["world", "preflight"])
def test_a_rank_takes_its_gpu_before_anything_is_imported_that_may_take_the_first_one(
    start: str, gpu_3: list[object], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "prepare", lambda: gpu_3.append("imports"))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: 1 / 0)  # as far as this test goes
    monkeypatch.setattr(agreement, "preflight", lambda *a, **k: gpu_3.append("imports"))
    if start == "world":
        with pytest.raises(ZeroDivisionError), world.model_parallel_world(recipe):
            pass
    else:
        agreement.preflight_together(recipe, 1, None)
    assert gpu_3 == [torch.device("cuda", 3), "started", "imports"]


@pytest.mark.parametrize(("said", "told"), [(None, "3"), ("5", "5")])
def test_deepspeed_is_told_the_gpu_that_is_current(
    said: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a script that has told its ranks apart without LOCAL_RANK; another number would send them all to GPU 0."""
    from mtp_megatron.deepspeed import trainer

    monkeypatch.setenv("LOCAL_RANK", said or "")  # so that it is put back
    if said is None:
        monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    trainer._tell_local_rank()
    assert os.environ["LOCAL_RANK"] == told


def test_a_gpu_that_does_not_answer_is_named(gpu_3: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore lines")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(
        EnvironmentUnsupported, match="GPU 3 of this node cannot be used: CUDA error: uncorrectable ECC"
    ):
        devices.take_own_gpu()


@pytest.mark.parametrize(
    ("tensor", "chunk", "multiprocessors", "memory", "said"),
    [
        (2, None, 132, 80, None),
        (2, None, 114, 80, "multiprocessors is 132 there and 114 here"),
        (2, None, 132, 141, "memory at least, GiB is 64 there and 128 here"),
        (2, 512, 132, 141, None),  # the loss goes in chunks of that many
        (1, None, 132, 141, None),  # no rank waits for another in each chunk
    ],
)
def test_gpus_of_two_kinds_in_one_job(
    tensor: int, chunk: int | None, multiprocessors: int, memory: int, said: str | None,
    gpu_3: list[object], recipe: Recipe, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update={"tensor": tensor}),
            "heads": recipe.heads.model_copy(update={"loss_chunk_tokens": chunk}),
        }
    )

    def statement(rank: int, count: int, gib: int) -> agreement.Statement:
        properties = SimpleNamespace(major=9, minor=0, multi_processor_count=count, total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        cuda_memory.cache_clear()
        plan: Any = SimpleNamespace(recipe=recipe, initial=None, data=Blend((), (), 0, ()))
        return agreement.Statement(rank, f"host{rank}", "", agreement._facts(plan))

    statements = [statement(0, 132, 80), statement(1, multiprocessors, memory)]
    cuda_memory.cache_clear()
    if said is None:
        agreement.compare(statements)
        return
    with pytest.raises(ConfigError, match=f"GPU=.*rank 1 on host1.*{said}.*GPUs of one kind"):
        agreement.compare(statements)


SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
BATCH = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}  # sbatch's script, which is task 0 of no step
SHELL = {**SRUN, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "34889", "SLURM_STEP_ID": "4294967290"}


def environment(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", *SHELL):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({}, False),
        (SRUN, True),
        ({**SRUN, "SLURM_PROCID": "0"}, True),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "8"}, False),
        (BATCH, False),
        (SHELL, False),
        ({**SHELL, "SLURM_PROCID": "1"}, True),  # srun in such a shell: its tasks inherit the terminal's port
    ],
)
def test_tasks_of_srun_without_a_launcher_are_no_jobs(
    variables: dict[str, str], refused: bool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment(variables, monkeypatch)
    monkeypatch.setattr(agreement, "rendezvous", lambda *args, **settings: iter([(None, 0, 0)]))
    if not refused:
        assert agreement.job_store(recipe) is None
        return
    said = r"SLURM_STEP_NUM_TASKS=8: .*no launcher has set RANK.*examples/torchrun/slurm\.sbatch"
    with pytest.raises(ConfigError, match=said):
        agreement.job_store(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text("heads: {n: 2}\n")
    with pytest.raises(ConfigError, match=said):  # nor does each of them start a job of several ranks
        cli.run(argparse.Namespace(describe=False, print_recipe=False, recipe=str(file), overrides=[], nproc=2))


@pytest.mark.parametrize("processes", [0, -1])
def test_fewer_processes_than_one_are_refused(processes: int, tmp_path: Path) -> None:
    """0 was taken for none given, and -1 was torchrun's AssertionError."""
    file = tmp_path / "recipe.yaml"
    file.write_text("heads: {n: 2}\n")
    with pytest.raises(ConfigError, match=f"--nproc={processes}: must be 1 or more"):
        cli.run(argparse.Namespace(describe=False, print_recipe=False, recipe=str(file), overrides=[], nproc=processes))


def test_a_process_group_that_exists_is_enough(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a script that has told srun's tasks apart by itself."""
    environment(SRUN, monkeypatch)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert agreement.job_store(recipe) is None
