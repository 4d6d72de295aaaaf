"""Whom the effects of an exit, an ioctl, a message or a device are for, and what each of them needs.

test_property.py holds these lists against the oracle; here are the ways to get one, and their ends.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastexit as fx
from conftest import INTERPRETED
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit.declare import load

ICR = 0x830
ALL_BUT_SELF = fx.icr(vector=0x41, shorthand=fx.Shorthand.ALL_BUT_SELF)
NOTIFY, WAKE, KICK, DOORBELL = fx.Effect.NOTIFY, fx.Effect.WAKE, fx.Effect.KICK, fx.Effect.DOORBELL


def running(vcpus: int = 4, **options: object) -> fx.Machine:
    """Everybody in the guest, with APICs that accept."""
    m = fx.Machine(vcpus=vcpus, **options)  # type: ignore[arg-type]
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(0x808, 0)
    return m


def avic() -> fx.Machine:
    m = fx.Machine(vcpus=4, vendor="svm")
    for v in m.vcpus:
        v.mmio_write(r.APIC_SPIV, 0x1FF)
    for v in m.vcpus:
        v.mmio_write(r.APIC_TASKPRI, 0)
    return m


def records(*accesses: tuple[int, int, int | None]) -> np.ndarray:
    """A batch of WRMSRs, and of RDMSRs where there is no value: vCPU, MSR, value."""
    exits = np.zeros(len(accesses), dtype=fx.EXIT)
    for exit, (vcpu, msr, value) in zip(exits, accesses, strict=True):
        exit["vcpu"], exit["msr"], exit["value"] = vcpu, msr, value or 0
        exit["reason"] = fx.VmxExit.MSR_READ if value is None else fx.VmxExit.MSR_WRITE
    return exits


def asleep(v: fx.Vcpu) -> None:
    while v.ack() is not None:
        v.eoi()
    v.rflags |= r.RFLAGS_IF
    assert v.exit(fx.SvmExit.HLT if v.machine.vendor == "svm" else fx.VmxExit.HLT).blocked


def test_each_target_with_what_it_needs() -> None:
    m = running(6)
    v = m.vcpus[0]
    asleep(m.vcpus[2])
    m.vcpus[4].set_msr(0x80F, 0xFF)  # discards, and is out of the guest; a new APIC map has the others scan
    for other in m.vcpus[:4]:
        if other.index != 2:
            other.wrmsr(0x808, 0)
    m.vcpus[5].put()
    assert v.wrmsr(ICR, fx.icr(dest=3, vector=0x51)).effects is NOTIFY
    assert v.targets == ((3, NOTIFY),)
    out = v.wrmsr(ICR, ALL_BUT_SELF)
    assert (out.accepted, out.effects) == (4, NOTIFY | WAKE)
    assert v.targets == ((1, NOTIFY), (2, WAKE))  # 3 has been told, 5 looks when it is loaded
    assert [type(target) for target in v.targets] == [fx.Target] * 2
    assert v.targets[0].effect is NOTIFY


def test_a_sleeper_of_the_short_way() -> None:
    """One exit, one target, which sleeps: the wake-up is its, too."""
    m = running()
    asleep(m.vcpus[2])
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=2, vector=0x51))
    assert (out.reentered, out.effects, m.vcpus[0].targets) == (True, WAKE, ((2, WAKE),))
    asleep(m.vcpus[3])
    (got,) = m.run(records((0, ICR, fx.icr(dest=3, vector=0x51))))
    assert (int(got["value"]) >> 32, int(got["value"]) & 0xFFFF) == (1, WAKE << 12 | 3)


@pytest.mark.parametrize("kernel", ["5.8", "6.18"])
@pytest.mark.parametrize("door", ["exit", "batch", "host"])
def test_every_exit_begins_a_list(door: str, kernel: str) -> None:
    """A fast exit, a generic one, a read, an ioctl: what an earlier one has left is gone."""
    m = running(kernel=kernel)
    v = m.vcpus[0]
    for second in (fx.icr(dest=9, vector=0x41), None):
        v.wrmsr(ICR, fx.icr(vector=0x60 if second else 0x61, shorthand=fx.Shorthand.ALL_BUT_SELF))
        assert len(v.targets) == 3
        for other in m.vcpus[1:]:
            other.hw_notify()
        if door == "exit":
            v.wrmsr(ICR, second) if second else v.rdmsr(0x802)
        elif door == "host":
            v.set_msr(ICR, second) if second else v.get_msr(0x802)
        else:
            m.run(records((0, ICR, second) if second else (0, 0x802, None)))
        assert v.targets == ()


def test_senders_have_lists_of_their_own() -> None:
    m = running()
    for sender, dest in ((0, 1), (1, 2), (2, 3)):
        m.vcpus[sender].wrmsr(ICR, fx.icr(dest=dest, vector=0x41))
    assert [v.targets for v in m.vcpus] == [((1, NOTIFY),), ((2, NOTIFY),), ((3, NOTIFY),), ()]


def test_messages() -> None:
    m = running()
    assert (m.signal_msi(0xFEE0_2000, 0x51), m.targets) == (1, ((2, NOTIFY),))
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x52))
    assert m.targets == ((2, NOTIFY),)
    assert (m.signal_msi(0xFEEF_F000, 0x51), m.targets) == (4, ((0, NOTIFY), (3, NOTIFY)))
    assert (m.signal_msi(0xFEE0_2000, 0x51), m.targets) == (1, ())
    with pytest.raises(ValueError, match="bits 39:32"):
        running(x2apic_api=1).signal_msi(1 << 32, 0x51)


def test_devices() -> None:
    m = running(vtd_pi=True)
    m.pi_update_irte(1, 0, 0xFEE0_3000, 0x61)
    m.pi_update_irte(2, 1, 0xFEEF_F000, 0x62)  # to all: remapped
    assert (m.device_interrupt(1).effects, m.targets) == (NOTIFY, ((3, NOTIFY),))
    assert (m.device_interrupt(1).effects, m.targets) == (fx.Effect.NONE, ())
    assert m.device_interrupt(2).accepted == 4
    assert m.targets == ((0, NOTIFY), (1, NOTIFY), (2, NOTIFY))


def test_inhibits() -> None:
    """Set by user space, or by a guest that gives itself another id: everybody in the guest leaves it."""
    m = running()
    m.vcpus[2].put()
    assert m.set_inhibit(r.Inhibit.ABSENT) is KICK
    assert m.targets == ((0, KICK), (1, KICK), (3, KICK))
    assert m.set_inhibit(r.Inhibit.ABSENT) is fx.Effect.NONE
    assert m.targets == ()
    m = avic()
    out = m.vcpus[1].mmio_write(r.APIC_ID, 3 << 24)
    assert (out.effects, m.vcpus[1].targets) == (KICK, ((0, KICK), (2, KICK), (3, KICK)))
    m = avic()
    assert m.vcpus[2].set_msr(r.MSR_APICBASE, 0xFEC0_0800)
    assert m.vcpus[2].targets == ((0, KICK), (1, KICK), (3, KICK))


def test_paravirtual_ipis() -> None:
    m = running()
    v = m.vcpus[0]
    assert v.hypercall(r.HC_SEND_IPI, 0b1110, 0, 0, 0x41).effects is NOTIFY
    assert v.targets == ((1, NOTIFY), (2, NOTIFY), (3, NOTIFY))
    asleep(m.vcpus[2])
    assert v.hypercall(r.HC_KICK_CPU, 0, 2).effects is WAKE
    assert v.targets == ((2, WAKE),)


def test_what_hardware_sends() -> None:
    m = running(ipiv=True)
    v = m.vcpus[1]
    out = v.hw_wrmsr(ICR, fx.icr(dest=3, vector=0x41))
    assert (out.path, v.targets) == (fx.Path.HARDWARE, ((3, NOTIFY),))
    assert v.hw_wrmsr(ICR, fx.icr(dest=3, vector=0x42)).path is fx.Path.HARDWARE
    assert v.targets == ()
    m = avic()
    for v in m.vcpus:
        v.load(v.index)
        v.mmio_write(r.APIC_TASKPRI, 0)
    v = m.vcpus[3]
    out = v.hw_mmio_write(r.APIC_ICR, ALL_BUT_SELF)
    assert (out.path, out.effects) == (fx.Path.HARDWARE, DOORBELL)
    assert v.targets == ((0, DOORBELL), (1, DOORBELL), (2, DOORBELL))
    asleep(m.vcpus[1])
    out = v.hw_mmio_write(r.APIC_ICR, ALL_BUT_SELF + 1)  # KVM sends once more what hardware could not send to all
    assert (out.path, v.targets) == (fx.Path.SLOW, ((0, DOORBELL), (1, WAKE), (2, DOORBELL)))
    asleep(m.vcpus[1])
    v.hw_mmio_write(r.APIC_ICR2, 1 << 24)
    out = v.hw_mmio_write(r.APIC_ICR, 0x43)
    assert (out.effects, v.targets) == (WAKE, ((1, WAKE),))


def test_what_the_way_to_an_entry_asks_for() -> None:
    """An interrupt window that AVIC is inhibited for, the map that an INIT changes: of the exit before, or of run()."""
    m = fx.Machine(vcpus=3, vendor="svm", irqchip="split", kernel="6.18")
    for v in m.vcpus:
        v.mmio_write(r.APIC_SPIV, 0x1FF)
    v = m.vcpus[1]
    v.mmio_write(r.APIC_LVT0, r.LVT0_BOOT)
    for other in m.vcpus:
        other.exit(fx.SvmExit.INTERRUPT)
    v.interrupt(0x31)
    assert v.run()
    assert (m.vcpus[2].mode, m.inhibits) == (r.EXITING_GUEST_MODE, {r.Inhibit.IRQWIN})
    assert v.targets == ((0, KICK), (2, KICK))
    for other in m.vcpus:
        other.exit(fx.SvmExit.INTERRUPT)
    v.rflags |= r.RFLAGS_IF
    out = v.exit(fx.SvmExit.VINTR)  # the window opens, and the outcome says so
    assert (out.effects, v.targets, m.inhibits) == (KICK, ((0, KICK), (2, KICK)), set())

    m = avic()
    for i, ldr in enumerate((1, 2, 2, 4)):
        m.vcpus[i].mmio_write(r.APIC_LDR, ldr << 24)
    assert m.inhibits == {r.Inhibit.LOGICAL_ID_ALIASED}
    for v in m.vcpus:
        v.exit(fx.SvmExit.INTERRUPT)
    m.vcpus[0].mmio_write(r.APIC_ICR2, 2 << 24)
    m.vcpus[0].mmio_write(r.APIC_ICR, fx.icr(delivery=fx.DeliveryMode.INIT, level=True))
    assert m.vcpus[0].targets == ((2, KICK),)
    out = m.vcpus[2].exit(fx.SvmExit.INTERRUPT)
    assert (out.blocked, out.effects, out.targets) == (True, KICK, m.vcpus[2].targets)
    assert {target.vcpu for target in out.targets} == {0, 1, 3}
    assert m.inhibits == set()
    assert m.vcpus[3].mode == r.EXITING_GUEST_MODE


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_whom_an_init_kicks(dispatcher: str, vendor: str) -> None:
    """Everybody in the guest scans the IOAPIC again for the new map: said by an exit, run() and an ioctl, once."""
    m = running(4, dispatcher=dispatcher, vendor=vendor)
    v = m.vcpus[2]
    interrupt = fx.SvmExit.INTERRUPT if vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT
    init = fx.icr(dest=2, delivery=fx.DeliveryMode.INIT, level=True)
    others = [((n, KICK),) for n in (0, 1, 3)]

    def again() -> None:
        m.vcpus[0].wrmsr(ICR, fx.icr(dest=2, vector=1, delivery=fx.DeliveryMode.SIPI, level=True))
        v.run()
        v.wrmsr(0x80F, 0x1FF)
        for one in m.vcpus:
            one.exit(interrupt)
        m.vcpus[0].wrmsr(ICR, init)

    m.vcpus[0].wrmsr(ICR, init)
    out = v.exit(interrupt)
    assert (out.effects, [(target,) for target in out.targets]) == (KICK, others)
    again()
    assert v.get_mp_state() == r.MP_INIT_RECEIVED
    assert [(target,) for target in v.targets] == others
    v.set_mp_state(r.MP_RUNNABLE)
    assert v.run()
    assert v.exit(interrupt).effects == fx.Effect.NONE


def _init_for_one_outside(**options: object) -> fx.Machine:
    """vCPU 3 is out of the guest, and takes an INIT when it comes in: the new APIC map has all others scan."""
    m = running(**options)
    v = m.vcpus[3]
    v.get_lapic()
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=3, delivery=fx.DeliveryMode.INIT, level=True))
    assert m.vcpus[0].targets == ()
    return m


SCANS = ((0, KICK), (1, KICK), (2, KICK))
DOORS = {
    "wrmsr": lambda v: v.wrmsr(0x808, 0x10),
    "icr": lambda v: v.wrmsr(ICR, fx.icr(dest=9, vector=0x41)),
    "exit": lambda v: v.exit(fx.VmxExit.EXTERNAL_INTERRUPT),
    "hw_wrmsr": lambda v: v.hw_wrmsr(0x808, 0x10),
    "rdmsr": lambda v: v.rdmsr(0x802),
    "port": lambda v: v.io_write(0x20, 0),
}


@pytest.mark.parametrize(
    "options", [{}, {"dispatcher": "compiled"}, {"costs": "skylake-retpoline"}, {"apicv": False}], ids=str
)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kernel", ["5.6", "6.18"])
def test_an_exit_has_what_its_own_entry_asked_for(kernel: str, door: str, options: dict) -> None:
    """A vCPU outside exits: the KVM_RUN that this stands for asks something of others, and the outcome says whom."""
    m = _init_for_one_outside(kernel=kernel, **options)
    v = m.vcpus[3]
    out = DOORS[door](v)
    assert v.targets == SCANS
    if isinstance(out, fx.Outcome):
        assert (out.effects, out.targets) == (KICK, SCANS)
    assert v.wrmsr(0x808, 0x20).targets == v.targets == ()


def test_a_batch_has_it_too() -> None:
    m = _init_for_one_outside()
    got = m.run(records((3, 0x808, 0x10), (3, 0x808, 0x20)))
    assert [int(value) for value in got["value"]] == [3 << 32 | KICK << 12, 0]


def test_a_vcpu_that_somebody_brought_in_has_told_of_it() -> None:
    """Dispatcher.start_run has no outcome, and the exit behind it is not asked for what that sent."""
    for dispatcher in ("python", "compiled"):
        m = _init_for_one_outside(dispatcher=dispatcher)
        v = m.vcpus[3]
        m.dispatcher.start_run(v)
        assert v.targets == SCANS
        assert v.wrmsr(0x808, 0x10).effects is fx.Effect.NONE
        assert v.targets == ()


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False])
def test_an_outcome_with_costs_leaves_nobody_out(vendor: str, apicv: bool) -> None:
    """Its targets are the exit's, those among them whom no IPI reaches; each has its cycle."""
    m = running(vendor=vendor, apicv=apicv, costs="epyc" if vendor == "svm" else "skylake-retpoline")
    rng, kicks = np.random.default_rng(3), 0
    for _ in range(400):
        v = m.vcpus[int(rng.integers(4))]
        match int(rng.integers(8)):
            case 0:
                out = v.wrmsr(0x80F, int(rng.choice([0xFF, 0x1FF])))
            case 1:
                v.mem_write(0xFEC0_0000, 0x10 + int(rng.integers(48)))
                out = v.mem_write(0xFEC0_0010, int(rng.integers(1 << 32)) & 0x0003_8AFF)
            case 2:
                v.get_lapic()
                continue
            case 3:
                out = v.wrmsr(ICR, fx.icr(dest=int(rng.integers(4)), delivery=fx.DeliveryMode.INIT, level=True))
            case 4:
                out = v.wrmsr(0x80B, 0)
            case _:
                out = v.wrmsr(ICR, fx.icr(vector=0x41 + int(rng.integers(9)), shorthand=int(rng.integers(4)), dest=1))
        assert sorted(out.targets) == sorted(v.targets)
        united = fx.Effect.NONE
        for one in out.targets:
            united |= one.effect
        assert united == out.effects
        assert [(one.vcpu, one.effect) for one in out.sent] == list(out.targets)
        cycles = [one.cycles for one in out.sent]
        assert cycles == sorted(cycles)
        assert not cycles or cycles[-1] <= out.cycles_spent
        kicks += sum(one.effect is KICK for one in out.targets)
        for one in m.vcpus:
            one.settle()
    assert kicks > 20


