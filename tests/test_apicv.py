"""Accesses that an Intel CPU virtualises, those that make it exit, and what KVM makes of the exits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare

TPR, EOI, ICR, SELF_IPI = 0x808, 0x80B, 0x830, 0x83F
IF = 0x200


def booted(**options: Any) -> fx.Machine:
    """x2APIC guests with interrupts on; every vCPU is loaded on the pCPU of its index and runs."""
    m = fx.Machine(vcpus=3, **options)
    m.boot_x2apic()
    return running(m)


def xapic(**options: Any) -> fx.Machine:
    """The same in xAPIC mode, APICs software-enabled."""
    m = fx.Machine(vcpus=3, **options)
    for v in m.vcpus:
        v.mmio_write(0xF0, 0x1FF)
    return running(m)


def running(m: fx.Machine) -> fx.Machine:
    for v in m.vcpus:
        v.rflags |= IF
        declare.load("pi_load")(m.handle, v.index, v.index)
        run(v)
        v.rip = 0x1000
    return m


def run(v: fx.Vcpu) -> None:
    v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def exits(v: fx.Vcpu) -> int:
    return v.counters()["exits"]


def page(v: fx.Vcpu, offset: int) -> int:
    """A dword of the register page as it is, without a sync."""
    return int(v.machine.words[L.PAGE + v.index * L.PAGE_STRIDE + offset // 8]) >> offset % 8 * 8 & 0xFFFF_FFFF


def vectors(v: fx.Vcpu, first: int) -> set[int]:
    words = v.machine.mem[first : first + 4].tolist()
    return {i * 64 + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def irr(v: fx.Vcpu) -> set[int]:
    return vectors(v, v.vec + L.VEC_IRR)


def isr(v: fx.Vcpu) -> set[int]:
    return vectors(v, v.own + L.K_ISR)


def status(v: fx.Vcpu) -> tuple[int, int]:
    """RVI and SVI."""
    return v.machine.mem[v.vec + L.VEC_RVI], v.machine.mem[v.own + L.K_SVI]


def pir(v: fx.Vcpu) -> set[int]:
    words = v.machine.mem[v.hot : v.hot + 4].tolist()
    return {i * 64 + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def pend(v: fx.Vcpu, *wanted: int) -> None:
    """These vectors are posted, and the running guest's CPU has taken them to IRR."""
    for vector in wanted:
        declare.load("hardware_post")(v.machine.handle, v.index, vector)
    assert v.hw_notify()


