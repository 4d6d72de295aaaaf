"""AVIC: its tables, who rings whose doorbell, what the CPU does alone, and what KVM does where the CPU gives up."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.profile import since
from generations import kernels

ICR, TPR, EOI, SPIV = 0x830, 0x808, 0x80B, 0x80F
INCOMPLETE, UNACCELERATED = fx.SvmExit.AVIC_INCOMPLETE_IPI, fx.SvmExit.AVIC_UNACCELERATED_ACCESS
VALID, RUNNING = 1 << 63, 1 << 62
WRITE = 1 << 32
LOGICAL_VALID = 1 << 31
Fail = r.AvicIpi
HARDWARE, DOORBELL = fx.Path.HARDWARE, fx.Effect.DOORBELL


def load(v: fx.Vcpu, cpu: int) -> None:
    """The host's scheduler puts the vCPU on a pCPU."""
    v.machine.mem[v.own + L.K_CPU] = cpu
    declare.load("avic_load")(v.machine.handle, v.index, cpu)


def put(v: fx.Vcpu, *, blocking: bool = False) -> None:
    declare.load("avic_put")(v.machine.handle, v.index, int(blocking))


def run(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.INTERRUPT)


def machine(vcpus: int = 4, **options: Any) -> fx.Machine:
    """x2AVIC: every vCPU booted, on the pCPU of its own index plus 8, in the guest."""
    if "apic_ids" not in options:
        options["vcpus"] = vcpus
    m = fx.Machine(vendor="svm", **{"x2avic": True} | options)
    m.boot_x2apic()
    for v in m.vcpus:
        load(v, v.index + 8)
        run(v)
    return m


def xapic(vcpus: int = 4, *, cluster: bool = False, **options: Any) -> fx.Machine:
    """The same in xAPIC mode; logical ids one bit each, or clusters of two."""
    m = fx.Machine(vcpus=vcpus, vendor="svm", **options)
    for v in m.vcpus:
        run(v)
        v.hw_mmio_write(r.APIC_SPIV, 0x1FF)
        if cluster:
            v.hw_mmio_write(r.APIC_DFR, 0x0FFF_FFFF)
        bits = (v.index // 2) << 4 | 1 << v.index % 2 if cluster else 1 << v.index
        v.hw_mmio_write(r.APIC_LDR, bits << 24)
        load(v, v.index + 8)
        run(v)
    return m


def irr(v: fx.Vcpu) -> set[int]:
    words = v.machine.mem[v.vec : v.vec + 4].tolist()
    return {i * 64 + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def reg(v: fx.Vcpu, offset: int) -> int:
    """A register of the backing page."""
    return v.machine.mem[L.PAGE + v.index * L.PAGE_STRIDE + (offset >> 3)] & 0xFFFF_FFFF


def put_reg(v: fx.Vcpu, offset: int, value: int) -> None:
    v.machine.mem[L.PAGE + v.index * L.PAGE_STRIDE + (offset >> 3)] = value


def level(v: fx.Vcpu, vector: int) -> None:
    """A level interrupt in service."""
    v.machine.signal_msi(0xFEE0_0000 | v.vcpu_id << 12, 0x8000 | vector)
    assert v.ack() == vector


def exits(m: fx.Machine) -> list[tuple[int, int, int]]:
    """Reason, EXITINFO1 and EXITINFO2 of the exits in the trace."""
    return [
        (a[0], a[2], a[3]) for e, a in ((x["event"], x["args"].tolist()) for x in m.trace.records()) if e == L.TP_EXIT
    ]


def lines(m: fx.Machine, *names: str) -> list[str]:
    return [line for line in m.trace.lines() if line.split(":")[0] in names]


# ------------------------------------------------------------------------------------------------------ physical table


def test_entries_are_valid_from_the_start() -> None:
    """A new vCPU has a valid entry with a backing page of its own and does not run."""
    m = fx.Machine(apic_ids=[0, 5, 254], vendor="svm")
    assert np.flatnonzero(m.avic_physical).tolist() == [0, 5, 254]
    fields = [r.AVIC_PHYSICAL_ENTRY.decode(int(m.avic_physical[i])) for i in (0, 5, 254)]
    assert all(f["VALID"] and not f["RUNNING"] and not f["GA_LOG"] and f["HOST_ID"] == 0 for f in fields)
    assert len({f["BACKING_PAGE"] for f in fields}) == 3
    assert not m.avic_logical.any()


@pytest.mark.parametrize(("x2avic", "last"), [(False, 0xFE), (True, 0x1FF)])
def test_ids_beyond_the_table_have_no_entry(x2avic: bool, last: int) -> None:
    m = fx.Machine(apic_ids=[0, last, last + 1, 4095], vendor="svm", x2avic=x2avic)
    assert np.flatnonzero(m.avic_physical).tolist() == [0, last]
    load(m.vcpus[2], 3)
    put(m.vcpus[3])
    assert np.flatnonzero(m.avic_physical).tolist() == [0, last]


@pytest.mark.parametrize("options", [{"vendor": "vmx"}, {"vendor": "svm", "apicv": False}])
def test_no_avic_no_tables(options: dict[str, Any]) -> None:
    m = fx.Machine(vcpus=2, **options)
    load(m.vcpus[1], 3)
    assert not m.avic_physical.any()


def test_load_and_put() -> None:
    """Loading names the pCPU and sets IsRunning; putting clears IsRunning and leaves the pCPU."""
    m = fx.Machine(vcpus=2, vendor="svm")
    v, page = m.vcpus[1], int(m.avic_physical[1]) & ~VALID
    load(v, 0x2A5)
    assert m.avic_physical[1] == VALID | RUNNING | page | 0x2A5
    put(v)
    assert m.avic_physical[1] == VALID | page | 0x2A5
    load(v, 3)
    assert m.avic_physical[1] == VALID | RUNNING | page | 3
    assert m.avic_physical[0] & np.uint64(RUNNING) == 0


def test_ga_log_stays_out_of_the_table() -> None:
    """KVM notes that a vCPU blocks in a bit that is reserved in the table, so the table does not get it."""
    m = fx.Machine(vcpus=2, vendor="svm")
    v = m.vcpus[1]
    load(v, 3)
    put(v, blocking=True)
    assert m.mem[v.own + L.K_AVIC_ENTRY] & r.AVIC_GA_LOG
    assert not int(m.avic_physical[1]) & (r.AVIC_GA_LOG | RUNNING)
    load(v, 4)
    assert m.mem[v.own + L.K_AVIC_ENTRY] == int(m.avic_physical[1])


def test_sleeper_is_not_loaded() -> None:
    """A vCPU that is scheduled in while it blocks keeps IsRunning clear."""
    m = machine()
    v = m.vcpus[1]
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=5))
    assert run(v).blocked
    put(v, blocking=True)
    load(v, 3)
    assert not int(m.avic_physical[1]) & RUNNING


