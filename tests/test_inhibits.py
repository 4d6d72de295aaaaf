"""APICv inhibits: which reasons count, who sets them, what becomes of interrupts when APICv goes off and comes back."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.profile import as_of, since
from generations import kernels

Inhibit = r.Inhibit
ICR, APICBASE = 0x830, 0x1B
XAPIC, X2APIC = 0xFEE0_0800, 0xFEE0_0C00
SINCE_6_1 = kernels("6.1")
ONLY_6_1 = kernels("6.1", before="6.6")

USER = {Inhibit.DISABLED, Inhibit.HYPERV}
USER_6_1 = USER | {Inhibit.ABSENT, Inhibit.BLOCKIRQ, Inhibit.APIC_ID_MODIFIED, Inhibit.APIC_BASE_MODIFIED}
SVM_5_6 = {Inhibit.NESTED, Inhibit.IRQWIN, Inhibit.PIT_REINJ}
SVM_6_1 = USER_6_1 | SVM_5_6 | {Inhibit.SEV}
SVM_6_6 = SVM_6_1 | {Inhibit.PHYSICAL_ID_ALIASED, Inhibit.LOGICAL_ID_ALIASED}
COUNTING = {
    "vmx": {
        "seed-v3": set(),
        "5.6": USER,
        "6.1": USER_6_1,
        "6.6": USER_6_1 | {Inhibit.PHYSICAL_ID_ALIASED},
    },
    "svm": {
        "seed-v3": set(),
        "5.6": USER | SVM_5_6,
        "5.7": USER | SVM_5_6 | {Inhibit.X2APIC},
        "6.1": SVM_6_1,
        "6.6": SVM_6_6,
        "6.18": SVM_6_6 | {Inhibit.PHYSICAL_ID_TOO_BIG},
    },
}


def machine(vendor: str = "vmx", kernel: str = "6.18", vcpus: int = 3, **options: Any) -> fx.Machine:
    """Booted into x2APIC mode, every vCPU in the guest; xAPICs where a guest with x2APIC mode has no AVIC."""
    if vendor == "svm" and kernel in kernels("5.7", before="6.1"):
        return xapic(vendor, kernel, vcpus, **options)
    m = fx.Machine(vcpus=vcpus, vendor=vendor, kernel=kernel, **options)
    m.boot_x2apic()
    for v in m.vcpus:
        run(v)
    return m


def xapic(vendor: str = "vmx", kernel: str = "6.18", vcpus: int = 3, **options: Any) -> fx.Machine:
    """In xAPIC mode, enabled, logical ids 1, 2, 4, ...; every vCPU in the guest."""
    options = {"x2apic": vendor == "vmx" or since(kernel, "6.1")} | options
    m = fx.Machine(vcpus=vcpus, vendor=vendor, kernel=kernel, **options)
    for v in m.vcpus:
        v.mmio_write(r.APIC_SPIV, 0x1FF)
        v.mmio_write(r.APIC_LDR, 1 << 24 + v.index)
        run(v)
    return m


def run(v: fx.Vcpu) -> fx.Outcome:
    """An exit that does nothing, and the entry behind it."""
    return v.exit(fx.SvmExit.CPUID if v.machine.vendor == "svm" else fx.VmxExit.CPUID)


def send(m: fx.Machine, dest: int, vector: int) -> fx.Outcome:
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=dest, vector=vector))


def vectors(v: fx.Vcpu, first: int) -> set[int]:
    """The vectors of a set that begins at a word."""
    bits = v.machine.mem[first : first + 4].tolist()
    return {64 * i + bit for i, part in enumerate(bits) for bit in range(64) if part >> bit & 1}


def inhibit_lines(m: fx.Machine) -> list[str]:
    name = "kvm_apicv_inhibit_changed: "
    return [line.removeprefix(name) for line in m.trace.lines() if line.startswith(name)]


# ------------------------------------------------------------------------------------------------------- which count


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("vendor", COUNTING)
def test_reasons_that_count(vendor: str, kernel: str) -> None:
    """Each vendor and generation knows its own reasons; others are ignored, without a trace line."""
    m = machine(vendor, kernel)
    counting = as_of(COUNTING[vendor], kernel)
    m.trace.enable()
    windows = {Inhibit.IRQWIN} if since(kernel, "7.3") else set()  # which goes by a count there
    for reason in [reason for reason in Inhibit if reason not in windows]:
        before = m.inhibits
        m.set_inhibit(reason)
        counts = reason in counting
        assert (reason in m.inhibits) is counts, reason
        assert m.inhibits >= before
        if not counts:
            assert not any(f"reason={int(reason)}," in line for line in inhibit_lines(m))
    for v in m.vcpus:
        run(v)
        assert v.apicv is not bool(counting)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_machine_without_apicv(vendor: str) -> None:
    """APICv that is switched off is not inhibited further, and nobody hears of it."""
    m = machine(vendor, apicv=False)
    m.trace.enable()
    assert m.set_inhibit(Inhibit.BLOCKIRQ) == fx.Effect.NONE
    m.vcpus[1].set_msr(APICBASE, 0xFED0_0C00)
    assert (m.inhibits, inhibit_lines(m), m.vcpus[0].requests) == ({Inhibit.DISABLED}, [], 0)


@pytest.mark.parametrize(("reason", "error"), [(14, ValueError), (-1, ValueError), ("IRQWIN", TypeError)])
def test_no_such_reason(reason: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="inhibit reason"):
        fx.Machine(vcpus=1).set_inhibit(reason)


# ----------------------------------------------------------------------------------------------------- on and off again


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", SINCE_6_1)
def test_everybody_looks_again_at_the_next_entry(vendor: str, kernel: str) -> None:
    """The first reason makes vCPUs leave the guest and wakes nobody; each follows when it enters again."""
    m = machine(vendor, kernel)
    m.vcpus[2].set_msr(0x808, 0)  # in user space
    assert m.set_inhibit(Inhibit.BLOCKIRQ) == fx.Effect.KICK
    assert [v.mode for v in m.vcpus] == [2, 2, 0]
    assert all(v.requests == r.REQ_APICV_UPDATE and v.apicv for v in m.vcpus)
    run(m.vcpus[1])
    assert [v.apicv for v in m.vcpus] == [True, False, True]
    assert m.vcpus[1].requests == 0
    assert m.set_inhibit(Inhibit.BLOCKIRQ, False) == fx.Effect.KICK
    for v in m.vcpus:
        run(v)
    assert [v.apicv for v in m.vcpus] == [True, True, True]


def test_sleeper_sleeps_on() -> None:
    """A vCPU that blocks is not woken; it has its request for when it runs."""
    m = machine()
    v = m.vcpus[1]
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=5))
    assert run(v).blocked
    for other in (m.vcpus[0], m.vcpus[2]):
        other.get_msr(APICBASE)
    assert m.set_inhibit(Inhibit.BLOCKIRQ) == fx.Effect.NONE
    assert m.mem[v.hot + L.HOT_BLOCKED] == 1
    assert v.requests & ~r.REQ_SCAN_IOAPIC == r.REQ_APICV_UPDATE | r.REQ_EVENT, (
        "the INIT that it waits behind asked for an EVENT"
    )


@pytest.mark.parametrize("kernel", ["5.8", "6.1", "6.18"])
def test_only_the_first_and_the_last_reason_matter(kernel: str) -> None:
    """Between them nobody is disturbed. Since 6.1 every call is traced, before only those that switch APICv."""
    m = machine("svm", kernel)
    m.trace.enable()
    steps = [
        (Inhibit.HYPERV, True, True, 0x2),
        (Inhibit.HYPERV, True, False, 0x2),
        (Inhibit.PIT_REINJ, True, False, 0x202),
        (Inhibit.HYPERV, False, False, 0x200),
        (Inhibit.PIT_REINJ, False, True, 0),
        (Inhibit.PIT_REINJ, False, False, 0),
    ]
    for reason, on, switches, inhibits in steps:
        for v in m.vcpus:
            run(v)
        m.trace.clear()
        assert m.set_inhibit(reason, on) == (fx.Effect.KICK if switches else fx.Effect.NONE)
        assert all(bool(v.requests) is switches for v in m.vcpus)
        records = [a[:3].tolist() for e, _, a in m.trace.records() if e == L.TP_APICV_INHIBIT_CHANGED]
        assert records == ([[reason, on, inhibits]] if switches or since(kernel, "6.1") else [])


def test_what_was_posted_is_not_lost() -> None:
    """VMX: a vector that is in PIR when APICv goes off reaches IRR at the next entry, which also injects it."""
    m = machine()
    v = m.vcpus[1]
    assert send(m, 1, 0x41).effects == fx.Effect.NOTIFY
    m.set_inhibit(Inhibit.BLOCKIRQ)
    v.rflags |= r.RFLAGS_IF
    assert v.pid[:4].any()
    run(v)
    assert (v.apicv, v.pid[:4].any(), v.injected) == (False, False, 0x41)
    assert (vectors(v, v.vec + L.VEC_IRR), vectors(v, v.own + L.K_ISR)) == (set(), {0x41})


def test_posted_behind_the_update_is_not_lost() -> None:
    """VMX: an entry syncs PIR whether or not APICv is active on this vCPU."""
    m = machine()
    v = m.vcpus[1]
    m.set_inhibit(Inhibit.BLOCKIRQ)
    run(v)
    v.pid[1] |= 1 << 0x45 - 64
    v.pid[4] |= r.PID_ON
    run(v)
    assert (v.apicv, vectors(v, v.vec + L.VEC_IRR), v.pid[:4].any()) == (False, {0x45}, False)


@pytest.mark.parametrize(
    ("vendor", "active", "inhibited"),
    [("vmx", fx.Effect.NOTIFY, fx.Effect.KICK), ("svm", fx.Effect.DOORBELL, fx.Effect.KICK)],
)
def test_delivery_follows(vendor: str, active: fx.Effect, inhibited: fx.Effect) -> None:
    """A running target is notified or rung while APICv is on, kicked while it is off."""
    m = machine(vendor)
    m.vcpus[1].rflags |= r.RFLAGS_IF  # or the second one asks for a window, which keeps AVIC off
    assert send(m, 1, 0x41).effects == active
    m.set_inhibit(Inhibit.HYPERV)
    for v in m.vcpus:
        run(v)
    assert send(m, 1, 0x42).effects == inhibited
    assert m.vcpus[1].requests & r.REQ_EVENT
    m.set_inhibit(Inhibit.HYPERV, False)
    for v in m.vcpus:
        run(v)
    assert send(m, 1, 0x63).effects == active
    assert m.vcpus[1].pending() == 0x63


def test_guest_interrupt_status_comes_back() -> None:
    """VMX: with APICv on again, SVI is the highest vector in service and RVI the highest that waits."""
    m = machine()
    v = m.vcpus[1]
    m.set_inhibit(Inhibit.BLOCKIRQ)
    for vcpu in m.vcpus:
        run(vcpu)
    send(m, 1, 0x61)
    assert v.ack() == 0x61
    send(m, 1, 0x31)
    m.set_inhibit(Inhibit.BLOCKIRQ, False)
    run(v)
    assert (m.mem[v.own + L.K_SVI], m.mem[v.vec + L.VEC_RVI]) == (0x61, 0x31)
    assert (m.mem[v.own + L.K_ISR_COUNT], m.mem[v.own + L.K_ISR_CACHE]) == (1, L.NONE)


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_interrupts_in_service_are_counted_again(vendor: str) -> None:
    """Without APICv EOIs go by a count of ISR bits, which APICv does not keep."""
    m = machine(vendor)
    v = m.vcpus[1]
    for vector in (0x31, 0x61):
        send(m, 1, vector)
        assert v.ack() == vector
    m.set_inhibit(Inhibit.HYPERV)
    run(v)
    assert (m.mem[v.own + L.K_ISR_COUNT], m.mem[v.own + L.K_ISR_CACHE]) == (2, L.NONE)
    assert [v.eoi(), v.eoi(), v.eoi()] == [0x61, 0x31, None]


# -------------------------------------------------------------------------------------------------- what the guest does


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("api", [0, r.X2ApicApi.USE_32BIT_IDS])
def test_aliased_id(vendor: str, api: int) -> None:
    """An xAPIC id that two vCPUs have drops the map, unless ids have 32 bits; repaired, APICv is back."""
    m = xapic(vendor, x2apic_api=api)
    v = m.vcpus[1]
    out = v.mmio_write(r.APIC_ID, 0)
    assert out.effects == fx.Effect.KICK
    want = {Inhibit.APIC_ID_MODIFIED}
    if not api:
        want |= {Inhibit.PHYSICAL_ID_ALIASED} | ({Inhibit.LOGICAL_ID_ALIASED} if vendor == "svm" else set())
    assert m.inhibits == want
    assert [vcpu.apicv for vcpu in m.vcpus] == [True, False, True]
    run(m.vcpus[0])
    assert not m.vcpus[0].apicv
    v.mmio_write(r.APIC_ID, 1 << 24)
    assert (m.inhibits, v.apicv) == (set(), True)


@pytest.mark.parametrize("kernel", ["5.8", *SINCE_6_1])
def test_modified_id(kernel: str) -> None:
    """An id of its own inhibits too, since 6.1; 6.1 never forgives it."""
    m = xapic(kernel=kernel)
    m.vcpus[1].mmio_write(r.APIC_ID, 7 << 24)
    assert m.inhibits == ({Inhibit.APIC_ID_MODIFIED} if since(kernel, "6.1") else set())
    m.vcpus[1].mmio_write(r.APIC_ID, 1 << 24)
    assert m.inhibits == ({Inhibit.APIC_ID_MODIFIED} if kernel in ONLY_6_1 else set())


@pytest.mark.parametrize("kernel", SINCE_6_1)
def test_modified_id_in_a_page(kernel: str) -> None:
    """KVM_SET_LAPIC of a page with another id counts as well."""
    m = xapic(kernel=kernel)
    page = bytearray(m.vcpus[1].get_lapic())
    page[r.APIC_ID + 3] = 9
    m.vcpus[1].set_lapic(bytes(page))
    assert m.inhibits == {Inhibit.APIC_ID_MODIFIED}


@pytest.mark.parametrize("kernel", SINCE_6_1)
def test_page_while_inhibited(kernel: str) -> None:
    """Nothing is mapped at the page then, so another vCPU's access is an EPT violation, each time."""
    m = xapic(kernel=kernel)
    v, other = m.vcpus[:2]
    for vcpu in v, other:
        run(vcpu)
    other.mmio_write(r.APIC_ID, 7 << 24)
    run(v)
    m.trace.enable()
    v.hw_mmio_write(r.APIC_ICR2, 2 << 24)
    v.hw_mmio_write(r.APIC_ICR2, 3 << 24)
    assert v.hw_mmio_read(r.APIC_ICR2) == 3 << 24
    exits = [[int(args[0]), int(args[2])] for event, _, args in m.trace.records() if event == L.TP_EXIT]
    assert exits == [[fx.VmxExit.EPT_VIOLATION, qualification] for qualification in (0x182, 0x182, 0x181)]


