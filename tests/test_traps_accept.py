"""What an APIC does with an interrupt that has reached it: traps 4-11, 13, 27, 47, 50, 51, 67, 69, 70."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastexit as fx
from apics import (
    BASE,
    EOI,
    ESR,
    ICR,
    INIT,
    LOWEST,
    NMI,
    REMOTE_READ,
    SELF_IPI,
    SIPI,
    SMI,
    SVR,
    in_service,
    interrupted,
    kinds,
    machine,
    msi,
    nmis,
    patched,
    register,
    vectors,
)
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.profile import since

LEVEL = 1 << 15
RUNNABLE, INIT_RECEIVED = fx.MpState.RUNNABLE, fx.MpState.INIT_RECEIVED


def send(m: fx.Machine, mode: int, vector: int = 0, dest: int = 1, **fields: Any) -> fx.Outcome:
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=dest, vector=vector, delivery=mode, **fields))


@pytest.mark.parametrize("vector", [0, 1, 8, 15])
def test_trap_04_vectors_0_to_15_pend_for_ever(vector: int) -> None:
    """Accepted and in IRR; never injected, whatever TPR and RFLAGS.IF say; ESR tells nobody."""
    m = machine()
    v = m.vcpus[1]
    assert send(m, 0, vector).accepted == 1
    assert vectors(v) == {vector}
    v.rflags |= r.RFLAGS_IF
    interrupted(v)
    assert (v.injected, v.pending(), v.ack()) == (None, None, None)
    assert vectors(v) == {vector}
    assert (v.rdmsr(ESR), m.vcpus[0].rdmsr(ESR)) == (0, 0)


def test_trap_05_tmr_is_written_at_acceptance() -> None:
    """TMR takes the trigger of each arrival at once, also of one that finds its vector pending; and of an edge."""
    m = machine()
    v = m.vcpus[1]
    send(m, 0, 0x41, level=True, trigger_level=True)
    assert (vectors(v), vectors(v, r.APIC_TMR)) == ({0x41}, {0x41})
    send(m, 0, 0x41)
    assert (vectors(v), vectors(v, r.APIC_TMR)) == ({0x41}, set())
    m.signal_msi(0xFEE01000, LEVEL | 0x41)
    assert vectors(v, r.APIC_TMR) == {0x41}
    assert v.ack() == 0x41
    assert vectors(v, r.APIC_TMR) == {0x41}, "delivery leaves TMR alone"


@pytest.mark.parametrize("mode", [0, LOWEST])
def test_trap_06_level_needs_assert(mode: int) -> None:
    """A level IPI with assert is an interrupt; with de-assert it is dropped, and traced as accepted all the same."""
    m = machine()
    m.trace.enable()
    assert send(m, mode, 0x41, trigger_level=True).accepted == 0
    assert vectors(m.vcpus[1]) == set()
    (line,) = (text for text in m.trace.lines() if "accept_irq" in text)
    assert line == f"kvm_apic_accept_irq: apicid 1 vec 65 ({fx.DeliveryMode(mode).name}|level)"
    assert send(m, mode, 0x41, trigger_level=True, level=True).accepted == 1
    assert vectors(m.vcpus[1]) == {0x41}


@pytest.mark.parametrize("mode", [0, LOWEST, NMI, INIT])
def test_trap_07_edge_needs_no_assert(mode: int) -> None:
    """Edge with the level bit 0, which older manuals call de-assert, is delivered."""
    m = machine()
    m.trace.enable()
    assert send(m, mode, 0x41).accepted == 1
    mode_name = fx.DeliveryMode(mode).name
    assert f"kvm_apic_ipi: dst 1 vec 65 ({mode_name}|physical|de-assert|edge|dst)" in m.trace.lines()
    got = {0: 0x41 in vectors(m.vcpus[1]), NMI: nmis(m) == {1}, INIT: m.vcpus[1].events().latched_init}
    assert got[0 if mode == LOWEST else mode]


def test_trap_08_software_disabled_takes_what_needs_no_irr() -> None:
    """SVR bit 8 clear: Fixed and lowest priority are refused; NMI, INIT, SIPI and the unhalt come in."""
    m = machine()
    v = m.vcpus[1]
    v.set_msr(SVR, 0xFF)
    assert [send(m, mode, 0x41).accepted for mode in (0, LOWEST, NMI, REMOTE_READ, INIT, SIPI)] == [0, 0, 1, 1, 1, 1]
    assert vectors(v) == set()
    assert nmis(m) == {1}
    assert v.get_mp_state() == RUNNABLE, "INIT and SIPI have done their work"
    assert v.machine.mem[v.own + L.K_CS] == 0x4100


@pytest.mark.parametrize("shorthand", [0, 3])
def test_trap_08_hardware_disabled_takes_nothing(shorthand: int) -> None:
    """APICBASE.EN clear: the APIC is nobody's target, neither by its id nor as one of all."""
    m = machine(0, 1)
    v = m.vcpus[1]
    assert v.set_msr(BASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))
    state = v.get_mp_state()
    nobody = -1 if shorthand else 0
    for mode in (0, LOWEST, NMI, REMOTE_READ, INIT, SIPI):
        assert send(m, mode, 0x41, dest=0 if shorthand else 1, shorthand=shorthand).accepted == nobody
    assert (vectors(v), nmis(m), v.events().latched_init, v.get_mp_state()) == (set(), set(), False, state)


