"""Files of tensors that are read one at a time: exactly, and at a cost that does not grow with the file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mtp_megatron.checkpoint import hf_reader
from mtp_megatron.checkpoint.hf_reader import HFFolder, SafetensorsFile
from mtp_megatron.checkpoint.pth import PthFile
from mtp_megatron.checkpoint.source import Remapped
from mtp_megatron.checkpoint.tables import LLAMA, expand
from mtp_megatron.errors import CheckpointError
from tests.checkpoints import SHAPE

TENSORS = {
    "z": torch.randn(3, 5),
    "a": torch.randn(4, 1).bfloat16(),
    "a10": torch.randn(2, 2, 2).half(),
    "a9": torch.zeros(0, 7),
    "number": torch.tensor(2.5),
}


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Calls of a module's function, as their first arguments."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(module, name)

    def counting(first: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(first)
        return original(first, *arguments, **named)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_safetensors_are_read_bit_by_bit_and_by_name(tmp_path: Path) -> None:
    save_file(TENSORS | {"ids": torch.arange(3)}, tmp_path / "file.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as theirs:
        assert file.keys() == list(theirs.keys())  # the first one's type is taken for the model's
    for key, tensor in TENSORS.items():
        found, meta = file.read(key), file.meta(key)
        assert (found.dtype, found.shape) == (meta.dtype, meta.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    assert file.meta("ids").dtype == torch.uint8  # refused by whoever wants a weight


def test_a_safetensors_header_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    save_file({f"experts.{number}": torch.full((2,), float(number)) for number in range(300)}, path)
    opened, parsed = counted(monkeypatch, hf_reader, "safe_open"), counted(monkeypatch, json, "loads")
    file = SafetensorsFile(path)
    assert all(torch.equal(file.read(f"experts.{number}"), torch.full((2,), float(number))) for number in range(300))
    assert (opened, len(parsed)) == ([path], 1)


def test_a_safetensors_file_that_gets_shorter_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(file.read("a"), torch.ones(4))
    with pytest.raises(CheckpointError, match=r"file\.safetensors: missing, truncated or damaged \(b has 11 of 16 "):
        file.read("b")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"file\.safetensors: missing, truncated or damaged"):
        file.read("a")


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ({"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}, 0),
        (["F32", [2], [0, 8]], 8),
    ],
    ids=["a size that torch has not", "no object"],
)
def test_a_header_that_the_library_lets_pass_is_named(entry: Any, values: int, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(values))
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["a"], "control"
    with pytest.raises(CheckpointError, match=r"file\.safetensors: missing, truncated or damaged"):
        SafetensorsFile(path)


def test_the_directory_of_a_pth_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pth"
    tensors = TENSORS | {"turned": torch.randn(3, 2).t(), "part": torch.arange(9.0)[2:5]}
    torch.save(tensors, path)
    file = PthFile(path)
    opened = counted(monkeypatch, zipfile, "ZipFile")
    assert all(torch.equal(file.read(key), tensor) for key, tensor in tensors.items())
    assert opened == []


def test_a_pth_file_that_gets_shorter_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"a": torch.ones(4), "b": torch.ones(400)}, path)
    file = PthFile(path)
    end = max(info.header_offset for info in file._members.values() if info.filename.endswith("data/1"))
    path.write_bytes(path.read_bytes()[: end + 500])
    assert torch.equal(file.read("a"), torch.ones(4))
    with pytest.raises(CheckpointError, match=r"file\.pth: b "):
        file.read("b")


def test_of_a_pth_file_that_was_compressed_the_whole_is_read_and_no_part(tmp_path: Path) -> None:
    """Its bytes would be taken for the numbers."""
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "file.pth", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert torch.equal(PthFile(tmp_path / "plain.pth").read_part("a", 3, 2), torch.tensor([3.0, 4.0]))
    file = PthFile(tmp_path / "file.pth")
    assert torch.equal(file.read("a"), torch.arange(1000.0))
    with pytest.raises(CheckpointError, match=r"file\.pth: compressed"):
        file.read_part("a", 3, 2)


def test_a_tied_copy_of_whole_numbers_is_refused_by_name(tmp_path: Path) -> None:
    """It is compared before the model's shapes are."""
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    save_file({tied[0]: torch.ones(4, 2, dtype=torch.int64), tied[1]: torch.ones(4, 2)}, tmp_path / "model.safetensors")
    shape = replace(SHAPE, tied_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as uint8, a quantised model's type"):
        Remapped(HFFolder(tmp_path), expand(LLAMA, shape), shape, tied_copy=tied)


def test_tied_embeddings_under_the_other_name_alone_are_named(tmp_path: Path) -> None:
    """``safetensors.torch.save_model`` keeps the first name of two."""
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    save_file({tied[0]: torch.ones(4, 2)}, tmp_path / "model.safetensors")
    shape = replace(SHAPE, tied_embeddings=True)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        Remapped(HFFolder(tmp_path), expand(LLAMA, shape), shape, tied_copy=tied)