def test_long_ids_are_compared_by_their_low_byte() -> None:
    """vCPU 0x102 has xAPIC id 2 and is unmodified; vCPU 2 beside it is an alias."""
    m = fx.Machine(apic_ids=[0, 0x102])
    m.vcpus[0].mmio_write(r.APIC_SPIV, 0x1FF)
    assert m.inhibits == set()
    m.add_vcpu(2)
    m.vcpus[0].mmio_write(r.APIC_SPIV, 0xFF)
    assert m.inhibits == {Inhibit.PHYSICAL_ID_ALIASED}


@pytest.mark.parametrize(
    ("register", "value"),
    [(r.APIC_LDR, 1 << 24), (r.APIC_LDR, 0x06 << 24), (r.APIC_DFR, 0)],
    ids=["somebody else's bit", "two bits", "another model"],
)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", ["6.1", "6.18"])
def test_useless_logical_map(kernel: str, vendor: str, register: int, value: int) -> None:
    """A logical map that is no use inhibits AVIC, not VMX's APICv, which delivers by KVM's map."""
    m = xapic(vendor, kernel)
    m.vcpus[1].mmio_write(register, value)
    inhibited = vendor == "svm" and since(kernel, "6.6")
    assert m.inhibits == ({Inhibit.LOGICAL_ID_ALIASED} if inhibited else set())
    m.vcpus[1].set_msr(APICBASE, XAPIC & ~r.APICBASE_EN)
    assert m.inhibits == set()


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", ["5.8", *SINCE_6_1])
def test_moved_page(kernel: str, vendor: str) -> None:
    """A page that is not at 0xFEE00000 while the APIC is enabled inhibits for good; moving it back does not help."""
    m = xapic(vendor, kernel)
    v = m.vcpus[1]
    v.set_msr(APICBASE, 0xFED0_0000)
    assert m.inhibits == set(), "moved while disabled"
    want = {Inhibit.APIC_BASE_MODIFIED} if since(kernel, "6.1") else set()
    v.set_msr(APICBASE, 0xFED0_0800)
    assert m.inhibits == want
    v.set_msr(APICBASE, XAPIC)
    v.mmio_write(r.APIC_ID, 1 << 24)
    assert m.inhibits == want


