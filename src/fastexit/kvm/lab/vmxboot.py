"""What Bochs needs to start a kernel at once: memory images, a loader in the place of the VGA BIOS, a configuration.

Models: nothing. No boot disc: image and initramfs are in memory from the beginning, and the loader, which the BIOS
calls when it has set up ACPI, jumps into the kernel. Spec: Documentation/arch/x86/boot.rst (32-bit boot protocol).
"""

from __future__ import annotations

import struct
from pathlib import Path

from fastexit.kvm.lab.kernels import Kernel, KernelMissing

MIB = 1 << 20
MEMORY_MIB = 512
BLOCK = 8 * MIB
"""Bochs gives memory to a guest in blocks of this size, and a memory image is whole only within one."""
KERNEL_AT, KERNEL_BLOCKS = 0x100_0000, 2
INITRAMFS_AT, INITRAMFS_BLOCKS = 0x1000_0000, 2
ACPI_AT = MEMORY_MIB * MIB - 0x10000
"""Bochs' BIOS puts its tables at the end of memory."""
IPS = 50_000_000
"""Instructions a second, of which each is one tick of the TSC; the kernel is told the same frequency."""
COMMAND_LINE = (
    "console=ttyS0 panic=-1 quiet nokaslr mitigations=off no_timer_check nowatchdog nosoftlockup idle=halt "
    f"tsc_early_khz={IPS // 1000} lpj={IPS // 250} clocksource=tsc tsc=reliable "
    "debugfs=off rcupdate.rcu_expedited=1 cryptomgr.notests init_on_alloc=0"
)
"""idle=halt, for a store that should end MWAIT on another processor is not always seen; debugfs=off, for a VM has some
hundred files there, which take longer than a program; rcu_expedited, for each VM waits for several grace periods;
cryptomgr.notests, for its tests are a third of the boot."""
MODEL = "corei7_skylake_x"
MAILBOX_BYTES = 32 * 16 * 63 * 512
OFF = ("speaker", "parallel", "iodebug", "gameport", "sb16", "e1000", "ne2k", "es1370", "voodoo")
USB = ("usb_uhci", "usb_ohci", "usb_ehci", "usb_xhci")

_E820 = "<QQI"
_RAM, _RESERVED, _ACPI = 1, 2, 3
_MAP = (
    (0, 0x9FC00, _RAM),
    (0x9FC00, 0xA0000, _RESERVED),
    (0xE0000, 0x100000, _RESERVED),
    (0x100000, ACPI_AT, _RAM),
    (ACPI_AT, MEMORY_MIB * MIB, _ACPI),
    (0xFFFC0000, 1 << 32, _RESERVED),
)
"""What Bochs' BIOS says of memory: begin, end, kind."""


