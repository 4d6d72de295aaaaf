"""An embedder's devices on Unicorn's CPUs: ports and addresses where the machine has none."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

import unicorn_guest as G
from fastexit.adapters.unicorn import Devices, Ended
from unicorn_guest import STOP, guest, read, word

ELSEWHERE = 0xFD00_0000


class Mine(Devices):
    """It answers with numbers that say what was asked."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def port_read(self, cpu: Any, port: int, size: int) -> int:
        return 0x1_0000_0000 | port << 16 | size << 8 | cpu.index

    def port_write(self, cpu: Any, port: int, value: int, size: int) -> None:
        self.said.append(("out", cpu.index, port, value, size))

    def memory_read(self, cpu: Any, address: int, size: int) -> int:
        return address ^ size

    def memory_write(self, cpu: Any, address: int, value: int, size: int) -> None:
        self.said.append(("store", cpu.index, address, value, size))


CODE = (
    b"\xba\xf4\x00\x00\x00\xed\x89\x04\x25" + word(0x500)  # mov edx, 0xf4; in eax, dx; mov [0x500], eax
    + b"\xb0\x5a\xee"  # mov al, 0x5a; out dx, al
    + G.peek(ELSEWHERE, 0x504) + G.poke(ELSEWHERE + 4, 7)
    + b"\xbf" + word(ELSEWHERE) + b"\x66\x8b\x07\x66\x89\x04\x25" + word(0x508)  # mov ax, [rdi]
)  # fmt: skip


@pytest.mark.parametrize(
    "machine", [{}, {"apicv": False}, {"vendor": "svm"}, {"irqchip": "split"}, {"dispatcher": "compiled"}], ids=str
)
def test_an_embedders_devices_answer(machine: dict) -> None:
    host = guest(b"\x90" * 100 + STOP, CODE + STOP, **machine)
    host.devices = mine = Mine()
    assert host.run(instructions=10_000) is Ended.IDLE
    assert read(host, 0x500, 4) == 0xF4_0401
    assert read(host, 0x504, 4) == ELSEWHERE ^ 4
    assert read(host, 0x508, 2) == 2
    assert mine.said == [("out", 1, 0xF4, 0x5A, 1), ("store", 1, ELSEWHERE + 4, 7, 4)]
    assert host.cpus[1].counters.devices == 5
    assert not host.machine.vcpus[1].user_io


def test_a_device_cannot_run_its_host() -> None:
    refused: list[str] = []

    class Runs(Devices):
        def port_read(self, cpu: Any, port: int, size: int) -> int:
            with pytest.raises(RuntimeError, match="cannot run the host again") as found:
                cpu.host.run(instructions=5)
            refused.append(str(found.value))
            return 0

    host = guest(b"\xe4\x99" + STOP)
    host.devices = Runs()
    assert host.run(instructions=10_000) is Ended.IDLE
    assert host.run(instructions=10) is Ended.IDLE
    assert len(refused) == 1


def test_nobody_answers() -> None:
    host = guest(CODE + STOP)
    assert host.run(instructions=10_000) is Ended.IDLE
    assert (read(host, 0x500, 4), read(host, 0x504, 4), read(host, 0x508, 2)) == (0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF)


def test_the_machines_devices_come_first() -> None:
    ioapic = G.poke(0xFEC0_0000, 1) + G.peek(0xFEC0_0010, 0x500)  # its version
    host = guest(ioapic + b"\xb0\xaa\xe6\x21\xe4\x21\x89\x04\x25" + word(0x504) + STOP)  # the first PIC's mask
    host.devices = mine = Mine()
    assert host.run(instructions=10_000) is Ended.IDLE
    assert (read(host, 0x500, 4), read(host, 0x504, 1)) == (0x17_0011, 0xAA)
    assert mine.said == []


def test_a_split_irqchips_ioapic_is_the_embedders() -> None:
    host = guest(G.peek(0xFEC0_0010, 0x500) + STOP, irqchip="split")
    host.devices = Mine()
    assert host.run(instructions=10_000) is Ended.IDLE
    assert read(host, 0x500, 4) == 0xFEC0_0014