def test_wake_up_vector() -> None:
    """0xF1 makes a vCPU exit: its pCPU wakes whoever blocks there."""
    m = running(vtd_pi=True)
    for sleeper in (1, 2):
        m.vcpus[sleeper].load(0)
        asleep(m.vcpus[sleeper])
        load("hardware_post")(m.handle, sleeper, 0x51)
    v = m.vcpus[0]
    v.rdmsr(0x802)
    out = v.exit(fx.VmxExit.EXTERNAL_INTERRUPT, intr_info=1 << 31 | r.POSTED_INTR_WAKEUP_VECTOR)
    assert (out.effects, v.targets) == (WAKE, ((1, WAKE), (2, WAKE)))


def test_batch_says_how_many_and_the_first() -> None:
    m = running()
    one = (0, ICR, fx.icr(dest=2, vector=0x41))
    got = m.run(records(one, (1, ICR, ALL_BUT_SELF), (1, 0x802, None), one))
    told = [(int(value) >> 32, int(value) & 0xFFF, int(value) >> 12 & 15) for value in got["value"]]
    assert told == [(1, 2, NOTIFY), (2, 0, NOTIFY), (0, 1, 0), (0, 0, 0)]
    assert m.vcpus[1].targets == ()


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels take long for so many")
def test_everybody_at_once() -> None:
    """As many targets as there can be, each in its place."""
    m = running(L.MAX_VCPUS)
    v = m.vcpus[7]
    assert v.wrmsr(ICR, ALL_BUT_SELF).accepted == L.MAX_VCPUS - 1
    assert v.targets == tuple((i, NOTIFY) for i in range(L.MAX_VCPUS) if i != 7)
    assert v.targets[-1] == (L.MAX_VCPUS - 1, NOTIFY)
    assert m.vcpus[6].targets == m.vcpus[8].targets == m.targets == ()


