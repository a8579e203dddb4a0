"""The serving bundle: a plain Llama that every engine serves, its heads as drafts, commands, facts and hashes.

- ``EXPORT/``: trunk + head 1, a Hugging Face Llama folder (and ``mtp_heads``, for ``generate``);
- ``EXPORT/mtp-heads/``: heads 2 to n for vLLM with this package's plugin;
- ``EXPORT/eagle3-head2/``: head 2 as a stock EAGLE-3 draft;
- ``EXPORT/medusa/``: instead of these two, where the heads are Medusa blocks or linear maps;
- ``EXPORT/README.md``: commands and model card;
- ``EXPORT/manifest.json``: SHA-256 of each file.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mtp_megatron.checkpoint.bundle_manifest import write_manifest
from mtp_megatron.checkpoint.convert import DEFAULT_SHARD_BYTES, convert
from mtp_megatron.checkpoint.heads import NewHeads
from mtp_megatron.checkpoint.hf import EXPORT_CONFIG, EXPORT_FORMAT, HEADS_STEM, MODEL_STEM
from mtp_megatron.checkpoint.hf_reader import HFFolder, read_json
from mtp_megatron.checkpoint.sharded import ShardedWriter, index_path, is_finite, read_sharded
from mtp_megatron.data.atomic import new_folder
from mtp_megatron.data.huggingface import read_files
from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.bundle_readme import readme
from mtp_megatron.serving.drafts import HEADS_FOLDER, TRANSFORMS, Draft, drafts_of

README = "README.md"


@dataclass(frozen=True)
class Bundle:
    """What was written: the folder, its drafts' folder names, bytes in all, notices for the user."""

    output: Path
    drafts: tuple[str, ...]
    total_bytes: int
    notices: tuple[str, ...] = ()


def write_bundle(
    source: str | Path,
    output: str | Path,
    *,
    kind: str = "auto",
    heads: int | None = None,
    new_heads: NewHeads = "fresh",
    model_recipe: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Bundle:
    """Write a serving bundle of a model in any layout that ``convert`` reads.

    Written to a hidden folder that is renamed at the end; memory is bounded by one shard and one tensor. An export of
    this package's is read, checked and written like any other source: files that are copied as they are carry their
    damage into a bundle whose hashes then say that it is whole.

    Args:
        source: see :func:`mtp_megatron.checkpoint.convert.convert`, as for the other arguments.
        output: the folder to make; it must not exist or be empty.
        kind, heads, new_heads, model_recipe, dtype, max_shard_bytes, progress: as there.

    Raises:
        CheckpointError: the source cannot be converted, has no heads to draft with, or one of a head's tensors has no
            place in a draft; the output holds something. Nothing is left behind.
        DataError: the output cannot be written, or the tokenizer cannot be read.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder. Choose another --output folder.")
    with new_folder(output) as folder:
        plain = folder / "plain"
        notices = convert(
            source,
            plain,
            to="hf",
            kind=kind,
            heads=heads,
            new_heads=new_heads,
            model_recipe=model_recipe,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        ).notices
        for path in plain.iterdir():
            path.rename(folder / path.name)
        plain.rmdir()
        if _is_export(source):
            _keep_what_an_export_says(source, folder)
        llama, export = read_json(folder / "config.json"), read_json(folder / EXPORT_CONFIG)
        tensors = HFFolder(folder)
        drafts = drafts_of(llama, export, tensors.keys())
        for draft in drafts:
            _write_draft(draft, folder, tensors, max_shard_bytes, progress)
        (folder / README).write_text(readme(llama, export, drafts), encoding="utf-8")
        write_manifest(folder)
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Bundle(output, tuple(draft.folder for draft in drafts), total, notices)


def _is_export(folder: Path) -> bool:
    """Whether a folder is what ``convert --to hf`` wrote."""
    path = folder / EXPORT_CONFIG
    return path.is_file() and read_json(path).get("format") == EXPORT_FORMAT


def _keep_what_an_export_says(source: Path, folder: Path) -> None:
    """The training that an export names, and what people put beside its tokenizer, a chat template for example.

    Files that the conversion makes are not replaced: they are made of what was checked.
    """
    export, said = read_json(folder / EXPORT_CONFIG), read_json(source / EXPORT_CONFIG).get("source")
    if isinstance(said, dict):
        text = json.dumps({**export, "source": said}, indent=2) + "\n"
        (folder / EXPORT_CONFIG).write_text(text, encoding="utf-8")
    for name, content in read_files(source).items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


def _write_draft(draft: Draft, folder: Path, tensors: HFFolder, max_shard_bytes: int, progress: bool) -> None:
    target = folder / draft.folder
    target.mkdir()
    model_type: torch.dtype = getattr(torch, draft.config["dtype"])
    writer = ShardedWriter(target, MODEL_STEM, max_shard_bytes)
    for rule in tqdm(draft.rules, desc=draft.folder, unit="tensor", disable=not progress):
        if draft.folder == HEADS_FOLDER and rule.sources[0].startswith("mtp_heads."):
            continue  # these files are there already, and get a second name
        made = TRANSFORMS[rule.transform]([tensors.read(key) for key in rule.sources], draft.config, model_type)
        if not is_finite(made):  # a product of two finite ones
            raise CheckpointError(
                f"{draft.folder}: {rule.draft} does not fit {draft.config['dtype']}. Choose another --dtype."
            )
        writer.add(rule.draft, made)
    writer.close()
    if draft.folder == HEADS_FOLDER:
        _share_heads(folder, target)
    written = {key for key, _ in read_sharded(target, MODEL_STEM)}
    wanted = {rule.draft for rule in draft.rules}
    if written != wanted:
        raise CheckpointError(f"{target}: {min(written ^ wanted)} was not written as it should be. Convert again.")
    # Last, because no reader takes a folder without it for a model.
    (target / "config.json").write_text(json.dumps(draft.config, indent=2) + "\n", encoding="utf-8")


def _share_heads(folder: Path, target: Path) -> None:
    """Give the heads' files a second name in the draft's folder, and the draft's index their tensors."""
    index = read_json(index_path(target, MODEL_STEM))
    heads = read_json(index_path(folder, HEADS_STEM))
    for name in sorted(set(heads["weight_map"].values())):
        _link(folder / name, target / name)
    index["weight_map"] |= heads["weight_map"]
    index["metadata"]["total_size"] += heads["metadata"]["total_size"]
    index_path(target, MODEL_STEM).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
