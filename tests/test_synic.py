"""The synthetic interrupt controller: its MSRs, how a SINT is raised, auto-EOI, what an EOI says, APICv's inhibit.

What holds was read in arch/x86/kvm/hyperv.c and lapic.c of 5.10.262, 5.15.215, 6.1.192, 6.6.87, 6.8, 6.12.118, 6.18.44,
7.2.13 and 7.3.4; generations before 5.10 are taken to be like it.
"""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import regs as r
from fastexit.ioctls import UserSynic
from fastexit.profile import since
from windows import PAGE, VENDORS, booted, deliver, leave, shown, synic

KERNELS = fx.profiles()
SINT = hv.MSR_HV_SINT0
MASKED, AUTO = hv.HV_SINT_MASKED, hv.HV_SINT_AUTO_EOI
REGISTERS = (hv.MSR_HV_SCONTROL, hv.MSR_HV_SVERSION, hv.MSR_HV_SIEFP, hv.MSR_HV_SIMP, hv.MSR_HV_EOM)


def faults(v: fx.Vcpu, msr: int, value: int | None = None) -> bool:
    if value is not None:
        return v.wrmsr(msr, value).fault is not None
    try:
        v.rdmsr(msr)
    except fx.GeneralProtection:
        return True
    return False


def in_service(v: fx.Vcpu) -> list[int]:
    page = v.get_lapic()
    return [n for n in range(256) if page[r.APIC_ISR + (n >> 5) * 16 + (n >> 3 & 3)] >> (n & 7) & 1]


# ---------------------------------------------------------------------------------------------------------------- MSRs


@pytest.mark.parametrize("kernel", KERNELS)
def test_inactive(kernel: str) -> None:
    """Nothing for a guest; user space reads all and writes 0, which leaves a SINT unmasked with vector 0."""
    m = booted(kernel)
    v = m.vcpus[0]
    for msr in (*REGISTERS, SINT, hv.MSR_HV_SINT15):
        assert faults(v, msr), hex(msr)
        assert faults(v, msr, 0), hex(msr)
        assert v.get_msr(msr) == {hv.MSR_HV_SVERSION: 1, SINT: MASKED, hv.MSR_HV_SINT15: MASKED}.get(msr, 0), hex(msr)
    assert shown(m, "synic_msr") == []
    for msr in (*REGISTERS, SINT):
        assert not v.set_msr(msr, 1), hex(msr)
        assert v.set_msr(msr, 0), hex(msr)
        assert v.get_msr(msr) == 0, hex(msr)
    assert [line[1:] for line in shown(m, "synic_msr")] == [(msr, 0, 1) for msr in (*REGISTERS, SINT)]
    assert shown(m, "acked") == [], "EOM of an inactive SynIC tells nobody"


