"""What the tests of single traps say again and again: machines in one mode, registers and vector sets of a page."""

from __future__ import annotations

from typing import Any

import fastexit as fx
from fastexit import regs as r

ICR, SELF_IPI, EOI, SVR, TPR, PPR = 0x830, 0x83F, 0x80B, 0x80F, 0x808, 0x80A
LVTT, TMICT, TMCCT, TDCR, ESR = 0x832, 0x838, 0x839, 0x83E, 0x828
NMI, INIT, SIPI, LOWEST, REMOTE_READ, SMI = 4, 5, 6, 1, 3, 2
BASE = r.MSR_APICBASE
X2APIC = r.APICBASE_EN | r.APICBASE_EXTD


def machine(*ids: int, x2apic: bool = True, **options: Any) -> fx.Machine:
    """vCPUs with these ids, software-enabled, without APICv unless told; in x2APIC mode or as xAPICs."""
    m = fx.Machine(apic_ids=ids or (0, 1, 2), **{"apicv": False, **options})
    if x2apic:
        m.boot_x2apic()
    else:
        for v in m.vcpus:
            v.mmio_write(r.APIC_SPIV, 0x1FF)
    return m


def to_x2apic(v: fx.Vcpu) -> None:
    """One vCPU alone goes to x2APIC mode, software-enabled."""
    assert v.set_msr(BASE, v.apic_base | X2APIC)
    assert v.set_msr(SVR, 0x1FF)


def register(v: fx.Vcpu, offset: int) -> int:
    """A dword of KVM_GET_LAPIC's page."""
    return int.from_bytes(v.get_lapic()[offset : offset + 4], "little")


def patched(v: fx.Vcpu, registers: dict[int, int]) -> bytes:
    """The vCPU's page with some dwords changed."""
    page = bytearray(v.get_lapic())
    for offset, value in registers.items():
        page[offset : offset + 4] = value.to_bytes(4, "little")
    return bytes(page)


def vectors(v: fx.Vcpu, first: int = r.APIC_IRR) -> set[int]:
    """IRR (or ISR, TMR) as a set of vectors."""
    page = v.get_lapic()
    return {n for n in range(256) if page[first + n // 32 * 16 + n % 32 // 8] >> n % 8 & 1}


def in_service(v: fx.Vcpu, *numbers: int) -> dict[int, int]:
    """The ISR dwords of a page that has these vectors, and no other, in service."""
    words = {r.APIC_ISR + 16 * i: 0 for i in range(8)}
    for n in numbers:
        words[r.APIC_ISR + n // 32 * 16] |= 1 << n % 32
    return words


def receivers(m: fx.Machine, vector: int) -> set[int]:
    """Ids of the vCPUs that have a vector pending."""
    return {v.vcpu_id for v in m.vcpus if vector in vectors(v)}


def nmis(m: fx.Machine) -> set[int]:
    """Ids of the vCPUs that have an NMI pending."""
    return {v.vcpu_id for v in m.vcpus if v.events().nmi_pending}


def msi(m: fx.Machine, dest: int, vector: int, mode: int = 0, logical: bool = False, hint: bool = False) -> int:
    """KVM_SIGNAL_MSI, edge, to an 8-bit destination."""
    address = 0xFEE00000 | dest << 12 | (8 if hint else 0) | (4 if logical else 0)
    return m.signal_msi(address, mode << 8 | vector)


def xapic_ipi(v: fx.Vcpu, dest: int, low: int) -> fx.Outcome:
    """An IPI through the xAPIC page: ICR2, then ICR."""
    v.mmio_write(r.APIC_ICR2, dest << 24)
    return v.mmio_write(r.APIC_ICR, low)


def alias(m: fx.Machine, index: int, apic_id: int) -> None:
    """The xAPIC of one vCPU takes the id of another."""
    m.vcpus[index].mmio_write(r.APIC_ID, apic_id << 24)


def interrupted(v: fx.Vcpu) -> fx.Outcome:
    """The guest runs until a host interrupt takes it out; then it is in the guest again."""
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def kinds(m: fx.Machine) -> list[str]:
    """The names of the traced events, in order."""
    return [line.split(":")[0] for line in m.trace.lines()]