def wants(v: fx.Vcpu, vector: int) -> None:
    """The IOAPIC wants to hear of this vector's EOI."""
    v.machine.mem[v.own + L.K_IOAPIC_HANDLED + vector // 64] |= 1 << vector % 64


def lines(m: fx.Machine) -> list[str]:
    """The trace without entries and inhibits, and of exits only reason and qualification."""
    found = []
    for line in m.trace.lines():
        name, _, rest = line.partition(": ")
        if name == "kvm_exit":
            words = rest.split()
            first = "info1" if "info1" in words else "info"
            found.append(f"{name} {words[3]} {int(words[words.index(first) + 1], 16):#x}")
        elif name not in ("kvm_entry", "kvm_apicv_inhibit_changed"):
            found.append(line)
    m.trace.clear()
    return found


HARDWARE = (fx.Path.HARDWARE, None)


def result(out: fx.Outcome) -> tuple[fx.Path, fx.Fault | None]:
    return out.path, out.fault


# ------------------------------------------------------------------------------------------------- x2APIC: no exit


def test_reads_do_not_exit() -> None:
    """Every register that KVM lets a guest read comes from the page, TMCCT excepted; it is what KVM would return."""
    m = booted()
    v = m.vcpus[1]
    pend(v, 0x41, 0x52, 0xE3)
    v.hw_deliver()
    v.wrmsr(ICR, fx.icr(dest=2, vector=0x77))
    v.wrmsr(0x832, 0x100EC)
    before = exits(v)
    values = {}
    for msr in range(0x800, 0x900):
        try:
            values[msr] = v.hw_rdmsr(msr)
        except fx.GeneralProtection:
            pass
    exited = exits(v) - before
    assert len(values) == 41
    assert exited == 256 - 40, "all that have no register, and TMCCT"
    assert {msr: v.get_msr(msr) for msr in values} == values
    assert values[0x817] == 1 << 0xE3 % 32
    assert values[ICR] == fx.icr(dest=2, vector=0x77)


def test_read_moves_rip() -> None:
    """Two bytes on, and the interrupt shadow is over, without KVM; nothing is traced."""
    m = booted()
    v = m.vcpus[0]
    m.trace.enable()
    v.shadow = r.SHADOW_STI
    v.hw_rdmsr(0x802)
    assert (v.rip, v.shadow, lines(m)) == (0x1002, 0, [])


@pytest.mark.parametrize("kernel", ["5.8", "6.18"])
def test_icr_read_is_64_bits_of_the_page(kernel: str) -> None:
    """The CPU reads eight bytes at 0x300. A kernel that keeps the high half at 0x310 shows the guest a zero there."""
    m = booted(kernel=kernel)
    v = m.vcpus[0]
    icr = fx.icr(dest=1, vector=0x77)
    v.wrmsr(ICR, icr)
    assert v.hw_rdmsr(ICR) == (icr & 0xFFFF_FFFF if kernel == "5.8" else icr)
    assert v.rdmsr(ICR) == icr


def test_tpr_write() -> None:
    """TPR and PPR follow at once. The CPU refuses bits 63:8, which KVM's own emulation ignores."""
    m = booted()
    v = m.vcpus[0]
    before = exits(v)
    assert result(v.hw_wrmsr(TPR, 0x5A)) == HARDWARE
    assert (page(v, 0x80), page(v, 0xA0), v.rip) == (0x5A, 0x5A, 0x1002)
    for value in (0x100, 1 << 31, 1 << 63):
        assert result(v.hw_wrmsr(TPR, value)) == (fx.Path.HARDWARE, fx.Fault.GP)
    assert (page(v, 0x80), v.rip, exits(v)) == (0x5A, 0x1002, before)
    assert v.events().exception is None, "the CPU delivers its own #GP"
    assert result(v.wrmsr(TPR, 0x15B)) == (fx.Path.SLOW, None)


def test_eoi_write() -> None:
    """EOI of the vector in service, no exit; any bit set faults, which KVM's emulation does not mind."""
    m = booted()
    v = m.vcpus[0]
    pend(v, 0x41)
    assert v.hw_deliver() == 0x41
    for value in (1, 1 << 32):
        assert result(v.hw_wrmsr(EOI, value)) == (fx.Path.HARDWARE, fx.Fault.GP)
    assert isr(v) == {0x41}
    before = exits(v)
    assert result(v.hw_wrmsr(EOI, 0)) == HARDWARE
    assert (isr(v), status(v), page(v, 0xA0)) == (set(), (0, 0), 0)
    assert exits(v) == before


def test_eoi_with_nothing_in_service() -> None:
    """SVI is 0, so vector 0 leaves service; KVM would trace -1."""
    m = booted()
    v = m.vcpus[0]
    v.ioapic_handled = ()
    m.trace.enable()
    assert result(v.hw_wrmsr(EOI, 0)) == HARDWARE
    assert (status(v), lines(m)) == ((0, 0), [])


def test_self_ipi_write() -> None:
    """The vector is in IRR and RVI before the next instruction; neither descriptor nor KVM is asked."""
    m = booted()
    v = m.vcpus[0]
    m.trace.enable()
    for vector in (0x41, 0x31):
        out = v.hw_wrmsr(SELF_IPI, vector)
        assert (*result(out), out.accepted, out.effects) == (*HARDWARE, 1, fx.Effect.NONE)
    assert (irr(v), status(v), pir(v), lines(m)) == ({0x31, 0x41}, (0x41, 0), set(), [])
    assert result(v.hw_wrmsr(SELF_IPI, 0x141)) == (fx.Path.HARDWARE, fx.Fault.GP)
    assert v.rip == 0x1004


def test_self_ipi_below_16_exits() -> None:
    """An illegal vector is KVM's problem: APIC-write exit for 0x3F0, and KVM posts it."""
    m = booted()
    v = m.vcpus[0]
    m.trace.enable()
    out = v.hw_wrmsr(SELF_IPI, 0x0F)
    assert (out.path, out.accepted) == (fx.Path.SLOW, 1)
    assert lines(m) == [
        "kvm_exit APIC_WRITE 0x3f0",
        "kvm_apic: apic_write APIC_SELF_IPI = 0xf",
        "kvm_apic_ipi: dst 0 vec 15 (Fixed|physical|de-assert|edge|self)",
        "kvm_apic_accept_irq: apicid 0 vec 15 (Fixed|edge)",
        "kvm_apicv_accept_irq: apicid 0 vec 15 (Fixed|edge)",
    ]
    assert (irr(v), v.rip) == ({0x0F}, 0x1002)


def test_other_writes_exit() -> None:
    """SVR has to be intercepted, ICR too without IPI virtualisation: ordinary exits, the latter fast."""
    m = booted()
    v = m.vcpus[0]
    m.trace.enable()
    assert v.hw_wrmsr(0x80F, 0xFF).path == fx.Path.SLOW
    assert lines(m) == [
        "kvm_exit MSR_WRITE 0x0",
        "kvm_apic: apic_write APIC_SPIV = 0xff",
        "kvm_msr: msr_write 80f = 0xff",
    ]
    assert v.hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41)).path == fx.Path.FAST
    assert v.rip == 0x1004
    out = v.hw_wrmsr(0x802, 5)
    assert (out.path, out.fault, v.rip) == (fx.Path.SLOW, fx.Fault.GP, 0x1004)


# ------------------------------------------------------------------------------------------------- virtual interrupts


def test_delivery_nests_by_class() -> None:
    """A higher class interrupts, the same class waits for EOI, and each EOI brings back what it interrupted."""
    m = booted()
    v = m.vcpus[0]
    pend(v, 0x41)
    assert v.hw_deliver() == 0x41
    pend(v, 0x4F, 0x62)
    assert v.hw_deliver() == 0x62
    assert (status(v), page(v, 0xA0), isr(v), irr(v)) == ((0x4F, 0x62), 0x60, {0x41, 0x62}, {0x4F})
    assert v.hw_deliver() is None
    v.hw_wrmsr(EOI, 0)
    assert (status(v), page(v, 0xA0)) == ((0x4F, 0x41), 0x40)
    assert v.hw_deliver() is None
    v.hw_wrmsr(EOI, 0)
    assert v.hw_deliver() == 0x4F
    v.hw_wrmsr(EOI, 0)
    assert (status(v), isr(v), irr(v)) == ((0, 0), set(), set())


@pytest.mark.parametrize("tpr", [0x40, 0x3F, 0x4F])
def test_tpr_holds_back(tpr: int) -> None:
    """Class 4 passes TPR class 3 and waits for TPR class 4, whatever the low halves say; the TPR write lets it go."""
    m = booted()
    v = m.vcpus[0]
    v.hw_wrmsr(TPR, tpr)
    pend(v, 0x4A)
    assert v.hw_deliver() == (0x4A if tpr == 0x3F else None)
    if tpr != 0x3F:
        v.hw_wrmsr(TPR, 0)
        assert v.hw_deliver() == 0x4A


