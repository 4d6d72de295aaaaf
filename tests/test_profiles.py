"""What each kernel generation takes fast, with which completion, and at which step of the exit the IPI leaves."""

from __future__ import annotations

from typing import Any

import pytest

import fastexit as fx
from fastexit import offers
from fastexit import regs as r
from fastexit.profile import as_of, since
from fastexit.releases import generation, release
from fastexit.traits import Trait
from generations import having, kernels

KERNELS = fx.profiles()
VENDORS = ("vmx", "svm")
ICR, DEADLINE = 0x830, 0x6E0

STORES_RESERVED = tuple(name for name in KERNELS if name not in having(Trait.ICR_RESERVED_GP))
SINCE_6_18 = kernels("6.18")
WRITES: dict[str, tuple[int, tuple[str, ...]]] = {
    "unicast": (fx.icr(dest=1, vector=0xFD), KERNELS),
    "unicast, assert": (fx.icr(dest=1, vector=0xFD, level=True), KERNELS),
    "unicast, level": (fx.icr(dest=1, vector=0xFD, level=True, trigger_level=True), KERNELS),
    "unicast, busy": (fx.icr(dest=1, vector=0xFD, busy=True), KERNELS),
    "unicast, vector 5": (fx.icr(dest=1, vector=5), KERNELS),
    "nobody's id": (fx.icr(dest=77, vector=0xFD), KERNELS),
    "id above the map": (fx.icr(dest=0x12345, vector=0xFD), KERNELS),
    "0xff is no broadcast": (fx.icr(dest=0xFF, vector=0xFD), KERNELS),
    "reserved bit 13": (fx.icr(dest=1, vector=0xFD) | 1 << 13, STORES_RESERVED),
    "reserved bit 20": (fx.icr(dest=1, vector=0xFD) | 1 << 20, STORES_RESERVED),
    "broadcast": (fx.icr(dest=0xFFFF_FFFF, vector=0xFD), kernels(before="5.7")),
    "logical broadcast": (fx.icr(dest=0xFFFF_FFFF, vector=0xFD, logical=True), ()),
    "self": (fx.icr(vector=0xFD, shorthand=1), (*kernels(before="5.6"), *SINCE_6_18)),
    "all": (fx.icr(vector=0xFD, shorthand=2), kernels(before="5.6")),
    "all but self": (fx.icr(vector=0xFD, shorthand=3), kernels(before="5.6")),
    "logical": (fx.icr(dest=0x6, vector=0xFD, logical=True), SINCE_6_18),
    "lowest priority": (fx.icr(dest=0x6, vector=0xFD, logical=True, delivery=1), SINCE_6_18),
    "lowest priority, physical": (fx.icr(dest=1, vector=0xFD, delivery=1), SINCE_6_18),
    "SMI": (fx.icr(dest=1, delivery=2), SINCE_6_18),
    "remote read": (fx.icr(dest=1, delivery=3), SINCE_6_18),
    "NMI": (fx.icr(dest=1, delivery=4), SINCE_6_18),
    "INIT": (fx.icr(dest=1, delivery=5, level=True), SINCE_6_18),
    "SIPI": (fx.icr(dest=1, vector=0x9A, delivery=6), SINCE_6_18),
    "ExtINT": (fx.icr(dest=1, vector=0xFD, delivery=7), SINCE_6_18),
    "NMI to all but self": (fx.icr(delivery=4, shorthand=3), ()),
}
COMPLETIONS = {
    "seed-v3": fx.Fastpath.SKIP_EMUL_INS,
    "5.8": fx.Fastpath.EXIT_HANDLED,
    "6.12": fx.Fastpath.REENTER_GUEST,
}
"""How a fast ICR write ends, from which generation on."""
FIRST_STEP_AFTER_THE_IPI = {
    "seed-v3": "irq_window",
    "5.8": "guest_mode_outside",
    "6.12": None,
}
"""From which generation on which step is the first that finds the IPI gone; None: it has left before any step."""
STEPS = ("guest_mode_outside", "handle_exit_irqoff", "irq_window", "srcu_lock", "handle_exit", "vcpu_enter_guest")


def booted(kernel: str, vendor: str = "vmx", **options: Any) -> fx.Machine:
    m = fx.Machine(vcpus=4, kernel=kernel, vendor=vendor, **options)
    m.boot_x2apic()
    return m


