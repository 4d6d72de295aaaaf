"""SMI, NMI, INIT and SIPI where something blocks them: SMM, VMX root operation, GIF, L2; and who counts as boot CPU."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r

ICR = 0x830
IF = 1 << 9
VENDORS = ("vmx", "svm")
SMI, NMI, INIT, SIPI = 2, 4, 5, 6


def booted(vendor: str = "vmx", **options: Any) -> fx.Machine:
    """vCPUs 0 and 1 of a kernel with SMM run in the guest, interrupts on."""
    m = fx.Machine(vcpus=2, vendor=vendor, **{"apicv": False, "smm": True} | options)
    m.boot_x2apic()
    for v in m.vcpus:
        v.rflags |= IF
        run(v)
    return m


def run(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def waits(v: fx.Vcpu) -> bool:
    """The next entry, from the guest or from user space: does the vCPU wait for SIPI instead?"""
    return run(v).blocked if v.mode else not v.run()


def send(m: fx.Machine, delivery: int, vector: int = 0) -> fx.Outcome:
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=delivery, vector=vector, level=True))


def pending_init(v: fx.Vcpu) -> bool:
    return v.events().latched_init


@pytest.mark.parametrize("vendor", VENDORS)
def test_smi_enters_smm_and_rsm_leaves_it(vendor: str) -> None:
    """The entry after an SMI begins at SMM's entry point with NMIs masked; RSM gives back RIP and RFLAGS."""
    m = booted(vendor)
    v = m.vcpus[1]
    v.rip = 0x1234
    assert send(m, SMI).effects == fx.Effect.KICK
    run(v)
    assert (v.smm, v.rip, v.rflags, v.nmi_masked, v.counters()["smis"]) == (True, 0x8000, 2, True, 1)
    v.rsm()
    assert (v.smm, v.rip, v.rflags, v.nmi_masked) == (False, 0x1234, 2 | IF, False)
    with pytest.raises(ValueError, match="RSM outside SMM is #UD"):
        v.rsm()


def test_smi_in_smm_waits_for_rsm() -> None:
    """A second SMI is latched while the first one is handled."""
    m = booted()
    v = m.vcpus[1]
    send(m, SMI)
    run(v)
    send(m, SMI)
    run(v)
    assert (v.counters()["smis"], v.events().smi_pending) == (1, True)
    v.rsm()
    run(v)
    assert (v.smm, v.counters()["smis"], v.events().smi_pending) == (True, 2, False)


def test_smi_inside_an_nmi_leaves_nmis_masked() -> None:
    """RSM unmasks NMIs only if the SMI masked them."""
    m = booted()
    v = m.vcpus[1]
    send(m, NMI)
    run(v)
    assert v.nmi_masked
    send(m, SMI)
    run(v)
    v.rsm()
    assert v.nmi_masked


def test_nmi_in_smm_comes_after_rsm() -> None:
    """SMM masks NMIs; one that came meanwhile is delivered by the entry behind RSM."""
    m = booted()
    v = m.vcpus[1]
    send(m, SMI)
    run(v)
    send(m, NMI)
    m.trace.enable()
    run(v)
    assert "intr_info 0x80000202" not in " ".join(m.trace.lines())
    v.rsm()
    run(v)
    assert "intr_info 0x80000202" in m.trace.lines()[-1]


def test_smi_nmi_and_interrupt_in_their_order() -> None:
    """An exception goes alone; then SMI; NMIs are masked by it and IF is clear, so the rest waits for RSM."""
    m = booted()
    v = m.vcpus[1]
    send(m, 0, 0x61)
    send(m, NMI)
    send(m, SMI)
    m.trace.enable()
    assert v.wrmsr(0x802, 0).fault is fx.Fault.GP
    # What was pending had an entry of its own before the guest could run its WRMSR: the first exit is the kick's.
    assert v.smm
    assert v.events().nmi_pending == 1
    v.rsm()
    run(v)
    assert v.nmi_masked
    assert (v.rflags & IF, v.irq_window, v.injected) == (0, True, None), "the NMI's gate has cleared IF"
    v.rflags |= IF
    v.exit(fx.VmxExit.INTERRUPT_WINDOW)
    assert v.injected == 0x61


@pytest.mark.parametrize("vendor", VENDORS)
def test_smm_blocks_init_and_drops_sipi(vendor: str) -> None:
    """INIT stays latched in SMM, a SIPI is lost there; behind RSM the vCPU waits for another one."""
    m = booted(vendor)
    v = m.vcpus[1]
    send(m, SMI)
    run(v)
    send(m, INIT)
    send(m, SIPI, 0x9A)
    assert not waits(v)
    assert pending_init(v)
    v.rsm()
    assert waits(v)
    assert v.get_mp_state() is r.MpState.INIT_RECEIVED
    send(m, SIPI, 0x9B)
    assert v.get_mp_state() is r.MpState.RUNNABLE
    assert (m.mem[v.own + L.K_CS], v.smm) == (0x9B00, False)