@pytest.mark.parametrize("why", ["IF", "shadow", "window", "user space"])
def test_delivery_waits(why: str) -> None:
    """Interrupts off, an interrupt shadow, an interrupt window that KVM wants, or no guest at all: not now."""
    m = booted()
    v = m.vcpus[0]
    pend(v, 0x41)
    if why == "IF":
        v.rflags &= ~IF
    elif why == "shadow":
        v.shadow = r.SHADOW_MOV_SS
    elif why == "window":
        m.mem[v.own + L.K_IRQ_WINDOW] = 1
    else:
        v.get_lapic()
    assert v.hw_deliver() is None
    assert (isr(v), irr(v)) == (set(), {0x41})


def test_delivery_is_not_for_other_machines() -> None:
    """AVIC has its own, and without APICv the VM entry injects."""
    for options in ({"vendor": "svm"}, {"apicv": False}):
        m = booted(**options)
        m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41))
        assert m.vcpus[1].hw_deliver() is None


def test_cpu_and_kvm_agree() -> None:
    """A storm of posts, deliveries and EOIs by the CPU leaves the page that KVM's ack and EOI leave."""
    by_cpu, by_kvm = booted(), booted()
    rng = np.random.default_rng(3)
    for step in range(300):
        vector, tpr = int(rng.integers(16, 256)), int(rng.integers(0, 256))
        a, b = by_cpu.vcpus[0], by_kvm.vcpus[0]
        choice = rng.integers(0, 4)
        if choice == 0:
            pend(a, vector)
            by_kvm.vcpus[1].wrmsr(ICR, fx.icr(dest=0, vector=vector))
        elif choice == 1:
            assert a.hw_deliver() == b.ack()
        elif choice == 2:
            a.hw_wrmsr(EOI, 0)
            b.wrmsr(EOI, 0)
        else:
            a.hw_wrmsr(TPR, tpr)
            b.wrmsr(TPR, tpr)
        run(b)
        assert a.hw_rdmsr(0x80A) == b.rdmsr(0x80A)
        assert (irr(a), isr(a), status(a)) == (irr(b), isr(b), status(b)), f"step {step}"


# --------------------------------------------------------------------------------------------------- EOI-induced exits


@pytest.mark.parametrize("irqchip", ["full", "split"])
def test_eoi_that_the_ioapic_wants(irqchip: str) -> None:
    """The CPU has done the EOI when it exits: KVM traces it, tells the IOAPIC, and asks for another look; no skip."""
    m = booted(irqchip=irqchip)
    v = m.vcpus[0]
    wants(v, 0x41)
    m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, vector=0x41, level=True, trigger_level=True))
    assert v.hw_notify()
    assert v.hw_deliver() == 0x41
    m.trace.enable()
    out = v.hw_wrmsr(EOI, 0)
    assert (out.path, out.fault) == (fx.Path.SLOW, None)
    told = ["kvm_userspace_exit: reason KVM_EXIT_IOAPIC_EOI (26)"] if irqchip == "split" else []
    assert lines(m) == ["kvm_exit EOI_INDUCED 0x41", "kvm_eoi: apicid 0 vector 65", *told]
    assert (isr(v), status(v), v.rip) == (set(), (0, 0), 0x1002)
    told = m.mem[v.own + L.K_IOAPIC_EOI]
    assert told == (0x141 if irqchip == "full" else 0x41), "KVM's own IOAPIC is told that it was level-triggered"


def test_eoi_exit_requests() -> None:
    """An EVENT request, and on a split irqchip one for the exit to user space."""
    for irqchip, request in (("full", 0), ("split", r.REQ_IOAPIC_EOI_EXIT)):
        m = booted(irqchip=irqchip)
        v = m.vcpus[0]
        wants(v, 0xFE)
        declare.load("set_eoi_accelerated")(m.handle, 0, 0xFE)
        assert v.requests == r.REQ_EVENT | request


@pytest.mark.parametrize("api", [0, fx.X2ApicApi.ENABLE_SUPPRESS_EOI_BROADCAST])
def test_suppressed_eoi_broadcast(api: int) -> None:
    """SVR bit 12 keeps the EOI from user space's IOAPIC, but only if user space enabled that."""
    m = booted(irqchip="split", x2apic_api=int(api))
    v = m.vcpus[0]
    v.wrmsr(0x80F, 0x11FF)
    wants(v, 0x41)
    declare.load("set_eoi_accelerated")(m.handle, 0, 0x41)
    assert v.requests == (r.REQ_EVENT if api else r.REQ_EVENT | r.REQ_IOAPIC_EOI_EXIT)


def test_eoi_that_nobody_wants() -> None:
    """KVM handles an EOI-induced exit of any vector; what the IOAPIC does not route goes no further."""
    m = booted()
    v = m.vcpus[0]
    m.trace.enable()
    v.exit(fx.VmxExit.EOI_INDUCED, info1=0x42)
    assert lines(m) == ["kvm_exit EOI_INDUCED 0x42", "kvm_eoi: apicid 0 vector 66"]
    assert m.mem[v.own + L.K_IOAPIC_EOIS] == 0


def test_eoi_bitmap_goes_by_the_vector_in_service() -> None:
    """Only the vector that leaves service counts, not the one that comes back."""
    m = booted()
    v = m.vcpus[0]
    wants(v, 0x41)
    for vector in (0x41, 0x62):
        pend(v, vector)
        v.hw_deliver()
    assert v.hw_wrmsr(EOI, 0).path == fx.Path.HARDWARE
    assert v.hw_wrmsr(EOI, 0).path == fx.Path.SLOW


# ---------------------------------------------------------------------------------------------------------- xAPIC page

READABLE = (
    *(0x20, 0x30, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, *range(0x100, 0x290, 0x10)),
    *(0x300, 0x310, *range(0x320, 0x390, 0x10), 0x3E0),
)
WRITABLE = (0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310, *range(0x320, 0x390, 0x10), 0x3E0)