def test_without_ipi_virtualisation_nobody_runs() -> None:
    """enable_ipiv=0: the table never says IsRunning, KVM's own copy does, so every IPI exits."""
    m = machine(ipiv=False)
    assert [int(m.avic_physical[i]) >> 62 for i in range(4)] == [0b10] * 4
    assert all(m.mem[v.own + L.K_AVIC_ENTRY] & RUNNING for v in m.vcpus)
    assert int(m.avic_physical[2]) & 0xFFF == 10
    m.trace.enable()
    out = m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=2, vector=0x41))
    assert (out.path, out.effects, irr(m.vcpus[2])) == (fx.Path.SLOW, DOORBELL, {0x41})
    assert exits(m) == [(0x401, 0x2_0000_0041, 1 << 32 | 2)]


def test_inhibit_unloads() -> None:
    """AVIC off: the vCPU no longer runs as far as hardware knows, until AVIC is back."""
    m = machine()
    v = m.vcpus[1]
    m.set_inhibit(r.Inhibit.HYPERV)
    run(v)
    assert int(m.avic_physical[1]) >> 62 == 0b10
    load(v, 3)
    assert int(m.avic_physical[1]) & 0xFFF == 9, "svm_vcpu_load leaves a vCPU without AVIC alone"
    m.set_inhibit(r.Inhibit.HYPERV, False)
    run(v)
    assert (int(m.avic_physical[1]) >> 62, int(m.avic_physical[1]) & 0xFFF) == (0b11, 3)


def test_pcpu_beyond_the_entry() -> None:
    """A host APIC id that does not fit 12 bits is not stored."""
    m = fx.Machine(vcpus=1, vendor="svm")
    before = int(m.avic_physical[0])
    declare.load("avic_load")(m.handle, 0, 0x1000)
    assert m.avic_physical[0] == before


# ------------------------------------------------------------------------------------------------------- logical table


@pytest.mark.parametrize(
    ("dfr", "ldr", "index"),
    [
        (0xFFFF_FFFF, 0x01, 0),
        (0xFFFF_FFFF, 0x80, 7),
        (0xFFFF_FFFF, 0x03, None),
        (0xFFFF_FFFF, 0x00, None),
        (0x0FFF_FFFF, 0x01, 0),
        (0x0FFF_FFFF, 0x34, 3 * 4 + 2),
        (0x0FFF_FFFF, 0xE8, 14 * 4 + 3),
        (0x0FFF_FFFF, 0xF1, None),
        (0x0FFF_FFFF, 0x30, None),
        (0x0FFF_FFFF, 0x36, None),
    ],
)
def test_logical_index(dfr: int, ldr: int, index: int | None) -> None:
    """Flat: the bit's number. Cluster: four entries a cluster, cluster 15 has none. Several bits have no entry."""
    m = fx.Machine(vcpus=3, vendor="svm")
    v = m.vcpus[2]
    v.hw_mmio_write(r.APIC_DFR, dfr)
    v.hw_mmio_write(r.APIC_LDR, ldr << 24)
    entries = {int(i): int(m.avic_logical[i]) for i in np.flatnonzero(m.avic_logical)}
    assert entries == ({} if index is None else {index: LOGICAL_VALID | 2})


def test_logical_entry_moves_with_the_ldr() -> None:
    """A new LDR invalidates the old entry, whose id stays behind, and makes the new one."""
    m = fx.Machine(vcpus=3, vendor="svm")
    v = m.vcpus[1]
    v.hw_mmio_write(r.APIC_LDR, 0x02 << 24)
    v.hw_mmio_write(r.APIC_LDR, 0x08 << 24)
    assert m.avic_logical[:4].tolist() == [0, 1, 0, LOGICAL_VALID | 1]
    v.hw_mmio_write(r.APIC_LDR, 0)
    assert m.avic_logical[:4].tolist() == [0, 1, 0, 1]


def test_new_model_forgets_the_entry() -> None:
    """A DFR write invalidates the entry; only an LDR that differs makes one again, by the new model."""
    m = fx.Machine(vcpus=3, vendor="svm")
    v = m.vcpus[1]
    v.hw_mmio_write(r.APIC_LDR, 0x12 << 24)
    assert not m.avic_logical.any(), "two bits in the flat model"
    v.hw_mmio_write(r.APIC_LDR, 0x02 << 24)
    v.hw_mmio_write(r.APIC_DFR, 0x0FFF_FFFF)
    v.hw_mmio_write(r.APIC_LDR, 0x02 << 24)
    assert m.avic_logical[:8].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    v.hw_mmio_write(r.APIC_LDR, 0x12 << 24)
    assert m.avic_logical[:8].tolist() == [0, 1, 0, 0, 0, LOGICAL_VALID | 1, 0, 0]


def test_logical_table_catches_up() -> None:
    """What a guest writes while AVIC is off is in the table when AVIC comes back; KVM_SET_LAPIC is there at once."""
    m = fx.Machine(vcpus=2, vendor="svm")
    v = m.vcpus[1]
    m.set_inhibit(r.Inhibit.HYPERV)
    run(v)
    v.mmio_write(r.APIC_LDR, 0x04 << 24)
    assert not m.avic_logical.any()
    m.set_inhibit(r.Inhibit.HYPERV, False)
    run(v)
    assert m.avic_logical[2] == LOGICAL_VALID | 1
    page = bytearray(v.get_lapic())
    page[r.APIC_LDR + 3] = 0x20
    v.set_lapic(bytes(page))
    assert m.avic_logical[:6].tolist() == [0, 0, 1, 0, 0, LOGICAL_VALID | 1]


def test_x2apic_needs_no_logical_table() -> None:
    """x2APIC logical ids follow from the physical ones, so nothing is entered."""
    assert not machine().avic_logical.any()


# ------------------------------------------------------------------------------------------------------------ doorbells


def test_doorbell_by_pcpu() -> None:
    """The doorbell goes to another pCPU than this one; what KVM delivers for a device has no pCPU of a vCPU."""
    m = machine()
    sender, target = m.vcpus[0], m.vcpus[1]
    m.trace.enable()
    assert sender.wrmsr(ICR, fx.icr(dest=1, vector=0x41)).effects == DOORBELL
    assert lines(m, "kvm_avic_doorbell") == ["kvm_avic_doorbell: vcpuid=1, apicid=9"]
    load(target, 8)
    m.trace.clear()
    assert sender.wrmsr(ICR, fx.icr(dest=1, vector=0x42)).effects == fx.Effect.NONE
    assert lines(m, "kvm_avic_doorbell") == []
    m.trace.clear()
    m.signal_msi(0xFEE0_1000, 0x43)
    assert lines(m, "kvm_avic_doorbell", "kvm_apicv_accept_irq") == [
        "kvm_apicv_accept_irq: apicid 1 vec 67 (Fixed|edge)",
        "kvm_avic_doorbell: vcpuid=1, apicid=8",
    ]
    assert irr(target) == {0x41, 0x42, 0x43}


