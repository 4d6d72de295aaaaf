"""The PC round the guest: serial port, ACPI tables, CMOS, fw_cfg, ports that end it, its trace; no KVM is needed."""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastexit as fx
from fastexit.adapters.kvmhost import acpi, aml, tracefile, userland
from fastexit.adapters.kvmhost.firmware import Cmos, FwCfg, configuration
from fastexit.adapters.kvmhost.gate import Gate
from fastexit.adapters.kvmhost.memory import MIB, Memory
from fastexit.adapters.kvmhost.ports import Ports
from fastexit.adapters.kvmhost.power import Ended, Power
from fastexit.adapters.kvmhost.serial import WAITING, Serial
from fastexit.adapters.kvmhost.testdevice import LineDevice, SintDevice

COM1 = 0x3F8


class Line:
    """A serial port and what came of it."""

    def __init__(self) -> None:
        self.sent = b""
        self.levels: list[int] = []
        self.port = Serial(self._send, self.levels.append)

    def _send(self, data: bytes) -> None:
        self.sent += data

    def out(self, register: int, value: int) -> None:
        self.port.write(COM1 + register, 1, value)

    def inp(self, register: int) -> int:
        return self.port.read(COM1 + register, 1)


# ---------------------------------------------------------------------------------------------------------- serial port


def test_bytes_leave_at_once() -> None:
    line = Line()
    for letter in b"hello":
        assert line.inp(5) & 0x60 == 0x60
        line.out(0, letter)
    assert line.sent == b"hello"
    assert line.levels == []


def test_divisor_hides_data_and_interrupts() -> None:
    line = Line()
    line.out(3, 0x80)
    line.out(0, 1)
    line.out(1, 0)
    assert (line.inp(0), line.inp(1), line.sent) == (1, 0, b"")
    line.out(3, 3)
    line.out(0, 65)
    assert line.sent == b"A"


def test_line_follows_what_waits() -> None:
    line = Line()
    line.out(4, 8)  # OUT2
    line.out(1, 1)
    assert line.levels == []
    line.port.receive(b"ab")
    assert line.levels == [1]
    assert line.inp(2) & 0xF == 4
    assert line.inp(0) == 97
    assert line.levels == [1]
    assert line.inp(0) == 98
    assert line.levels == [1, 0]
    assert (line.inp(2) & 0xF, line.inp(5) & 1, line.inp(0)) == (1, 0, 0)


def test_empty_transmitter_interrupts_until_it_is_identified() -> None:
    line = Line()
    line.out(4, 8)
    line.out(1, 2)
    assert line.levels == [1]
    assert line.inp(2) & 0xF == 2
    assert line.levels == [1, 0]
    line.out(0, 65)
    assert line.levels == [1, 0, 1]
    line.out(1, 0)
    assert line.levels == [1, 0, 1, 0]


def test_out2_gates_the_line() -> None:
    line = Line()
    line.out(1, 1)
    line.port.receive(b"a")
    assert line.levels == []
    line.out(4, 8)
    assert line.levels == [1]
    line.out(4, 0)
    assert line.levels == [1, 0]


def test_what_is_typed_before_a_driver_listens_waits() -> None:
    """A driver clears the FIFO and reads what is in it when it opens the port."""
    line = Line()
    line.port.receive(b"early")
    line.out(2, 7)
    assert (line.inp(5) & 1, line.inp(0)) == (0, 0)
    line.out(1, 1)
    assert bytes(line.inp(0) for _ in range(5)) == b"early"


def test_loopback() -> None:
    line = Line()
    line.port.receive(b"x")
    line.out(4, 0x10 | 0xB)
    line.out(0, 0x5A)
    assert (line.inp(5) & 1, line.inp(0), line.sent) == (1, 0x5A, b"")
    assert line.inp(6) & 0xF0 == 0xB0
    line.out(4, 0x10)
    assert line.inp(6) & 0xF0 == 0


def test_16550a_is_recognised() -> None:
    line = Line()
    line.out(2, 1)
    assert line.inp(2) & 0xC0 == 0xC0
    line.out(7, 0xA5)
    assert line.inp(7) == 0xA5