@pytest.mark.parametrize("split", [False, True])
def test_enable(split: bool) -> None:
    """SCONTROL is 1 as soon as the capability is enabled; every register can be read then."""
    m = booted(irqchip="split" if split else "full")
    v = m.vcpus[0]
    assert v.enable_synic(1) is fx.Effect(0)
    assert [v.rdmsr(msr) for msr in REGISTERS] == [1, 1, 0, 0, 0]
    assert v.rdmsr(hv.MSR_HV_SINT15) == MASKED
    assert faults(m.vcpus[1], hv.MSR_HV_SCONTROL)
    for bad, error in ((0, ValueError), (3, ValueError), ("1", TypeError)):
        with pytest.raises(error):
            v.enable_synic(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("msr", [hv.MSR_HV_SCONTROL, hv.MSR_HV_SIEFP, hv.MSR_HV_SIMP])
def test_writes_that_leave(msr: int) -> None:
    """KVM_EXIT_HYPERV at the next entry: the value is stored, RIP has moved, kvm_msr is out, nothing is to complete."""
    m = synic()
    v = m.vcpus[0]
    rip = v.rip
    out = v.wrmsr(msr, PAGE | 1)
    assert (out.user, v.exit_reason, v.rip) == (fx.KvmExit.HYPERV, fx.KvmExit.HYPERV, rip + 2)
    assert shown(m, "synic_msr", "msr_write", "user") == [
        ("synic_msr", msr, PAGE | 1, 0),
        ("msr_write", msr, PAGE | 1, 0),
        ("user", int(fx.KvmExit.HYPERV)),
    ]
    stored = {hv.MSR_HV_SCONTROL: 1, hv.MSR_HV_SIEFP: 0, hv.MSR_HV_SIMP: 0} | {msr: PAGE | 1}
    assert v.user_hyperv == UserSynic(msr, *stored.values())
    assert v.run()
    assert v.rdmsr(msr) == PAGE | 1
    assert v.set_msr(msr, PAGE | 3)
    assert v.run(), "user space's own write asks for no exit"
    assert v.user_hyperv == UserSynic(msr, *stored.values())


@pytest.mark.parametrize("msr", [hv.MSR_HV_SIEFP, hv.MSR_HV_SIMP])
@pytest.mark.parametrize("version", [1, 2])
def test_pages(msr: int, version: int) -> None:
    """A page is zeroed when a guest enables it, unless user space took SYNIC2; one that is not there is refused."""
    m = synic(version=version)
    v = m.vcpus[0]
    m.guest_memory[PAGE - 1 : PAGE + 4097] = b"\xaa" * 4098
    v.wrmsr(msr, PAGE)
    assert m.guest_memory[PAGE] == 0xAA, "not enabled"
    v.set_msr(msr, PAGE | 1)
    assert m.guest_memory[PAGE] == 0xAA, "by user space"
    v.wrmsr(msr, PAGE | 1)
    zeroed = bytes(4096) if version == 1 else b"\xaa" * 4096
    assert m.guest_memory[PAGE - 1 : PAGE + 4097] == b"\xaa" + zeroed + b"\xaa"
    v.run()
    m.trace.clear()
    nowhere = 1 << 40 | 1
    assert faults(v, msr, nowhere) is (version == 1)
    assert v.get_msr(msr) == (PAGE | 1 if version == 1 else nowhere)
    assert shown(m, "synic_msr", "msr_write") == [
        ("synic_msr", msr, nowhere, 0),
        ("msr_write", msr, nowhere, int(version == 1)),
    ], "the line comes first, refused or not"
    assert v.set_msr(msr, nowhere | 2)


def test_one_capability_after_the_other() -> None:
    """Only the rule of zeroing changes, and SCONTROL is 1 again."""
    m = synic(version=2)
    v = m.vcpus[0]
    v.set_msr(hv.MSR_HV_SCONTROL, 0)
    v.set_msr(SINT + 3, 0x50)
    v.enable_synic(1)
    assert (v.rdmsr(hv.MSR_HV_SCONTROL), v.rdmsr(SINT + 3)) == (1, 0x50)
    m.guest_memory[PAGE] = 0xAA
    v.wrmsr(hv.MSR_HV_SIMP, PAGE | 1)
    assert m.guest_memory[PAGE] == 0


def test_version_is_read_only() -> None:
    """Its line is there all the same."""
    m = synic()
    v = m.vcpus[0]
    assert faults(v, hv.MSR_HV_SVERSION, 1)
    assert shown(m, "synic_msr") == [("synic_msr", hv.MSR_HV_SVERSION, 1, 0)]
    assert v.set_msr(hv.MSR_HV_SVERSION, 7)
    assert v.rdmsr(hv.MSR_HV_SVERSION) == 7


@pytest.mark.parametrize("host", [False, True])
def test_eom_tells_all_sixteen(host: bool) -> None:
    """Whatever the value and whatever waits."""
    m = synic()
    v = m.vcpus[0]
    write = v.set_msr if host else v.wrmsr
    write(hv.MSR_HV_EOM, 0x1234)
    expected: list[tuple[Any, ...]] = [("synic_msr", hv.MSR_HV_EOM, 0x1234, int(host))]
    assert shown(m, "synic_msr", "acked") == expected + [("acked", i) for i in range(16)]
    assert v.rdmsr(hv.MSR_HV_EOM) == 0


def test_eom_wakes_a_stuck_timer() -> None:
    """A one-shot whose message did not fit into its SINT's slot is asked to try again; others are left alone."""
    m = synic()
    v = m.vcpus[0]
    row = L.HV + v.index * L.HV_STRIDE
    enabled, direct = hv.HV_STIMER_ENABLED, hv.HV_STIMER_DIRECT
    for i, config in enumerate((2 << 16 | enabled, 2 << 16, 2 << 16 | enabled | direct, 3 << 16 | enabled)):
        m.mem[row + L.HV_STIMER + i * L.STIMER_STRIDE + L.STIMER_CONFIG] = config
    m.mem[row + L.HV_STIMER_STUCK] = 0xF
    v.set_msr(SINT + 2, 0x50)
    v = deliver(m, 0x50)
    v.set_msr(hv.MSR_HV_EOI, 0)
    assert m.mem[row + L.HV_STIMER_PENDING] == 1, "timer 0 alone: enabled, not direct, of SINT 2"
    assert m.mem[v.hot + L.HOT_REQUESTS] & r.REQ_HV_STIMER
    v.set_msr(hv.MSR_HV_EOM, 0)
    assert m.mem[row + L.HV_STIMER_PENDING] == 0b1001


def test_sint_values() -> None:
    """All 64 bits are stored. An unmasked vector below 16 is a guest's #GP, and user space's to write."""
    v = synic().vcpus[0]
    odd = 0xDEAD_BEEF_0004_0055
    assert not faults(v, SINT + 4, odd)
    assert v.rdmsr(SINT + 4) == odd
    assert faults(v, SINT + 4, 0x0F)
    assert v.rdmsr(SINT + 4) == odd
    assert not faults(v, SINT + 4, MASKED | 0x0F)
    assert v.set_msr(SINT + 4, 0x0F)
    assert v.rdmsr(SINT + 4) == 0x0F


# ------------------------------------------------------------------------------------------------------------- raising


@pytest.mark.parametrize("vendor", VENDORS)
def test_route(vendor: str) -> None:
    """1, also when the vector was pending already: no coalescing; no kvm_apic_ipi, whatever SCONTROL is."""
    m = synic(vendor=vendor)
    v = m.vcpus[1]
    v.set_msr(SINT + 2, 0x50)
    v.set_msr(hv.MSR_HV_SCONTROL, 0)
    m.set_gsi_routing([("hv_sint", 5, 1, 2)])
    m.trace.clear()
    for _ in range(2):
        assert m.irq_line(5, 1) == 1
        assert shown(m) == [("set_irq", 5, 1, 0), ("accept", v.vcpu_id, 0x50), ("synic_irq", 2, 0x50, 1)]
    assert v.pending() == 0x50
    assert [target.vcpu for target in m.targets] == [1] or m.targets == ()


def test_whom_a_route_reaches() -> None:
    """By VP index: the vCPU with that creation index if it still has it, else the first one that has."""
    m = synic(apic_ids=[0, 7, 3])
    for v in m.vcpus:
        v.set_msr(SINT, 0x50 + v.index)
    m.set_gsi_routing([("hv_sint", i, i, 0) for i in range(4)])
    m.vcpus[0].set_msr(hv.MSR_HV_VP_INDEX, 2)

    def raised(gsi: int) -> list[int]:
        m.irq_line(gsi, 1)
        found = [v.index for v in m.vcpus if v.pending() is not None]
        for v in m.vcpus:
            v.ack()
            v.eoi()
        return found

    assert [raised(gsi) for gsi in range(4)] == [[], [1], [2], []]
    m.vcpus[2].set_msr(hv.MSR_HV_VP_INDEX, 3)
    assert [raised(gsi) for gsi in (2, 3)] == [[0], [2]]


def test_routes_that_raise_nothing() -> None:
    """-1 for every error; a SINT beyond 15 or an index that nobody has is accepted in the table and fails at use."""
    m = synic()
    m.set_gsi_routing([("hv_sint", 1, 0, 16), ("hv_sint", 2, 9, 0), ("hv_sint", 3, 0, 1), ("hv_sint", 4, 1, 1)])
    m.vcpus[1].set_msr(SINT + 1, 0x50)
    assert [m.irq_line(gsi, 1) for gsi in (1, 2, 3, 5, 4095, 1 << 31)] == [-1] * 6
    assert m.irq_line(4, 0) == -1, "level 0"
    assert [line[1:3] for line in shown(m, "set_irq")] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (5, 1),
        (4095, 1),
        (1 << 31, 1),
        (4, 0),
    ]
    assert shown(m, "accept", "synic_irq") == []
    assert m.irq_line(4, 1) == 1
    other = booted()
    other.set_gsi_routing([("hv_sint", 4, 1, 1)])
    assert other.irq_line(4, 1) == -1, "no SynIC"