@pytest.mark.parametrize("kernel", kernels("6.1"))
def test_doorbells_and_scans_are_traced(kernel: str) -> None:
    m = xapic(kernel=kernel)
    m.trace.enable()
    assert m.vcpus[0].mmio_write(r.APIC_ICR, 0x000C_0041).effects == DOORBELL
    m.vcpus[0].exit(INCOMPLETE, info1=fx.icr(vector=0x41, shorthand=3), info2=1 << 32)
    assert lines(m, "kvm_avic_doorbell")
    assert lines(m, "kvm_avic_kick_vcpu_slowpath")


# ------------------------------------------------------------------------------------------------------- hardware: IPIs

IPIS: dict[str, tuple[int, set[int]]] = {
    "unicast": (fx.icr(dest=1, vector=0x41), {1}),
    "assert": (fx.icr(dest=2, vector=0x41, level=True), {2}),
    "itself": (fx.icr(dest=0, vector=0x41), {0}),
    "self": (fx.icr(vector=0x41, shorthand=1), {0}),
    "all": (fx.icr(vector=0x41, shorthand=2), {0, 1, 2, 3}),
    "all but self": (fx.icr(vector=0x41, shorthand=3), {1, 2, 3}),
    "broadcast": (fx.icr(dest=0xFFFF_FFFF, vector=0x41), {0, 1, 2, 3}),
    "logical": (fx.icr(dest=0b1010, vector=0x41, logical=True), {1, 3}),
    "logical, nobody": (fx.icr(dest=0, vector=0x41, logical=True), set()),
}


@pytest.mark.parametrize("name", IPIS)
def test_ipis_that_never_exit(name: str) -> None:
    """Fixed, edge, every target running: IRR bits and doorbells, no exit, no trace line; ICR is readable afterwards."""
    value, targets = IPIS[name]
    m = machine()
    v = m.vcpus[0]
    before = v.counters(), v.rip
    m.trace.enable()
    out = v.hw_wrmsr(ICR, value)
    assert (out.path, out.accepted, out.fault) == (HARDWARE, len(targets), None)
    assert out.effects == (DOORBELL if targets - {0} else fx.Effect.NONE)
    assert [irr(other) for other in m.vcpus] == [{0x41} if i in targets else set() for i in range(4)]
    assert (v.counters(), v.rip) == (before[0], before[1] + 2)
    assert len(m.trace) == 0
    assert v.hw_rdmsr(ICR) == value


XAPIC_IPIS = {
    "unicast": (1 << 24, 0x41, {1}),
    "broadcast": (0xFF << 24, 0x41, {0, 1, 2, 3}),
    "all but self": (0, 0xC0041, {1, 2, 3}),
    "flat": (0b0110 << 24, 0x841, {1, 2}),
}


@pytest.mark.parametrize("name", XAPIC_IPIS)
def test_xapic_ipis_that_never_exit(name: str) -> None:
    """The same by the page: ICR2 is plain storage, ICR sends."""
    icr2, low, targets = XAPIC_IPIS[name]
    m = xapic()
    v = m.vcpus[0]
    assert v.hw_mmio_write(r.APIC_ICR2, icr2).path is HARDWARE
    out = v.hw_mmio_write(r.APIC_ICR, low)
    assert (out.path, out.accepted) == (HARDWARE, len(targets))
    assert {i for i in range(4) if irr(m.vcpus[i])} == targets
    assert (v.hw_mmio_read(r.APIC_ICR), v.hw_mmio_read(r.APIC_ICR2)) == (low, icr2)


def test_cluster_model() -> None:
    """Cluster 1, members 0 and 1: vCPUs 2 and 3, by entries 4 and 5 of the logical table."""
    m = xapic(cluster=True)
    assert np.flatnonzero(m.avic_logical).tolist() == [0, 1, 4, 5]
    v = m.vcpus[0]
    v.hw_mmio_write(r.APIC_ICR2, 0x13 << 24)
    assert v.hw_mmio_write(r.APIC_ICR, 0x841).accepted == 2
    assert [bool(irr(other)) for other in m.vcpus] == [False, False, True, True]


def test_hardware_rings_by_pcpu() -> None:
    """A target on the sender's own pCPU gets no doorbell from hardware either."""
    m = machine()
    load(m.vcpus[1], 8)
    assert m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41)).effects == fx.Effect.NONE


INCOMPLETE_IPIS: dict[str, tuple[int, Fail, int, set[int]]] = {
    "NMI": (fx.icr(dest=1, delivery=4), Fail.INVALID_INT_TYPE, 0, set()),
    "lowest priority": (fx.icr(dest=1, vector=0x41, delivery=1), Fail.INVALID_INT_TYPE, 0, {1}),
    "level": (fx.icr(dest=1, vector=0x41, level=True, trigger_level=True), Fail.INVALID_INT_TYPE, 0, {1}),
    "vector below 16": (fx.icr(dest=1, vector=0xF), Fail.INVALID_VECTOR, 0, set()),
    "nobody's id": (fx.icr(dest=77, vector=0x41), Fail.INVALID_TARGET, 77, set()),
    "id beyond the table": (fx.icr(dest=0x10001, vector=0x41), Fail.INVALID_TARGET, 1, set()),
    "one bit too many": (fx.icr(dest=0x1A, vector=0x41, logical=True), Fail.INVALID_TARGET, 4, {1, 3}),
    "sleeper": (fx.icr(dest=2, vector=0x41), Fail.TARGET_NOT_RUNNING, 2, {2}),
    "sleeper among others": (fx.icr(dest=0xE, vector=0x41, logical=True), Fail.TARGET_NOT_RUNNING, 2, {1, 2, 3}),
    "sleeper in a broadcast": (fx.icr(vector=0x41, shorthand=3), Fail.TARGET_NOT_RUNNING, 2, {1, 2, 3}),
}


@pytest.mark.parametrize("name", INCOMPLETE_IPIS)
def test_incomplete_ipis(name: str) -> None:
    """What hardware leaves to KVM: EXITINFO1 is the ICR, EXITINFO2 says why and where; KVM finishes the IPI.

    The exit is a trap: RIP has moved. An IPI with an invalid target reaches the valid ones by KVM's hands; one with a
    vector below 16 reaches nobody.
    """
    value, why, index, targets = INCOMPLETE_IPIS[name]
    m = machine()
    put(m.vcpus[2], blocking=True)
    v = m.vcpus[0]
    rip = v.rip
    m.trace.enable()
    out = v.hw_wrmsr(ICR, value)
    assert (out.path, v.rip) == (fx.Path.SLOW, rip + 2)
    assert exits(m) == [(INCOMPLETE, value, why << 32 | index)]
    high, low = value >> 32, value & 0xFFFF_FFFF
    assert lines(m, "kvm_avic_incomplete_ipi") == [
        f"kvm_avic_incomplete_ipi: vcpu=0, icrh:icrl=0x{high:08x}:{low:08x}, id={why}, index={index}"
    ]
    assert {i for i in range(4) if irr(m.vcpus[i])} == targets
    assert bool(lines(m, "kvm_apic_ipi")) is (why in (Fail.INVALID_INT_TYPE, Fail.INVALID_TARGET))
    assert bool(lines(m, "kvm_avic_kick_vcpu_slowpath")) is ("broadcast" in name)
    assert v.hw_rdmsr(ICR) == value


