"""VMCALL and VMMCALL of guests on Unicorn's CPUs."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

from fastexit import regs as R
from fastexit.adapters.unicorn import Ended, Stop
from unicorn_guest import HLT, STI, STOP, count, guest, put, read, word

VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
IPI = 0x40
MOVES = b"\xb8", b"\xbb", b"\xb9", b"\xba", b"\xbe"
"""Into EAX, EBX, ECX, EDX, ESI."""


def call(instruction: bytes, *registers: int) -> bytes:
    """The instruction with these registers, and what it left in RAX at 0x500."""
    moves = b"".join(move + word(value) for move, value in zip(MOVES, registers, strict=False))
    return moves + instruction + b"\x48\x89\x04\x25" + word(0x500)


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL], ids=["vmcall", "vmmcall"])
@pytest.mark.parametrize(
    "machine", [{}, {"apicv": False}, {"vendor": "svm"}, {"dispatcher": "compiled"}, {"kernel": "5.6"}], ids=str
)
def test_a_paravirtual_ipi_arrives(machine: dict, instruction: bytes) -> None:
    """KVM_HC_SEND_IPI to APIC id 1, whichever vendor's instruction it is: RAX says to how many."""
    code = call(instruction, R.HC_SEND_IPI, 2, 0, 0, IPI)
    host = guest(b"\x90" * 100 + code + put(0x508, 7) + STOP, STI + HLT + STOP, **machine)
    assert host.run(instructions=100_000) is Ended.IDLE
    assert (read(host, 0x500), count(host, IPI), read(host, 0x508, 4)) == (1, 1, 7)
    assert host.cpus[0].counters.stops[Stop.HYPERCALL] == 1


def test_what_no_kernel_knows() -> None:
    """-KVM_ENOSYS in all of RAX; the next instruction is the next."""
    host = guest(call(VMCALL, 0x1234) + put(0x508, 7) + STOP)
    assert host.run(instructions=1000) is Ended.IDLE
    assert (read(host, 0x500), read(host, 0x508, 4)) == ((1 << 64) - 1000, 7)


def test_hyperv_s_calls() -> None:
    """Behind a guest OS id they are Hyper-V's: HvCallSendSyntheticClusterIpi, fast, to VP 1."""
    code = b"\x49\xc7\xc0" + word(2)  # mov r8, 2: the mask of VPs
    code += call(VMCALL, 0, 0, 0x1000B, IPI)
    host = guest(b"\x90" * 100 + code + STOP, STI + HLT + STOP, hyperv=True)
    for v in host.machine.vcpus:
        v.set_msr(0x4000_0000, 1)
        v.set_msr(0x4000_0001, 1)
    assert host.run(instructions=100_000) is Ended.IDLE
    assert (read(host, 0x500) & 0xFFFF, count(host, IPI)) == (0, 1)