def test_page_above_4_gib() -> None:
    """The base has all address bits."""
    m = xapic()
    m.vcpus[1].set_msr(APICBASE, 1 << 40 | XAPIC)
    assert m.inhibits == {Inhibit.APIC_BASE_MODIFIED}


@pytest.mark.parametrize("kernel", ["5.8", *SINCE_6_1])
@pytest.mark.parametrize("apicv", [True, False])
def test_mode_change(kernel: str, apicv: bool) -> None:
    """A new mode has APICv looked at: by a request, whatever the machine has; in 6.1 at once; before, not at all."""
    m = machine(kernel=kernel, apicv=apicv)
    v = m.vcpus[1]
    v.set_msr(APICBASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))
    assert v.requests & ~r.REQ_SCAN_IOAPIC == (
        r.REQ_APICV_UPDATE if since(kernel, "6.6") else r.REQ_EVENT if kernel in ONLY_6_1 and apicv else 0
    )
    assert v.apicv is (apicv and kernel not in ONLY_6_1)
    run(v)
    assert v.apicv is (apicv and not since(kernel, "6.1")), "no APICv for an APIC that is disabled"
    assert m.vcpus[0].apicv is apicv
    v.set_msr(APICBASE, XAPIC)
    run(v)
    assert v.apicv is apicv