def test_route_to_a_disabled_apic() -> None:
    """0: accepted by nobody, though its lines are there."""
    m = synic()
    m.vcpus[1].set_msr(SINT, 0x50)
    m.vcpus[1].set_msr(0x80F, 0xFF)
    m.set_gsi_routing([("hv_sint", 4, 1, 0)])
    m.trace.clear()
    assert m.irq_line(4, 1) == 0
    assert shown(m) == [("set_irq", 4, 1, 0), ("accept", 1, 0x50), ("synic_irq", 0, 0x50, 0)]


@pytest.mark.parametrize(
    ("entries", "error", "text"),
    [
        ([("ioapic", 1, 2, 3)], TypeError, r"entry 0 is no \('ioapic', gsi, pin\)"),
        ([("hv_sint", 1, 0, 0), ("ioapic", 1, 1)], ValueError, "entry 1: GSI 1 has a route already"),
        ([("hv_sint", 1, 0, 0), ("hv_sint", 1, 0, 1)], ValueError, "entry 1: GSI 1 has a route already"),
        ([("hv_sint", 4096, 0, 0)], ValueError, "entry 0: GSI 0x1000 is out of range"),
        ([("xen", 1, 0, 0)], ValueError, "entry 0: kind 'xen' is none of ioapic, pic, msi, hv_sint"),
        ([("hv_sint", 1)], TypeError, r"entry 0 is no \('hv_sint', gsi, vcpu, sint\)"),
        ([7], TypeError, r"entry 0 is no \(kind, gsi, ...\)"),
        ([("hv_sint", 1, 0, -1)], ValueError, "entry 0: SINT -0x1 is out of range"),
    ],
)
def test_bad_tables(entries: list[Any], error: type[Exception], text: str) -> None:
    """One line, and the table stays as it was."""
    m = synic()
    m.vcpus[0].set_msr(SINT, 0x50)
    m.set_gsi_routing([("hv_sint", 9, 0, 0)])
    with pytest.raises(error, match=text):
        m.set_gsi_routing(entries)
    assert m.irq_line(9, 1) == 1


