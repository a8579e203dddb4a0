"""The index of samples: which documents make which sample, in a seed's order, as megatron-core's GPTDataset keeps it.

Run as a module it writes one; :mod:`.shared_index` starts that process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtp_megatron import compat
from mtp_megatron.data.compiled import compiled_helpers
from mtp_megatron.data.manifest import Manifest, load_manifest
from mtp_megatron.errors import DataError, MTPError
from mtp_megatron.signals import end_with_parent

EXIT_EXPLAINED = 2  # the last line of what the process said is for the user
_SPLITS: tuple[Literal["train", "valid"], ...] = ("train", "valid")
_FILES = len(_SPLITS) * 4  # a description, and the order of documents, samples and both together
_SMALL = 1_000_000
_ROOM = re.compile(r"\.[0-9a-f]{16}\..+")
_LEFT_BEHIND = 24 * 3600.0  # seconds; writing an index takes minutes


@dataclass(frozen=True)
class SampleIndex:
    """The index of one data set for one length of samples and one seed; equal bytes wherever it is written.

    Attributes:
        manifest: the data set.
        seq_length: tokens per sample.
        seed: of the order.
        cache: the folder that holds indices, each in a folder of its own.
    """

    manifest: Manifest
    seq_length: int
    seed: int
    cache: Path

    @property
    def folder(self) -> Path:
        """Where it is. Its name says what went into it and not where the data lies, so that an index is found by a host
        that mounts it elsewhere, and comes along with a copy of the data."""
        manifest = self.manifest
        splits = f"{manifest.train.model_dump_json()} {manifest.valid.model_dump_json()}"
        content = f"{manifest.fingerprint} {manifest.tokenizer.sha256} {splits}"
        identity = f"{content} {self.seq_length} {self.seed} {compat.MCORE_VERSION}"
        return self.cache.absolute() / hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def small(self) -> bool:
        """Whether writing it takes about a second at most, less than starting a process that could."""
        splits = (self.manifest.train, self.manifest.valid)
        return sum(split.documents + split.tokens // self.seq_length for split in splits) <= _SMALL

    def there(self) -> bool:
        """Whether this host sees it, and all of it: what sweeps a scratch disk takes single files."""
        with suppress(OSError):
            list(self.cache.iterdir())  # NFS remembers that a name was absent until it is listed
            return len(list(self.folder.iterdir())) >= _FILES
        return False

    def open(self) -> tuple[Any, Any]:
        """Training and held-out samples, one pass of each: ``megatron.core.datasets.gpt_dataset.GPTDataset``.

        Raises:
            DataError: it cannot be read.
        """
        compat.prepare()
        try:
            train, valid = (self._split(name, self.folder) for name in _SPLITS)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{self.folder}: the index of samples cannot be read ({error}). Remove that folder: it is made again."
            ) from error
        return train, valid

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A hidden folder beside it to write it in; removed at the end, if it has not got the index's name by then.

        Raises:
            DataError: the cache cannot be written.
        """
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            _sweep(self.cache)
            room = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.cache.absolute()))
        except OSError as error:
            raise self._not_written(error) from error
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def write(self, room: Path) -> None:
        """Write it into ``room``, and give that its name: it appears whole or not at all.

        megatron-core takes an index for complete when its files exist, so one that a killed job left half written would
        be read. In a process group only rank 0 may call this: elsewhere megatron-core would not write.

        Raises:
            DataError: the cache cannot be written, or megatron-core lacks its compiled helpers.
        """
        compiled_helpers()
        try:
            for name in _SPLITS:
                self._split(name, room)
            os.chmod(room, 0o755)  # mkdtemp's folders are private, the index is for all who may read the data set
            if not self.there():
                self._put_aside()
                os.rename(room, self.folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another job was faster, with the same content
                return
            raise self._not_written(error) from error

    def _put_aside(self) -> None:
        """Files are missing in it, or this host does not see them: others may read it, so it is not removed yet."""
        with suppress(FileNotFoundError):
            aside = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex[:8]}")
            os.rename(self.folder, aside)
            os.utime(aside)  # for _sweep

    def command(self, room: Path) -> list[str]:
        """What writes it in a process of its own; see :func:`main`."""
        settings = (self.manifest.path, self.seq_length, self.seed, self.cache.absolute(), room, os.getpid())
        return [sys.executable, "-P", "-m", "mtp_megatron.data.sample_index", *map(str, settings)]

    def _split(self, name: Literal["train", "valid"], folder: Path) -> Any:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        prefix = self.manifest.prefix(name)
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend_per_split=[([self.manifest.prefix(split)], None) for split in _SPLITS] + [None],
            path_to_cache=str(folder),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=_TokenizerView(self.manifest),
        )
        documents = GPTDataset.build_low_level_dataset(prefix, config)
        chosen = np.arange(GPTDataset.numel_low_level_dataset(documents), dtype=np.int32)
        # megatron-core takes a path in the second place, but only to name its files by a hash of it; not through its
        # BlendedMegatronDatasetBuilder, which gives it the real one
        return GPTDataset(documents, name, chosen, None, Split[name], config)

    def _not_written(self, error: OSError) -> DataError:
        return DataError(
            f"{self.cache}: the index of samples cannot be written ({error}). Set data.cache to a folder that can be "
            "written; it may be another one on each host."
        )


class _TokenizerView:
    """What GPTDatasetConfig asks of a tokenizer. Without ``pad``: no id is masked, since samples are never padded."""

    def __init__(self, manifest: Manifest) -> None:
        self.eod, self.vocab_size = manifest.eod, manifest.vocab_size
        self.unique_identifiers = OrderedDict(
            kind=manifest.tokenizer.kind, sha256=manifest.tokenizer.sha256, vocab_size=manifest.vocab_size
        )


def _sweep(cache: Path) -> None:
    """Remove the rooms that killed jobs left. A young one may be another job's, perhaps on another host."""
    for room in cache.iterdir():
        if _ROOM.fullmatch(room.name):
            with suppress(OSError):  # another job sweeps, too, or has given it its name
                if time.time() - max(path.stat().st_mtime for path in (room, *room.iterdir())) > _LEFT_BEHIND:
                    shutil.rmtree(room, ignore_errors=True)


def main(argv: Sequence[str]) -> int:
    """Write the index that :meth:`SampleIndex.command` names; returns 0, or ``EXIT_EXPLAINED``."""
    path, seq_length, seed, cache, room, parent = argv
    end_with_parent(int(parent))
    try:
        SampleIndex(load_manifest(path), int(seq_length), int(seed), Path(cache)).write(Path(room))
    except MTPError as error:
        print(error, file=sys.stderr)
        return EXIT_EXPLAINED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