def test_guest_changes_its_mode() -> None:
    """A guest's WRMSR to APICBASE is a generic exit, and the entry behind it looks at APICv."""
    m = machine()
    v = m.vcpus[1]
    out = v.wrmsr(APICBASE, v.apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD))
    assert (out.path, v.apicv, v.requests) == (fx.Path.SLOW, False, 0)


@pytest.mark.parametrize(
    ("ids", "x2avic", "too_big"),
    [
        ((0, 0xFE), False, False),
        ((0, 0xFF), False, True),
        ((0, 0x1FF), True, False),
        ((0, 0x200), True, True),
    ],
)
@pytest.mark.parametrize("kernel", fx.profiles())
def test_id_beyond_avic(kernel: str, ids: tuple[int, ...], x2avic: bool, too_big: bool) -> None:
    """AVIC addresses ids to 0xFE, x2AVIC to 0x1FF; a vCPU beyond never has AVIC, the others lose it at their entry.
    Up to 6.16 there is no such vCPU.
    """
    assert fx.Machine(apic_ids=ids, kernel=kernel).inhibits == set(), "VMX has no such limit"
    if x2avic and not since(kernel, "6.1"):
        pytest.skip("x2AVIC came with 6.1")
    if too_big and not since(kernel, "6.18"):
        with pytest.raises(ValueError, match="EINVAL"):
            fx.Machine(apic_ids=ids, vendor="svm", x2avic=x2avic, kernel=kernel)
        return
    m = fx.Machine(apic_ids=ids, vendor="svm", x2avic=x2avic, kernel=kernel, x2apic=since(kernel, "6.1"))
    assert m.inhibits == ({Inhibit.PHYSICAL_ID_TOO_BIG} if too_big else set())
    assert [v.apicv for v in m.vcpus] == [True, not too_big]
    for v in m.vcpus:
        run(v)
    assert [v.apicv for v in m.vcpus] == [not too_big, not too_big]


