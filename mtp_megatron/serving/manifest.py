"""The manifest of a bundle: the SHA-256 and size of each of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = "mtp_megatron bundle"
_CHUNK_BYTES = 1 << 22


def write_manifest(folder: Path) -> None:
    """Hash every file under ``folder`` and write ``manifest.json``."""
    known: dict[tuple[int, int], str] = {}  # a file that has two names is read once
    files = {}
    for path in _files(folder):
        stat = path.stat()
        identity = (stat.st_dev, stat.st_ino)
        known[identity] = known.get(identity) or _sha256(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": known[identity], "bytes": stat.st_size}
    content = {"format": _FORMAT, "version": 1, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> int:
    """Compare every file with the manifest; returns how many there are.

    Files that are not in the manifest are left alone: people add their own.

    Raises:
        CheckpointError: no manifest, or a file that is missing, shortened or changed; names it.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["format"] != _FORMAT or not files:
            raise ValueError("not a bundle's")
        expected = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing. Give a folder that `mtp-megatron convert --to bundle` wrote."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}). Convert the checkpoint again.") from error
    for name, (sha256, size) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing. Copy the bundle again, or convert the checkpoint again.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes instead of {size}. Copy the bundle again, or convert again."
            )
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file}: its content changed (SHA-256). Copy the bundle again, or convert again.")
    return len(expected)


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