def test_snapshots_have_no_lists() -> None:
    """What is in one is what the machine would be without its senders' lists; one that claims a list is refused."""
    m, other = running(), running()
    m.vcpus[0].wrmsr(ICR, ALL_BUT_SELF)
    other.vcpus[0].wrmsr(ICR, ALL_BUT_SELF)
    other.mem[other.vcpus[0].own + L.K_TARGETS] = 0
    data = m.snapshot()
    assert data == other.snapshot()
    assert len(m.vcpus[0].targets) == 3
    assert fx.Machine.restore(data).vcpus[0].targets == ()


@pytest.mark.parametrize(("count", "place"), [(L.MAX_VCPUS - 1, True), (L.MAX_VCPUS, False), (0xFFFF_FFFF, False)])
def test_a_count_that_somebody_forged(count: int, place: bool) -> None:
    """A list ends where its row does: nothing is read or written behind it, and no sum runs over."""
    m = running(vtd_pi=True)
    asleep(m.vcpus[2])
    load("hardware_post")(m.handle, 2, 0x51)
    v, (sleeper, row) = m.vcpus[1], (m.vcpus[2], L.TARGETS + L.TARGETS_STRIDE)
    m.mem[v.own + L.K_TARGETS] = head = count << 32 | 3
    assert len(v.targets) == min(count, L.MAX_VCPUS)
    woken = load("external_interrupt")(m.handle, 1, 1 << 31 | r.POSTED_INTR_WAKEUP_VECTOR)
    assert woken == 0
    sleeper.load(1)
    asleep(sleeper)
    load("hardware_post")(m.handle, 2, 0x52)
    m.mem[v.own + L.K_TARGETS] = head
    assert fx.OUTCOMES[load("external_interrupt")(m.handle, 1, 1 << 31 | r.POSTED_INTR_WAKEUP_VECTOR)].effects is WAKE
    assert m.mem[v.own + L.K_TARGETS] == (head + (1 << 32) if place else head)
    written = np.flatnonzero(m.words[L.TARGETS : L.HV]).tolist()
    assert written == ([row + L.TARGETS_STRIDE - 1 - L.TARGETS] if place else [])


def test_senders_that_do_not_exist() -> None:
    m = running()
    signal = load("signal_msi")
    for sender in (0, L.HOST - 1, L.SENDERS, L.NONE):
        before = m.words.copy()
        assert signal(m.handle, 0xFEE0_2000, 0x51, sender) == L.NONE
        assert (m.words == before).all()
    assert signal(m.handle, 0xFEE0_2000, 0x51, L.SENDERS - 1) != L.NONE