def deadline_mode(v: fx.Vcpu) -> None:
    assert v.set_msr(0x832, r.LVT_TIMER_DEADLINE | 0xEC)


def first_step_that_sees_the_ipi(m: fx.Machine, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Sends a unicast IPI from vCPU 0; the dispatcher's first step that finds it posted, None if no step runs."""
    seen: list[tuple[str, bool]] = []

    def spy(name: str) -> Any:
        step = getattr(m.dispatcher, name)

        def run(*args: Any, **named: Any) -> Any:
            seen.append((name, bool(m.vcpus[1].pid[3])))
            return step(*args, **named)

        return run

    m.vcpus[0].wrmsr(0x80B, 0)
    for name in STEPS:
        monkeypatch.setattr(m.dispatcher, name, spy(name))
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert m.vcpus[1].pid[3], "the IPI was never posted"
    return next((name for name, posted in seen if posted), None)


def test_generations_by_name() -> None:
    """Every name that is listed has its row."""
    assert [generation(name).name for name in KERNELS] == list(KERNELS)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("vendor", VENDORS)
def test_who_takes_a_write(vendor: str, name: str) -> None:
    """Each generation takes exactly its ICR writes, completes them its own way, and moves RIP unless it faults."""
    value, takers = WRITES[name]
    for kernel in KERNELS:
        m = booted(kernel, vendor)
        v = m.vcpus[0]
        rip = v.rip
        out = v.wrmsr(ICR, value)
        taken = kernel in takers and (since(kernel, "5.6") or vendor == "vmx")
        assert out.path is (fx.Path.FAST if taken else fx.Path.SLOW), kernel
        assert out.completion is (as_of(COMPLETIONS, kernel) if taken else fx.Fastpath.NONE), kernel
        assert (out.refusal is fx.Refusal.NONE) is taken, kernel
        faults = "reserved" in name and kernel not in STORES_RESERVED
        assert out.fault is (fx.Fault.GP if faults else None), kernel
        assert v.rip == rip + (0 if faults else 2), kernel


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("unicast", 1),
        ("nobody's id", 0),
        ("broadcast", 4),
        ("self", 1),
        ("all", 4),
        ("all but self", 3),
        ("logical", 2),
        ("lowest priority", 1),
        ("SMI", 1),
        ("ExtINT", 0),
        ("NMI to all but self", 3),
    ],
)
def test_path_does_not_change_who_accepts(name: str, accepted: int) -> None:
    """However a generation handles the write, the same number of APICs accept it."""
    for kernel in KERNELS:
        for vendor in VENDORS:
            assert booted(kernel, vendor).vcpus[0].wrmsr(ICR, WRITES[name][0]).accepted == accepted, (kernel, vendor)


@pytest.mark.parametrize("kernel", STORES_RESERVED)
def test_reserved_bits_are_stored(kernel: str) -> None:
    """Where they do not fault, reserved ICR bits are kept and read back; the busy bit never is."""
    v = booted(kernel).vcpus[0]
    v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD, busy=True) | 0xFFF3_2000 & ~(3 << 18))
    assert v.rdmsr(ICR) == fx.icr(dest=1, vector=0xFD) | 0xFFF3_2000 & ~(3 << 18)


@pytest.mark.parametrize("kernel", having(Trait.ICR_RESERVED_GP))
@pytest.mark.parametrize("bit", [13, 16, 17, *range(20, 32)])
def test_each_reserved_bit_faults(kernel: str, bit: int) -> None:
    """From 6.12 on each of the reserved ICR bits faults and leaves the old ICR."""
    v = booted(kernel).vcpus[0]
    v.wrmsr(ICR, fx.icr(dest=2, vector=0x31))
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD) | 1 << bit)
    assert (out.fault, out.refusal, out.accepted) == (fx.Fault.GP, fx.Refusal.RESERVED_BITS, 0)
    assert v.rdmsr(ICR) == fx.icr(dest=2, vector=0x31)


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("all", fx.Refusal.SHORTHAND),
        ("broadcast", fx.Refusal.BROADCAST),
        ("logical broadcast", fx.Refusal.BROADCAST),
        ("reserved bit 13", fx.Refusal.RESERVED_BITS),
    ],
)
def test_why_6_18_declines(name: str, refusal: fx.Refusal) -> None:
    """The newest generation names the condition that failed."""
    assert booted("6.18").vcpus[0].wrmsr(ICR, WRITES[name][0]).refusal is refusal


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("self", fx.Refusal.SHORTHAND),
        ("logical", fx.Refusal.LOGICAL),
        ("NMI", fx.Refusal.DELIVERY_MODE),
        ("broadcast", fx.Refusal.BROADCAST),
    ],
)
def test_why_5_7_declines(name: str, refusal: fx.Refusal) -> None:
    """An older generation names the condition that failed, too."""
    assert booted("5.7").vcpus[0].wrmsr(ICR, WRITES[name][0]).refusal is refusal