def test_new_vcpu_looks_when_it_first_runs() -> None:
    """A vCPU that is added to an inhibited machine counts as active until its first entry."""
    m = machine()
    m.set_inhibit(Inhibit.HYPERV)
    v = m.add_vcpu(9)
    assert (v.apicv, v.requests) == (True, r.REQ_APICV_UPDATE | r.REQ_EVENT)
    run(v)
    assert (v.apicv, v.requests) == (False, 0)


# -------------------------------------------------------------------------------------------- interrupt windows and L2


@pytest.mark.parametrize("kernel", kernels("5.8", before="7.3"))
def test_irq_window(kernel: str) -> None:
    """SVM: a window needs AVIC out of the way; the exit that says it is open brings AVIC back.

    Up to 5.10 both happened at once (5.10.262 kvm_request_apicv_update), since 5.15 at the next entry (5.15.85).
    """
    m = machine("svm", kernel)
    v = m.vcpus[1]
    declare.load("irq_window")(m.handle, v.index, 1)
    assert m.inhibits == {Inhibit.IRQWIN}
    assert v.apicv is since(kernel, "5.15")
    for vcpu in m.vcpus:
        run(vcpu)
        assert not vcpu.apicv
    out = v.exit(fx.SvmExit.VINTR)
    assert (m.inhibits, v.apicv) == (set(), True)
    assert out.effects == fx.Effect.KICK, "the others are in the guest"
    assert m.vcpus[0].requests == r.REQ_APICV_UPDATE


