"""DeepSpeed's checkpoints without DeepSpeed: made by hand in its layout, read exactly, and refused where damaged.

Those that DeepSpeed itself has written are in tests/distributed/test_deepspeed_checkpoints.py.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mtp_megatron.checkpoint import cli as convert_cli
from mtp_megatron.checkpoint.convert import TARGETS
from mtp_megatron.checkpoint.kinds import KINDS, detect
from mtp_megatron.checkpoint.pth import PthFile
from mtp_megatron.cli import main
from mtp_megatron.errors import CheckpointError
from tests.checkpoints import random_tensors, seal, write_checkpoint

RANKS = 2  # data parallel ones, each with a piece of everything under ZeRO 3


def write_deepspeed(run: Path, tensors: dict[str, Tensor], stage: int) -> Path:
    """A run's checkpoint as an engine of TP 1 leaves it; returns its folder."""
    folder = write_checkpoint(run, tensors=tensors)
    for file in [folder / ".metadata", *folder.glob("*.distcp")]:
        file.unlink()
    if stage < 3:
        torch.save({"module": tensors}, folder / "mp_rank_00_model_states.pt")
    else:
        flat = {key: padded(tensor.flatten()).chunk(RANKS) for key, tensor in tensors.items()}
        shapes = [{key: tensor.shape for key, tensor in tensors.items()}]
        for rank in range(RANKS):
            group = torch.cat([pieces[rank] for pieces in flat.values()])
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            model: dict[str, Any] = {"param_shapes": shapes, "frozen_param_shapes": {}, "frozen_param_fragments": {}}
            torch.save(model, folder / f"{name}_model_states.pt")
            states = {"exp_avg": torch.zeros(1000), "fp32_flat_groups": [group]}
            torch.save({"optimizer_state_dict": states}, folder / f"{name}_optim_states.pt")
    seal(folder)
    (folder.parent / "latest_checkpointed_iteration.txt").unlink()
    return folder


def padded(flat: Tensor) -> Tensor:
    return F.pad(flat, (0, -len(flat) % RANKS))


def convert(source: Path, output: Path, *arguments: str) -> int:
    return main(["convert", str(source), "--to", "hf", "--output", str(output), "--quiet", *arguments])


@pytest.mark.parametrize("kind", ["auto", "deepspeed"])
@pytest.mark.parametrize("stage", [2, 3])
def test_every_stage_is_read_exactly(stage: int, kind: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    write_deepspeed(tmp_path / "run", tensors, stage)
    assert detect(tmp_path / "run") == "deepspeed"
    assert convert(tmp_path / "run", tmp_path / "hf", "--from", kind) == 0
    write_checkpoint(tmp_path / "megatron", tensors=tensors)
    assert convert(tmp_path / "megatron", tmp_path / "expected") == 0
    for name in ("model.safetensors", "mtp_heads.safetensors"):
        found, expected = load_file(tmp_path / "hf" / name), load_file(tmp_path / "expected" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_command_line_takes_every_layout_that_errors_tell_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_deepspeed(tmp_path / "run", random_tensors(), 2)
    (folder / ".metadata").write_bytes(b"of megatron's")
    seal(folder)
    assert convert(folder, tmp_path / "hf") == 2
    told = re.search(r"Say which with --from (\w+) or (\w+)\.", capsys.readouterr().err)
    assert told is not None
    assert set(told.groups()) == {"deepspeed", "megatron"}
    assert convert(folder, tmp_path / "hf", "--from", "deepspeed") == 0
    parser = argparse.ArgumentParser()
    convert_cli.add_arguments(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["kind"] == ("auto", *KINDS)
    assert set(choices["to"] or ()) == {*TARGETS, "bundle"}
    assert "DeepSpeed run" in parser.format_help()


def flip(file: Path, where: int) -> None:
    content = bytearray(file.read_bytes())
    content[where] ^= 0x10
    file.write_bytes(content)


def position(file: Path, group: str) -> int:
    """Where the middle of a flat group lies in a file of optimizer states, or of the moments beside it."""
    states = torch.load(file, map_location="meta", weights_only=True)["optimizer_state_dict"]
    storage = (states["exp_avg"] if group == "exp_avg" else states["fp32_flat_groups"][0]).untyped_storage()
    return int(storage._checkpoint_offset) + storage.nbytes() // 2


@pytest.mark.parametrize("stage", [2, 3])
def test_a_flipped_bit_is_told_by_the_checksum(stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It makes no value infinite: without the checksum nothing would show."""
    folder = write_deepspeed(tmp_path / "run", random_tensors(), stage)
    if stage == 3:
        file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        flip(file, position(file, "exp_avg"))
        assert convert(folder, tmp_path / "unharmed") == 0  # what is not read is not looked at
        flip(file, position(file, "fp32_flat_groups"))
    else:
        file = folder / "mp_rank_00_model_states.pt"
        flip(file, file.stat().st_size // 2)
    assert convert(folder, tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert file.name in error
    assert "is damaged (Bad CRC-32" in error
    assert "Copy the file again" in error
    assert not [entry for entry in tmp_path.iterdir() if "hf" in entry.name]


def test_a_checksum_is_computed_once_for_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"flat": torch.arange(100.0)}, tmp_path / "x.pt")
    file, calls = PthFile(tmp_path / "x.pt"), []
    blocks = file._blocks
    monkeypatch.setattr(file, "_blocks", lambda key: (calls.append(key), blocks(key))[1])
    assert [file.read_part("flat", start, 10).sum().item() for start in (0, 50)] == [45.0, 545.0]
    assert calls == ["flat"]
    with pytest.raises(CheckpointError, match="no flat tensor of 110 values"):
        file.read_part("flat", 100, 10)


@pytest.mark.parametrize(
    "content",
    [{}, {"module": torch.ones(3)}, {"module": {"x": "text"}}, [1, 2]],
    ids=["nothing", "a tensor", "a text", "a list"],
)
def test_states_of_another_form_are_refused(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_deepspeed(tmp_path / "run", random_tensors(), 2)
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    seal(folder)
    assert convert(folder, tmp_path / "hf") == 2
    assert "mp_rank_00_model_states.pt" in capsys.readouterr().err