def test_which_reads_of_the_page_exit() -> None:
    """The manual's list is virtualised; PPR, APR, TMCCT, CMCI and the rest of the 4 KiB exit, and are emulated."""
    m = xapic()
    v = m.vcpus[1]
    pend(v, 0x41)
    quiet = set()
    for offset in range(0, 0x1000, 0x10):
        before = exits(v)
        value = v.hw_mmio_read(offset)
        if exits(v) == before:
            quiet.add(offset)
            assert value == (0 if offset == 0xB0 else v.mmio_read(offset)), hex(offset)
    assert quiet == set(READABLE)


def test_which_writes_to_the_page_are_stored() -> None:
    """A write outside the manual's list is an APIC-access exit, and the emulator does what it does anyway."""
    m = xapic()
    v = m.vcpus[1]
    m.trace.enable()
    stored = set()
    for offset in range(0, 0x1000, 0x10):
        v.hw_mmio_write(offset, 0x0100_0000 if offset == 0x20 else 0)  # another id than its own would inhibit APICv
        reasons = [line.split()[1] for line in lines(m) if line.startswith("kvm_exit")]
        assert reasons in ([], ["APIC_WRITE"], ["APIC_ACCESS"])
        if reasons != ["APIC_ACCESS"]:
            stored.add(offset)
    assert stored == set(WRITABLE)


