"""The oracle's run loop against a real /dev/kvm: sleep, interrupts of user space's PIC, MSR filters, IOAPIC EOIs.

Each trial sets a whole state, lets a real guest run, and compares what it did with what the model says.
"""

from __future__ import annotations

import random
import struct

import pytest

import oracle
import oracle_apic
import strategies as s
from fastexit import regs as r
from fastexit.reasons import KvmExit
from kvm_vm import API_FLAGS_SPLIT, UNUSABLE, RealKvm

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(UNUSABLE is not None, reason=UNUSABLE or "")]


def machines(**keywords: object) -> tuple[oracle.Machine, RealKvm]:
    """The same machine twice, every vCPU in x2APIC mode and able to run."""
    real = RealKvm(apic_ids=[0, 1], **keywords)
    model = oracle.Machine(apic_ids=[0, 1], hv_timer=False, fastpath=False, **keywords)
    real.start_guests()
    for machine in (model, real):
        for vcpu in machine.vcpus:
            vcpu.set_mp_state(r.MP_RUNNABLE)
            vcpu.set_msr(r.MSR_APICBASE, vcpu.get_msr(r.MSR_APICBASE) | r.APICBASE_EXTD)
            vcpu.set_msr(r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF)
    return model, real


def page_with(vcpu: oracle_apic.Vcpu, rng: random.Random, **registers: int) -> bytes:
    """The vCPU's page with some vectors pending or in service."""
    page = bytearray(vcpu.get_lapic())
    for base, likely in ((r.APIC_IRR, 0.12), (r.APIC_ISR, 0.06), (r.APIC_TMR, 0.1)):
        for word in range(8):
            bits = 1 << rng.randrange(32) if rng.random() < likely else 0
            struct.pack_into("<I", page, base + 0x10 * word, bits)
    for name, value in registers.items():
        struct.pack_into("<I", page, getattr(r, f"APIC_{name}"), value)
    return bytes(page)


def test_filtered_msrs() -> None:
    """A WRMSR that the filter denies, that is bad, or that is of no MSR: #GP, or user space's business."""
    rng = random.Random(1)
    seen = set()
    for _ in range(12):
        model, real = machines()
        with real:
            deny = rng.random() < 0.3
            ranges = [
                oracle.MsrRange(rng.randrange(1, 4), base, 8, rng.getrandbits(8))
                for base in rng.sample((0x1B, 0x6DC, 0x6E0, 0x800, 0x830), rng.randrange(1, 4))
            ]
            reasons = rng.choice((0, r.MSR_EXIT_FILTER, r.MSR_EXIT_INVAL, r.MSR_EXIT_UNKNOWN, 7))
            model.msr_filter, model.user_space_msr = (deny, ranges), reasons
            real.set_msr_filter(deny, ranges)
            real.ask_user_space(reasons)
            for vcpu in (model.vcpus[0], real.vcpus[0]):
                vcpu.set_msr(r.MSR_X2APIC_BASE + (r.APIC_LVTT >> 4), r.LVT_TIMER_DEADLINE | r.LVT_MASKED)
            for _ in range(25):
                msr = rng.choice((r.MSR_TSC_DEADLINE, r.MSR_APICBASE, r.MSR_X2APIC_ICR, 0x808, 0x805, 0x6DD))
                value = rng.choice((0, 1 << 62, 0xFEE00D00, 0xFEE00900, 0x41, 0x2000))
                error = rng.random() < 0.5
                story = f"{ranges}, default {'deny' if deny else 'allow'}, asks {reasons}: {msr:#x} {value:#x}"
                real.vcpus[0].msr_error = error
                if rng.random() < 0.7:
                    want, got = (m.vcpus[0].guest_wrmsr(msr, value) for m in (model, real))
                    exit_reason, data = KvmExit.X86_WRMSR, value
                else:
                    want, got = (m.vcpus[0].guest_rdmsr(msr) for m in (model, real))
                    exit_reason, data = KvmExit.X86_RDMSR, 0
                    if model.vcpus[0].thread.msr_asked and not error:
                        want = got  # the answer is user space's
                assert got == want, story
                asked = [(exit_reason, why, msr, data) for why in [model.vcpus[0].thread.msr_asked] if why]
                assert [a if a[0] == KvmExit.X86_WRMSR else (*a[:3], 0) for a in real.vcpus[0].asked] == asked, story
                seen.add((want if isinstance(want, str) else "read", bool(asked)))
                if asked:
                    assert model.vcpus[0].thread.msr_asked
                    model.vcpus[0].complete_msr(error=error)
                for vcpu in (model.vcpus[0], real.vcpus[0]):
                    assert vcpu.get_msr(r.MSR_APICBASE) is not None
                assert not s.differences(s.masked(model.vcpus[0].get_lapic()), s.masked(real.vcpus[0].get_lapic())), (
                    story
                )
                assert real.vcpus[0].get_msr(r.MSR_TSC_DEADLINE) == model.vcpus[0].get_msr(r.MSR_TSC_DEADLINE), story
    assert {("ok", False), ("gp", False), ("user", True)} <= seen


