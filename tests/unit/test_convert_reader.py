"""Reading Megatron checkpoints: every chunking, and every kind of damage or malice."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_megatron.checkpoint import megatron_reader
from mtp_megatron.checkpoint.megatron_reader import MegatronCheckpoint, open_checkpoint
from mtp_megatron.errors import CheckpointError
from tests.checkpoints import random_tensors, seal, stack_trunk, write_checkpoint, write_torch_dist

CUTS: dict[str, Callable[[str, torch.Tensor], list[int]]] = {
    "whole": lambda key, tensor: [1] * tensor.dim(),
    "every axis in two": lambda key, tensor: [2] * tensor.dim(),
    "uneven thirds": lambda key, tensor: [1] * (tensor.dim() - 1) + [3],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run")


def test_reads_every_tensor_of_a_tp2_checkpoint_bit_by_bit(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tensors = random_tensors()
    assert set(checkpoint.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert checkpoint.meta(key).shape == tensor.shape
        assert torch.equal(checkpoint.read(key), tensor)


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_named(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000007/__0_0\.distcp: deleted meanwhile, as a training"):
        checkpoint.read("final_norm.weight")


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_any_chunking_gives_the_same_tensors(tmp_path: Path, cuts: Callable[..., list[int]]) -> None:
    tensors = random_tensors(dtype=torch.bfloat16)
    write_torch_dist(tmp_path / "c", stack_trunk(tensors), cuts)
    checkpoint = MegatronCheckpoint(tmp_path / "c")
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in tensors.items())


def test_a_layer_is_read_without_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = megatron_reader._load
    monkeypatch.setattr(megatron_reader, "_load", lambda chunk, dtype: loaded.append(chunk) or load(chunk, dtype))
    open_checkpoint(folder).read("decoder.layers.1.mlp.linear_fc1.weight")
    assert len(loaded) == 2  # the TP2 halves of that one layer
    assert {chunk.offsets[0] for chunk in loaded} == {1}


def test_the_optimizer_is_left_out_and_a_run_or_its_checkpoints_will_do(tmp_path: Path) -> None:
    tensors = stack_trunk(random_tensors())
    extra = {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in tensors.items()}
    folder = write_checkpoint(tmp_path / "run")
    write_torch_dist(folder, tensors | extra | {"chained_0.optimizer.state.x": torch.ones(2, 2)})
    seal(folder)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        checkpoint = open_checkpoint(path)
        assert checkpoint.folder == folder
        assert set(checkpoint.keys()) == set(random_tensors())


def test_neither_megatron_nor_a_process_group_is_needed(folder: Path) -> None:
    program = f"""
    import sys, torch
    from mtp_megatron.checkpoint.megatron_reader import open_checkpoint
    checkpoint = open_checkpoint({str(folder)!r})
    for key in checkpoint.keys(): checkpoint.read(key)
    assert not [name for name in sys.modules if name.split(".")[0] == "megatron"]
    assert not torch.distributed.is_initialized()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


class Malice:
    """A pickle of this runs a command when it is loaded the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_metadata_file_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    hostile = pickle.dumps(Malice(marker))
    pickle.loads(hostile)
    assert marker.exists(), "control: loaded the ordinary way it does run"
    marker.unlink()
    (folder / ".metadata").write_bytes(hostile)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata.*system"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_a_hostile_data_file_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    hostile = io.BytesIO()
    torch.save(Malice(marker), hostile)
    checkpoint = open_checkpoint(folder)
    for file in folder.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        source = checkpoint._sources["final_norm.weight"].stored.chunks[0]
        if file == source.file:
            padded = hostile.getvalue()[: source.length].ljust(source.length, b"\0")
            content[source.start : source.start + source.length] = padded
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read("final_norm.weight")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 1000, -1])
def test_a_cut_metadata_file_is_named(folder: Path, keep: int) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:keep])
    seal(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        open_checkpoint(folder)


def test_a_metadata_file_of_anything_else_is_named(folder: Path) -> None:
    for content in (None, {"a": 1}, [1, 2]):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        seal(folder)
        with pytest.raises(CheckpointError, match=r"\.metadata: damaged or not"):
            open_checkpoint(folder)


def test_a_truncated_or_missing_data_file_is_named_before_anything_is_read(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp has \d+ bytes instead of"):
        open_checkpoint(folder)
    seal(folder)  # even where nobody recorded the sizes
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: truncated"):
        open_checkpoint(folder)
    file.unlink()
    seal(folder)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: missing"):
        open_checkpoint(folder)


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    key = "decoder.layers.2.mlp.linear_fc2.weight"
    checkpoint = open_checkpoint(folder)
    chunk = next(c for c in checkpoint._sources[key].stored.chunks if c.offsets[0] == 2)
    content = bytearray(chunk.file.read_bytes())
    clean = bytes(content[chunk.start : chunk.start + chunk.length])
    where = clean.index(checkpoint.read(key)[chunk.offsets[1], : chunk.sizes[2]].contiguous().numpy().tobytes()[:16])
    content[chunk.start + where] ^= 1
    chunk.file.write_bytes(content)
    # Control: torch.load alone takes the damaged numbers.
    with chunk.file.open("rb") as file:
        file.seek(chunk.start)
        torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
    with pytest.raises(CheckpointError, match=rf"{chunk.file.name}: damaged, the checksum"):
        checkpoint.read(key)


def test_no_file_outside_the_folder_is_read(folder: Path, tmp_path: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"/../0.distcp"))
    seal(folder)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(folder)


def test_chunks_that_leave_a_hole_are_refused(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["output_layer.weight"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"output_layer\.weight hold 4224 of 8448 values"):
        open_checkpoint(folder).read("output_layer.weight")


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, r"\.metadata: chunks of output_layer\.weight overlap"), (-264, "lies outside the tensor's shape")],
    ids=["one twice", "before the beginning"],
)
def test_chunks_that_hide_a_hole_are_refused(folder: Path, offset: int, message: str) -> None:
    """Their values add up to the tensor's, half of which would be whatever memory held."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    first, second = metadata.state_dict_metadata["output_layer.weight"].chunks
    assert (*first.offsets, *first.sizes) == (0, 0, 132, 32)
    index = {i.offset: i for i in metadata.storage_data if i.fqn == "output_layer.weight"}[second.offsets]
    stored = metadata.storage_data.pop(index)
    second.offsets = torch.Size([offset, 0])
    metadata.storage_data[dataclasses.replace(index, offset=second.offsets)] = stored
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder).read("output_layer.weight")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_text("weights"), "a file. Give the folder"),
        (lambda path: path.mkdir(), "no checkpoint"),
        (lambda path: (path / "iter_0000003").mkdir(parents=True), "files.json is missing"),
    ],
    ids=["nothing", "a file", "an empty folder", "an unfinished save"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x")


def test_the_old_torch_format_is_refused(tmp_path: Path) -> None:
    """Megatron's legacy layout: mp_rank_00/model_optim_rng.pt, no .metadata."""
    folder = tmp_path / "iter_0000003"
    (folder / "mp_rank_00").mkdir(parents=True)
    (folder / "files.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"\.metadata: missing, so this is no finished torch_dist checkpoint"):
        open_checkpoint(folder)