def test_trap_09_init_overwrites_a_pending_sipi() -> None:
    """SIPI, then INIT, both before the target looks: the INIT alone is left, and the target waits for a new SIPI."""
    m = machine()
    v = m.vcpus[1]
    assert v.set_mp_state(INIT_RECEIVED) is None
    send(m, SIPI, 0x12)
    send(m, INIT)
    assert v.get_mp_state() == INIT_RECEIVED
    send(m, SIPI, 0x34)
    assert v.get_mp_state() == RUNNABLE
    assert m.mem[v.own + L.K_CS] == 0x3400

    send(m, INIT)
    send(m, SIPI, 0x56)
    assert v.get_mp_state() == RUNNABLE, "the other way round both are taken, in order"


@pytest.mark.parametrize("state", [fx.MpState.RUNNABLE, fx.MpState.UNINITIALIZED, fx.MpState.HALTED])
def test_trap_09_sipi_to_one_that_does_not_wait_is_lost(state: fx.MpState) -> None:
    """It is accepted and consumed: neither an INIT that follows nor user space's INIT_RECEIVED finds it."""
    m = machine()
    v = m.vcpus[1]
    v.set_mp_state(state)
    rip = v.rip
    assert send(m, SIPI, 0x12).accepted == 1
    assert (v.get_mp_state(), v.rip) == (state, rip)
    v.set_mp_state(INIT_RECEIVED)
    assert v.get_mp_state() == INIT_RECEIVED
    send(m, INIT)
    assert v.get_mp_state() == INIT_RECEIVED


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_trap_10_remote_read_unhalts(vendor: str) -> None:
    """Delivery mode 3 is the message of PV spinlocks: a halted vCPU goes on, and gets no vector."""
    m = machine(vendor=vendor)
    v = m.vcpus[1]
    v.set_mp_state(fx.MpState.HALTED)
    assert not v.run()
    out = send(m, REMOTE_READ, 0x41)
    assert (out.accepted, out.effects) == (1, fx.Effect.WAKE)
    assert v.get_mp_state() == RUNNABLE
    assert vectors(v) == set()


@pytest.mark.parametrize("kernel", fx.profiles())
def test_trap_11_self_ipi_and_the_icr(kernel: str) -> None:
    """SELF_IPI sends without the ICR; up to 5.8 it went through ICR low, and no upper bit was looked at."""
    old = not since(kernel, "5.10")
    m = machine(kernel=kernel)
    v = m.vcpus[0]
    sent = fx.icr(dest=1, vector=0x33)
    v.wrmsr(ICR, sent)
    assert v.wrmsr(SELF_IPI, 0x41).fault is None
    assert v.rdmsr(ICR) == (1 << 32 | 0x40041 if old else sent)
    assert v.wrmsr(SELF_IPI, 0x151).fault is (None if old else fx.Fault.GP)
    assert vectors(v) == ({0x41, 0x51} if old else {0x41})