def test_too_much_is_an_overrun() -> None:
    line = Line()
    line.out(4, 8)
    line.out(1, 5)
    line.port.receive(bytes(WAITING + 5))
    assert line.port.room() == 0
    assert line.inp(2) & 0xF == 6
    assert (line.inp(5) & 2, line.inp(5) & 2) == (2, 0)


# ----------------------------------------------------------------------------------------------------------------- ACPI


def tables(memory: Memory, root: int) -> dict[bytes, bytes]:
    """All tables by their signature, as a guest finds them."""
    rsdp = memory.read(root, 36)
    (xsdt,) = struct.unpack_from("<Q", rsdp, 24)

    def whole(at: int) -> bytes:
        (length,) = struct.unpack("<I", memory.read(at + 4, 4))
        return memory.read(at, length)

    found = {whole(at)[:4]: whole(at) for (at,) in struct.iter_unpack("<Q", whole(xsdt)[36:])}
    found[b"XSDT"] = whole(xsdt)
    found[b"RSDT"] = whole(struct.unpack_from("<I", rsdp, 16)[0])
    facs, dsdt = struct.unpack_from("<II", found[b"FACP"], 36)
    found |= {b"FACS": whole(facs), b"DSDT": whole(dsdt)}
    return found


@pytest.mark.parametrize("count", [1, 4, 64])
def test_checksums(count: int) -> None:
    memory = Memory(2 * MIB)
    root = acpi.install(memory, range(count))
    rsdp = memory.read(root, 36)
    assert (rsdp[:8], root % 16) == (b"RSD PTR ", 0)
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0)
    found = tables(memory, root)
    assert set(found) == {b"FACP", b"APIC", b"XSDT", b"RSDT", b"FACS", b"DSDT"}
    for name, data in found.items():
        if name != b"FACS":
            assert sum(data) & 0xFF == 0, name
    assert (len(found[b"FACP"]), len(found[b"FACS"])) == (276, 64)


def test_fadt_fields() -> None:
    memory = Memory(2 * MIB)
    fadt = tables(memory, acpi.install(memory, [0]))[b"FACP"]
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<I4xI", fadt, 56) == (0x600, 0x604)
    assert struct.unpack_from("<I", fadt, 76) == (0x608,)
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)
    assert struct.unpack_from("<HBI", fadt, 109)[0] & 1 == 1
    assert (fadt[116:120], struct.unpack_from("<Q", fadt, 120), fadt[128]) == (b"\1\x08\0\0", (0xCF9,), 6)
    assert struct.unpack_from("<Q", fadt, 148 + 4) == (0x600,)
    assert struct.unpack_from("<Q", fadt, 208 + 4) == (0x608,)
    assert struct.unpack_from("<Q", fadt, 140)[0] == struct.unpack_from("<I", fadt, 40)[0]


def test_madt_entries() -> None:
    madt = acpi.madt([0, 1, 300])
    at, entries = 44, []
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    kinds = [entry[0] for entry in entries]
    assert kinds == [0, 0, 9, 1, 2, 4]
    assert [entry[3] for entry in entries[:2]] == [0, 1]
    assert struct.unpack_from("<I", entries[2], 4) == (300,)
    assert struct.unpack_from("<II", entries[3], 4) == (0xFEC0_0000, 0)
    assert struct.unpack_from("<BBIH", entries[4], 2) == (0, 9, 9, 0b1101)


def test_too_many_tables() -> None:
    with pytest.raises(ValueError, match="do not fit below 1 MiB"):
        acpi.install(Memory(2 * MIB), range(4000))


@pytest.mark.parametrize(
    ("inside", "encoded"),
    [(0, "01"), (62, "3f"), (63, "4104"), (0xFFD, "4fff"), (0xFFE, "810001"), (0x10000, "830010")],
)
def test_package_length(inside: int, encoded: str) -> None:
    assert aml.length(inside).hex() == encoded


def test_aml_pieces() -> None:
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert [aml.integer(n).hex() for n in (0, 1, 2, 0x100, 0x1_0000, 1 << 32)] == [
        "00",
        "01",
        "0a02",
        "0b0001",
        "0c00000100",
        "0e0000000001000000",
    ]
    assert aml.irq(4).hex() == "221000"
    assert aml.io_ports(0x3F8, 8).hex() == "4701f803f8030108"
    with pytest.raises(ValueError, match="too many"):
        aml.length(1 << 28)
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)


