"""Files compressed with Zstandard, as a stream (the extra ``zst``)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

# What a file may ask the decoder to look back to, and so the memory it takes: the most that `zstd --long=31` writes, as
# Reddit's dumps have it. It is touched only as far as the text goes.
_MOST_WINDOW = 1 << 31
# A block of 4 bytes may stand for 128 KiB of text, and what is fed is decompressed at once: 128 MiB at most.
_PART_BYTES = 4096
_BUFFER_BYTES = 1 << 20


def open(path: Path, mode: str) -> BinaryIO:
    """The decompressed bytes of a file, as ``gzip.open`` gives them.

    Reading raises OSError where the file is no Zstandard, damaged, compressed with a dictionary or has more than 2 GiB
    to look back to, and EOFError where it ends within a frame.
    """
    return io.BufferedReader(_Frames(path.open(mode)), _BUFFER_BYTES)


class _Frames(io.RawIOBase):
    """All frames of a file, one after another; ``zstd``, ``pzstd`` and ``cat`` write several.

    Not the package's ``stream_reader``, to which the middle of a frame is as good an end as any (0.25).
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._fed, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._text:
            if not self._decompress():
                return 0
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress(self) -> bool:
        """Go on by one part; False at the end of the file."""
        part = self._fed or self._stream.read(_PART_BYTES)
        if not part:
            if not self._frame.eof:
                raise EOFError("it ends within a frame, so it is truncated")
            return False
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        try:
            self._text = memoryview(self._frame.decompress(part))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        self._fed = self._frame.unused_data
        return True
