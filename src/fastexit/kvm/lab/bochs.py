"""Bochs: where a user gets it, and the one test that has to be taken out of it; mends.py has what else is changed.

Models: nothing. Bochs 3.0 emulates VMX with APICv and posted interrupts, so that a kernel's own kvm_intel runs on any
machine. Its package and the libraries that it needs are unpacked into a cache and run by their own dynamic linker:
nothing is installed, and it takes no root.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from fastexit.kvm.lab import elf, mends
from fastexit.kvm.lab.kernels import Apt, KernelMissing, directory, unpack

VERSION = "3.0"
SUITE = "trixie"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
NEEDED = {
    "bochs": "usr/bin/bochs-bin",
    "bochsbios": "usr/share/bochs/BIOS-bochs-latest",
    "libc6": f"{LIBRARIES}/ld-linux-x86-64.so.2",
}
"""One file of each package without which nothing works."""
GUARDED = b"VMFAIL: VMCS EXEC CTRL: Posted Interrupt Descriptor phy addr malformed"
"""What 3.0 says of a descriptor that is not at the beginning of a page; the architecture wants 64 bytes."""
MENDED = "bochs-mended"
JNE, NOP = b"\x0f\x85", b"\x66\x0f\x1f\x44\x00\x00"
_LEA_RSI = re.compile(rb"\x48\x8d\x35")
_LIBRARY = re.compile(r"Inst ((?:lib|gcc-)\S*)")


class Tree:
    """An unpacked Bochs; KernelMissing, in one line, for a directory that is none or has another version.

    The first use of a tree patches a copy of the program.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root: Path = root or default()
        missing = [name for name, path in NEEDED.items() if not (self.root / path).exists()]
        if missing:
            without = ", ".join(missing)
            raise KernelMissing(
                0, f"no Bochs {VERSION} below {str(self.root)!r} (without {without}): fastexit kernels get bochs"
            )
        self.bios: Path = self.root / NEEDED["bochsbios"]
        self._program = _patched(self.root / NEEDED["bochs"])

    def command(self, *arguments: str) -> list[str]:
        """How it is called, whatever libraries the system has."""
        linker = self.root / NEEDED["libc6"]
        return [str(linker), "--library-path", str(self.root / LIBRARIES), str(self._program), *arguments]

    def environment(self) -> dict[str, str]:
        """With its own plugins."""
        plugins = self.root / LIBRARIES / "bochs" / "plugins"
        return os.environ | {"LTDL_LIBRARY_PATH": str(plugins), "BXSHARE": str(self.bios.parent)}


def default() -> Path:
    """Where `get` puts it: beside the kernels, or ``$FASTEXIT_BOCHS``."""
    named = os.environ.get("FASTEXIT_BOCHS")
    return Path(named) if named else directory() / f"bochs-{VERSION}"


def get(apt: Apt, root: Path | None = None) -> Tree:
    """Bochs and its libraries from apt's sources, which must have the suite of Debian 13; the tree that is there."""
    root = root or default()
    try:
        return Tree(root)
    except KernelMissing:
        pass
    apt.update()
    empty = ("-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false")
    wanted = [f"bochs={VERSION}+*", f"bochsbios={VERSION}+*"]
    plan = apt.run(
        "apt-get", *empty, "-o", f"APT::Default-Release={SUITE}", "-s", "install", *wanted, "bochs-term", "vgabios"
    )
    names = [f"{name}/{SUITE}" for name in dict.fromkeys(_LIBRARY.findall(plan))]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        made, debs = Path(scratch) / "tree", Path(scratch) / "debs"
        debs.mkdir()
        for deb in apt.download([*wanted, *names], debs):
            unpack(deb, made)
        shutil.rmtree(root, ignore_errors=True)
        made.replace(root)
    return Tree(root)


# ------------------------------------------------------------------------------------------------------------ the patch


def guard(program: bytes) -> int:
    """Where the jump lies that refuses posted-interrupt descriptors; KernelMissing where there is not exactly one.

    The message that the jump leads to tells: its text has one address, one instruction loads that, one jump goes there.
    """
    text = program.find(GUARDED)
    if text < 0 or program.find(GUARDED, text + 1) >= 0:
        raise _unknown("it has another text for descriptors that it refuses")
    try:
        segments = elf.segments(program)
    except ValueError as none:
        raise _unknown(str(none)) from None
    loaded = next((address + text - at for at, size, address, _ in segments if at <= text < at + size), None)
    found = []
    for at, size, address, executable in segments:
        if not executable or loaded is None:
            continue
        code = program[at : at + size]
        for load in _LEA_RSI.finditer(code):
            (distance,) = struct.unpack_from("<i", code, load.end())
            if address + load.end() + 4 + distance == loaded:
                found += [at + jump for jump in _jumps(code, load.start())]
    if len(found) != 1:
        raise _unknown(f"{len(found)} jumps lead to the text of the test")
    return found[0]


def _jumps(code: bytes, target: int) -> list[int]:
    """Places of the conditional jumps to a place."""
    found, at = [], code.find(JNE)
    while at >= 0:
        (distance,) = struct.unpack_from("<i", code, at + 2) if at + 6 <= len(code) else (0,)
        if at + 6 + distance == target:
            found.append(at)
        at = code.find(JNE, at + 1)
    return found


def _unknown(why: str) -> KernelMissing:
    return KernelMissing(0, f"this Bochs cannot be used, {why}: version {VERSION} of Debian 13 is needed")


def _patched(program: Path) -> Path:
    """A copy of the program without the test, and with the mends; it is made once."""
    made = program.with_name(MENDED)
    if made.exists() and made.stat().st_mtime_ns >= program.stat().st_mtime_ns:
        return made
    data = bytearray(program.read_bytes())
    at = guard(bytes(data))
    data[at : at + len(NOP)] = NOP
    try:
        data[:] = mends.mended(bytes(data))
    except ValueError as other:
        raise _unknown(str(other)) from None
    scratch = made.with_name(f"{MENDED}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.chmod(0o755)
    scratch.replace(made)
    return made


def version(tree: Tree) -> str:
    """What the program says of itself."""
    done = subprocess.run(tree.command("--help"), env=tree.environment(), capture_output=True, text=True, check=False)
    found = re.search(r"Bochs x86 Emulator (\S+)", done.stdout + done.stderr)
    return found[1] if found else "unknown"
