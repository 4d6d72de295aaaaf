"""A trace as a file: plain, gzip or xz, read in whole lines and constant memory, as far as it is sound.

What a damaged or cut file still gives is given; `TraceFile.cut` then says what happened.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BUNDLED = Path(__file__).parents[1] / "data" / "linux-6.1-4vcpu-x2apic.trace.xz"
"""The trace that comes with the package: a Linux 6.1 guest on 4 vCPUs in x2APIC mode, from reset to power-off."""

CHUNK_BYTES = 1 << 18
_RAW_BYTES = 1 << 13
_LONGEST_LINE = 1 << 24

_FOREIGN = {
    b"\x17\x08Dtracing": "a binary trace-cmd file: run `trace-cmd report FILE > trace.txt` and pass that",
    b"PERFILE2": "a binary perf file: run `perf script -i FILE > trace.txt` and pass that",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: run `zstd -d FILE` and pass the text",
    b"BZh": "bzip2-compressed: run `bzip2 -d FILE` and pass the text",
    b"PK\x03\x04": "a zip archive: unpack it and pass the text",
    b"\x7fELF": "a program, not a trace: pass ftrace text",
}
_COMPRESSED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}


class TraceError(ValueError):
    """A trace that cannot be replayed. The message is one line: where, what, and what to do."""


class _Inflater:
    """Compressed bytes in, text out; streams one after the other are one file, as for gzip and xz."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._stream = make()

    def feed(self, raw: bytes) -> bytes:
        """The text that these bytes complete; zlib.error or lzma.LZMAError when they are damaged."""
        out = []
        while raw:
            if self._stream.eof:
                self._stream = self._make()
            out.append(self._stream.decompress(raw))
            raw = self._stream.unused_data.lstrip(b"\0") if self._stream.eof else b""
        return b"".join(out)

    @property
    def complete(self) -> bool:
        """True at the end of a stream."""
        return bool(self._stream.eof)


class TraceFile:
    """One file. ``size`` is its bytes on disk; after a pass, ``cut`` says why it ended early, or is empty, and
    ``tail`` is what stood behind the last line end.

    What comes through a pipe is put into a file without a name first, since a trace is read more than once.

    TraceError when the file cannot be opened, is empty, or is of a kind that needs another tool first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.fsdecode(path)
        self.cut: str = ""
        self.tail: bytes = b""
        self._spool = -1
        try:
            with open(self.path, "rb") as file:
                kind = os.fstat(file.fileno()).st_mode
                if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
                    with tempfile.TemporaryFile() as spool:
                        shutil.copyfileobj(file, spool)
                        spool.flush()
                        self._spool = os.dup(spool.fileno())
                    weakref.finalize(self, os.close, self._spool)
                elif not stat.S_ISREG(kind):
                    raise TraceError(f"{self.path}: a device, not a trace: pass a file or a pipe")
            with self._open() as file:
                self.size: int = os.fstat(file.fileno()).st_size
                magic = file.read(16)
        except OSError as error:
            raise TraceError(f"{self.path}: cannot be read ({error.strerror}): check the path") from None
        if not magic:
            raise TraceError(f"{self.path}: the file is empty: record a trace and pass its text")
        for prefix, what in _FOREIGN.items():
            if magic.startswith(prefix):
                raise TraceError(f"{self.path}: {what}")
        self._make = next((make for prefix, make in _COMPRESSED.items() if magic.startswith(prefix)), None)

    def _open(self) -> IO[bytes]:
        """The file from its beginning. One pass at a time: what came through a pipe has one position."""
        if self._spool < 0:
            return open(self.path, "rb")
        os.lseek(self._spool, 0, os.SEEK_SET)
        return open(self._spool, "rb", closefd=False)

    def chunks(self, progress: Callable[[int], object] | None = None) -> Iterator[bytes]:
        """Whole lines, about CHUNK_BYTES at a time, each chunk without its last line end.

        ``progress(n)`` is called as n more bytes on disk are consumed.
        """
        self.cut = ""
        self.tail = b""
        parts: list[bytes] = []
        size = 0
        for block in self._blocks(progress):
            parts.append(block)
            size += len(block)
            if size < CHUNK_BYTES:
                continue
            text = b"".join(parts)
            end = text.rfind(b"\n")
            if end >= 0:
                yield text[:end]
            elif len(text) > _LONGEST_LINE:
                raise TraceError(f"{self.path}: {len(text):,} bytes without a line end: pass ftrace text")
            parts = [text[end + 1 :]]
            size = len(parts[0])
        text = b"".join(parts)
        end = text.rfind(b"\n")
        if end >= 0:
            yield text[:end]
        self.tail = text[end + 1 :]

    def _blocks(self, progress: Callable[[int], object] | None) -> Iterator[bytes]:
        """Decompressed bytes; a cut or damaged stream ends the iteration."""
        inflater = _Inflater(self._make) if self._make else None
        with self._open() as file:
            while raw := file.read(_RAW_BYTES if inflater else CHUNK_BYTES):
                if progress:
                    progress(len(raw))
                if inflater is None:
                    yield raw
                    continue
                try:
                    yield inflater.feed(raw)
                except (zlib.error, lzma.LZMAError) as error:
                    if isinstance(error, zlib.error):
                        yield from self._salvage(file.tell() - len(raw), raw)
                    self.cut = f"the compressed data is damaged from about here on ({error})"
                    return
        if inflater is not None and not inflater.complete:
            self.cut = "the compressed stream is cut short"

    def _salvage(self, sound: int, raw: bytes) -> Iterator[bytes]:
        """What damaged gzip bytes still give, one at a time: a decompressor that fails keeps what it had at hand.

        Not for xz: LZMA notices damage late, and what it gives until then looks like a trace but is none.
        """
        assert self._make is not None
        inflater = _Inflater(self._make)
        with self._open() as file:
            for start in range(0, sound, _RAW_BYTES):
                inflater.feed(file.read(min(_RAW_BYTES, sound - start)))
        for i in range(len(raw)):
            try:
                yield inflater.feed(raw[i : i + 1])
            except zlib.error:
                return