def test_6_18_needs_a_map() -> None:
    """Aliased xAPIC ids drop the map, and with it everything that 6.18 could resolve; 6.12 does not ask."""
    outcomes = {}
    for kernel in ("6.12", "6.18"):
        m = fx.Machine(vcpus=3, kernel=kernel)
        for i in (1, 2):
            m.vcpus[i].mmio_write(0xF0, 0x1FF)
            m.vcpus[i].mmio_write(0x20, 7 << 24)
        m.vcpus[0].set_msr(0x1B, m.vcpus[0].apic_base | 0x400)
        outcomes[kernel] = m.vcpus[0].wrmsr(ICR, fx.icr(dest=7, vector=0x41))
    assert outcomes["6.12"].path is fx.Path.FAST
    assert outcomes["6.18"].refusal is fx.Refusal.NO_APIC_MAP
    assert [outcomes[k].accepted for k in ("6.12", "6.18")] == [2, 2]


def test_6_18_needs_a_usable_logical_map() -> None:
    """One APIC that votes for xAPIC logical mode spoils the logical map for the fast path; physical stays fast."""
    m = fx.Machine(vcpus=3, kernel="6.18")
    v = m.vcpus[0]
    v.set_msr(0x1B, v.apic_base | 0x400)
    v.set_msr(0x80F, 0x1FF)
    m.vcpus[1].mmio_write(0xF0, 0x1FF)
    m.vcpus[1].mmio_write(0xD0, 1 << 24)
    assert v.wrmsr(ICR, fx.icr(dest=1, vector=0x41, logical=True)).refusal is fx.Refusal.LOGICAL_MAP_UNUSABLE
    assert v.wrmsr(ICR, fx.icr(dest=1, vector=0x41)).path is fx.Path.FAST


@pytest.mark.parametrize("kernel", KERNELS)
def test_xapic_mode_is_never_fast(kernel: str) -> None:
    """An APIC in xAPIC mode has no ICR MSR: #GP from the generic path; its MMIO ICR is no MSR write."""
    m = fx.Machine(vcpus=2, kernel=kernel)
    v = m.vcpus[0]
    v.mmio_write(0xF0, 0x1FF)
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.fault, out.refusal) == (fx.Path.SLOW, fx.Fault.GP, fx.Refusal.NOT_X2APIC)
    out = v.mmio_write(0x300, 0xFD)
    assert (out.path, out.refusal) == (fx.Path.SLOW, fx.Refusal.NOT_AN_MSR_WRITE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_msrs_are_generic(kernel: str) -> None:
    """EOI, TPR and SELF_IPI writes have no fast handler in any generation."""
    v = booted(kernel).vcpus[0]
    for msr in (0x80B, 0x808, 0x83F):
        assert v.wrmsr(msr, 0x31 if msr == 0x83F else 0).refusal is fx.Refusal.MSR


@pytest.mark.parametrize("vendor", VENDORS)
def test_tsc_deadline(vendor: str) -> None:
    """0x6E0 is fast from 5.8 where the preemption timer serves it, in 6.18 everywhere, and always re-enters."""
    for kernel in KERNELS:
        for hv_timer in (True, False) if vendor == "vmx" else (False,):
            m = booted(kernel, vendor, hv_timer=hv_timer)
            v = m.vcpus[0]
            deadline_mode(v)
            out = v.wrmsr(DEADLINE, 1 << 40)
            fast = since(kernel, "6.18") or (hv_timer and since(kernel, "5.8"))
            assert out.path is (fx.Path.FAST if fast else fx.Path.SLOW), (kernel, hv_timer)
            assert out.completion is (fx.Fastpath.REENTER_GUEST if fast else fx.Fastpath.NONE), (kernel, hv_timer)
            assert v.rdmsr(DEADLINE) == 1 << 40
    assert booted("6.12", "svm").vcpus[0].wrmsr(DEADLINE, 0).refusal is fx.Refusal.NO_HV_TIMER


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", kernels("5.6"))
def test_l2_is_left_alone(kernel: str, vendor: str) -> None:
    """From 5.6 on nothing of L2's is handled fast: its exit goes to L1 and no IPI leaves."""
    m = booted(kernel, vendor)
    v = m.vcpus[0]
    v.nested = True
    rip = v.rip
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.refusal, out.accepted) == (fx.Path.SLOW, fx.Refusal.NESTED, 0)
    assert v.counters()["nested_exits"] == 1
    assert (v.rip, m.vcpus[1].pending()) == (rip, None)


