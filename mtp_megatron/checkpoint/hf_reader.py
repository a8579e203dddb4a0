"""Reads a Hugging Face folder of the Llama family: safetensors, or ``.bin`` files without running their pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_megatron.checkpoint.description import ModelDescription, describe_foreign
from mtp_megatron.checkpoint.hf import EXPORT_CONFIG, EXPORT_FORMAT, HEADS_STEM, MODEL_STEM
from mtp_megatron.checkpoint.hf_config import ends_and_begin, model_settings
from mtp_megatron.checkpoint.pth import PthFile
from mtp_megatron.checkpoint.sharded import checked_weight_map
from mtp_megatron.checkpoint.source import Remapped, Tensors, TensorSource, fingerprint
from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, expand
from mtp_megatron.data.huggingface import HuggingFaceTokenizer, read_files
from mtp_megatron.data.tokenizer import MODEL_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mtp_megatron.errors import CheckpointError

CONFIG = "config.json"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LENGTH = struct.Struct("<Q")  # safetensors: the header's length, the header (JSON), the values
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafetensorsFile:
    """The tensors of one safetensors file by key.

    The header is parsed once: for tens of thousands of experts' matrices that takes longer than reading one of them.
    The file is open only while one is read, and not mapped: memory holds that one.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path
        try:
            with safe_open(path, framework="pt"):  # holds the header against itself and the file's size
                pass
            with path.open("rb") as file:
                begin = _LENGTH.size + _LENGTH.unpack(file.read(_LENGTH.size))[0]
                header = json.loads(file.read(begin - _LENGTH.size))
            self._metas: dict[str, Tensor] = {}
            self._places: dict[str, tuple[int, int]] = {}
            for key in sorted(header.keys() - {"__metadata__"}):
                entry = header[key]
                dtype = _DTYPES.get(entry["dtype"], torch.uint8)
                self._metas[key] = torch.empty(entry["shape"], dtype=dtype, device="meta")
                start, end = entry["data_offsets"]
                self._places[key] = (begin + start, begin + end)
        except (SafetensorError, OSError, TypeError) as error:  # the last: sizes and entries that the library lets pass
            raise self._damaged(error) from error

    def keys(self) -> list[str]:
        """Keys of the file's tensors."""
        return list(self._metas)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values; any type that is not floating point is given as ``uint8``."""
        return self._metas[key]

    def read(self, key: str) -> Tensor:
        """The values, of a floating point type."""
        start, end = self._places[key]
        values = torch.empty(end - start, dtype=torch.uint8)
        try:
            with self.folder.open("rb") as file:
                file.seek(start)
                found = file.readinto(values.numpy().data)
        except OSError as error:
            raise self._damaged(error) from error
        if found != end - start:
            raise self._damaged(f"{key} has {found} of {end - start} bytes")
        meta = self._metas[key]
        return values.view(meta.dtype).view(meta.shape)

    def _damaged(self, what: object) -> CheckpointError:
        return CheckpointError(f"{self.folder}: missing, truncated or damaged ({what}). Copy the file again.")


class HFFolder:
    """All tensors of a Hugging Face folder by key, the further heads of this package's exports included.

    Raises:
        CheckpointError: no tensors, files missing or damaged, or an index that disagrees with them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = fingerprint(path for path in folder.iterdir() if path.is_file())
        self._files: dict[str, Tensors] = dict(_model_files(folder))
        if (folder / EXPORT_CONFIG).is_file():
            self._files |= dict(_indexed(folder, f"{HEADS_STEM}.safetensors", SafetensorsFile))

    def keys(self) -> list[str]:
        """Keys of the folder's tensors."""
        return list(self._files)

    def meta(self, key: str) -> Tensor:
        """The tensor without its values."""
        return self._files[key].meta(key)

    def read(self, key: str) -> Tensor:
        """The values."""
        return self._files[key].read(key)


def open_hf(folder: Path) -> tuple[TensorSource, ModelDescription]:
    """The model in a Hugging Face folder: its last layer is head 1 unless an export says otherwise, which also has the
    further heads.

    Raises:
        CheckpointError: another family, settings or tensors that this package's model has not, damaged files.
        DataError: the tokenizer of an export is damaged.
    """
    config, export = read_json(folder / CONFIG), _export(folder)
    heads = export["heads"] if export else {"n": 1}
    layers = heads.get("kind", "transformer") == "transformer"
    model = model_settings(config, folder / CONFIG, heads_are_layers=layers)
    tensors = HFFolder(folder)
    dtype = tensors.meta(tensors.keys()[0]).dtype
    description = describe_foreign(
        "hf",
        model,
        tokenizer=_tokenizer(folder, config, export),
        precision=PRECISIONS.get(dtype, "fp32"),
        heads=heads,
        where=folder / CONFIG,
    )
    mappings = expand((*LLAMA, *FURTHER_HEADS), description.shape)
    tied_copy = ("lm_head.weight", "model.embed_tokens.weight")
    return Remapped(tensors, mappings, description.shape, tied_copy=tied_copy), description


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file.

    Raises:
        CheckpointError: missing, damaged, or no settings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}). Give the model's own file.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged, no settings in it. Give the model's own file.")
    return content


def _export(folder: Path) -> dict[str, Any] | None:
    path = folder / EXPORT_CONFIG
    if not path.is_file():
        return None
    export = read_json(path)
    if export.get("format") != EXPORT_FORMAT or not isinstance(export.get("heads"), dict):
        raise CheckpointError(
            f"{path}: not an export's. Remove it, or give a folder that `mtp-megatron convert` wrote."
        )
    return export


def _tokenizer(folder: Path, config: dict[str, Any], export: dict[str, Any] | None) -> Tokenizer:
    entry = (export or {}).get("tokenizer") or {}
    if entry.get("kind") == ByteTokenizer.kind:
        return ByteTokenizer()
    if entry.get("kind") == "sentencepiece":
        return load_tokenizer(folder / MODEL_FILE)
    (end, *more), begin = ends_and_begin(config)
    return HuggingFaceTokenizer(
        read_files(folder),
        vocab_size=int(config["vocab_size"]),
        eod=end,
        bos=begin,
        name=str(folder),
        more_ends=more,
    )


def _model_files(folder: Path) -> Iterator[tuple[str, Tensors]]:
    for name, reader in ((f"{MODEL_STEM}.safetensors", SafetensorsFile), ("pytorch_model.bin", PthFile)):
        if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
            return _indexed(folder, name, reader)
    raise CheckpointError(
        f"{folder}: neither {MODEL_STEM}.safetensors nor pytorch_model.bin, whole or with an index. Give the whole "
        "folder."
    )


def _indexed(folder: Path, name: str, reader: type[SafetensorsFile] | type[PthFile]) -> Iterator[tuple[str, Tensors]]:
    """Key and file of every tensor, from the index if there is one."""
    path = folder / f"{name}.index.json"
    if not path.is_file():
        file = reader(folder / name)
        yield from ((key, file) for key in file.keys())  # noqa: SIM118 (not a dict)
        return
    weight_map = checked_weight_map(path, read_json(path).get("weight_map"), "Copy it again.")
    for part in dict.fromkeys(weight_map.values()):
        file, wanted = reader(folder / part), {key for key, where in weight_map.items() if where == part}
        if odd := sorted(wanted ^ set(file.keys())):
            raise CheckpointError(
                f"{folder / part}: it and {path.name} disagree ({', '.join(odd[:3])}). Copy both again."
            )
        yield from ((key, file) for key in file.keys())  # noqa: SIM118 (not a dict)
