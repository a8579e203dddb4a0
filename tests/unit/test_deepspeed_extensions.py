"""A lock that a killed build left in torch's cache of extensions is named, and left."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from mtp_megatron.deepspeed.extensions import STALE_AFTER, stale_locks, warn_of_stale_locks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def lock(folder: Path, age: float, now: float) -> Path:
    folder.mkdir(parents=True)
    path = folder / "lock"
    path.touch()
    os.utime(path, (now - age, now - age))
    return path


def test_only_old_locks_are_stale(cache: Path) -> None:
    now = 1e9
    old = lock(cache / "deepspeed_shm_comm", STALE_AFTER + 1, now)
    nested = lock(cache / "py311_cpu" / "deepspeed_shm_comm", STALE_AFTER + 1, now)
    lock(cache / "fused_adam", STALE_AFTER - 1, now)
    assert stale_locks(now) == [old, nested]
    old.unlink()
    assert stale_locks(now) == [nested]


def test_one_rank_of_a_host_warns(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = lock(cache / "deepspeed_shm_comm", 0, 1e9)
    with caplog.at_level(logging.WARNING):
        warn_of_stale_locks()
    assert str(path) in caplog.text
    assert "Delete the file" in caplog.text
    assert path.exists()
    caplog.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    warn_of_stale_locks()
    assert not caplog.text


def test_the_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the variable: where torch itself would build."""
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    old = lock(tmp_path / "py311_cpu" / "x", 0, 1e9)
    assert stale_locks() == [old]