def test_nmi_by_incomplete_ipi() -> None:
    m = machine()
    out = m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=1, delivery=4))
    assert (out.accepted, out.effects) == (1, fx.Effect.KICK)
    assert m.vcpus[1].events().nmi_pending == 1


@pytest.mark.parametrize("shorthand", [0, 3])
def test_sleeper_is_woken(shorthand: int) -> None:
    """A target that blocks: hardware sets its IRR bit, KVM wakes it; those that run get their doorbell from KVM too."""
    m = machine()
    v = m.vcpus[2]
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=2, delivery=5))
    assert run(v).blocked
    put(v, blocking=True)
    for other in m.vcpus[0], m.vcpus[1], *m.vcpus[3:]:
        run(other)  # whom the INIT's new APIC map had scan
    out = m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=0 if shorthand else 2, vector=0x41, shorthand=shorthand))
    assert out.effects == fx.Effect.WAKE | (DOORBELL if shorthand else fx.Effect.NONE)
    assert irr(v) == {0x41}


def test_target_without_avic() -> None:
    """Hardware reaches the backing page of a vCPU whose APIC is disabled too; KVM then asks it to look for itself."""
    m = machine()
    v = m.vcpus[1]
    v.set_msr(r.MSR_APICBASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))
    run(v)
    assert not v.apicv
    out = m.vcpus[0].hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41))
    assert (out.path, out.effects) == (fx.Path.SLOW, fx.Effect.KICK)
    assert (irr(v), v.requests) == ({0x41}, r.REQ_EVENT)


def test_kvm_sets_no_irr_for_a_target_that_does_not_run() -> None:
    """Number 1 says that hardware has set the bits: KVM only kicks, whatever it finds."""
    m = machine()
    out = m.vcpus[0].exit(INCOMPLETE, info1=0x1_0000_0041, info2=1 << 32 | 1)
    assert (out.effects, out.accepted, irr(m.vcpus[1])) == (DOORBELL, 0, set())
    assert m.mem[m.vcpus[1].vec + L.VEC_IRR_PENDING] == 1


@pytest.mark.parametrize(
    ("value", "index", "slow"),
    [
        (fx.icr(dest=1, vector=0x41), 1, False),
        (fx.icr(dest=1, vector=0x41), 2, True),
        (fx.icr(dest=77, vector=0x41), 77, False),
        (fx.icr(dest=0xFFFF_FFFF, vector=0x41), 1, True),
        (fx.icr(dest=0xFF, vector=0x41), 0xFF, False),
        (fx.icr(vector=0x41, shorthand=3), 1, True),
        (fx.icr(vector=0x41, shorthand=1), 0, True),
        (fx.icr(dest=0b1110, vector=0x41, logical=True), 7, False),
        (fx.icr(dest=0xFFFF_FFFF, vector=0x41, logical=True), 1, False),
    ],
)
def test_which_targets_are_scanned_for(value: int, index: int, slow: bool) -> None:
    """Unicast and logical destinations are looked up; shorthands, broadcasts and a wrong index are scanned for."""
    m = machine()
    m.trace.enable()
    m.vcpus[0].exit(INCOMPLETE, info1=value, info2=1 << 32 | index)
    text = f"kvm_avic_kick_vcpu_slowpath: icrh:icrl=0x{value >> 32:06x}:{value & 0xFFFF_FFFF:08x}, index={index}"
    assert lines(m, "kvm_avic_kick_vcpu_slowpath") == ([text] if slow else [])


def test_scan_finds_the_targets() -> None:
    """The scan matches as delivery does: all but the sender; an index that is wrong changes nobody."""
    m = machine()
    for v in m.vcpus:
        m.mem[v.vec + L.VEC_IRR_PENDING] = 0
    m.vcpus[0].exit(INCOMPLETE, info1=fx.icr(vector=0x41, shorthand=3), info2=1 << 32)
    assert [m.mem[v.vec + L.VEC_IRR_PENDING] for v in m.vcpus] == [0, 1, 1, 1]


def test_xapic_logical_kick_uses_the_table() -> None:
    """In xAPIC mode the bits of a logical destination are looked up in AVIC's table; invalid entries are nobody."""
    m = xapic()
    m.mem[L.AVIC_LOGICAL + 1] = 0  # entries 2 and 3
    for v in m.vcpus:
        m.mem[v.vec + L.VEC_IRR_PENDING] = 0
    m.vcpus[0].exit(INCOMPLETE, info1=0x0F00_0000 << 32 | 0x841, info2=1 << 32)
    assert [m.mem[v.vec + L.VEC_IRR_PENDING] for v in m.vcpus] == [1, 1, 0, 0]


@pytest.mark.parametrize("why", [Fail.INVALID_BACKING_PAGE, Fail.INVALID_VECTOR, 5, 0xFFFF_FFFF])
def test_numbers_that_do_nothing(why: int) -> None:
    m = machine()
    m.trace.enable()
    out = m.vcpus[0].exit(INCOMPLETE, info1=0x1_0000_0041, info2=why << 32)
    assert (out.effects, out.accepted) == (fx.Effect.NONE, 0)
    assert lines(m, "kvm_apic_ipi", "kvm_avic_kick_vcpu_slowpath") == []


@pytest.mark.parametrize("x2apic", [True, False])
def test_busy_bit_has_the_write_redone(x2apic: bool) -> None:
    """If hardware left the busy bit in ICR, KVM writes the register once more, which clears it."""
    m = machine() if x2apic else xapic()
    v = m.vcpus[0]
    high = 1 if x2apic else 1 << 24
    put_reg(v, r.APIC_ICR, 0x1441)
    put_reg(v, r.APIC_ICR2, high)
    m.trace.enable()
    out = v.exit(INCOMPLETE, info1=high << 32 | 0x1441, info2=0)
    assert (out.accepted, reg(v, r.APIC_ICR)) == (1, 0x441)
    assert len(lines(m, "kvm_apic")) == 1
    m.trace.clear()
    v.exit(INCOMPLETE, info1=high << 32 | 0x441, info2=0)
    assert lines(m, "kvm_apic") == []


# -------------------------------------------------------------------------------------------------- hardware: registers


def test_task_priority() -> None:
    """TPR needs no exit, and PPR follows at once."""
    v = machine().vcpus[0]
    assert v.hw_wrmsr(TPR, 0x53).path is HARDWARE
    assert (v.hw_rdmsr(TPR), v.hw_rdmsr(0x80A), reg(v, r.APIC_PROCPRI)) == (0x53, 0x53, 0x53)
    v = xapic().vcpus[0]
    assert v.hw_mmio_write(r.APIC_TASKPRI, 0xFF42).path is HARDWARE
    assert (v.hw_mmio_read(r.APIC_TASKPRI), v.hw_mmio_read(r.APIC_PROCPRI)) == (0x42, 0x42)