def test_default_table() -> None:
    """With a full irqchip it has routes to the IOAPIC, whose pins are masked, and the PICs; split it is empty."""
    assert synic().irq_line(16, 1) == -1
    assert synic().irq_line(16, 0) == 1
    assert synic(irqchip="split").irq_line(3, 1) == -1
    with pytest.raises(ValueError, match="no CONFIG_KVM_HYPERV"):
        booted(hyperv=False, kvm_hyperv=False).set_gsi_routing([("hv_sint", 1, 0, 0)])


# ---------------------------------------------------------------------------------------------------------------- EOIs


@pytest.mark.parametrize("door", ["hyperv", "x2apic", "assist"])
def test_eoi_tells_the_sints(door: str) -> None:
    """By any door: kvm_eoi, then synic_send_eoi and one line for each SINT that has the vector now, in order."""
    m = synic()
    v = m.vcpus[0]
    v.wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    for i, value in ((9, 0x50), (2, 0x50), (3, MASKED | 0x50), (4, 0x60)):
        v.wrmsr(SINT + i, value)
    deliver(m, 0x50)
    assert v.pv_eoi, "connected vectors are offered like others"
    if door == "assist":
        v.assist = 0
    else:
        leave(m)
    shown(m)
    if door == "assist":
        leave(m)
    else:
        v.wrmsr(hv.MSR_HV_EOI if door == "hyperv" else 0x80B, 0)
    expected: list[tuple[Any, ...]] = [("eoi", 0x50), ("synic_eoi", 0x50), ("acked", 2), ("acked", 9)]
    expected += [("pv_eoi", 0x50)] if door == "assist" else []
    assert shown(m, "eoi", "synic_eoi", "acked", "pv_eoi") == expected


def test_eoi_of_a_sint_that_moved() -> None:
    """The old vector is nobody's any more; one whose SINT was masked is not, either."""
    m = synic()
    v = m.vcpus[0]
    for after in (0x60, MASKED | 0x50):
        v.wrmsr(SINT + 2, 0x50)
        deliver(m, 0x50)
        v.wrmsr(SINT + 2, after)
        shown(m)
        v.wrmsr(hv.MSR_HV_EOI, 0)
        assert shown(m, "eoi", "synic_eoi", "acked") == [("eoi", 0x50)]