@pytest.mark.parametrize(("offset", "length", "value"), [(0x21, 1, 0x44), (0x22, 2, 0x1133), (0x20, 1, 0x55)])
def test_partial_read(offset: int, length: int, value: int) -> None:
    """Any bytes of a register, as long as they lie in its first four."""
    m = xapic()
    v = m.vcpus[0]
    m.words[L.PAGE + 0x20 // 8] = 0x1133_4455
    before = exits(v)
    assert v.hw_mmio_read(offset, length) == value
    assert exits(v) == before


@pytest.mark.parametrize(("offset", "length"), [(0x23, 2), (0x24, 4), (0x2C, 1), (0x1FE, 4)])
def test_misaligned_accesses_exit(offset: int, length: int) -> None:
    """What reaches beyond the first four bytes is an APIC-access exit; KVM then drops such a write."""
    m = xapic()
    v = m.vcpus[0]
    before = m.words[L.PAGE : L.PAGE + 128].tobytes()
    m.trace.enable()
    v.hw_mmio_read(offset, length)
    v.hw_mmio_write(offset, 0x77, length)
    assert lines(m) == [f"kvm_exit APIC_ACCESS {offset:#x}", f"kvm_exit APIC_ACCESS {0x1000 | offset:#x}"]
    assert m.words[L.PAGE : L.PAGE + 128].tobytes() == before


def test_page_tpr_and_eoi() -> None:
    """TPR bytes 3:1 are cleared; EOI reads as 0 whatever was written."""
    m = xapic()
    v = m.vcpus[0]
    before = exits(v)
    assert result(v.hw_mmio_write(0x80, 0x1234_5623)) == HARDWARE
    assert (page(v, 0x80), page(v, 0xA0)) == (0x23, 0x23)
    pend(v, 0x2F, 0x41)
    assert v.hw_deliver() == 0x41
    assert result(v.hw_mmio_write(0xB0, 0xDEAD_BEEF)) == HARDWARE
    assert (isr(v), v.hw_mmio_read(0xB0), page(v, 0xA0)) == (set(), 0, 0x23)
    assert v.hw_deliver() is None
    assert exits(v) == before


def test_page_eoi_that_the_ioapic_wants() -> None:
    """The EOI-exit bitmap counts for the page as well."""
    m = xapic()
    v = m.vcpus[0]
    wants(v, 0x41)
    pend(v, 0x41)
    v.hw_deliver()
    m.trace.enable()
    v.hw_mmio_write(0xB0, 0)
    assert lines(m) == ["kvm_exit EOI_INDUCED 0x41", "kvm_eoi: apicid 0 vector 65"]


def test_page_icr_high() -> None:
    """Stored without an exit, bytes 2:0 cleared, byte by byte if need be."""
    m = xapic()
    v = m.vcpus[0]
    before = exits(v)
    assert result(v.hw_mmio_write(0x310, 0x0234_5678)) == HARDWARE
    assert page(v, 0x310) == 0x0200_0000
    assert result(v.hw_mmio_write(0x313, 0x05, 1)) == HARDWARE
    assert result(v.hw_mmio_write(0x311, 0x99, 1)) == HARDWARE
    assert (page(v, 0x310), exits(v)) == (0x0500_0000, before)


def test_page_self_ipi() -> None:
    """ICR low with the self shorthand, Fixed, edge, a legal vector: no exit, no trace, the page keeps the value."""
    m = xapic()
    v = m.vcpus[0]
    m.trace.enable()
    for value in (0x4_0041, 0x4_4842):
        assert result(v.hw_mmio_write(0x300, value)) == HARDWARE
    assert (irr(v), status(v), page(v, 0x300), lines(m)) == ({0x41, 0x42}, (0x42, 0), 0x4_4842, [])


@pytest.mark.parametrize(
    "value",
    [0x4_000F, 0x4_0141, 0x4_8041, 0x4_1041, 0x4_2041, 0x14_0041, 0x8_0041, 0x41],
    ids=["vector", "lowest", "level", "busy", "bit 13", "bit 20", "all", "no shorthand"],
)
def test_page_icr_that_is_not_so_simple(value: int) -> None:
    """Everything else is a trap: the value is in the page, KVM sends the IPI from there and clears the busy bit."""
    m = xapic()
    v = m.vcpus[0]
    v.hw_mmio_write(0x310, 0x0200_0000)
    m.trace.enable()
    assert v.hw_mmio_write(0x300, value).path == fx.Path.SLOW
    seen = lines(m)
    assert seen[:2] == ["kvm_exit APIC_WRITE 0x300", f"kvm_apic: apic_write APIC_ICR = {value:#x}"]
    assert seen[2].startswith("kvm_apic_ipi")
    assert page(v, 0x300) == value & ~r.ICR_BUSY


def test_page_write_is_finished_by_kvm() -> None:
    """SVR: the CPU stores what the guest wrote, KVM keeps what it lets a guest set; no kvm_msr, RIP is not touched."""
    m = xapic()
    v = m.vcpus[0]
    m.trace.enable()
    out = v.hw_mmio_write(0xF0, 0xFFFF_F0FF)
    assert (out.path, out.fault) == (fx.Path.SLOW, None)
    assert lines(m) == ["kvm_exit APIC_WRITE 0xf0", "kvm_apic: apic_write APIC_SPIV = 0xfffff0ff"]
    assert (page(v, 0xF0), v.rip) == (0xFF, 0x1000)
    assert not m.mem[v.hot + L.HOT_FLAGS] & L.FLAG_SW


def test_nothing_is_left_to_skip_behind_a_trap() -> None:
    """A handler sees the instruction's length with a fault-like exit only."""
    m = booted(ipiv=True)
    seen = []
    for reason in (fx.VmxExit.APIC_WRITE, fx.VmxExit.EOI_INDUCED, fx.VmxExit.MSR_WRITE):
        m.handlers[reason] = lambda v, exit: seen.append((exit.reason, exit.length, exit.info1, exit.msr))
    v = m.vcpus[0]
    wants(v, 0)
    v.hw_wrmsr(SELF_IPI, 3)
    v.hw_wrmsr(EOI, 0)
    v.hw_wrmsr(0x80F, 0x1FF)
    assert seen == [(56, 0, 0x3F0, SELF_IPI), (45, 0, 0, EOI), (32, 2, 0, 0x80F)]


def test_page_writes_that_kvm_takes_back_and_those_it_does_not() -> None:
    """KVM masks what it stores; ESR and, in deadline mode, TMICT it only ignores: the guest reads what it wrote."""
    m = xapic()
    v = m.vcpus[0]
    v.hw_mmio_write(0xD0, 0x1234_5678)
    v.hw_mmio_write(0xE0, 0x1234_5678)
    v.hw_mmio_write(0x3E0, 0xFFFF_FFFF)
    assert [v.hw_mmio_read(offset) for offset in (0xD0, 0xE0, 0x3E0)] == [0x1200_0000, 0x1FFF_FFFF, 0xB]
    v.hw_mmio_write(0x280, 0x55)
    assert v.hw_mmio_read(0x280) == 0x55
    v.hw_mmio_write(0x320, r.LVT_TIMER_DEADLINE | 0xEC)
    v.hw_mmio_write(0x380, 1000)
    assert v.hw_mmio_read(0x380) == 1000

    emulated = xapic(apicv=False).vcpus[0]
    emulated.hw_mmio_write(0x280, 0x55)
    emulated.hw_mmio_write(0x320, r.LVT_TIMER_DEADLINE | 0xEC)
    emulated.hw_mmio_write(0x380, 1000)
    assert [emulated.hw_mmio_read(offset) for offset in (0x280, 0x380)] == [0, 0]


@pytest.mark.parametrize(("offset", "what"), [(0x81, "TASKPRI"), (0xB2, "EOI"), (0x301, "ICR")])
def test_write_into_the_middle_of_a_register(offset: int, what: str) -> None:
    """Only the exact offset is emulated by the CPU; KVM rounds the qualification down and redoes the register."""
    m = xapic()
    v = m.vcpus[0]
    m.trace.enable()
    v.hw_mmio_write(offset, 0x11, 1)
    seen = lines(m)
    assert seen[0] == f"kvm_exit APIC_WRITE {offset:#x}"
    assert seen[1] == f"kvm_apic: apic_write APIC_{what} = {0x11 << 8 * (offset & 3):#x}"


def test_page_in_x2apic_mode_and_msrs_in_xapic_mode() -> None:
    """The CPU virtualises the interface that the APIC's mode has; the other one exits and meets KVM's rules."""
    m = booted()
    before = exits(m.vcpus[0])
    assert m.vcpus[0].hw_mmio_read(0x20) == 0xFFFF_FFFF
    assert exits(m.vcpus[0]) == before + 1
    v = xapic().vcpus[0]
    out = v.hw_wrmsr(EOI, 0)
    assert (out.path, out.fault) == (fx.Path.SLOW, fx.Fault.GP)
    with pytest.raises(fx.GeneralProtection):
        v.hw_rdmsr(0x802)


# -------------------------------------------------------------------------------------------------- IPI virtualisation


def test_ipi_without_an_exit() -> None:
    """Fixed, physical, edge, no shorthand: posted and notified by the CPU, ICR stored, nothing traced."""
    m = booted(ipiv=True)
    v, target = m.vcpus[0], m.vcpus[1]
    m.trace.enable()
    before = exits(v)
    out = v.hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41))
    assert (*result(out), out.accepted, out.effects) == (*HARDWARE, 1, fx.Effect.NOTIFY)
    assert target.notification == (0xF2, 1)
    assert (pir(target), exits(v), v.rip, lines(m)) == ({0x41}, before, 0x1002, [])
    assert v.hw_rdmsr(ICR) == fx.icr(dest=1, vector=0x41)
    assert v.hw_wrmsr(ICR, fx.icr(dest=1, vector=0x42, level=True)).effects == fx.Effect.NONE
    target.hw_notify()
    assert target.hw_deliver() == 0x42


def test_table_is_filled_at_creation() -> None:
    """A vCPU that is missing from the APIC map, its APIC software-disabled, is reached by the CPU all the same."""
    m = booted(ipiv=True)
    late = m.add_vcpu(300)
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=300, vector=0x41)).accepted == 0
    out = m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=300, vector=0x41))
    assert (*result(out), out.accepted, out.effects) == (*HARDWARE, 1, fx.Effect.NONE), "SN is set at rest"
    assert pir(late) == {0x41}