def test_edge_eoi_needs_no_exit() -> None:
    m = machine()
    v = m.vcpus[0]
    for vector in (0x31, 0x61):
        v.hw_wrmsr(ICR, fx.icr(vector=vector, shorthand=1))
        assert v.ack() == vector
    m.trace.enable()
    run(v)
    m.trace.clear()
    assert v.hw_wrmsr(EOI, 0).path is HARDWARE
    assert (v.hw_rdmsr(0x80A), len(m.trace)) == (0x30, 0)
    assert [v.hw_wrmsr(EOI, 0).path for _ in range(2)] == [HARDWARE, HARDWARE], "an EOI of nothing is nothing"
    assert v.hw_rdmsr(0x80A) == 0


@pytest.mark.parametrize("x2apic", [True, False])
def test_level_eoi_exits(x2apic: bool) -> None:
    """A level interrupt's EOI is a trap with the vector in EXITINFO2; KVM ends the interrupt."""
    m = machine() if x2apic else xapic()
    v = m.vcpus[0]
    level(v, 0x41)
    run(v)
    m.trace.enable()
    out = v.hw_wrmsr(EOI, 0) if x2apic else v.hw_mmio_write(r.APIC_EOI, 0)
    assert out.path is fx.Path.SLOW
    assert exits(m) == [(UNACCELERATED, WRITE | r.APIC_EOI, 0x41)]
    assert lines(m, "kvm_eoi") == ["kvm_eoi: apicid 0 vector 65"]
    assert v.eoi() is None


TRAPS = {
    r.APIC_ID: 0,
    r.APIC_RRR: 5,
    r.APIC_LDR: 0x40 << 24,
    r.APIC_DFR: 0xFFFF_FFFF,
    r.APIC_SPIV: 0x1FE,
    r.APIC_ESR: 0,
    r.APIC_LVTT: 0x30031,
    r.APIC_LVTTHMR: 0x10032,
    r.APIC_LVTPC: 0x10033,
    r.APIC_LVT0: 0x10700,
    r.APIC_LVT1: 0x10400,
    r.APIC_LVTERR: 0x10034,
    r.APIC_TMICT: 0,
    r.APIC_TDCR: 0xB,
}


@pytest.mark.parametrize("offset", TRAPS)
def test_trap_registers(offset: int) -> None:
    """Written, then trapped: KVM finds the value in the page and writes the register once more."""
    m = xapic()
    v = m.vcpus[0]
    m.trace.enable()
    assert v.hw_mmio_write(offset, TRAPS[offset]).path is fx.Path.SLOW
    assert exits(m) == [(UNACCELERATED, WRITE | offset, 0)]
    register = r.REGISTER_NAMES[offset]
    dropped = offset == r.APIC_RRR
    assert lines(m, "kvm_apic") == ([] if dropped else [f"kvm_apic: apic_write {register} = 0x{TRAPS[offset]:x}"])
    assert reg(v, offset) == TRAPS[offset]


def test_trap_has_the_side_effects() -> None:
    """SVR by trap switches the APIC off, masks LVTs and keeps only its writable bits."""
    m = xapic()
    v = m.vcpus[1]
    v.hw_mmio_write(r.APIC_SPIV, 0xFFFF_F0FE)
    assert (reg(v, r.APIC_SPIV), reg(v, r.APIC_LVT1) & r.LVT_MASKED) == (0xFE, r.LVT_MASKED)
    assert m.signal_msi(0xFEE0_1000, 0x41) == 0


@pytest.mark.parametrize("offset", [0x30, 0x90, 0xA0, 0x100, 0x200, 0x390, 0x3F0, 0x40, 0xFF0])
def test_writes_that_fault_are_emulated(offset: int) -> None:
    """Read-only and reserved registers: not written by hardware; the emulator drops the write."""
    m = xapic()
    v = m.vcpus[0]
    before = v.get_lapic()
    m.trace.enable()
    assert v.hw_mmio_write(offset, 0x12).path is fx.Path.SLOW
    assert exits(m) == [(UNACCELERATED, WRITE | offset, 0)]
    assert v.get_lapic() == before


def test_reads() -> None:
    """Almost everything is read from the page; the current count only KVM knows, odd accesses are the emulator's."""
    m = xapic()
    v = m.vcpus[1]
    m.signal_msi(0xFEE0_1000, 0x41)
    run(v)
    m.trace.enable()
    assert [v.hw_mmio_read(o) for o in (0x20, 0x30, 0xD0, 0xF0, 0x220)] == [1 << 24, 0x50014, 2 << 24, 0x1FF, 2]
    assert len(m.trace) == 0
    assert (v.hw_mmio_read(r.APIC_TMCCT), v.hw_mmio_read(0x21, 1), v.hw_mmio_read(0x20, 2)) == (0, 0, 0)
    assert exits(m) == [(UNACCELERATED, offset, 0) for offset in (0x390, 0x20, 0x20)]


def test_write_that_is_no_dword_goes_to_the_emulator() -> None:
    m = xapic()
    v = m.vcpus[0]
    v.hw_mmio_write(r.APIC_TASKPRI, 0x20)
    m.trace.enable()
    assert v.hw_mmio_write(r.APIC_TASKPRI, 0x30, 1).path is fx.Path.SLOW
    assert (exits(m), reg(v, r.APIC_TASKPRI)) == ([(UNACCELERATED, WRITE | 0x80, 0)], 0x20)


# ------------------------------------------------------------------------------------------------------------- x2AVIC

PASSED = {
    0x802,
    0x803,
    0x808,
    0x809,
    0x80A,
    0x80B,
    0x80C,
    0x80D,
    0x80E,
    0x80F,
    0x810,
    0x818,
    0x820,
    0x828,
    0x830,
    0x831,
}
PASSED |= set(range(0x833, 0x83A)) | {0x83E}
READ_ONLY = {0x802, 0x803, 0x809, 0x80A, 0x80C, 0x80D, 0x80E, 0x810, 0x818, 0x820, 0x831}
TRAPPED = {0x80F, 0x828, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83E}
WRITE_ONLY_OR_NONE = {0x809, 0x80B, 0x80C, 0x80E, 0x831}