def loader(parameters: int) -> bytes:
    """512 bytes of a ROM that goes to protected mode and into the kernel, with ESI at its parameters."""
    rom = 0xC0000
    table_at, pointer_at, flat_at = 0x80, 0xA0, 0x40
    code = bytearray(512)
    begin = b"\x55\xaa\x01"
    begin += b"\xfa\x8c\xc8\x8e\xd8"  # cli; ds = cs
    begin += b"\xe4\x92\x0c\x02\xe6\x92"  # A20
    begin += b"\x66\x0f\x01\x16" + struct.pack("<H", pointer_at)  # lgdt
    begin += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # CR0.PE
    begin += b"\x66\xea" + struct.pack("<IH", rom + flat_at, 0x10)
    flat = b"\x66\xb8\x18\x00" + b"".join(b"\x8e" + bytes([0xC0 | n << 3]) for n in (0, 2, 3, 4, 5))
    flat += b"\xbc" + struct.pack("<I", 0x90000) + b"\x31\xed\x31\xff\x31\xdb"
    flat += b"\xbe" + struct.pack("<I", parameters) + b"\xb8" + struct.pack("<I", KERNEL_AT) + b"\xff\xe0"
    code[: len(begin)] = begin
    code[flat_at : flat_at + len(flat)] = flat
    struct.pack_into("<QQQQ", code, table_at, 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    struct.pack_into("<HI", code, pointer_at, 31, rom + table_at)
    code[-1] = -sum(code) & 0xFF
    return bytes(code)


def parameters(image: bytes, initramfs_bytes: int, command_line_at: int) -> bytes:
    """The zero page of a bzImage."""
    page = bytearray(0x1000)
    end = 0x202 + image[0x201]
    page[0x1F1:end] = image[0x1F1:end]
    page[0x210] = 0xFF
    page[0x211] |= 1
    struct.pack_into("<I", page, 0x214, KERNEL_AT)
    struct.pack_into("<II", page, 0x218, INITRAMFS_AT, initramfs_bytes)
    struct.pack_into("<I", page, 0x228, command_line_at)
    page[0x1E8] = len(_MAP)
    for n, (begin, stop, kind) in enumerate(_MAP):
        struct.pack_into(_E820, page, 0x2D0 + 20 * n, begin, stop - begin, kind)
    return bytes(page)


def place(kernel: Kernel, initramfs: bytes, into: Path, *, extra: str = "") -> list[str]:
    """Writes memory images and the loader: lines of a configuration that load them."""
    image = kernel.image.read_bytes()
    if image[0x202:0x206] != b"HdrS":
        raise KernelMissing(0, f"{str(kernel.image)!r} is no bzImage")
    code = image[((image[0x1F1] or 4) + 1) * 512 :]
    at = INITRAMFS_AT + (len(initramfs) + 0xFFF & ~0xFFF)
    line = f"{COMMAND_LINE} {extra}".strip().encode() + b"\0"
    tail = parameters(image, len(initramfs), at + 0x1000) + line
    packed = initramfs.ljust(at - INITRAMFS_AT, b"\0") + tail
    if len(code) > KERNEL_BLOCKS * BLOCK or len(packed) > INITRAMFS_BLOCKS * BLOCK:
        raise KernelMissing(0, f"kernel {kernel.release} or its modules are too large for the lab's memory")
    lines: list[str] = []
    for base, data in ((KERNEL_AT, code), (INITRAMFS_AT, packed)):
        for n, first in enumerate(range(0, len(data), BLOCK)):
            file = into / f"memory-{base + first:x}"
            file.write_bytes(data[first : first + BLOCK])
            lines.append(f"optramimage{len(lines) + 1}: file={file}, address=0x{base + n * BLOCK:x}")
    (into / "loader").write_bytes(loader(at))
    return [*lines, f"vgaromimage: file={into / 'loader'}"]


def configuration(bios: Path, into: Path, images: list[str], cpus: int, quantum: int) -> str:
    """A bochsrc: processors, memory, one disk that is a mailbox, and two ways to say something."""
    off = ", ".join(f"{name}=false" for name in (*OFF, *USB))
    lines = [
        f"plugin_ctrl: unmapped=true, biosdev=true, extfpuirq=true, serial=true, {off}",
        "config_interface: textconfig",
        'display_library: rfb, options="timeout=0"',
        f"memory: guest={MEMORY_MIB}, host={MEMORY_MIB}, block_size={BLOCK // 1024}",
        f"cpu: model={MODEL}, count={cpus}, ips={IPS}, reset_on_triple_fault=0, ignore_bad_msrs=1, quantum={quantum}",
        f"romimage: file={bios}",
        *images,
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        "ata1: enabled=0",
        f"ata0-master: type=disk, path={into / 'mailbox'}, mode=flat, cylinders=32, heads=16, spt=63",
        "boot: disk",
        f"log: {into / 'log'}",
        "panic: action=fatal",
        "error: action=ignore",
        "info: action=ignore",
        "debug: action=ignore",
        "port_e9_hack: enabled=1",
        f"com1: enabled=1, mode=file, dev={into / 'console'}",
        "clock: sync=none, time0=local",
    ]
    return "".join(f"{line}\n" for line in lines)