def test_table_only_with_ipi_virtualisation() -> None:
    """Entries are descriptor addresses with bit 0 set, by vCPU id; none without IPI virtualisation, none for AVIC."""
    m = fx.Machine(apic_ids=[3, 1], ipiv=True)
    table = m.words[L.PID_TABLE : L.PID_TABLE + 5].tolist()
    assert table == [0, 8 * (L.HOT + L.HOT_STRIDE) | 1, 0, 8 * L.HOT | 1, 0]
    for other in (fx.Machine(vcpus=2), fx.Machine(vcpus=2, vendor="svm")):
        assert not other.words[L.PID_TABLE : L.AVIC_PHYSICAL].any()


@pytest.mark.parametrize(
    ("icr", "accepted"),
    [
        (fx.icr(dest=1, vector=0x0F), 1),
        (fx.icr(dest=1, vector=0x41, delivery=1), 1),
        (fx.icr(dest=1, delivery=4), 1),
        (fx.icr(dest=2, vector=0x41, logical=True), 1),
        (fx.icr(dest=1, vector=0x41, level=True, trigger_level=True), 1),
        (fx.icr(dest=1, vector=0x41, busy=True), 1),
        (fx.icr(vector=0x41, shorthand=1), 1),
        (fx.icr(vector=0x41, shorthand=3), 2),
        (fx.icr(dest=77, vector=0x41), 0),
        (fx.icr(dest=0xFFFF_FFFF, vector=0x41), 3),
    ],
    ids=[
        *("vector", "lowest", "NMI", "logical", "level", "busy", "self", "all but self", "nobody", "broadcast"),
    ],
)
def test_ipi_that_traps(icr: int, accepted: int) -> None:
    """The rest exits behind the instruction: KVM reads the ICR from the page; no fast path, no kvm_msr, no skip."""
    m = booted(ipiv=True)
    v = m.vcpus[0]
    m.trace.enable()
    out = v.hw_wrmsr(ICR, icr)
    assert (out.path, out.accepted) == (fx.Path.SLOW, accepted)
    seen = lines(m)
    assert seen[0] == "kvm_exit APIC_WRITE 0x300"
    assert seen[1].startswith("kvm_apic_ipi")
    assert seen[-1] == f"kvm_apic: apic_write APIC_ICR = {icr & ~r.ICR_BUSY:#x}"
    assert not any(line.startswith("kvm_msr") for line in seen)
    assert (v.rip, v.hw_rdmsr(ICR)) == (0x1002, icr & ~r.ICR_BUSY)


@pytest.mark.parametrize("bit", [13, 16, 17, *range(20, 32)])
def test_cpu_checks_reserved_icr_bits(bit: int) -> None:
    """#GP by the CPU, nothing stored, KVM not asked."""
    m = booted(ipiv=True)
    v = m.vcpus[0]
    before = exits(v)
    assert result(v.hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41) | 1 << bit)) == (fx.Path.HARDWARE, fx.Fault.GP)
    assert (v.hw_rdmsr(ICR), pir(m.vcpus[1]), exits(v), v.rip) == (0, set(), before, 0x1002)


def test_ipi_to_a_preempted_and_to_a_sleeping_vcpu() -> None:
    """SN: posted in silence. A sleeper's descriptor has the CPU send 0xF1 to the pCPU that it slept on."""
    m = booted(ipiv=True)
    v, preempted, sleeper = m.vcpus
    put = declare.load("pi_put")
    put(m.handle, 1, 0)
    m.mem[sleeper.hot + L.HOT_BLOCKED] = 1
    put(m.handle, 2, 1)
    assert v.hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41)).effects == fx.Effect.NONE
    assert pir(preempted) == {0x41}
    assert v.hw_wrmsr(ICR, fx.icr(dest=2, vector=0x41)).effects == fx.Effect.NOTIFY
    assert sleeper.notification == (0xF1, 2)
    assert m.host_interrupt(2, 0xF1) == [2]


def test_page_ipi_without_an_exit() -> None:
    """xAPIC: the destination is the top byte of ICR high; the table goes by vCPU id."""
    m = xapic(ipiv=True)
    v = m.vcpus[0]
    before = exits(v)
    v.hw_mmio_write(0x310, 0x0100_0000)
    out = v.hw_mmio_write(0x300, 0x41)
    assert (*result(out), out.effects) == (*HARDWARE, fx.Effect.NOTIFY)
    assert (pir(m.vcpus[1]), exits(v)) == ({0x41}, before)
    v.hw_mmio_write(0x310, 0xFF00_0000)
    assert v.hw_mmio_write(0x300, 0x41).path == fx.Path.SLOW
    assert m.vcpus[2].pending() == 0x41


@pytest.mark.parametrize("entry", [8 * L.HOT, 8 * L.HOT | 3, 8 * L.HOT + 64 | 1, 1, (1 << 64) - 63])
def test_table_entries_are_checked(entry: int) -> None:
    """Not valid, reserved bits, no descriptor's address, outside the machine: the CPU exits, and touches nothing."""
    m = booted(ipiv=True)
    m.words[L.PID_TABLE + 1] = entry
    assert m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41)).path == fx.Path.SLOW
    assert pir(m.vcpus[1]) == {0x41}, "KVM's own delivery goes by the APIC map"
    with pytest.raises(ValueError, match="descriptor's address"):
        fx.Machine.restore(m.snapshot())


def test_restored_machine_posts() -> None:
    """The table is part of the machine."""
    m = booted(ipiv=True)
    copy = fx.Machine.restore(m.snapshot())
    assert copy.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41)).path == fx.Path.HARDWARE
    assert (pir(copy.vcpus[1]), pir(m.vcpus[1])) == ({0x41}, set())


# ------------------------------------------------------------------------------------------- where nothing is virtual