@pytest.mark.skipif(declare.JIT, reason="the order of stores can be watched with interpreted kernels only")
@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("x2apic", [True, False])
def test_trap_13_the_ipi_leaves_before_the_icr_is_written(kernel: str, x2apic: bool) -> None:
    """The target's IRR is set before the sender's ICR shows the command."""
    from fastexit.kernels.lapic import mmio_write, x2apic_msr_write

    m = machine(kernel=kernel, x2apic=x2apic)
    v = m.vcpus[0]
    icr = L.PAGE + v.index * L.PAGE_STRIDE + (r.APIC_ICR >> 3)
    irr = L.VEC + m.vcpus[1].index * L.VEC_STRIDE + 1
    v.mmio_write(r.APIC_ICR2, 1 << 24)
    log: list[str] = []

    class Stores:
        """The machine's words, noting stores to the two that matter."""

        def __getitem__(self, i: Any) -> Any:
            return m.words[i]

        def __setitem__(self, i: Any, value: Any) -> None:
            if i in (icr, irr):
                log.append("ICR" if i == icr else "IRR")
            m.words[i] = value

    words, index = Stores(), np.uint64(0)
    if x2apic:
        x2apic_msr_write(words, index, np.uint64(ICR), np.uint64(1 << 32 | 0x41))
    else:
        mmio_write(words, index, np.uint64(v.apic_base & ~0xFFF | r.APIC_ICR), np.uint64(4), np.uint64(0x41))
    assert log == ["IRR", "ICR"]
    assert vectors(m.vcpus[1]) == {0x41}


@pytest.mark.parametrize("smm", [False, True])
def test_trap_27_smi_without_smm_reaches_nobody(smm: bool) -> None:
    """A kernel without CONFIG_KVM_SMM counts no acceptance and kicks nobody; with it the target is kicked."""
    m = machine(smm=smm)
    interrupted(m.vcpus[1])
    out = send(m, SMI)
    assert (out.accepted, out.effects) == ((1, fx.Effect.KICK) if smm else (0, fx.Effect.NONE))
    assert m.vcpus[1].mode == (r.EXITING_GUEST_MODE if smm else r.IN_GUEST_MODE)
    assert m.vcpus[1].events().smi_pending is smm


def test_trap_47_acceptance_is_traced_before_it_is_decided() -> None:
    """The accept line appears for ExtINT, for a software-disabled target, for an SMI nobody handles."""
    m = machine(smm=False)
    m.vcpus[1].set_msr(SVR, 0xFF)
    m.trace.enable()
    for mode, vector, name in ((0, 0x41, "Fixed"), (7, 0, "ExtINT"), (SMI, 0, "SMI")):
        m.trace.clear()
        assert send(m, mode, vector).accepted == 0
        assert f"kvm_apic_accept_irq: apicid 1 vec {vector} ({name}|edge)" in m.trace.lines()


def test_trap_47_the_apicid_printed_is_the_vcpu_id() -> None:
    """Neither the index nor the id register: vcpu_id, in hex."""
    m = machine(0, 18, x2apic=False)
    m.vcpus[1].mmio_write(r.APIC_ID, 5 << 24)
    m.trace.enable()
    assert msi(m, 5, 0x41) == 1
    assert "kvm_apic_accept_irq: apicid 12 vec 65 (Fixed|edge)" in m.trace.lines()


def test_trap_50_get_mp_state_resets_the_vcpu() -> None:
    """KVM_GET_MP_STATE carries out INIT and SIPI; KVM_GET_LAPIC and the host's MSR reads do not."""
    m = machine()
    v = m.vcpus[1]
    v.wrmsr(0x808, 0x50)
    send(m, INIT)
    send(m, SIPI, 0x12)
    assert (register(v, r.APIC_TASKPRI), v.get_msr(SVR)) == (0x50, 0x1FF)
    assert v.get_mp_state() == RUNNABLE
    assert (register(v, r.APIC_TASKPRI), v.get_msr(SVR), m.mem[v.own + L.K_CS]) == (0, 0xFF, 0x1200)