@pytest.mark.parametrize("vendor", VENDORS)
def test_auto_eoi(vendor: str) -> None:
    """Never in service, PPR not raised; the next EOI ends what it interrupted, and tells no SINT of this one."""
    m = synic(vendor=vendor)
    v = m.vcpus[0]
    v.wrmsr(SINT + 2, AUTO | 0x50)
    deliver(m, 0x40)
    assert in_service(v) == [0x40]
    v.run()
    shown(m)
    deliver(m, 0x50)
    assert (in_service(v), v.get_msr(0x80A)) == ([0x40], 0x40), "an ordinary message: the vector's property"
    v.run()
    shown(m)
    v.wrmsr(hv.MSR_HV_EOI, 0)
    assert shown(m, "eoi", "synic_eoi", "acked") == [("eoi", 0x40)]
    v.wrmsr(hv.MSR_HV_EOI, 0)
    assert shown(m, "eoi") == [("eoi", L.NONE)]


def test_auto_eoi_is_held_back_until_injected() -> None:
    """TPR and PPR count before the injection; inside its handler one of the same class comes at once."""
    m = synic()
    v = m.vcpus[0]
    v.wrmsr(SINT + 2, AUTO | 0x50)
    v.wrmsr(hv.MSR_HV_TPR, 0x60)
    deliver(m, 0x50)
    assert v.pending() is None
    assert v.get_lapic()[r.APIC_IRR + 0x20 + 2] == 1
    v.run()
    v.wrmsr(hv.MSR_HV_TPR, 0)
    assert v.get_lapic()[r.APIC_IRR + 0x20 + 2] == 0
    v.run()
    deliver(m, 0x51)
    assert in_service(v) == [0x51]


def test_eoi_assist_is_offered_for_the_interrupted_vector() -> None:
    """Inside an auto-EOI handler: clearing the bit ends the lower interrupt."""
    m = synic()
    v = m.vcpus[0]
    v.wrmsr(hv.MSR_HV_VP_ASSIST_PAGE, PAGE | 1)
    v.wrmsr(SINT + 2, AUTO | 0x50)
    deliver(m, 0x40)
    leave(m)
    assert not v.pv_eoi
    deliver(m, 0x50)
    assert v.pv_eoi
    v.assist = 0
    shown(m)
    leave(m)
    assert shown(m, "eoi", "pv_eoi") == [("eoi", 0x40), ("pv_eoi", 0x40)]


def test_masked_or_reserved_is_neither_connected_nor_auto_eoi() -> None:
    """Bit 17 of a masked SINT does not count, nor does a vector below 16 that user space wrote."""
    m = synic()
    v = m.vcpus[0]
    v.wrmsr(SINT + 2, AUTO | MASKED | 0x50)
    deliver(m, 0x50)
    assert in_service(v) == [0x50]
    v.set_msr(SINT + 3, AUTO | 0x0F)
    row = L.HV + v.index * L.HV_STRIDE
    assert not any(m.mem[row + L.HV_AUTO_EOI : row + L.HV_AUTO_EOI + 8])


def test_two_sints_with_one_vector() -> None:
    """One with auto-EOI is enough; the vector is connected until the last one leaves it."""
    m = synic()
    v = m.vcpus[0]
    v.wrmsr(SINT + 2, AUTO | 0x50)
    v.wrmsr(SINT + 3, 0x50)
    deliver(m, 0x50)
    assert in_service(v) == []
    v.run()
    v.wrmsr(SINT + 2, MASKED)
    deliver(m, 0x50)
    assert in_service(v) == [0x50]
    v.run()
    shown(m)
    v.wrmsr(hv.MSR_HV_EOI, 0)
    assert shown(m, "acked") == [("acked", 3)]


# ------------------------------------------------------------------------------------------------------------- APICv


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_inhibit(kernel: str, vendor: str) -> None:
    """Up to 5.10 the capability switches APICv off for good: for the VM, before 5.6 for the vCPU. Later auto-EOI does,
    while it is in use: by the first vCPU that has a SINT with it, until the last one has none."""
    m = _with_apicv(kernel, vendor)
    v, other = m.vcpus[0], m.vcpus[1]
    assert (v.apicv, other.apicv) == (True, True)
    v.enable_synic()
    forever = not since(kernel, "5.15")
    assert (v.apicv, other.apicv) == (not forever, True), "its own at once"
    enter(m)
    assert v.apicv is not forever
    assert other.apicv is (not forever or kernel == "seed-v3")
    if forever:
        return
    other.enable_synic()
    v.set_msr(SINT + 2, MASKED | AUTO | 0x50)
    enter(m)
    assert v.apicv, "masked"
    for step, on in ((v, True), (other, True)):
        step.set_msr(SINT + 2, AUTO | 0x50)
        enter(m)
        assert (v.apicv, other.apicv) == (not on, not on)
    v.set_msr(SINT + 2, 0x50)
    enter(m)
    assert not v.apicv
    other.set_msr(SINT + 2, MASKED | AUTO | 0x50)
    enter(m)
    assert (v.apicv, other.apicv) == (True, True)