@pytest.mark.parametrize("why", ["plain", "inhibited", "L2"])
def test_everything_exits(why: str) -> None:
    """Without APICv, while it is off for the vCPU, and in L2: reads and writes exit, an EOI too."""
    m = booted(apicv=why != "plain")
    v = m.vcpus[0]
    if why == "inhibited":
        m.mem[v.hot + L.HOT_FLAGS] &= ~L.FLAG_APICV
    v.nested = why == "L2"
    v.l1_wants_exits = False
    m.trace.enable()
    assert v.hw_rdmsr(0x802) == 0
    v.hw_wrmsr(EOI, 1)
    v.hw_mmio_read(0x20)
    v.hw_mmio_write(0xB0, 1)
    reasons = [line.split()[1] for line in lines(m) if line.startswith("kvm_exit")]
    assert reasons == ["MSR_READ", "MSR_WRITE", "EPT_MISCONFIG", "EPT_MISCONFIG"]
    assert v.rip == 0x1004


def test_disabled_apic() -> None:
    """Globally disabled: KVM decides, which is #GP for MSRs and a hole for the page."""
    m = booted()
    v = m.vcpus[0]
    v.set_msr(0x1B, 0xFEE0_0000)
    assert v.hw_wrmsr(EOI, 0).fault == fx.Fault.GP
    assert v.hw_mmio_read(0x20) == 0xFFFF_FFFF


def test_access_from_user_space_enters_first() -> None:
    """The caller's word that the guest runs: KVM_RUN comes first, as for every other door."""
    m = fx.Machine(vcpus=1)
    m.boot_x2apic()
    assert m.vcpus[0].mode == 0
    assert m.vcpus[0].hw_wrmsr(TPR, 0x20).path == fx.Path.HARDWARE
    assert m.vcpus[0].mode == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda v: v.hw_wrmsr(1 << 32, 0),
        lambda v: v.hw_wrmsr(TPR, 1 << 64),
        lambda v: v.hw_rdmsr(-1),
        lambda v: v.hw_mmio_write(0x1000, 0),
        lambda v: v.hw_mmio_write(0x80, 0x100, 1),
        lambda v: v.hw_mmio_read(0x80, 8),
    ],
)
def test_bad_input(call: Any) -> None:
    v = booted().vcpus[0]
    with pytest.raises(ValueError, match=r"out of range|is not 1, 2 or 4"):
        call(v)


# --------------------------------------------------------------------------------------------- exits as KVM sees them


def test_apic_access_exit_of_an_eoi() -> None:
    """A linear write to EOI needs no decoding: KVM writes EOI = 0 whatever the guest wrote, and skips."""
    m = xapic(apicv=False)
    v = m.vcpus[0]
    m.vcpus[1].mmio_write(0x310, 0)
    m.vcpus[1].mmio_write(0x300, 0x41)
    v.ack()
    m.trace.enable()
    v.exit(fx.VmxExit.APIC_ACCESS, info1=0x10B0, value=0x55, length=6)
    assert lines(m)[:3] == [
        "kvm_exit APIC_ACCESS 0x10b0",
        "kvm_apic: apic_write APIC_EOI = 0x0",
        "kvm_eoi: apicid 0 vector 65",
    ]
    assert (isr(v), v.rip) == (set(), 0x1006)


@pytest.mark.parametrize(
    ("info1", "fields", "line"),
    [
        (0x1080, {"value": 0x23}, "kvm_apic: apic_write APIC_TASKPRI = 0x23"),
        (0x0020, {"write": True, "value": 5}, "kvm_apic: apic_read APIC_ID = 0x0"),
        (0x00B0, {}, None),
        (0xF080, {"write": True, "value": 0x23}, "kvm_apic: apic_write APIC_TASKPRI = 0x23"),
        (0xF020, {}, "kvm_apic: apic_read APIC_ID = 0x0"),
    ],
    ids=["write", "read", "read of EOI", "physical write", "physical read"],
)
def test_apic_access_exits_are_emulated(info1: int, fields: dict, line: str | None) -> None:
    """The qualification has offset and type; a physical access does not say whether it writes, the emulator knows."""
    m = xapic(apicv=False)
    v = m.vcpus[0]
    m.trace.enable()
    v.exit(fx.VmxExit.APIC_ACCESS, info1=info1, length=3, **fields)
    assert lines(m) == [f"kvm_exit APIC_ACCESS {info1:#x}", *([line] if line else [])]
    assert v.rip == 0x1003


def test_code_in_the_apic_page() -> None:
    """A fetch cannot be emulated: KVM gives up."""
    assert xapic().vcpus[0].exit(fx.VmxExit.APIC_ACCESS, info1=0x2080).user == fx.KvmExit.INTERNAL_ERROR


def test_ept_violation_on_the_page() -> None:
    """On the page that APICBASE names it is an access to the APIC; elsewhere somebody else's MMIO."""
    m = xapic(apicv=False)
    v = m.vcpus[0]
    out = v.exit(fx.VmxExit.EPT_VIOLATION, gpa=0xFEE0_0080, value=0x23, write=True)
    assert (out.user, page(v, 0x80)) == (None, 0x23)
    assert v.exit(fx.VmxExit.EPT_VIOLATION, gpa=0xFED0_0080).user == fx.KvmExit.MMIO
    v.set_msr(0x1B, 0xD000_0900)
    assert v.exit(fx.VmxExit.EPT_VIOLATION, gpa=0xFEE0_0080).user == fx.KvmExit.MMIO
    v.exit(fx.VmxExit.EPT_VIOLATION, gpa=0xD000_0080)
    assert v.read_data == 0x23