def test_no_window_inhibits_from_l2() -> None:
    """In L2 AVIC is off on this vCPU alone; a window of L2 leaves the machine alone, and closes one of L1."""
    m = machine("svm")
    v = m.vcpus[1]
    v.nested = True
    declare.load("irq_window")(m.handle, v.index, 1)
    assert m.inhibits == set()
    m.set_inhibit(Inhibit.IRQWIN)
    declare.load("irq_window")(m.handle, v.index, 0)
    assert m.inhibits == set()


def test_windows_are_no_reason_on_vmx() -> None:
    m = machine()
    m.trace.enable()
    declare.load("irq_window")(m.handle, 1, 1)
    assert (m.inhibits, inhibit_lines(m)) == (set(), [])


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", kernels("6.6"))
def test_every_change_looks_at_the_windows(kernel: str, vendor: str) -> None:
    """7.3.4 __kvm_set_or_clear_apicv_inhibit: behind each reason it sets or clears IRQWIN by the count, with a line."""
    m = machine(vendor, kernel)
    m.trace.enable()
    m.set_inhibit(Inhibit.HYPERV)
    m.set_inhibit(Inhibit.HYPERV, False)
    said = [line.split(",")[0] for line in inhibit_lines(m)]
    window = ["cleared reason=8"] if since(kernel, "7.3") else []
    assert said == ["set reason=1", *window, "cleared reason=1", *window]


@pytest.mark.parametrize("dispatcher", ["python", "compiled"])
def test_windows_are_counted(dispatcher: str) -> None:
    """7.3.4 kvm_inc_or_dec_irq_window_inhibit: the first window and the end of the last one change the reason.

    A window ends where an interrupt goes in with none behind it (svm_inject_irq), not at the exit that it made.
    """
    m = machine("svm", "7.3", dispatcher=dispatcher, irqchip="split")
    v, w = m.vcpus[1:]
    m.trace.enable()
    for vcpu in (v, w):
        vcpu.set_msr(0x835, r.DM_EXTINT << r.ICR_DM_SHIFT)
        vcpu.interrupt(0x41)
        run(vcpu)
        run(vcpu)
    assert m.inhibits == {Inhibit.IRQWIN}
    assert [line.split(",")[0] for line in inhibit_lines(m)] == ["set reason=8"]
    v.exit(fx.SvmExit.VINTR)
    assert m.inhibits == {Inhibit.IRQWIN}
    m.trace.clear()
    for vcpu, left in ((v, {Inhibit.IRQWIN}), (w, set())):
        vcpu.rflags |= r.RFLAGS_IF
        vcpu.exit(fx.SvmExit.VINTR)
        assert vcpu.injected == 0x41
        assert m.inhibits == left
    assert [line.split(",")[0] for line in inhibit_lines(m)] == ["cleared reason=8"]