def _with_apicv(kernel: str, vendor: str) -> fx.Machine:
    """Both vCPUs run in xAPIC mode, where AVIC of every generation is on."""
    m = fx.Machine(vcpus=2, kernel=kernel, vendor=vendor, apicv=True, hyperv=True, x2apic=False)
    for v in m.vcpus:
        v.set_mp_state(r.MpState.RUNNABLE)
        v.mmio_write(r.APIC_SPIV, 0x1FF)
    enter(m)
    m.trace.enable()
    return m


def enter(m: fx.Machine) -> None:
    for v in m.vcpus:
        v.run()
        leave(m, v.index)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if since(kernel, "5.15")])
def test_inhibit_is_traced(kernel: str) -> None:
    """Every change of the count sets or clears it anew: since 6.1 with a line each, before when APICv switches."""
    m = _with_apicv(kernel, "vmx")
    v, other = m.vcpus
    for vcpu in m.vcpus:
        vcpu.enable_synic()
    for vcpu, value in ((v, AUTO | 0x50), (other, AUTO | 0x50), (v, MASKED), (other, MASKED)):
        vcpu.set_msr(SINT + 2, value)
    found = [line[2:] for line in shown(m, "inhibit") if line[1] == r.Inhibit.HYPERV]
    assert found == ([(1, 2)] * 3 + [(0, 0)] if since(kernel, "6.1") else [(1, 2), (0, 0)])


def test_without_apicv_nothing_is_inhibited() -> None:
    m = synic()
    m.vcpus[0].wrmsr(SINT + 2, AUTO | 0x50)
    assert shown(m, "inhibit") == []
    assert m.mem[L.H_INHIBITS] == 1 << r.Inhibit.DISABLED


def test_with_apicv_an_eoi_tells_no_sint() -> None:
    """The EOI exits, for the bitmap has the vector, and the exit's handler knows the IOAPIC alone."""
    m = booted(apicv=True)
    v = m.vcpus[0]
    v.enable_synic()
    v.wrmsr(SINT + 2, 0x50)
    v.rflags |= r.RFLAGS_IF
    m.signal_msi(0xFEE0_0000, 0x50)
    v.run()
    v.hw_notify()
    assert v.hw_deliver() == 0x50
    shown(m)
    out = v.hw_wrmsr(0x80B, 0)
    assert out.path is fx.Path.SLOW, "an EOI-induced exit"
    assert shown(m, "eoi", "synic_eoi", "acked") == [("eoi", 0x50)]
    m.signal_msi(0xFEE0_0000, 0x60)
    v.hw_notify()
    assert v.hw_deliver() == 0x60
    assert v.hw_wrmsr(0x80B, 0).path is fx.Path.HARDWARE


def test_eoi_by_the_msr_tells_them_even_with_apicv() -> None:
    """Hyper-V's MSR is a write to the register, which goes the long way."""
    m = booted(apicv=True)
    v = m.vcpus[0]
    v.enable_synic()
    v.wrmsr(SINT + 2, 0x50)
    v.rflags |= r.RFLAGS_IF
    m.signal_msi(0xFEE0_0000, 0x50)
    v.run()
    v.hw_notify()
    v.hw_deliver()
    shown(m)
    v.wrmsr(hv.MSR_HV_EOI, 0)
    assert shown(m, "eoi", "synic_eoi", "acked") == [("eoi", 0x50), ("synic_eoi", 0x50), ("acked", 2)]


def test_snapshot_keeps_the_synic() -> None:
    m = synic(version=2)
    v = m.vcpus[0]
    values = {SINT + 2: AUTO | 0x50, hv.MSR_HV_SIMP: PAGE | 1, hv.MSR_HV_SCONTROL: 5, hv.MSR_HV_SIEFP: 0x9001}
    for msr, value in values.items():
        v.set_msr(msr, value)
    again = fx.Machine.restore(m.snapshot())
    assert {msr: again.vcpus[0].get_msr(msr) for msr in values} == values
    deliver(again, 0x50)
    assert in_service(again.vcpus[0]) == []