def test_svm_without_next_rip() -> None:
    """SVM declines without NRIPS where it could not decode otherwise; 5.6 to 5.8 and 6.8 do not ask."""
    asks = {"5.6": False, "5.10": True, "6.8": False, "6.12": True}
    for kernel in kernels("5.6"):
        out = booted(kernel, "svm", nrips=False).vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
        assert out.refusal is (fx.Refusal.NO_NEXT_RIP if as_of(asks, kernel) else fx.Refusal.NONE), kernel
        assert out.accepted == 1, kernel
    assert booted("6.18", "vmx", nrips=False).vcpus[0].wrmsr(ICR, 0x1000000FD).path is fx.Path.FAST


@pytest.mark.parametrize("kernel", kernels("5.6"))
def test_next_rip_or_l2_first(kernel: str) -> None:
    """svm_exit_handlers_fastpath of 6.12.118 and 7.3.4 asks for a next RIP first, of 5.10.262 and 6.1.192 for L2."""
    v = booted(kernel, "svm", nrips=False).vcpus[0]
    v.nested = True
    v.l1_wants_exits = False
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert out.refusal is (fx.Refusal.NO_NEXT_RIP if since(kernel, "6.12") else fx.Refusal.NESTED)


@pytest.mark.parametrize("kernel", kernels("6.12"))
def test_failed_entry_is_not_fast(kernel: str) -> None:
    """A VM entry that failed delivers no exit information to act on: no IPI, and the refusal says so."""
    m = booted(kernel)
    out = m.vcpus[0].exit(fx.VmxExit.MSR_WRITE, rcx=ICR, rax=0xFD, rdx=1, failed_entry=True)
    assert (out.path, out.accepted, out.user) == (fx.Path.SLOW, 0, fx.KvmExit.FAIL_ENTRY)
    assert m.vcpus[1].pending() is None
    assert out.refusal is fx.Refusal.FAILED_VMENTRY


