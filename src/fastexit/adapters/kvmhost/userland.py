"""An initramfs for a kernel that was given none: a static busybox, and an init that starts its shell.

Models: nothing. The shell's end switches the machine off; a command's exit code leaves by the exit port.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastexit.adapters.kvmhost.power import EXIT
from fastexit.kvm.lab.initramfs import CHARACTER_DEVICE, CONSOLE, DIRECTORY, FILE, PROGRAM, Entry, cpio

PLACES = "/bin/busybox", "/usr/bin/busybox", "/usr/lib/busybox/busybox", "/sbin/busybox"
SYMLINK = 0o120777
READY = "fastexit: init runs"
"""What init says when it has begun."""
_STATIC_ELF, _INTERPRETER = b"\x7fELF\x02", 3
_INIT = f"""#!/bin/sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir -p /proc /sys /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
echo "{READY} on $(grep -c ^processor /proc/cpuinfo) CPUs, $(uname -r)"
if [ -e /command ]; then
    sh /command
    code=$?
    printf "\\\\$(printf %03o $code)" | dd of=/dev/port bs=1 seek={EXIT} count=1 2>/dev/null
else
    setsid cttyhack sh
fi
poweroff -f
"""


def busybox() -> bytes:
    """A static one of this machine's; OSError, in one line, where there is none."""
    for place in PLACES:
        path = Path(place)
        if path.exists() and os.access(path, os.R_OK):
            program = path.read_bytes()
            if program[:5] == _STATIC_ELF and not _interpreted(program):
                return program
    raise FileNotFoundError(0, "no static busybox for an initramfs: install busybox-static, or give --initrd FILE")


def _interpreted(program: bytes) -> bool:
    """Whether it wants a dynamic linker, which the guest has not."""
    table, count = int.from_bytes(program[32:40], "little"), int.from_bytes(program[56:58], "little")
    return any(
        int.from_bytes(program[table + 56 * n : table + 56 * n + 4], "little") == _INTERPRETER for n in range(count)
    )


def initramfs(command: str | None = None) -> bytes:
    """The archive; with a shell command that runs in place of a shell."""
    entries = [
        Entry("dev", DIRECTORY),
        Entry("dev/console", CHARACTER_DEVICE, device=CONSOLE),
        Entry("bin", DIRECTORY),
        Entry("bin/busybox", PROGRAM, busybox()),
        Entry("bin/sh", SYMLINK, b"busybox"),
        Entry("init", PROGRAM, _INIT.encode()),
    ]
    if command is not None:
        entries.append(Entry("command", FILE, command.encode() + b"\n"))
    return cpio(entries)
