"""A trace as a file: plain, compressed, from a pipe, or in a recorder's own format, read in whole lines and constant
memory, as far as it is sound.

What a damaged or cut file still gives is given; `TraceFile.cut` then says what happened.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fastexit.trace.packed import Swollen, Unpacker, unpacker
from fastexit.trace.recorders import printed, recorder

BUNDLED = Path(__file__).parents[1] / "data" / "linux-6.1-4vcpu-x2apic.trace.xz"
"""The trace that comes with the package: a Linux 6.1 guest on 4 vCPUs in x2APIC mode, from reset to power-off."""

CHUNK_BYTES = 1 << 18
_RAW_BYTES = 1 << 13
_LONGEST_LINE = 1 << 20
_KEPT_OF_LINE = 1 << 13
"""What is left of a longer one: too long for any event, so that it is counted among what cannot be read."""
_MAGIC_BYTES = 262
"""As far as a file tells what it is; tar says it that late."""

STDIN = "-"
"""The path of what comes on standard input."""

_FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it and pass the text",
    b"\x7fELF": "a program, not a trace: pass ftrace text",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it and pass the text",
    b"\xff\xfe": "text in UTF-16: run `iconv -f UTF-16 -t UTF-8 FILE` and pass that",
    b"\xfe\xff": "text in UTF-16: run `iconv -f UTF-16 -t UTF-8 FILE` and pass that",
}
_TAR = b"ustar"


class TraceError(ValueError):
    """A trace that cannot be replayed. The message is one line: where, what, and what to do."""


class TraceFile:
    """One file. ``size`` is its bytes on disk; after a pass, ``cut`` says why it ended early, or is empty, and
    ``tail`` is what stood behind the last line end.

    A path of "-" is standard input. What comes through a pipe or from a file of the kernel is put into a file without a
    name first, since a trace is read more than once; so is what trace-cmd and perf make of their own formats.

    TraceError when the file cannot be opened, is empty, or is of a kind that needs another tool first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.fsdecode(path)
        self.cut: str = ""
        self.tail: bytes = b""
        self._spool = -1
        try:
            self._take()
            self.size: int = self._measure()
            with self._open() as file:
                magic = file.read(_MAGIC_BYTES)
        except OSError as error:
            raise TraceError(f"{self.path}: cannot be read ({error.strerror}): check the path") from None
        if not magic:
            raise TraceError(f"{self.path}: the file is empty: record a trace and pass its text")
        try:
            self._make = unpacker(magic)
            if self._make is not None and recorder(magic := self._beginning()):
                with tempfile.TemporaryFile() as unpacked:
                    for block in self._blocks(None):
                        unpacked.write(block)
                    self._make = None
                    self._print(unpacked, magic)
            elif recorder(magic):
                with self._open() as file:
                    self._print(file, magic)
        except LookupError as error:
            raise TraceError(f"{self.path}: {error}") from None
        except OSError as error:
            raise TraceError(f"{self.path}: cannot be made text ({error.strerror}): make room in $TMPDIR") from None
        foreign = next((what for begins, what in _FOREIGN.items() if magic.startswith(begins)), "")
        if magic[257:].startswith(_TAR):
            foreign = "a tar archive: unpack it and pass the text"
        if foreign:
            raise TraceError(f"{self.path}: {foreign}")

    def _take(self) -> None:
        """Keep what can be read only once."""
        if self.path == STDIN:
            self._keep(sys.stdin.buffer)
            return
        with open(self.path, "rb") as file:
            found = os.fstat(file.fileno())
            kind = found.st_mode
            if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or stat.S_ISREG(kind) and not found.st_size:
                self._keep(file)
            elif not stat.S_ISREG(kind):
                raise TraceError(f"{self.path}: a device, not a trace: pass a file or a pipe")

    def _keep(self, file: IO[bytes]) -> None:
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(file, spool)
            spool.flush()
            if self._spool >= 0:
                os.dup2(spool.fileno(), self._spool)
                return
            self._spool = os.dup(spool.fileno())
        weakref.finalize(self, os.close, self._spool)

    def _print(self, file: IO[bytes], magic: bytes) -> None:
        """Keep the text of a recorder's own file instead of it."""
        entry = recorder(magic)
        assert entry is not None
        file.flush()
        with printed(entry, file, os.fstat(file.fileno()).st_size) as text:
            self._keep(text)
        self.size = self._measure()

    def _measure(self) -> int:
        with self._open() as file:
            return os.fstat(file.fileno()).st_size

    def _beginning(self) -> bytes:
        """The first bytes of what is unpacked."""
        begins = b""
        for block in self._blocks(None):
            begins += block
            if len(begins) >= _MAGIC_BYTES:
                break
        self.cut = ""
        return begins[:_MAGIC_BYTES]

    def _open(self) -> IO[bytes]:
        """The file from its beginning. One pass at a time: what was kept has one position."""
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
        skipping = False
        for block in self._blocks(progress):
            if skipping:
                end = block.find(b"\n")
                if end < 0:
                    continue
                block = block[end:]
                skipping = False
            parts.append(block)
            size += len(block)
            if size < CHUNK_BYTES:
                continue
            text = b"".join(parts)
            end = text.rfind(b"\n")
            if end >= 0:
                yield text[:end]
            rest = text[end + 1 :]
            if len(rest) > _LONGEST_LINE:
                rest = rest[:_KEPT_OF_LINE]
                skipping = True
            parts = [rest]
            size = len(rest)
        text = b"".join(parts)
        end = text.rfind(b"\n")
        if end >= 0:
            yield text[:end]
        self.tail = text[end + 1 :]

    def _blocks(self, progress: Callable[[int], object] | None) -> Iterator[bytes]:
        """Decompressed bytes; a cut or damaged stream ends the iteration."""
        packed = self._make() if self._make else None
        with self._open() as file:
            while raw := file.read(_RAW_BYTES if packed else CHUNK_BYTES):
                if progress:
                    progress(len(raw))
                if packed is None:
                    yield raw
                    continue
                given = 0
                try:
                    for text in packed.feed(raw):
                        given += len(text)
                        yield text
                except packed.damage as error:
                    if packed.salvages and not isinstance(error, Swollen):
                        yield from self._salvage(file.tell() - len(raw), raw, given)
                    self.cut = f"the compressed data is damaged from about here on ({error})"
                    return
        if packed is not None and not packed.complete:
            self.cut = "the compressed stream is cut short"

    def _salvage(self, sound: int, raw: bytes, given: int) -> Iterator[bytes]:
        """What damaged gzip bytes still give, one at a time: a decompressor that fails keeps what it had at hand.

        Not for xz: LZMA notices damage late, and what it gives until then looks like a trace but is none.
        """
        assert self._make is not None
        packed: Unpacker = self._make()
        with self._open() as file:
            for start in range(0, sound, _RAW_BYTES):
                for _ in packed.feed(file.read(min(_RAW_BYTES, sound - start))):
                    pass
        for i in range(len(raw)):
            try:
                for text in packed.feed(raw[i : i + 1]):
                    yield text[given:]
                    given = max(0, given - len(text))
            except packed.damage:
                return