@pytest.mark.parametrize("kernel", KERNELS)
def test_switched_off(kernel: str) -> None:
    """With the fast path switched off the same write arrives all the same, generically."""
    m = booted(kernel)
    m.fastpath = False
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (out.path, out.refusal, out.accepted) == (fx.Path.SLOW, fx.Refusal.SWITCHED_OFF, 1)
    assert m.vcpus[1].pending() == 0xFD


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_where_the_ipi_leaves(kernel: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The IPI is out before the IRQ window up to 5.7, before mode changes in 5.8, without any step from 6.12."""
    if vendor == "svm":
        # AVIC has no descriptor; what differs between vendors here is only whether the handler runs at all.
        out = booted(kernel, vendor).vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
        assert out.reentered is (as_of(FIRST_STEP_AFTER_THE_IPI, kernel) is None)
        return
    assert first_step_that_sees_the_ipi(booted(kernel), monkeypatch) == as_of(FIRST_STEP_AFTER_THE_IPI, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_where_the_generic_ipi_leaves(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generically the IPI leaves in handle_exit, so the first step that sees it is the next entry."""
    m = booted(kernel)
    m.fastpath = False
    assert first_step_that_sees_the_ipi(m, monkeypatch) == "vcpu_enter_guest"


@pytest.mark.parametrize("kernel", KERNELS)
def test_changes_within_a_series_lead_to_its_row(kernel: str) -> None:
    """Stable releases stand in order, what they brought the row has, and what they took it has not."""
    known = generation(kernel)
    patches = [tuple(map(int, change.release.split("."))) for change in known.stable]
    assert patches == sorted(set(patches))
    for change in known.stable:
        assert change.release.startswith(f"{kernel}.")
        assert not change.added & ~known.traits
        assert not change.removed & known.traits


STABLE = {
    ("5.15.95", "5.15.96"): ("SVM_NEXT_RIP", ""),
    ("5.15.111", "5.15.116"): ("REENTRY_COUNTED", ""),
    ("5.15.129", "5.15.137"): ("LVTPC_MASKED", ""),
    ("5.15.154", "5.15.157"): ("LVTPC_KEPT_ON_AMD", ""),
    ("5.15.193", "5.15.194"): ("", "V_TPR_KEPT_BY_AVIC"),
    ("5.15.195", "5.15.198"): ("TIMER_NO_CATCH_UP", ""),
    ("6.6.0", "6.6.3"): ("", "RESTORE_CLEARS_PIR_LAST"),
    ("6.6.26", "6.6.29"): ("LVTPC_KEPT_ON_AMD", ""),
    ("6.6.51", "6.6.54"): ("ICR_NO_RESERVED ICR_RESERVED_GP", ""),
    ("6.6.68", "6.6.78"): ("ICR_SPLIT_SVM", "ID_FROM_PAGE"),
    ("6.6.100", "6.6.103"): ("FORCED_EXIT_HANDLED", ""),
    ("6.6.107", "6.6.108"): ("", "V_TPR_KEPT_BY_AVIC"),
    ("6.6.111", "6.6.113"): ("SVM_NEXT_RIP", ""),
    ("6.6.117", "6.6.120"): ("TIMER_NO_CATCH_UP", ""),
    ("6.6.128", "6.6.130"): ("CR8_FOLLOWS_AVIC", ""),
    ("6.6.145", "6.6.148"): ("TICK_ONLY_IN_RUN", ""),
    ("6.18.2", "6.18.3"): ("TIMER_NO_CATCH_UP", ""),
    ("6.18.17", "6.18.19"): ("CR8_FOLLOWS_AVIC", ""),
    ("6.18.26", "6.18.30"): ("", "PI_EMPTY_LOSES_RVI"),
    ("6.18.35", "6.18.39"): ("CR8_WITH_PPR X2AVIC_WRITES_EXIT", ""),
    ("6.18.40", "6.18.42"): ("TICK_ONLY_IN_RUN", ""),
    ("6.6.150", "6.7"): ("ID_FROM_PAGE V_TPR_KEPT_BY_AVIC", "SVM_NEXT_RIP TICK_ONLY_IN_RUN ICR_RESERVED_GP"),
    ("6.12.118", "6.16.1"): ("V_TPR_KEPT_BY_AVIC PI_EMPTY_LOSES_RVI", "CR8_FOLLOWS_AVIC SVM_NEXT_RIP CR8_WITH_PPR"),
}
"""Two trees, both read, and what the later one has that the other has not, and the other way round."""


@pytest.mark.parametrize("trees", STABLE, ids=" ".join)
def test_two_trees_differ_where_they_were_read_to(trees: tuple[str, str]) -> None:
    """Read in arch/x86/kvm: lapic.c, x86.c, svm/svm.c, svm/avic.c, vmx/vmx.c of both."""
    before, after = (generation(tree).traits for tree in trees)
    came, went = ([Trait[name] for name in names.split()] for names in STABLE[trees])
    assert [bool(after & trait) > bool(before & trait) for trait in came] == [True] * len(came)
    assert [bool(before & trait) > bool(after & trait) for trait in went] == [True] * len(went)


@pytest.mark.parametrize("offer", offers.OFFERS, ids=lambda offer: f"{offer.keyword}-{offer.since}")
def test_what_came_with_a_series_came_with_its_first_release(offer: offers.Offer) -> None:
    """Rows follow late trees; releases of a series that are older than its row's have what the series brought."""
    came = release(offer.since)
    assert came is not None
    series, patch = f"{came.major}.{came.minor}", came.patch or 0
    assert not offers.lacks(f"{series}.{patch + 1}", offer.since)
    if patch:
        assert offers.lacks(f"{series}.{patch - 1}", offer.since)
    assert offers.lacks("5.9.16", offer.since)


def test_an_early_release_has_msr_filters() -> None:
    fx.Machine(1, kernel="5.10.223").user_space_msr = r.MsrExit.FILTER
    with pytest.raises(ValueError, match="kernel 5.9.16 has no such option"):
        fx.Machine(1, kernel="5.9.16").user_space_msr = r.MsrExit.FILTER