def test_interrupts_of_the_pic() -> None:
    """KVM_INTERRUPT on a split irqchip: taken before the APIC's own interrupts, if LINT0 lets it through."""
    rng = random.Random(2)
    model, real = machines(irqchip="split")
    refused = 0
    with real:
        pair = model.vcpus[0], real.vcpus[0]
        for _ in range(150):
            lint0 = rng.choice((0x700, 0x10700, 0x400, 0, 0x10000, 0x720))
            page = page_with(model.vcpus[0], rng, LVT0=lint0)
            for vcpu in pair:
                vcpu.set_lapic(page)
            vector = rng.randrange(16, 256)
            for _ in range(rng.randrange(3)):
                answers = set()
                for vcpu in pair:
                    try:
                        answers.add(vcpu.interrupt(vector))
                    except ValueError:
                        answers.add("refused")
                assert len(answers) == 1
                refused += "refused" in answers
            want, got = model.vcpus[0].next_interrupt(), real.vcpus[0].taken()
            assert got == want, f"LINT0 {lint0:#x}, {s.describe(('set_lapic', 0, page))}"
    assert refused


def test_halt() -> None:
    """HLT ends with the interrupt that is pending, with a tick that is, and else not at all."""
    rng = random.Random(3)
    model, real = machines()
    ends = set()
    with real:
        pair = model.vcpus[0], real.vcpus[0]
        for _ in range(120):
            lvtt = rng.choice((0x41, 0x41, r.LVT_MASKED | 0x41, 0xF0))
            page = page_with(model.vcpus[0], rng, LVTT=lvtt, TMICT=0, TMCCT=0, TASKPRI=rng.choice((0, 0, 0x50)))
            unhalted, ticks = rng.random() < 0.1, rng.random() < 0.5
            for vcpu in pair:
                vcpu.set_lapic(page)
                vcpu.set_events(nmi_pending=0, nmi_masked=True)
                if ticks:
                    vcpu.set_msr(r.MSR_X2APIC_BASE + (r.APIC_TMICT >> 4), 1)
                if unhalted:
                    vcpu.set_msr(r.MSR_X2APIC_ICR, r.DM_REMRD << 8 | 1 << 14)
            model.set_time(model.now + 1000)
            interrupts = rng.random() < 0.8
            want = model.vcpus[0].halt_and_take(interrupts=interrupts)
            got = real.vcpus[0].halt_and_take(interrupts=interrupts)
            story = f"IF {interrupts}, tick {ticks}, unhalted {unhalted}, {s.describe(('set_lapic', 0, page))}"
            assert got == want, f"expected {want}, the guest {got}: {story}"
            assert real.vcpus[0].get_mp_state() == model.vcpus[0].get_mp_state(), story
            ends.add(want if isinstance(want, str) else "taken")
            model.vcpus[0].eoi()  # this host's module ends an interrupt when it injects it
            for vcpu in pair:
                vcpu.set_mp_state(r.MP_RUNNABLE)
    assert ends == {"taken", "asleep", "went on"}


@pytest.mark.parametrize("flags", [0, r.X2API_SUPPRESS_EOI, r.X2API_NO_SUPPRESS_EOI])
def test_eoi_for_the_ioapic_of_user_space(flags: int) -> None:
    if flags & ~API_FLAGS_SPLIT:
        pytest.skip("this kernel does not know the flag")
    rng = random.Random(4)
    model, real = machines(irqchip="split", x2apic_api=flags)
    exits = 0
    with real:
        for _ in range(60):
            handled = rng.sample(range(16, 256), 12)
            real.route(handled)
            model.vcpus[0].ioapic_handled = set(handled)
            in_service = rng.choice(handled) if rng.random() < 0.7 else rng.randrange(16, 256)
            spiv = rng.choice((0x1FF, 0x11FF))
            page = bytearray(model.vcpus[0].get_lapic())
            page[r.APIC_ISR : r.APIC_ISR + 0x80] = page[r.APIC_IRR : r.APIC_IRR + 0x80] = bytes(0x80)
            for base in (r.APIC_ISR, r.APIC_TMR):
                struct.pack_into("<I", page, base + in_service // 32 * 0x10, 1 << in_service % 32)
            struct.pack_into("<I", page, r.APIC_SPIV, spiv)
            for vcpu in (model.vcpus[0], real.vcpus[0]):
                vcpu.set_lapic(bytes(page))
            real.vcpus[0].run_through()
            model.vcpus[0].run_through()
            for vcpu in (model.vcpus[0], real.vcpus[0]):
                vcpu.set_msr(r.MSR_X2APIC_EOI, 0)
            want = model.vcpus[0].run()
            model.vcpus[0].in_guest = False
            real.vcpus[0].run_through()
            asked = [(want, in_service)] if want == KvmExit.IOAPIC_EOI else []
            assert real.vcpus[0].asked == asked, f"vector {in_service:#x}, SVR {spiv:#x}, handled {handled}"
            exits += len(asked)
    assert exits