def test_trap_51_host_msr_writes_are_guest_writes() -> None:
    """KVM_SET_MSRS of 0x830 sends, of 0x80B ends an interrupt, of 0x828 = 1 stops: no host exemption."""
    m = machine()
    v = m.vcpus[0]
    assert v.set_msr(ICR, fx.icr(dest=1, vector=0x41))
    assert (m.last_accepted, vectors(m.vcpus[1])) == (1, {0x41})
    assert m.vcpus[1].ack() == 0x41
    assert m.vcpus[1].set_msr(EOI, 0)
    assert vectors(m.vcpus[1], r.APIC_ISR) == set()
    assert not v.set_msr(ICR, 1 << 13)
    assert not v.set_msr(ESR, 1)


@pytest.mark.parametrize(("vendor", "block"), [("vmx", "vmxon"), ("svm", "gif"), ("vmx", "smm"), ("svm", "smm")])
def test_trap_67_sipi_is_lost_while_init_is_blocked(vendor: str, block: str) -> None:
    """VMX root operation, GIF clear, SMM: INIT stays latched, the SIPI behind it is thrown away."""
    m = machine(vendor=vendor, smm=True)
    v = m.vcpus[1]
    v.set_mp_state(RUNNABLE)
    if block == "smm":
        v.set_events(smm=True)
    else:
        setattr(v, block, block == "vmxon")
    send(m, INIT)
    send(m, SIPI, 0x12)
    assert (v.get_mp_state(), v.events().latched_init) == (RUNNABLE, True)
    if block == "smm":
        v.rsm()
    else:
        setattr(v, block, block != "vmxon")
    assert (v.get_mp_state(), v.events().latched_init) == (INIT_RECEIVED, False)


def test_trap_69_eoi_with_nothing_in_service() -> None:
    """The line says vector -1; no EVENT request, no IOAPIC, no PPR."""
    m = machine()
    v = m.vcpus[0]
    v.ioapic_handled = range(256)
    interrupted(v)
    assert v.requests == 0
    m.trace.enable()
    assert v.eoi() is None
    assert v.set_msr(EOI, 0)
    assert m.trace.lines()[0] == "kvm_eoi: apicid 0 vector -1"
    assert (kinds(m).count("kvm_eoi"), v.requests, v.ioapic_eoi) == (2, 0, None)


def test_trap_69_eoi_ends_what_the_cache_names() -> None:
    """Vectors leave in the order of nesting; an EOI asks for an EVENT. After KVM_SET_LAPIC the bits are scanned."""
    m = machine()
    v = m.vcpus[0]
    for vector in (0x41, 0x61):
        v.set_msr(SELF_IPI, vector)
        assert v.ack() == vector
    interrupted(v)
    assert (v.eoi(), v.requests) == (0x61, r.REQ_EVENT)
    assert (v.eoi(), v.eoi()) == (0x41, None)

    v.set_lapic(patched(v, in_service(v, 0x31, 0x91, 0x55)))
    assert [v.eoi() for _ in range(4)] == [0x91, 0x55, 0x31, None]


@pytest.mark.parametrize("level", [True, False])
def test_trap_70_ioapic_eoi_goes_by_tmr_at_eoi_time(level: bool) -> None:
    """The trigger mode told to the IOAPIC is that of the last arrival, not of the interrupt that ends."""
    m = machine()
    v = m.vcpus[1]
    v.ioapic_handled = [0x41]
    m.signal_msi(0xFEE01000, (0 if level else LEVEL) | 0x41)
    assert v.ack() == 0x41
    m.signal_msi(0xFEE01000, (LEVEL if level else 0) | 0x41)
    assert v.eoi() == 0x41
    assert v.ioapic_eoi == (0x41, level)
