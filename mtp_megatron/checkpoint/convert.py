"""From any layout to any other: the whole conversion, atomic and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mtp_megatron.checkpoint.bundle_manifest import check_weights
from mtp_megatron.checkpoint.description import ModelDescription
from mtp_megatron.checkpoint.heads import NewHeads, with_heads
from mtp_megatron.checkpoint.hf import EXPORT_CONFIG, write_folder
from mtp_megatron.checkpoint.kinds import open_source
from mtp_megatron.checkpoint.megatron_writer import write_megatron
from mtp_megatron.checkpoint.meta import write_meta
from mtp_megatron.checkpoint.source import TensorSource
from mtp_megatron.data.atomic import new_folder
from mtp_megatron.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SHARD_BYTES = 5 * 10**9
WRITERS = {"meta": write_meta, "megatron": write_megatron}
TARGETS = ("hf", *WRITERS)
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source: the model's folder.
        step: of the run that it comes from, passed-over steps included; 0 for a model from elsewhere.
        output: the folder made.
        num_heads: heads of the model.
        total_bytes: of the tensors written.
        fresh: False if the folder held this very export already, and nothing was done.
        notices: for the user.
    """

    source: Path
    step: int
    output: Path
    num_heads: int
    total_bytes: int
    fresh: bool = True
    notices: tuple[str, ...] = ()


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    kind: str = "auto",
    heads: int | None = None,
    new_heads: NewHeads = "fresh",
    model_recipe: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Conversion:
    """Write a model in another layout.

    Everything is written to a hidden folder that is renamed at the end, so whatever interrupts the conversion leaves
    nothing that looks finished. Memory is bounded by one tensor (Hugging Face: one shard).

    Args:
        source: a folder of any layout that :func:`.kinds.open_source` knows.
        output: the folder to make; it must not exist or be empty (or, for Hugging Face, hold this export already).
        to: one of :data:`TARGETS`.
        kind: the layout of ``source``, or ``"auto"``.
        heads: heads of the result; None: as many as the source has.
        new_heads: where heads that the source lacks come from.
        model_recipe: recipe whose section ``model`` describes a Megatron checkpoint that does not describe itself.
        dtype: a key of :data:`DTYPES`; None keeps what is stored.
        max_shard_bytes: size at which a new safetensors file is begun.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: the source cannot be converted, or is a bundle whose weights are not those of its manifest; or
            the output holds something. Nothing is left behind.
        ConfigError: an impossible number of heads, or a recipe that cannot be read.
        DataError: the output cannot be written, or the tokenizer cannot be read.
    """
    output = Path(output)
    tensors, description = open_source(source, kind, model_recipe=model_recipe)
    if heads is not None:
        tensors, description = with_heads(tensors, description, heads, new_heads)
    target_dtype = None if dtype is None else DTYPES[dtype]
    n = description.shape.num_heads
    if _already_there(output, tensors, to, target_dtype):
        return Conversion(tensors.folder, description.step, output, n, 0, fresh=False)
    check_weights(tensors.folder, progress=progress)
    size = 0
    with (
        new_folder(output) as folder,
        tqdm(desc=f"converting {tensors.folder.name}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):

        def advance(written: int, total: int) -> None:
            nonlocal size
            size += written
            bar.total = total
            bar.update(written)

        if to == "hf":
            notices = write_folder(
                tensors, description, folder, dtype=target_dtype, max_shard_bytes=max_shard_bytes, progress=advance
            )
        else:
            notices = WRITERS[to](tensors, description, folder, dtype=target_dtype, progress=advance)
        _write_recipe(description, folder, to)
    return Conversion(tensors.folder, description.step, output, n, size, notices=tuple(notices))


def convert_to_hf(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Conversion:
    """:func:`convert` to a Hugging Face folder, all heads as they are."""
    return convert(source, output, to="hf", dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress)


def _write_recipe(description: ModelDescription, folder: Path, to: str) -> None:
    """Beside a Megatron checkpoint, the recipe's sections that fit it."""
    if to != "megatron":
        return
    import yaml

    shape = description.shape
    sections = {"model": description.raw["model"], "heads": {"n": shape.num_heads, "kind": shape.head_kind}}
    text = "# The sections of a recipe whose run.load names this folder.\n" + yaml.safe_dump(sections, sort_keys=False)
    (folder / "model_recipe.yaml").write_text(text, encoding="utf-8")


def _already_there(output: Path, source: TensorSource, to: str, dtype: torch.dtype | None) -> bool:
    """Whether ``output`` is the finished export of this very model in this type.

    Raises:
        CheckpointError: it holds anything else.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise CheckpointError(f"{output}: is a file. Choose another --output folder.")
    if not any(output.iterdir()):
        return False
    name = str(dtype or source.meta(_EMBEDDING).dtype).removeprefix("torch.")
    try:
        held = json.loads((output / EXPORT_CONFIG).read_text(encoding="utf-8"))
        same = held["source"]["fingerprint"] == source.fingerprint and held["dtype"] == name
    except (OSError, ValueError, KeyError, TypeError):  # no export, so something of the user's
        same = False
    if same and to == "hf":
        return True
    what = "holds another export" if (output / EXPORT_CONFIG).exists() else "is not empty"
    raise CheckpointError(f"{output}: {what}. Choose another --output folder, or remove this one.")