@pytest.mark.parametrize("msr", range(0x800, 0x848))
def test_msr_by_msr(msr: int) -> None:
    """avic_set_x2apic_msr_interception to 6.18.35 passes a list of MSRs through; hardware does, traps or faults each.

    SELF_IPI is not on the list, nor LVTT (no deadline mode in hardware), nor ISR, TMR and IRR but the first of each.
    """
    m = machine(kernel="6.18.35")
    v = m.vcpus[0]
    rip = v.rip
    m.trace.enable()
    out = v.hw_wrmsr(msr, 0)
    if msr not in PASSED:
        assert exits(m) == [(fx.SvmExit.MSR, 1, 0)]
    elif msr in READ_ONLY:
        assert (out.path, out.fault, v.rip, len(m.trace)) == (HARDWARE, fx.Fault.GP, rip, 0)
    elif msr in TRAPPED:
        assert exits(m) == [(UNACCELERATED, WRITE | msr - 0x800 << 4, 0)]
        assert v.rip == rip + 2
    elif msr == 0x839:
        assert exits(m) == [(UNACCELERATED, WRITE | 0x390, 0)]
        assert (out.fault, v.rip) == (fx.Fault.GP, rip)
    elif msr == ICR:
        assert exits(m) == [(INCOMPLETE, 0, 4 << 32)], "vector 0"
    else:
        assert (msr in (TPR, EOI), out.path, out.fault) == (True, HARDWARE, None)


@pytest.mark.parametrize("msr", range(0x800, 0x848))
def test_read_msr_by_msr(msr: int) -> None:
    """What hardware reads is what KVM would have read."""
    m = machine(kernel="6.18.35")
    v = m.vcpus[1]
    m.signal_msi(0xFEE0_1000, 0x21)
    run(v)
    m.trace.enable()
    want = v.get_msr(msr)
    run(v)
    m.trace.clear()
    try:
        got = v.hw_rdmsr(msr)
    except fx.GeneralProtection:
        got = None
    assert got == want
    if msr not in PASSED:
        assert exits(m) == [(fx.SvmExit.MSR, 0, 0)]
    elif msr == 0x839:
        assert exits(m) == [(UNACCELERATED, 0x390, 0)]
    else:
        assert (len(m.trace), got is None) == (0, msr in WRITE_ONLY_OR_NONE)


@pytest.mark.parametrize(
    ("msr", "value"),
    [(ICR, fx.icr(dest=1, vector=0x41) | 1 << bit) for bit in (12, 13, 16, 17, 20, 31)]
    + [(TPR, 0x100), (TPR, 1 << 32), (EOI, 1), (SPIV, 1 << 32 | 0x1FF), (0x828, 1)],
)
def test_reserved_bits_fault_in_hardware(msr: int, value: int) -> None:
    """The CPU's own #GP: no exit, nothing written, the instruction not retired."""
    m = machine(kernel="6.18.35")
    v = m.vcpus[0]
    before, rip, count = v.get_lapic(), v.rip, v.counters()
    out = v.hw_wrmsr(msr, value)
    assert (out.path, out.fault, v.rip) == (HARDWARE, fx.Fault.GP, rip)
    assert v.counters()["exits"] == count["exits"]
    assert v.get_lapic() == before


THROUGH_IN_7 = set(range(0x802, 0x804)) | {0x808, 0x80A, 0x80D, 0x80F} | set(range(0x810, 0x829)) | {0x830, 0x83E}
THROUGH_IN_7 |= set(range(0x832, 0x839))


@pytest.mark.parametrize("msr", range(0x800, 0x848))
def test_msr_by_msr_in_7(msr: int) -> None:
    """avic_set_x2apic_msr_interception of 7.3.4: four registers are written without an exit, all are read, TMCCT never;
    the rest exits as an MSR access.
    """
    m = machine(kernel="7.3")
    v = m.vcpus[1]
    m.trace.enable()
    out = v.hw_wrmsr(msr, 0)
    if msr in (TPR, EOI):
        assert (out.path, out.fault, len(m.trace)) == (HARDWARE, None, 0)
    elif msr in (ICR, 0x83F):
        assert exits(m) == [(INCOMPLETE, 0, 4 << 32)], "vector 0"
    else:
        assert exits(m) == [(fx.SvmExit.MSR, 1, 0)]
    want = v.get_msr(msr)
    run(v)
    m.trace.clear()
    try:
        got = v.hw_rdmsr(msr)
    except fx.GeneralProtection:
        got = None
    assert got == want
    assert exits(m) == ([] if msr in THROUGH_IN_7 else [(fx.SvmExit.MSR, 0, 0)])


def test_self_ipi_in_7() -> None:
    m = machine(kernel="7.3")
    v = m.vcpus[1]
    m.trace.enable()
    out = v.hw_wrmsr(0x83F, 0x41)
    assert (out.path, out.accepted, irr(v), len(m.trace)) == (HARDWARE, 1, {0x41}, 0)
    assert v.hw_wrmsr(0x83F, 0x141).fault is fx.Fault.GP


def test_big_ids() -> None:
    """x2AVIC reaches ids up to 0x1FF, in clusters of 16."""
    m = machine(apic_ids=[0, 0x1F1, 0x1FF])
    v = m.vcpus[0]
    assert v.hw_wrmsr(ICR, fx.icr(dest=0x1FF, vector=0x41)).path is HARDWARE
    assert v.hw_wrmsr(ICR, fx.icr(dest=0x1F << 16 | 0x8002, vector=0x42, logical=True)).accepted == 2
    assert v.hw_wrmsr(ICR, fx.icr(vector=0x43, shorthand=3)).accepted == 2
    assert [irr(other) for other in m.vcpus] == [set(), {0x42, 0x43}, {0x41, 0x42, 0x43}]


def test_xapic_mode_cannot_reach_big_ids() -> None:
    """In xAPIC mode the VMCB limits hardware to 0xFE, in a broadcast too."""
    m = fx.Machine(apic_ids=[0, 0x1FF], vendor="svm", x2avic=True, x2apic_api=1)
    for v in m.vcpus:
        load(v, v.index)
        run(v)
    v = m.vcpus[0]
    assert v.hw_mmio_write(r.APIC_ICR, 0xC0041).accepted == 0
    assert irr(m.vcpus[1]) == set()


# -------------------------------------------------------------------------------------------------------------- modes


def test_hybrid_mode() -> None:
    """AVIC without x2AVIC in x2APIC mode: every MSR access exits, the IPI is fast, delivery rings the doorbell."""
    m = machine(x2avic=False)
    m.trace.enable()
    v = m.vcpus[0]
    out = v.hw_wrmsr(ICR, fx.icr(dest=1, vector=0x41))
    assert (out.path, out.effects, out.accepted) == (fx.Path.FAST, DOORBELL, 1)
    v.hw_wrmsr(TPR, 0)
    assert v.hw_rdmsr(0x802) == 0
    assert [reason for reason, _, _ in exits(m)] == [fx.SvmExit.MSR] * 3