# ------------------------------------------------------------------------------------------------------------- firmware


def test_cmos() -> None:
    cmos = Cmos(Memory(64 * MIB))

    def read(index: int) -> int:
        cmos.write(0x70, 1, index)
        return cmos.read(0x71, 1)

    assert (read(0xD), read(0xA) & 0x80) == (0x80, 0)
    assert read(0x32) == 0x20
    assert read(0x30) | read(0x31) << 8 == 63 * 1024
    assert read(0x34) | read(0x35) << 8 == 48 * 16
    cmos.write(0x70, 1, 0x8F)
    cmos.write(0x71, 1, 0x0A)
    assert (cmos.shutdown, cmos.read(0x70, 1)) == (0x0A, 0xFF)
    cmos.write(0x70, 1, 0x0B)
    cmos.write(0x71, 1, 6)
    assert read(0x32) == 20


def test_fw_cfg() -> None:
    device = FwCfg(configuration(Memory(64 * MIB), 3))

    def item(number: int, size: int) -> bytes:
        device.write(0x510, 2, number)
        return bytes(device.read(0x511, 1) for _ in range(size))

    assert item(0, 4) == b"QEMU"
    assert item(5, 3) == b"\3\0\0"
    assert item(3, 8) == struct.pack("<Q", 64 * MIB)
    assert item(0x1234, 4) == bytes(4)


# --------------------------------------------------------------------------------------------------------- ports, power


def power() -> tuple[Ports, list[Ended]]:
    ended: list[Ended] = []
    ports = Ports()
    Power(ended.append, lambda: 2_000_000_000).connect(ports)
    return ports, ended


@pytest.mark.parametrize(
    ("writes", "why"),
    [
        ([(0xF4, 4, 3)], Ended("exit port", 3)),
        ([(0xF4, 1, 0x14D)], Ended("exit port", 0x4D)),
        ([(0x604, 2, 1 << 13 | 5 << 10)], Ended("switched off", 0)),
        ([(0xCF9, 1, 6)], Ended("reset", 0)),
        ([(0x92, 1, 1)], Ended("reset", 0)),
        ([(0x64, 1, 0xFE)], Ended("reset", 0)),
        ([(0x8900, 1, letter) for letter in b"ShShutdown"], Ended("switched off", 0)),
    ],
)
def test_ends(writes: list[tuple[int, int, int]], why: Ended) -> None:
    ports, ended = power()
    for port, size, value in writes:
        ports.write(port, size, value)
    if len(writes) > 8:
        assert ended == []
        for letter in b"Shutdown":
            ports.write(0x8900, 1, letter)
    assert ended == [why]


def test_what_does_not_end() -> None:
    ports, ended = power()
    for port, value in (
        (0xCF9, 2),
        (0x92, 2),
        (0x64, 0xAA),
        (0x604, 1 << 13 | 3 << 10),
        (0x604, 5 << 10),
        (0x60, 0xFE),
    ):
        ports.write(port, 1 if port != 0x604 else 2, value)
    assert ended == []
    assert (ports.read(0x92, 1), ports.read(0x604, 2) & 1, ports.read(0x608, 4)) == (2, 1, 2 * 3_579_545)


def test_nobodys_port_reads_as_ones() -> None:
    ports = Ports()
    assert (ports.read(0xCFC, 4), ports.read(0x1234, 1)) == (0xFFFF_FFFF, 0xFF)
    ports.write(0xCF8, 4, 0x8000_0000)
    assert dict(ports.unclaimed) == {0xCFC: 1, 0x1234: 1, 0xCF8: 1}
    ports.add(FwCfg({}), 0x510, 2)
    with pytest.raises(ValueError, match="port 0x511 has a device"):
        ports.add(FwCfg({}), 0x511)