def test_window_beside_another_reason() -> None:
    """While something else keeps AVIC off a window is counted only; the next change of a reason sees the count."""
    m = machine("svm", "7.3", irqchip="split")
    m.set_inhibit(Inhibit.HYPERV)
    m.vcpus[1].set_msr(0x835, r.DM_EXTINT << r.ICR_DM_SHIFT)
    m.vcpus[1].interrupt(0x41)
    run(m.vcpus[1])
    assert m.inhibits == {Inhibit.HYPERV}
    m.set_inhibit(Inhibit.HYPERV, False)
    assert m.inhibits == {Inhibit.IRQWIN}
    restored = fx.Machine.restore(m.snapshot())
    restored.vcpus[1].rflags |= r.RFLAGS_IF
    restored.vcpus[1].exit(fx.SvmExit.VINTR)
    assert restored.inhibits == set()


@pytest.mark.parametrize("kernel", kernels("5.6"))
def test_what_is_pending_when_apicv_goes_off(kernel: str) -> None:
    """5.10.262 kvm_vcpu_update_apicv asks for no EVENT, so IRR waits for the next one; 5.15.85's looks at once."""
    m = machine(kernel=kernel)
    v = m.vcpus[1]
    send(m, 1, 0x40)
    v.hw_notify()
    m.set_inhibit(Inhibit.HYPERV)
    run(v)
    assert not v.apicv
    assert v.irq_window is since(kernel, "5.15")


@pytest.mark.parametrize(
    ("vendor", "kernel", "active"), [("vmx", "6.18", True), ("svm", "6.18", False), ("svm", "5.8", True)]
)
def test_nested_guest(vendor: str, kernel: str, active: bool) -> None:
    """SVM: a vCPU has no AVIC while it runs L2, from its next entry; an exit to L1 gives it back at once."""
    m = machine(vendor, kernel)
    v = m.vcpus[1]
    v.nested = True
    v.l1_wants_exits = False
    run(v)
    assert (v.apicv, m.inhibits) == (active, set())
    v.l1_wants_exits = True
    run(v)
    assert (v.nested, v.apicv) == (False, True)


def test_inhibited_while_in_l2() -> None:
    """A reason that came meanwhile keeps AVIC off behind the nested exit."""
    m = machine("svm")
    v = m.vcpus[1]
    v.nested = True
    run(v)  # reflected: L1 again
    v.nested = True
    m.set_inhibit(Inhibit.HYPERV)
    v.nested = False
    run(v)
    assert not v.apicv


# ------------------------------------------------------------------------------------------------------------ the rest


def test_trace_of_a_rebuilt_map() -> None:
    """Every rebuild sets or clears three reasons, two on VMX, behind the line of the write that caused it."""
    for vendor, reasons in (("vmx", (4, 5)), ("svm", (4, 11, 5))):
        m = xapic(vendor)
        m.trace.enable()
        m.vcpus[1].set_msr(APICBASE, XAPIC & ~r.APICBASE_EN)
        assert m.trace.lines() == [f"kvm_apicv_inhibit_changed: cleared reason={n}, inhibits=0x0" for n in reasons]


def test_trace_of_an_alias() -> None:
    m = xapic("svm")
    m.vcpus[1].get_msr(APICBASE)
    m.trace.enable()
    page = bytearray(m.vcpus[1].get_lapic())
    page[r.APIC_ID + 3] = 0
    m.vcpus[1].set_lapic(bytes(page))
    assert inhibit_lines(m) == [
        "set reason=4, inhibits=0x10 PHYSICAL_ID_ALIASED",
        "set reason=11, inhibits=0x810 PHYSICAL_ID_ALIASED|LOGICAL_ID_ALIASED",
        "set reason=5, inhibits=0x830 PHYSICAL_ID_ALIASED|APIC_ID_MODIFIED|LOGICAL_ID_ALIASED",
    ]


def test_snapshot_keeps_reasons() -> None:
    """An inhibited machine comes back inhibited, its requests pending."""
    m = machine("svm")
    m.set_inhibit(Inhibit.PIT_REINJ)
    run(m.vcpus[0])
    again = fx.Machine.restore(m.snapshot())
    assert again.inhibits == {Inhibit.PIT_REINJ}
    assert [v.apicv for v in again.vcpus] == [False, True, True]
    run(again.vcpus[1])
    assert not again.vcpus[1].apicv
