"""Compressed files unpacked in small pieces: gzip, xz, bzip2, and zstd where Python or the zstandard package has it."""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

PIECE = 1 << 20
"""Bytes of text that come at once, at most; of zstd it is eight times as many."""
MOST_TIMES = 500
"""A text that is longer than its file by more than this is none: traces reach a tenth of it."""
FREE_BYTES = 1 << 26
"""So much text is given before that is asked."""

_XZ_MEMORY = 1 << 28
_WINDOW = 1 << 27
_SLICE = 1 << 8


class Swollen(ValueError):
    """A stream that unpacks to far more than a trace could."""


class _Zlib:
    """zlib's decompressor with the face of the others."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail and not self._full

    def decompress(self, raw: bytes, most: int) -> bytes:
        out = self._stream.decompress(self._stream.unconsumed_tail + raw, most)
        self._full = len(out) == most
        return out


class _Zstandard:
    """The zstandard package's decompressor with the face of the others; it is fed little, as it has no limit."""

    def __init__(self, package: Any) -> None:
        self._stream = package.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
        self._raw = b""

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data) + self._raw

    @property
    def needs_input(self) -> bool:
        return not self._raw

    def decompress(self, raw: bytes, most: int) -> bytes:
        raw = self._raw + raw
        self._raw = raw[_SLICE:]
        return bytes(self._stream.decompress(raw[:_SLICE]))


def _zstd() -> tuple[Callable[[], Any], type[Exception]] | None:
    """How zstd is unpacked, and the error of a damaged stream; None where nothing here can."""
    try:
        module = importlib.import_module("compression.zstd")  # Python 3.14
        return module.ZstdDecompressor, module.ZstdError
    except ImportError:
        pass
    try:
        package = importlib.import_module("zstandard")
    except ImportError:
        return None
    return lambda: _Zstandard(package), package.ZstdError


_MAKERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": _Zlib,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY),
    b"BZh": bz2.BZ2Decompressor,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
_DAMAGE: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


class Unpacker:
    """Compressed bytes in, text out; streams one after the other are one file.

    Attributes:
        damage: what `feed` raises on damaged bytes; Swollen among it.
        salvages: True where bytes one at a time give text that a damaged block of them does not.
    """

    def __init__(self, make: Callable[[], Any], damage: tuple[type[Exception], ...]) -> None:
        self._make = make
        self._stream = make()
        self._in = self._out = 0
        self.damage: tuple[type[Exception], ...] = damage
        self.salvages: bool = make is _Zlib

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """The text that these bytes complete, in pieces."""
        self._in += len(raw)
        while True:
            if self._stream.eof:
                raw = self._stream.unused_data.lstrip(b"\0")
                if not raw:
                    return
                self._stream = self._make()
            text = self._stream.decompress(raw, PIECE)
            raw = b""
            self._out += len(text)
            if self._out > FREE_BYTES and self._out > MOST_TIMES * self._in:
                raise Swollen(f"it unpacks to more than {MOST_TIMES} times its size, as no trace does")
            if text:
                yield text
            if not self._stream.eof and self._stream.needs_input:
                return

    @property
    def complete(self) -> bool:
        """True at the end of a stream."""
        return bool(self._stream.eof)


def unpacker(magic: bytes) -> Callable[[], Unpacker] | None:
    """What makes the unpacker of a file that begins so; None for one that is not compressed.

    LookupError where it is compressed and nothing here can unpack it; the message says what to do.
    """
    for begins, make in _MAKERS.items():
        if magic.startswith(begins):
            return lambda: Unpacker(make, _DAMAGE)
    if not magic.startswith(_ZSTD):
        return None
    found = _zstd()
    if found is None:
        raise LookupError("zstd-compressed: pip install zstandard, or run `zstd -d FILE` and pass the text")
    make, error = found
    return lambda: Unpacker(make, (*_DAMAGE, error))