def test_test_device() -> None:
    lines: list[tuple[int, int]] = []
    ports = Ports()
    LineDevice(lambda gsi, level: lines.append((gsi, level))).connect(ports)
    ports.write(0x2000 + 14, 1, 1)
    ports.write(0x2000 + 14, 1, 0)
    assert lines == [(14, 1), (14, 0)]
    ports.write(0xE0, 4, 0x1234_5678)
    ports.write(0xE1, 1, 0xAA)
    assert (ports.read(0xE0, 4), ports.read(0xE2, 2)) == (0x1234_AA78, 0x1234)


def test_sint_routes() -> None:
    routes: list[list[Any]] = []
    raised: list[int] = []
    machine: Any = SimpleNamespace(set_gsi_routing=lambda entries: routes.append(list(entries)))
    device = SintDevice(machine, lambda gsi, level: raised.append(gsi), [("ioapic", 1, 1)])
    device.write(0x3000, 4, 1 << 16 | 2 << 8 | 5)
    device.write(0x3000, 4, 1 << 16 | 3 << 8 | 5)
    assert routes[-1] == [("ioapic", 1, 1), ("hv_sint", 64, 2, 5), ("hv_sint", 65, 3, 5)]
    device.write(0x3000, 4, 3 << 16 | 3 << 8 | 5)
    device.write(0x3000, 4, 2 << 16 | 2 << 8 | 5)
    device.write(0x3000, 4, 3 << 16 | 2 << 8 | 5)
    assert (raised, routes[-1]) == ([65], [("ioapic", 1, 1), ("hv_sint", 65, 3, 5)])


def test_gate_calls_behind_the_outermost() -> None:
    seen: list[str] = []
    gate = Gate(alone=False)
    with gate:
        pass
    gate.serialise(lambda: seen.append("behind"))
    with gate, gate:
        seen.append("inside")
    assert seen == ["inside", "behind"]


# ------------------------------------------------------------------------------------------------------------- userland


def test_initramfs_has_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userland, "busybox", lambda: b"static")
    archive = userland.initramfs("echo it's")
    assert b"bin/busybox\0" in archive
    assert b"echo it's\n" in archive
    assert b"sh /command" in archive
    assert b"\0command\0" not in userland.initramfs()


def test_no_busybox_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    dynamic = tmp_path / "busybox"
    dynamic.write_bytes(
        bytearray(b"\x7fELF\x02\x01").ljust(32, b"\0") + struct.pack("<Q", 64) + bytes(16) + b"\1\0" * 4
    )
    monkeypatch.setattr(userland, "PLACES", (str(tmp_path / "none"), str(dynamic)))
    data = bytearray(dynamic.read_bytes().ljust(200, b"\0"))
    struct.pack_into("<H", data, 56, 1)
    struct.pack_into("<I", data, 64, 3)
    dynamic.write_bytes(data)
    with pytest.raises(FileNotFoundError, match="no static busybox for an initramfs: install busybox-static"):
        userland.busybox()
    struct.pack_into("<I", data, 64, 1)
    dynamic.write_bytes(data)
    assert userland.busybox() == bytes(data)


# ------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("kept", [1, 4, 1 << 20])
@pytest.mark.parametrize("name", ["guest.trace", "guest.trace.xz", "guest.trace.gz"])
def test_lines_have_the_time_at_which_they_were_taken(
    kept: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are made when there is time for it, or when many wait; nothing of it shows."""
    monkeypatch.setattr(tracefile, "MOST_KEPT", kept)
    m, now = fx.Machine(vcpus=2), 0
    m.boot_x2apic()
    trace = tracefile.TraceFile(tmp_path / name, m, lambda: now)
    expected = []
    for now in (1_000, 2_000_000, 3_500_000_000):
        m.vcpus[now % 3 % 2].wrmsr(0x830, fx.icr(dest=1, vector=0x61))
        expected += [line.replace(line.split()[3], f"{now / 1e9:.6f}:") for line in m.trace.text().splitlines()]
        trace.drain()
        assert not len(m.trace)
    trace.close()
    opened = {".xz": lzma.open, ".gz": gzip.open}.get((tmp_path / name).suffix, open)
    with opened(tmp_path / name, "rt") as file:
        lines = [line for line in file if not line.startswith("#")]
    assert [line.split() for line in lines] == [line.split() for line in expected]
    assert (trace.lines, trace.lost) == (len(lines), 0)