@pytest.mark.parametrize(("vendor", "switch", "blocked"), [("vmx", "vmxon", True), ("svm", "gif", False)])
def test_root_operation_and_gif_block_init(vendor: str, switch: str, blocked: bool) -> None:
    """VMXON or a clear GIF latches INIT; VMXOFF or STGI lets it through."""
    m = booted(vendor)
    v = m.vcpus[1]
    setattr(v, switch, blocked)
    send(m, INIT)
    assert not waits(v)
    assert pending_init(v)
    setattr(v, switch, not blocked)
    assert waits(v)


def test_init_in_l2_is_an_exit_of_vmx() -> None:
    """VMX gives INIT to L1 as an exit and forgets it; the SIPI behind it is lost in root operation."""
    m = booted()
    v = m.vcpus[1]
    v.vmxon = v.nested = True
    send(m, INIT)
    send(m, SIPI, 0x9A)
    assert not waits(v)
    assert (v.nested, v.counters()["nested_exits"], pending_init(v)) == (False, 1, False)
    assert m.mem[v.own + L.K_PENDING_EVENTS] == 0


@pytest.mark.parametrize("intercepts", [True, False])
def test_init_in_l2_stays_pending_on_svm(intercepts: bool) -> None:
    """L1's intercept leaves L2 with GIF clear, so INIT waits for STGI; without it INIT resets the vCPU out of L2."""
    m = booted("svm")
    v = m.vcpus[1]
    v.nested, v.l1_wants_exits = True, intercepts
    send(m, INIT)
    assert waits(v) is not intercepts
    assert not v.nested
    if intercepts:
        assert (v.gif, pending_init(v)) == (False, True)
        v.gif = True
        assert waits(v)
    assert v.get_mp_state() is r.MpState.INIT_RECEIVED


def test_init_in_l2_waits_for_the_instruction_cut_short() -> None:
    """An event of L2 whose delivery an exit cut short is finished first; then INIT takes L2 away."""
    m = booted()
    v = m.vcpus[1]
    v.vmxon = v.nested = True
    send(m, INIT)
    m.trace.enable()
    v.exit(fx.VmxExit.EXCEPTION_NMI, intr_info=0x8000_0202, info2=0x8000_0041)
    assert "kvm_inj_virq: IRQ 0x41 [reinjected]" in m.trace.lines()
    assert (v.nested, pending_init(v)) == (False, False), "the entry was forced to exit, and then INIT was L1's"


def test_init_keeps_the_vector_of_user_space() -> None:
    """INIT empties the CPU's queues, but not what a PIC in user space has on its line."""
    m = booted(irqchip="split", boot_cpu_id=1)
    v = m.vcpus[1]
    v.set_msr(0x1B, v.apic_base | r.APICBASE_BSP)
    v.set_msr(0x835, 0x10000)
    v.interrupt(0x31)
    send(m, INIT)
    run(v)
    assert v.get_mp_state() is r.MpState.RUNNABLE
    with pytest.raises(ValueError, match="vector 49 still waits"):
        v.interrupt(0x32)


def test_boot_cpu_by_apicbase_and_by_id() -> None:
    """Who runs on after INIT goes by APICBASE bit 8; who has ExtINT on LINT0 after it by KVM_SET_BOOT_CPU_ID."""
    m = booted(boot_cpu_id=1)
    assert [bool(v.apic_base & r.APICBASE_BSP) for v in m.vcpus] == [False, True]
    assert [v.get_msr(0x835) for v in m.vcpus] == [0x10000, 0x700]
    v = m.vcpus[1]
    v.set_msr(0x1B, v.apic_base & ~r.APICBASE_BSP)
    send(m, INIT)
    assert waits(v)
    assert v.get_msr(0x835) == 0x700, "still the boot CPU's LINT0"


def test_boot_lint0_is_a_quirk() -> None:
    """With KVM_X86_QUIRK_LINT0_REENABLED disabled every LINT0 begins masked."""
    m = fx.Machine(vcpus=2, disable_quirks=r.QUIRK_LINT0_REENABLED)
    m.boot_x2apic()
    assert [v.get_msr(0x835) for v in m.vcpus] == [0x10000, 0x10000]