def test_hybrid_mode_deletes_the_access_page() -> None:
    """Once a vCPU in x2APIC mode has entered without x2AVIC, nobody's xAPIC page is virtualised any more."""
    m = xapic(x2avic=False)
    v = m.vcpus[0]
    assert v.hw_mmio_write(r.APIC_TASKPRI, 0x20).path is HARDWARE
    m.vcpus[3].set_msr(r.MSR_APICBASE, m.vcpus[3].apic_base | r.APICBASE_EXTD)
    assert v.hw_mmio_write(r.APIC_TASKPRI, 0x30).path is HARDWARE
    run(m.vcpus[3])
    m.trace.enable()
    assert v.hw_mmio_write(r.APIC_TASKPRI, 0x40).path is fx.Path.SLOW
    assert [reason for reason, _, _ in exits(m)] == [fx.SvmExit.NPF]
    assert reg(v, r.APIC_TASKPRI) == 0x40


def test_x2avic_keeps_the_access_page() -> None:
    m = xapic(x2avic=True)
    m.vcpus[3].set_msr(r.MSR_APICBASE, m.vcpus[3].apic_base | r.APICBASE_EXTD)
    run(m.vcpus[3])
    m.set_inhibit(r.Inhibit.LOGICAL_ID_ALIASED, False)
    run(m.vcpus[0])
    assert m.vcpus[0].hw_mmio_write(r.APIC_TASKPRI, 0x40).path is HARDWARE


@pytest.mark.parametrize("why", ["inhibited", "off", "L2", "no AVIC"])
def test_everything_exits_without_avic(why: str) -> None:
    """Inhibited, made without AVIC, or in L2: accesses exit as on a machine that knows no AVIC."""
    m = machine(**({"apicv": False, "x2avic": False} if why == "no AVIC" else {}))
    v = m.vcpus[0]
    if why == "inhibited":
        m.set_inhibit(r.Inhibit.PIT_REINJ)
        run(v)
    elif why == "L2":
        v.nested, v.l1_wants_exits = True, False
        run(v)
    elif why == "off":
        v.set_msr(r.MSR_APICBASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))
        v.set_msr(r.MSR_APICBASE, v.apic_base | r.APICBASE_EN)
        m.set_inhibit(r.Inhibit.HYPERV)
        run(v)
        m.trace.enable()
        v.hw_mmio_write(r.APIC_TASKPRI, 0x40)
        assert [reason for reason, _, _ in exits(m)] == [fx.SvmExit.NPF]
        return
    m.trace.enable()
    v.hw_wrmsr(TPR, 0x40)
    assert [reason for reason, _, _ in exits(m)] == [fx.SvmExit.MSR]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("x2apic", [True, False])
def test_hardware_and_kvm_agree(x2apic: bool, seed: int) -> None:
    """Whoever sends it, hardware, KVM behind an incomplete IPI, or KVM alone: an IPI reaches the same vCPUs.

    Vectors below 16 apart, which hardware refuses and KVM delivers. Two machines, one with AVIC's help, one without.
    """
    rng = random.Random(seed)
    build = machine if x2apic else xapic
    helped, plain = build(), build()
    for _ in range(60):
        i, sleeper = rng.randrange(4), rng.randrange(8)
        low = rng.randrange(16, 256) | rng.choice((0, 0, 0, 0x100, 0x400)) | rng.choice((0, 0x800))
        low |= rng.choice((0, 0x4000, 0xC000)) | rng.choice((0, 0, 0, 1, 2, 3)) << 18
        dest = rng.choice((rng.randrange(6), rng.randrange(32), 0xFF, 0xFFFF_FFFF))
        if sleeper < 4:
            put(helped.vcpus[sleeper])
        if x2apic:
            helped.vcpus[i].hw_wrmsr(ICR, dest << 32 | low)
            plain.vcpus[i].wrmsr(ICR, dest << 32 | low)
        else:
            for m, write in ((helped, "hw_mmio_write"), (plain, "mmio_write")):
                getattr(m.vcpus[i], write)(r.APIC_ICR2, (dest & 0xFF) << 24)
                getattr(m.vcpus[i], write)(r.APIC_ICR, low)
        for a, b in zip(helped.vcpus, plain.vcpus):
            assert (irr(a), a.pending()) == (irr(b), b.pending()), (i, hex(low), hex(dest), sleeper)
            assert a.events().nmi_pending == b.events().nmi_pending
        if sleeper < 4:
            load(helped.vcpus[sleeper], sleeper + 8)


def test_snapshot_keeps_the_tables() -> None:
    """Tables, KVM's copies and the deleted page come back; hardware goes on as before."""
    m = xapic()
    put(m.vcpus[2], blocking=True)
    again = fx.Machine.restore(m.snapshot())
    assert again.avic_physical.tolist() == m.avic_physical.tolist()
    assert again.avic_logical.tolist() == m.avic_logical.tolist()
    assert again.snapshot() == m.snapshot()
    again.vcpus[0].hw_mmio_write(r.APIC_ICR2, 0x0F << 24)
    out = again.vcpus[0].hw_mmio_write(r.APIC_ICR, 0x841)
    assert out.effects == DOORBELL
    assert [irr(v) for v in again.vcpus] == [{0x41}] * 4


# --------------------------------------------------------------------------------------------------- older generations

OLD = kernels(before="6.1")
"""AVIC of svm.c and avic.c up to 5.15 (5.6.4, 5.8.18, 5.10.262 and 5.15.85 read)."""


def old(kernel: str, vcpus: int = 4, **options: Any) -> fx.Machine:
    """A guest that was not offered x2APIC mode, every vCPU on a pCPU of its own."""
    m = xapic(vcpus, kernel=kernel, x2apic=False, **options)
    for v in m.vcpus:
        load(v, v.index + 8)
    return m


def entry(m: fx.Machine, vcpu_id: int) -> int:
    return m.mem[L.AVIC_PHYSICAL + vcpu_id]


@pytest.mark.parametrize("kernel", OLD)
def test_old_doorbell_goes_by_is_running(kernel: str) -> None:
    """svm_deliver_avic_intr: a vCPU that is loaded gets a doorbell, in the guest or not; any other is woken."""
    m = old(kernel)
    target = m.vcpus[1]
    target.rflags |= r.RFLAGS_IF
    m.mem[target.hot + L.HOT_MODE] = 0
    assert m.signal_msi(0xFEE0_1000, 0x41) == 1
    assert m.targets == ((1, DOORBELL),)
    put(target, blocking=True)
    m.mem[target.hot + L.HOT_BLOCKED] = 1
    assert m.signal_msi(0xFEE0_1000, 0x42) == 1
    assert m.targets == ((1, fx.Effect.WAKE),)


@pytest.mark.parametrize("kernel", fx.profiles())
def test_incomplete_ipi_by_generation(kernel: str) -> None:
    """Up to 5.15 only sleepers are woken, nobody who runs gets a doorbell, and an invalid target is nobody's."""
    m = old(kernel)
    v, sleeper = m.vcpus[0], m.vcpus[2]
    for vcpu in m.vcpus:
        run(vcpu)
    put(sleeper, blocking=True)
    m.mem[sleeper.hot + L.HOT_BLOCKED], m.mem[sleeper.hot + L.HOT_MODE] = 1, 0
    v.exit(INCOMPLETE, info1=fx.icr(vector=0x41, shorthand=3), info2=1 << 32)
    running = () if kernel in OLD else ((1, DOORBELL), (3, DOORBELL))
    assert sorted(v.targets) == sorted(((2, fx.Effect.WAKE), *running))
    lost = v.exit(INCOMPLETE, info1=0x0100_0000_0000_4041, info2=int(Fail.INVALID_TARGET) << 32)
    assert (lost.accepted, irr(m.vcpus[1])) == ((0, set()) if kernel in OLD else (1, {0x41}))


