"""ACPI tables of a small PC: what a guest finds its CPUs, IOAPIC, serial port and power button's registers by.

Models: nothing. ACPI 6.5: RSDP, XSDT, RSDT, FADT, FACS, MADT, DSDT. Legacy hardware is there (PIC, PIT, COM1, CMOS);
VGA, a keyboard and MSI are not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from fastexit import regs as R
from fastexit.adapters.kvmhost import aml
from fastexit.adapters.kvmhost.memory import FIRMWARE, FIRST_MIB_ENDS, Memory

OEM, OEM_TABLE, CREATOR = b"FXEXIT", b"FASTEXIT", b"FXIT"
SCI = 9
PM_EVENTS, PM_CONTROL, PM_TIMER, RESET = 0x600, 0x604, 0x608, 0xCF9
SLEEP_TYPE = 5
"""What the guest writes into SLP_TYP of PM1a_CNT to switch itself off."""
RESET_VALUE = 6
COM1, COM1_IRQ = 0x3F8, 4
LEGACY_DEVICES, NO_VGA, NO_MSI = 1, 1 << 2, 1 << 3
WBINVD, TIMER_32_BITS, RESET_REGISTER = 1, 1 << 8, 1 << 10
ONLY_XAPIC_ID = 0xFE
"""The last APIC id that an entry of the old kind has room for."""
_HEADER = struct.Struct("<4sIBB6s8sI4sI")


def checksum(data: bytes) -> int:
    """The byte that makes the sum of all of them 0."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: header, then what it says."""
    length = _HEADER.size + len(body)
    head = _HEADER.pack(signature, length, revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1)
    whole = bytearray(head + body)
    whole[9] = checksum(bytes(whole))
    return bytes(whole)


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer, which is searched for by its first eight bytes."""
    first = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM, 2, rsdt))
    first[8] = checksum(bytes(first))
    whole = bytearray(bytes(first) + struct.pack("<IQB3x", 36, xsdt, 0))
    whole[32] = checksum(bytes(whole))
    return bytes(whole)


def madt(apic_ids: Sequence[int]) -> bytes:
    """Local APICs and the IOAPIC. A legacy PIC pair is there; IRQ 9, the SCI, is level-triggered and active high."""
    body = struct.pack("<II", R.APIC_DEFAULT_PHYS_BASE, 1)
    for uid, apic_id in enumerate(apic_ids):
        if apic_id <= ONLY_XAPIC_ID:
            body += struct.pack("<BBBBI", 0, 8, uid & 0xFF, apic_id, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, R.IOAPIC_DEFAULT_BASE, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, 0b1101)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # LINT1 is NMI, of every CPU
    return table(b"APIC", 5, body)


def _register(bits: int, port: int) -> bytes:
    """A Generic Address Structure in I/O space."""
    return struct.pack("<BBBBQ", 1, bits, 0, 0, port)


def fadt(facs: int, dsdt: int) -> bytes:
    """The fixed description: PM1a, the PM timer, the reset register."""
    body = struct.pack("<II", facs, dsdt)
    body += struct.pack("<BBHIBBBB", 0, 0, SCI, 0, 0, 0, 0, 0)  # no SMI command: ACPI is on already
    body += struct.pack("<IIIIIIII", PM_EVENTS, 0, PM_CONTROL, 0, 0, PM_TIMER, 0, 0)
    body += struct.pack("<BBBBBBBB", 4, 2, 0, 4, 0, 0, 0, 0)
    body += struct.pack("<HHHHBBBBB", 0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, 0)
    body += struct.pack("<HBI", LEGACY_DEVICES | NO_VGA | NO_MSI, 0, WBINVD | TIMER_32_BITS | RESET_REGISTER)
    body += _register(8, RESET) + struct.pack("<BHB", RESET_VALUE, 0, 5)
    body += struct.pack("<QQ", facs, dsdt)
    for bits, port in ((32, PM_EVENTS), (0, 0), (16, PM_CONTROL), (0, 0), (0, 0), (32, PM_TIMER), (0, 0), (0, 0)):
        body += _register(bits, port) if bits else bytes(12)
    body += bytes(24)  # no sleep control or status register
    body += bytes(8)  # no hypervisor vendor
    return table(b"FACP", 6, body)


def facs() -> bytes:
    """The firmware's control structure, which has no checksum."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def dsdt(vcpus: int) -> bytes:
    """Devices that nobody could find otherwise: processors, COM1, the real-time clock; and how to switch off."""
    processors = b"".join(
        aml.device(f"C{number:03X}", aml.name("_HID", aml.text("ACPI0007")), aml.name("_UID", aml.integer(number)))
        for number in range(vcpus)
    )
    serial = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.buffer(aml.io_ports(COM1, 8) + aml.irq(COM1_IRQ) + aml.END_TAG)),
    )
    clock = aml.device(
        "RTC0",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.buffer(aml.io_ports(0x70, 2) + aml.irq(8) + aml.END_TAG)),
    )
    off = aml.name("_S5_", aml.package(aml.integer(SLEEP_TYPE), aml.integer(0), aml.integer(0), aml.integer(0)))
    return table(b"DSDT", 2, aml.scope("\\_SB_", processors + serial + clock) + off)


def install(memory: Memory, apic_ids: Sequence[int]) -> int:
    """All tables where firmware would have them; the address of the RSDP. ValueError where they do not fit."""
    root = FIRMWARE
    at = root + 64
    places: dict[str, int] = {}

    def put(name: str, data: bytes) -> int:
        nonlocal at
        if at + len(data) > FIRST_MIB_ENDS:
            raise ValueError(f"ACPI tables of {len(apic_ids)} vCPUs do not fit below 1 MiB")
        memory.write(at, data, name)
        places[name] = at
        at = at + len(data) + 63 & ~63
        return places[name]

    described = put("FADT", fadt(put("FACS", facs()), put("DSDT", dsdt(len(apic_ids)))))
    found = [described, put("MADT", madt(apic_ids))]
    xsdt = put("XSDT", table(b"XSDT", 1, struct.pack(f"<{len(found)}Q", *found)))
    rsdt = put("RSDT", table(b"RSDT", 1, struct.pack(f"<{len(found)}I", *found)))
    memory.write(root, rsdp(rsdt, xsdt), "RSDP")
    return root