def test_set_mp_state() -> None:
    """SIPI_RECEIVED is INIT_RECEIVED and a pending SIPI; 6.12 refuses both behind a blocked INIT or a pending SMI."""
    m = booted(kernel="6.12")
    v = m.vcpus[1]
    v.set_events(sipi_vector=0x77)
    v.set_mp_state(r.MpState.SIPI_RECEIVED)
    assert v.get_mp_state() is r.MpState.RUNNABLE
    assert m.mem[v.own + L.K_CS] == 0x7700
    v.vmxon = True
    for state in (r.MpState.INIT_RECEIVED, r.MpState.SIPI_RECEIVED):
        with pytest.raises(ValueError, match="EINVAL"):
            v.set_mp_state(state)
    v.vmxon = False
    v.set_events(smm=False, smi_pending=True)
    with pytest.raises(ValueError, match="an SMI goes first"):
        v.set_mp_state(r.MpState.INIT_RECEIVED)
    v.set_mp_state(r.MpState.HALTED)
    assert v.get_mp_state() is r.MpState.HALTED
    with pytest.raises(ValueError, match="mp_state"):
        v.set_mp_state(77)


def test_set_events() -> None:
    """The SMM fields go together; NMIs are queued anew; a SIPI vector alone starts nobody."""
    m = booted()
    v = m.vcpus[1]
    v.set_events(nmi_pending=5, nmi_masked=True, sipi_vector=0x12, smm=True, smm_inside_nmi=True, latched_init=True)
    got = v.events()
    assert (got.nmi_pending, got.nmi_masked, got.smm, got.latched_init) == (1, True, True, True)
    v.rsm()
    assert v.nmi_masked, "the SMI had come inside an NMI"
    v.set_events(smm=False)
    got = v.events()
    assert (got.nmi_masked, got.smm, got.latched_init) == (False, False, False)
    assert v.get_mp_state() is r.MpState.RUNNABLE


def test_set_events_replaces_what_was_queued() -> None:
    """Exception and interrupt have no flag of their own: what is not given is gone."""
    m = booted()
    v = m.vcpus[1]
    v.set_events(exception=6, interrupt=0x41)
    assert (v.events().exception, v.events().interrupt) == (6, 0x41)
    v.set_events()
    assert (v.events().exception, v.events().interrupt) == (None, None)
    v.set_events(interrupt=0x41)
    m.trace.enable()
    assert v.run()
    assert m.trace.lines()[-2] == "kvm_inj_virq: IRQ 0x41 [reinjected]"
    for bad in (2, 32):
        with pytest.raises(ValueError, match="exception"):
            v.set_events(exception=bad)


def test_set_events_refuses_smm() -> None:
    """Where the kernel has no SMM, and while the vCPU waits for SIPI."""
    v = booted(smm=False).vcpus[1]
    with pytest.raises(ValueError, match="no CONFIG_KVM_SMM"):
        v.set_events(smm=True)
    v = booted(kernel="6.12").vcpus[1]
    v.set_mp_state(r.MpState.INIT_RECEIVED)
    with pytest.raises(ValueError, match="waits for SIPI"):
        v.set_events(smm=True)
    v.set_events(smm=False, latched_init=True)
    assert v.events().latched_init


def test_sregs_of_a_boot_cpu_at_its_reset_vector() -> None:
    """Old user space resets the boot CPU by KVM_SET_SREGS alone: it runs again."""
    m = booted()
    for v, state in zip(m.vcpus, (r.MpState.RUNNABLE, r.MpState.HALTED), strict=True):
        v.set_mp_state(r.MpState.HALTED)
        v.rip, m.mem[v.own + L.K_CS] = 0xFFF0, 0xF000
        v.set_sregs()
        assert v.get_mp_state() is state


@pytest.mark.parametrize("vendor", VENDORS)
def test_nmis_and_smis_of_user_space_are_those_of_ipis(vendor: str) -> None:
    """KVM_NMI counts up to two, with NMIs that others send; KVM_SMI is taken by the next entry, before them."""
    m = booted(vendor)
    v = m.vcpus[1]
    v.nmi()
    send(m, NMI)
    v.nmi()
    assert v.mode == 0
    assert v.events().nmi_pending == 2
    v.smi()
    assert v.run()
    assert (v.smm, v.counters()["smis"]) == (True, 1)
    v.rsm()
    run(v)
    assert (v.smm, v.nmi_masked, v.events().nmi_pending) == (False, True, 1)


def test_user_spaces_smi_needs_smm() -> None:
    with pytest.raises(ValueError, match=r"KVM_SMI.*ENOTTY"):
        booted(smm=False, kernel="6.18").vcpus[1].smi()
    booted(smm=False, kernel="5.10").vcpus[1].smi()


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_waits_behind_an_smi_forces_no_exit(vendor: str) -> None:
    """enter_smm sets RFLAGS, which asks for an EVENT: the entry is cancelled, and the NMI then asks for its window."""
    m = booted(vendor)
    v = m.vcpus[1]
    v.nmi()
    v.smi()
    m.trace.enable()
    assert v.run()
    entries = [line for line in m.trace.lines() if line.startswith("kvm_entry")]
    assert len(entries) == 1
    assert "immediate" not in entries[0]
    assert (v.smm, v.nmi_window, v.events().nmi_pending) == (True, True, 1)
