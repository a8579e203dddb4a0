"""Take the GPU code for other architectures out of a wheel's libraries; the files keep their size, the wheel shrinks.

    python tools/thin_wheel.py transformer_engine_cu13-2.11.0-py3-none-manylinux_2_28_x86_64.whl --architecture 9.0

A library keeps its code for several architectures in ELF sections named .nv_fatbin: containers, each with one entry an
architecture. Of each container the newest entry that the given one can run stays, and the others become zeros, which
compress to nothing. The result runs on that architecture alone.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

CONTAINER = 0xBA55ED50
SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")


def sections(library: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of the sections with GPU code of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names = struct.unpack_from("<HHH", library, 58)

    def section(index: int) -> tuple[int, int, int]:
        name, offset, length = (
            *struct.unpack_from("<I", library, table + index * size),
            *struct.unpack_from("<QQ", library, table + index * size + 24),
        )
        return name, offset, length

    _, strings, _ = section(names)
    for index in range(count):
        name, offset, length = section(index)
        start = strings + name
        if library[start : library.index(b"\0", start)] in SECTIONS:
            yield offset, length


def thin(library: bytearray, architecture: int) -> int:
    """Zero what an architecture (90 for 9.0) does not run; how many bytes that were."""
    zeroed = 0
    for offset, length in list(sections(library)):
        at, end = offset, offset + length
        while at + 16 <= end:
            magic, _, header, body = struct.unpack_from("<IHHQ", library, at)
            if magic != CONTAINER:  # padding between containers
                at += 8
                continue
            entries = list(_entries(library, at + header, at + header + body))
            usable = [arch for arch, _, _ in entries if arch <= architecture]
            for arch, start, size in entries:
                if usable and arch != max(usable):
                    library[start : start + size] = bytes(size)
                    zeroed += size
            at += header + body
    return zeroed


def _entries(library: bytearray, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Architecture, offset and size of a container's entries."""
    while at < end:
        header, size = struct.unpack_from("<IQ", library, at + 4)
        (arch,) = struct.unpack_from("<I", library, at + 28)
        if header < 32:
            raise ValueError(f"the entry at byte {at} has a header of {header} bytes: not the format known here")
        yield arch, at + header, size
        at += header + size


def thin_wheel(wheel: Path, architecture: int) -> int:
    """In place, by way of a file beside it; how many bytes became zeros."""
    zeroed = 0
    temporary = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as target:
        (record,) = (name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        rows = []
        for info in source.infolist():
            if info.filename == record:
                continue
            data = bytearray(source.read(info))
            if data[:4] == b"\x7fELF":
                zeroed += thin(data, architecture)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append((info.filename, f"sha256={digest}", str(len(data))))
            target.writestr(info, bytes(data), zipfile.ZIP_DEFLATED)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        target.writestr(record, text.getvalue())
    temporary.replace(wheel)
    return zeroed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Take the GPU code for other architectures out of a wheel.")
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL", help="is replaced")
    parser.add_argument("--architecture", required=True, help="compute capability that stays, for example 9.0")
    args = parser.parse_args(argv)
    major, _, minor = args.architecture.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        parser.error(f"--architecture {args.architecture}: a compute capability is wanted, such as 9.0")
    for wheel in args.wheels:
        before = wheel.stat().st_size
        thin_wheel(wheel, 10 * int(major) + int(minor))
        print(f"{wheel.name}: {before / 2**20:.0f} MiB, now {wheel.stat().st_size / 2**20:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
