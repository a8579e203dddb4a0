"""The manifest of a bundle: the SHA-256 and size of each of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mtp_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = "mtp_megatron bundle"
_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")  # not those of the drafts, which no conversion reads
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
    expected = _read(path)
    if expected is None:
        what = "not a bundle's" if path.exists() else "missing"
        raise CheckpointError(f"{path}: {what}. Give a folder that `mtp-megatron convert --to bundle` wrote.")
    for name, entry in expected.items():
        _compare(folder / name, *entry, "Copy the bundle again, or convert the checkpoint again.")
    return len(expected)


def check_weights(folder: Path, *, progress: bool) -> None:
    """Compare the plain model's and the heads' weights with the manifest, if the folder is a bundle.

    For a conversion that starts from one: the damage of a file would be copied, and hashed as if it were whole.

    Raises:
        CheckpointError: a file is missing, shortened or changed, or the manifest is damaged.
    """
    weights = {name: entry for name, entry in (_read(folder / MANIFEST) or {}).items() if _WEIGHTS.fullmatch(name)}
    total = sum(size for _, size in weights.values())
    with tqdm(
        desc=f"checking {folder.name}", total=total, unit="B", unit_scale=True, disable=not (progress and weights)
    ) as bar:
        for name, entry in weights.items():
            _compare(
                folder / name,
                *entry,
                f"Copy the bundle again, or remove its {MANIFEST} if you have changed the weights yourself.",
                advance=bar.update,
            )


def _read(path: Path) -> dict[str, tuple[str, int]] | None:
    """SHA-256 and bytes of each file; None if there is no file, or another program's.

    Raises:
        CheckpointError: a bundle's, and damaged.
    """
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            return None
        files: dict[str, dict[str, Any]] = manifest["files"]
        if not files:
            raise ValueError("no files in it")
        return {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error!r}). Copy the bundle again, convert the checkpoint again, or remove it if it is "
            "another program's."
        ) from error


def _compare(file: Path, sha256: str, size: int, remedy: str, advance: Callable[[int], object] | None = None) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing. {remedy}")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file}: has {file.stat().st_size} bytes instead of {size}. {remedy}")
    if _sha256(file, advance) != sha256:
        raise CheckpointError(f"{file}: its content changed (SHA-256). {remedy}")


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _sha256(path: Path, advance: Callable[[int], object] | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()