def test_tpr_below_threshold() -> None:
    """The guest lowered its TPR without an exit; KVM recomputes PPR, and the entry injects what waited."""
    m = booted(apicv=False)
    v = m.vcpus[0]
    v.wrmsr(TPR, 0x50)
    m.vcpus[1].wrmsr(ICR, fx.icr(dest=0, vector=0x41))
    run(v)
    assert v.injected is None
    m.words[L.PAGE + 0x80 // 8] = 0x30
    v.exit(fx.VmxExit.TPR_BELOW_THRESHOLD)
    assert (v.injected, page(v, 0xA0)) == (0x41, 0x40)


@pytest.mark.parametrize("offset", [0x100, 0x3D0, 0x400, 0x418, 0x420, 0xFF0])
def test_apic_write_exit_beyond_all_registers(offset: int) -> None:
    """A qualification that no CPU gives: traced with what is there, nothing written, nothing read outside the page."""
    m = xapic()
    v = m.vcpus[1]
    assert page(m.vcpus[2], 0x20), "which lies behind the page, 0x400 further on"
    pend(v, 0x05)
    v.rflags &= ~IF
    before = m.words[L.PAGE : L.PAGE + 4 * L.PAGE_STRIDE].tobytes()
    m.trace.enable()
    out = v.exit(fx.VmxExit.APIC_WRITE, info1=offset)
    assert (out.fault, out.user, m.words[L.PAGE : L.PAGE + 4 * L.PAGE_STRIDE].tobytes()) == (None, None, before)
    name = r.REGISTER_NAMES.get(offset & 0xFF0, f"0x{offset & 0xFF0:x}")
    assert lines(m)[1:] == [f"kvm_apic: apic_write {name} = 0x0"]


def test_older_kernels_read_the_register_first() -> None:
    """Up to 5.10 KVM fetched the value through the path of a guest's read; SELF_IPI, which nobody reads, was 0 then."""
    m = xapic(kernel="5.8")
    m.trace.enable()
    m.vcpus[0].hw_mmio_write(0xE0, 0x1000_0000)
    assert lines(m) == [
        "kvm_exit APIC_WRITE 0xe0",
        "kvm_apic: apic_read APIC_DFR = 0x10000000",
        "kvm_apic: apic_write APIC_DFR = 0x10000000",
    ]
    m = booted(kernel="5.8")
    m.trace.enable()
    m.vcpus[0].hw_wrmsr(SELF_IPI, 0x0F)
    assert lines(m)[:2] == ["kvm_exit APIC_WRITE 0x3f0", "kvm_apic: apic_write APIC_SELF_IPI = 0x0"]
    assert irr(m.vcpus[0]) == {0}


# ----------------------------------------------------------------------------------------- the TPR's shadow by itself


def shadowed(**options: Any) -> fx.Machine:
    """x2APIC mode on VMX without APICv; vCPU 0 in the guest."""
    m = fx.Machine(vcpus=2, apicv=False, **options)
    m.boot_x2apic()
    m.vcpus[0].run()
    m.trace.enable()
    return m


@pytest.mark.parametrize("kernel", fx.profiles())
def test_tpr_needs_no_exit_without_apicv(kernel: str) -> None:
    """vmx_update_msr_bitmap_x2apic lets TPR through wherever x2APIC mode is virtualised, as 5.10, 6.1 to 7.3 showed."""
    m = shadowed(kernel=kernel)
    v = m.vcpus[0]
    rip = v.rip
    assert v.hw_wrmsr(0x808, 0x35).path is fx.Path.HARDWARE
    assert (v.hw_rdmsr(0x808), v.rip) == (0x35, rip + 4)
    out = v.hw_wrmsr(0x808, 0x100)
    assert (out.path, out.fault, v.rip) == (fx.Path.HARDWARE, fx.Fault.GP, rip + 4)
    assert m.trace.lines() == []
    assert v.hw_wrmsr(0x80B, 0).path is fx.Path.SLOW, "no other register"


def test_tpr_exits_in_l2_and_on_svm() -> None:
    m = shadowed()
    m.vcpus[0].nested = True
    assert m.vcpus[0].hw_wrmsr(0x808, 0x35).path is fx.Path.SLOW
    assert shadowed(vendor="svm").vcpus[0].hw_wrmsr(0x808, 0x35).path is fx.Path.SLOW


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_tpr_below_its_threshold(dispatcher: str) -> None:
    """vmx_update_cr8_intercept: the class of the highest vector in IRR while TPR holds it back; a write below exits."""
    m = shadowed(dispatcher=dispatcher)
    v = m.vcpus[0]
    v.rflags |= 1 << 9
    v.hw_wrmsr(0x808, 0x80)
    m.vcpus[1].wrmsr(0x830, fx.icr(dest=0, vector=0x61))
    v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert v.injected is None
    m.trace.clear()
    rip = v.rip
    assert v.hw_wrmsr(0x808, 0x70).path is fx.Path.HARDWARE
    assert v.hw_wrmsr(0x808, 0x50).path is fx.Path.SLOW
    assert (v.injected, v.rip) == (0x61, rip + 4)
    exit, virq, entry = m.trace.lines()
    assert exit.startswith(f"kvm_exit: vcpu 0 reason TPR_BELOW_THRESHOLD rip {rip + 4:#x} info1 0x0000000000000000 ")
    assert virq == "kvm_inj_virq: IRQ 0x61"
    assert v.hw_wrmsr(0x808, 0).path is fx.Path.HARDWARE, "nothing is held back any more"


@pytest.mark.parametrize("irqchip", ["full", "split"])
def test_eoi_of_the_rtc_pin(irqchip: str) -> None:
    """EOI_INDUCED of vector 0 on vCPU 0, which the RTC pin of KVM's IOAPIC wants: 5.10, 6.1, 6.12, 6.18, 7.3."""
    m = fx.Machine(vcpus=2, irqchip=irqchip)
    m.boot_x2apic()
    paths = [v.hw_wrmsr(0x80B, 0).path for v in m.vcpus]
    assert paths == [fx.Path.SLOW if irqchip == "full" else fx.Path.HARDWARE, fx.Path.HARDWARE]
    assert m.vcpus[0].ioapic_handled == ({0} if irqchip == "full" else set())
    assert m.vcpus[1].ioapic_handled == set()