@pytest.mark.parametrize("kernel", fx.profiles())
def test_ipi_that_hardware_cannot_send(kernel: str) -> None:
    """Up to 5.15 both halves of ICR are written again, lines and all; later the IPI is only sent."""
    m = old(kernel)
    m.trace.enable()
    out = m.vcpus[0].exit(INCOMPLETE, info1=0x0100_0000_0000_4400, info2=0)
    assert (out.accepted, m.vcpus[1].events().nmi_pending) == (1, 1)
    written = [line.split()[2] for line in lines(m, "kvm_apic") if "apic_write" in line]
    assert written == (["APIC_ICR2", "APIC_ICR"] if kernel in OLD else [])


@pytest.mark.parametrize("kernel", fx.profiles())
def test_entry_moves_with_the_id(kernel: str) -> None:
    """avic_handle_apic_id_update, up to 5.15: the entry goes where the guest's new xAPIC id is; a second time there is
    none any more at the old place.
    """
    m = old(kernel)
    v = m.vcpus[1]
    before = entry(m, 1)
    v.hw_mmio_write(r.APIC_ID, 9 << 24)
    if kernel not in OLD:
        assert (entry(m, 1) & VALID, entry(m, 9)) == (VALID, 0)
        return
    assert (entry(m, 1), entry(m, 9)) == (0, before)
    m.vcpus[0].hw_mmio_write(r.APIC_ICR2, 9 << 24)
    out = m.vcpus[0].hw_mmio_write(r.APIC_ICR, 0x41)
    assert (out.path, irr(v)) == (HARDWARE, {0x41})
    put(v)
    assert not entry(m, 9) & RUNNING
    v.hw_mmio_write(r.APIC_ID, 7 << 24)
    assert (entry(m, 7), entry(m, 9) & VALID) == (0, VALID)
    out = v.hw_mmio_write(r.APIC_ID, 255 << 24)
    assert out.user is fx.KvmExit.UNKNOWN, "no entry has that id"


@pytest.mark.parametrize("kernel", fx.profiles())
def test_ldr_by_generation(kernel: str) -> None:
    """avic_get_logical_id_entry up to 6.1.192: the lowest bit counts; an LDR without an entry ends KVM_RUN, and the map
    never hears of it.
    """
    m = old(kernel, 2)
    v = m.vcpus[1]
    loose = not since(kernel, "6.6")
    v.hw_mmio_write(r.APIC_LDR, 0b11000 << 24)
    valid = m.mem[L.AVIC_LOGICAL + 1] >> 32 & LOGICAL_VALID
    assert bool(valid) is loose
    v.hw_mmio_write(r.APIC_DFR, 0x0FFF_FFFF)
    out = v.hw_mmio_write(r.APIC_LDR, 0xF1 << 24)
    assert (out.user is fx.KvmExit.UNKNOWN) is loose


@pytest.mark.parametrize("kernel", fx.profiles())
def test_rrr_by_generation(kernel: str) -> None:
    m = old(kernel)
    m.trace.enable()
    m.vcpus[0].hw_mmio_write(r.APIC_RRR, 5)
    written = [line for line in lines(m, "kvm_apic") if "apic_write" in line]
    assert bool(written) is not since(kernel, "6.6")


@pytest.mark.parametrize(
    ("x2apic", "value", "slow", "asked"),
    [
        (False, 0x0600_0000_0000_0841, True, {1, 2}),
        (False, 0x0200_0000_0000_0841, False, {1}),
        (False, 0x0000_0000_0000_0841, False, set()),
        (True, 0x0000_0002_0000_0841, False, set()),
        (True, 0x0001_0001_0000_0841, True, {4}),
        (True, 0x0000_0001_0000_0041, False, {1}),
    ],
)
def test_logical_kicks_of_6_1(x2apic: bool, value: int, slow: bool, asked: set[int]) -> None:
    """avic_kick_target_vcpus_fast of 6.1.192: several bits are scanned for. In x2APIC mode the cluster is taken for the
    bits: none of cluster 0 is kicked, whatever waits in their IRR, and for any other cluster there is a scan.
    """
    options: dict[str, Any] = {"kernel": "6.1", "apic_ids": [0, 1, 2, 3, 16]}
    m = machine(**options) if x2apic else xapic(kernel="6.1")
    for v in m.vcpus:
        m.mem[v.vec + L.VEC_IRR_PENDING] = 0
    m.trace.enable()
    index = 1 if not value & 0x800 or value >> 56 == 2 else 0
    m.vcpus[0].exit(INCOMPLETE, info1=value, info2=1 << 32 | index)
    assert bool(lines(m, "kvm_avic_kick_vcpu_slowpath")) is slow
    assert {v.index for v in m.vcpus if m.mem[v.vec + L.VEC_IRR_PENDING]} == asked


@pytest.mark.parametrize("kernel", ["5.7", "5.8", "5.10", "5.15"])
def test_guest_with_x2apic_has_no_avic(kernel: str) -> None:
    """svm_cpuid_update of 5.7.6 and 5.8.18, svm_vcpu_after_set_cpuid of 5.10.262: the mere offer inhibits."""
    m = fx.Machine(2, vendor="svm", kernel=kernel)
    m.trace.enable()
    assert m.inhibits == {r.Inhibit.X2APIC}
    for v in m.vcpus:
        run(v)
    assert not any(v.apicv for v in m.vcpus)
    m.boot_x2apic()
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41)).accepted == 1
    assert fx.Machine(2, vendor="svm", kernel=kernel, x2apic=False).inhibits == set()


@pytest.mark.parametrize("kernel", fx.profiles())
def test_id_beyond_the_table(kernel: str) -> None:
    """avic_init_backing_page: EINVAL up to 6.16, an inhibit from then on. Without AVIC nobody minds."""
    if since(kernel, "6.18"):
        assert fx.Machine(apic_ids=[0, 0xFF], vendor="svm", kernel=kernel).inhibits == {r.Inhibit.PHYSICAL_ID_TOO_BIG}
    else:
        m = fx.Machine(1, vendor="svm", kernel=kernel)
        before = m.snapshot()
        with pytest.raises(ValueError, match="EINVAL"):
            m.add_vcpu(0xFF)
        assert m.snapshot() == before
        m.add_vcpu(0xFE)
    fx.Machine(apic_ids=[0, 0xFF], vendor="svm", kernel=kernel, apicv=False)
