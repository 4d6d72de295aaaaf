"""A posted-interrupt descriptor on its way through the host: load, put, wake-up, devices that post, notifications."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numba
import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit import declare
from fastexit.profile import since
from generations import kernels

ICR = 0x830
ON, SN = 1, 2
F2, F1 = 0xF2 << 16, 0xF1 << 16
IF = 0x200


def ndst(cpu: int) -> int:
    return cpu << 32


def booted(**options: Any) -> fx.Machine:
    options.setdefault("vtd_pi", options.get("vendor", "vmx") == "vmx" and options.get("apicv", True))
    m = fx.Machine(vcpus=3, **options)
    m.boot_x2apic()
    return m


def load(v: fx.Vcpu, cpu: int) -> None:
    """What vcpu_load does to the descriptor."""
    assert declare.load("pi_load")(v.machine.handle, v.index, cpu) == 0


def put(v: fx.Vcpu, blocking: bool = False) -> fx.Effect:
    """What vcpu_put does to it; NOTIFY is a wake-up vector to the pCPU itself."""
    return fx.OUTCOMES[declare.load("pi_put")(v.machine.handle, v.index, int(blocking))].effects


def sleep(v: fx.Vcpu, cpu: int) -> None:
    """The guest halts with interrupts on, and the vCPU's thread goes to sleep on this pCPU."""
    load(v, cpu)
    v.rflags |= IF
    v.machine.mem[v.hot + L.HOT_BLOCKED] = 1
    assert put(v, blocking=True) == fx.Effect.NONE


def post(v: fx.Vcpu, vector: int) -> int:
    """A device posts; the notification as control word, or 0."""
    return declare.load("hardware_post")(v.machine.handle, v.index, vector)


def control(v: fx.Vcpu) -> int:
    return v.machine.mem[v.hot + L.PID_CONTROL_WORD]


def pir(v: fx.Vcpu) -> set[int]:
    return bits(v.machine.mem[v.hot : v.hot + 4].tolist())


def irr(v: fx.Vcpu) -> set[int]:
    first = v.vec
    return bits(v.machine.mem[first : first + 4].tolist())


def bits(words: list[int]) -> set[int]:
    return {i * 64 + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def rvi(v: fx.Vcpu) -> int:
    return v.machine.mem[v.vec + L.VEC_RVI]


def run(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.VmxExit.EXTERNAL_INTERRUPT)


# ------------------------------------------------------------------------------------------------------ load and put


def test_first_load_names_the_pcpu() -> None:
    """NDST becomes the pCPU, SN goes, NV is 0xF2 as it was; pCPU 0, which NDST names at rest, is no exception."""
    m = booted()
    load(m.vcpus[0], 0)
    load(m.vcpus[1], 7)
    assert control(m.vcpus[0]) == F2
    assert control(m.vcpus[1]) == F2 | ndst(7)
    assert control(m.vcpus[2]) == F2 | SN


def test_migration_moves_notifications() -> None:
    """A load on another pCPU changes NDST only; vectors that are posted stay where they are."""
    m = booted()
    v = m.vcpus[1]
    load(v, 3)
    assert post(v, 0x41) == F2 | ndst(3) | ON
    load(v, 4)
    assert (control(v), pir(v)) == (F2 | ndst(4) | ON, {0x41})


def test_load_makes_silent_vectors_known() -> None:
    """Preempted, the vCPU is not disturbed; a device posts in silence, and load makes an ON of it."""
    m = booted()
    v = m.vcpus[1]
    load(v, 3)
    assert put(v) == fx.Effect.NONE
    assert control(v) == F2 | ndst(3) | SN
    assert post(v, 0x41) == 0
    assert (control(v), pir(v)) == (F2 | ndst(3) | SN, {0x41})
    load(v, 3)
    assert control(v) == F2 | ndst(3) | ON


def test_load_without_sn_on_the_same_pcpu_looks_at_nothing() -> None:
    """Where SN was clear somebody has notified already: PIR without ON stays so."""
    m = booted()
    v = m.vcpus[1]
    load(v, 3)
    v.pid[1] = 2
    load(v, 3)
    assert control(v) == F2 | ndst(3)
    load(v, 4)
    assert control(v) == F2 | ndst(4) | ON, "a migration does look"


def test_put_where_nobody_posts() -> None:
    """Without IPI virtualisation or device posting the descriptor stays as it is, whatever the vCPU does."""
    m = booted(vtd_pi=False)
    v = m.vcpus[1]
    load(v, 3)
    v.rflags |= IF
    for blocking in (False, True):
        assert put(v, blocking) == fx.Effect.NONE
        assert control(v) == F2 | ndst(3)


@pytest.mark.parametrize("option", ["vtd_pi", "ipiv"])
def test_blocking_vcpu_asks_for_the_wakeup_vector(option: str) -> None:
    """Either kind of hardware that posts: NV becomes 0xF1, nothing else; the vCPU is on its pCPU's list."""
    m = booted(**{"vtd_pi": False, option: True})
    v = m.vcpus[1]
    sleep(v, 5)
    assert control(v) == F1 | ndst(5)
    assert m.mem[v.own + L.K_WAKEUP_CPU] == 6
    assert v.notification == (0xF1, 5)


@pytest.mark.parametrize("why", ["IF clear", "STI shadow", "preempted", "not blocking"])
def test_others_suppress_notifications(why: str) -> None:
    """A vCPU that an interrupt would not wake, or that runs on later anyway, sets SN."""
    m = booted()
    v = m.vcpus[1]
    load(v, 5)
    v.rflags = 2 if why == "IF clear" else 2 | IF
    v.shadow = r.SHADOW_STI if why == "STI shadow" else 0
    m.mem[v.own + L.K_PREEMPTED] = int(why == "preempted")
    assert put(v, blocking=why != "not blocking") == fx.Effect.NONE
    assert control(v) == F2 | ndst(5) | SN
    assert m.mem[v.own + L.K_WAKEUP_CPU] == 0


def test_l2_that_exits_on_interrupts_blocks_with_if_clear() -> None:
    """An interrupt that makes L2 exit to L1 is never blocked by L2's flag; if L1 lets L2 have it, it is."""
    m = booted()
    v = m.vcpus[1]
    v.nested = True
    load(v, 5)
    put(v, blocking=True)
    assert control(v) == F1 | ndst(5)
    v.l1_wants_exits = False
    load(v, 5)
    put(v, blocking=True)
    assert control(v) == F2 | ndst(5) | SN


def test_vector_that_came_before_the_switch() -> None:
    """ON is set when NV changes: the notification went out as 0xF2, so put sends 0xF1 to its own pCPU, which wakes."""
    m = booted()
    v = m.vcpus[1]
    load(v, 5)
    v.rflags |= IF
    m.mem[v.hot + L.HOT_BLOCKED] = 1
    assert post(v, 0x41) == F2 | ndst(5) | ON
    assert put(v, blocking=True) == fx.Effect.NOTIFY
    assert v.notification == (0xF1, 5)
    assert m.host_interrupt(5, 0xF1) == [1]


def test_load_leaves_the_list_of_the_previous_pcpu() -> None:
    """Woken on another pCPU, the vCPU is on no list, notified as 0xF2 again, and has ON for what was posted."""
    m = booted()
    v = m.vcpus[1]
    sleep(v, 5)
    assert post(v, 0x41) == F1 | ndst(5) | ON
    load(v, 6)
    assert (control(v), m.mem[v.own + L.K_WAKEUP_CPU]) == (F2 | ndst(6) | ON, 0)
    m.mem[v.hot + L.HOT_BLOCKED] = 1
    assert m.host_interrupt(5, 0xF1) == m.host_interrupt(6, 0xF1) == []


def test_same_pcpu_after_blocking_is_a_full_load() -> None:
    """The wake-up vector alone, without a migration, makes load rewrite the control word."""
    m = booted()
    v = m.vcpus[1]
    sleep(v, 5)
    load(v, 5)
    assert (control(v), m.mem[v.own + L.K_WAKEUP_CPU]) == (F2 | ndst(5), 0)


@pytest.mark.parametrize("options", [{"vendor": "svm"}, {"apicv": False}], ids=["svm", "plain"])
def test_machines_without_descriptors(options: dict) -> None:
    """AVIC has tables instead, and without APICv nobody posts: load and put touch nothing."""
    m = booted(**options)
    v = m.vcpus[1]
    before = v.pid.tobytes()
    load(v, 5)
    v.rflags |= IF
    assert put(v, blocking=True) == fx.Effect.NONE
    assert v.pid.tobytes() == before


# ---------------------------------------------------------------------------------------------------------- wake-ups


def test_wakeup_wakes_those_it_is_for() -> None:
    """Of three sleepers, 0xF1 wakes the one on this pCPU that has ON; a second 0xF1 finds it awake."""
    m = booted()
    a, b, c = m.vcpus
    sleep(a, 5)
    sleep(b, 5)
    sleep(c, 6)
    assert post(b, 0x41) == F1 | ndst(5) | ON
    assert post(c, 0x41) == F1 | ndst(6) | ON
    assert m.host_interrupt(5, 0xF1) == [1]
    assert m.host_interrupt(5, 0xF1) == []
    assert m.host_interrupt(6, 0xF1) == [2]
    assert [m.mem[v.hot + L.HOT_BLOCKED] for v in m.vcpus] == [1, 0, 0]


def test_several_wake_at_once() -> None:
    """One wake-up vector serves the whole list."""
    m = booted()
    for v in m.vcpus:
        sleep(v, 5)
    post(m.vcpus[0], 0x41)
    post(m.vcpus[2], 0x41)
    assert m.host_interrupt(5, 0xF1) == [0, 2]


def test_notification_vector_in_the_host_does_nothing() -> None:
    """0xF2 that comes when the guest has left: the vector stays in PIR, the next entry syncs it."""
    m = booted()
    v = m.vcpus[1]
    sleep(v, 5)
    post(v, 0x41)
    assert m.host_interrupt(5, 0xF2) == []
    assert m.mem[v.hot + L.HOT_BLOCKED] == 1
    assert pir(v) == {0x41}


def test_wakeup_vector_interrupts_another_guest() -> None:
    """The pCPU runs vCPU 0 when 0xF1 arrives: its external-interrupt exit wakes vCPU 1, which sleeps there."""
    m = booted()
    sleep(m.vcpus[1], 5)
    post(m.vcpus[1], 0x41)
    load(m.vcpus[0], 5)
    interrupt = declare.load("external_interrupt")
    for info in (0xF1, 0x8000_00F2, 0x8000_00EC):
        assert interrupt(m.handle, 0, info) == 0
    assert m.mem[m.vcpus[1].hot + L.HOT_BLOCKED] == 1
    assert fx.OUTCOMES[interrupt(m.handle, 0, 0x8000_00F1)].effects == fx.Effect.WAKE
    assert m.mem[m.vcpus[1].hot + L.HOT_BLOCKED] == 0
    load(m.vcpus[0], 6)
    m.mem[m.vcpus[1].hot + L.HOT_BLOCKED] = 1
    assert interrupt(m.handle, 0, 0x8000_00F1) == 0, "the list of another pCPU"


def test_has_pending() -> None:
    """ON, or SN with something in PIR; PIR alone is what a sender is about to announce."""
    m = booted()
    v = m.vcpus[1]
    pending = declare.load("pi_has_pending")
    load(v, 5)
    assert pending(m.handle, 1) == 0
    v.pid[3] = 1
    assert pending(m.handle, 1) == 0
    put(v)
    assert pending(m.handle, 1) == 1
    v.pid[3] = 0
    assert pending(m.handle, 1) == 0
    v.pid[4] |= np.uint64(ON)
    assert pending(m.handle, 1) == 1


@pytest.mark.parametrize("cpu", [-1, 1 << 32])
def test_no_such_pcpu(cpu: int) -> None:
    m = booted()
    with pytest.raises(ValueError, match="pCPU"):
        m.host_interrupt(cpu, 0xF1)


# ---------------------------------------------------------------------------------------------------------- hardware


def test_hardware_posts_once() -> None:
    """The first vector notifies, further ones add their bit; after the harvest the next one notifies again."""
    m = booted()
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    assert [post(v, vector) for vector in (0x41, 0x41, 0xFF)] == [F2 | ndst(5) | ON, 0, 0]
    assert pir(v) == {0x41, 0xFF}
    assert v.hw_notify()
    assert post(v, 0x41) == F2 | ndst(5) | ON


def test_hardware_notifies_where_software_would_not() -> None:
    """PIR set, ON clear: software leaves it to whoever set the bit, hardware looks at ON alone."""
    m = booted()
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    v.pid[1] = 2
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41)).effects == fx.Effect.NONE
    assert post(v, 0x41) == F2 | ndst(5) | ON


def test_software_notifies_where_hardware_does_not() -> None:
    """SN silences devices; an IPI through KVM sets ON all the same, and notifies."""
    m = booted()
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    put(v)
    assert post(v, 0x41) == 0
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x42)).effects == fx.Effect.NOTIFY
    assert control(v) == F2 | ndst(5) | SN | ON


def test_notification_in_guest_mode() -> None:
    """0xF2 while the guest runs: all of PIR goes to IRR, ON goes, RVI is the highest of both; no exit."""
    m = booted()
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    post(v, 0x91)
    assert v.hw_notify()
    exits = v.counters()["exits"]
    for vector in (0x21, 0x52, 0x83):
        post(v, vector)
    assert v.hw_notify()
    assert (control(v), pir(v), irr(v), rvi(v)) == (F2 | ndst(5), set(), {0x21, 0x52, 0x83, 0x91}, 0x91)
    assert v.counters()["exits"] == exits
    post(v, 0xE0)
    v.hw_notify()
    assert rvi(v) == 0xE0


def test_notification_over_an_empty_pir() -> None:
    """The CPU leaves RVI alone; KVM's own sync, in 6.18 before 6.18.30, loses it."""
    m = booted(kernel="6.18.26")
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    post(v, 0x91)
    v.hw_notify()
    v.pid[4] |= np.uint64(ON)
    assert not v.hw_notify()
    assert (control(v), rvi(v)) == (F2 | ndst(5), 0x91)
    v.pid[4] |= np.uint64(ON)
    run(v)
    assert rvi(v) == 0


@pytest.mark.parametrize("options", [{}, {"apicv": False}, {"vendor": "svm"}], ids=["user space", "plain", "svm"])
def test_notification_without_a_guest_that_takes_it(options: dict) -> None:
    """The host's handler gets it, and does nothing: outside the guest, and wherever the CPU has no descriptor."""
    m = booted(**options)
    v = m.vcpus[1]
    if options:
        v.rdmsr(0x802)
    v.pid[1] = 2
    assert not v.hw_notify()
    assert pir(v) == {0x41}


@pytest.mark.parametrize("nested", [True, False], ids=["L2", "inhibited"])
def test_notification_while_apicv_is_off(nested: bool) -> None:
    """L2, or a vCPU whose APICv is off, runs without this descriptor: 0xF2 is an interrupt for the host."""
    m = booted()
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    post(v, 0x41)
    v.nested = nested
    if not nested:
        m.mem[v.hot + L.HOT_FLAGS] &= ~L.FLAG_APICV
    assert not v.hw_notify()
    assert pir(v) == {0x41}


# --------------------------------------------------------------------------------------------------- self-IPIs, 7.7


@pytest.mark.parametrize(
    ("options", "completion"),
    [
        ({}, fx.Fastpath.REENTER_GUEST),
        ({"apicv": False}, fx.Fastpath.EXIT_HANDLED),
        ({"vendor": "svm"}, fx.Fastpath.REENTER_GUEST),
        ({"vendor": "svm", "apicv": False}, fx.Fastpath.EXIT_HANDLED),
    ],
    ids=["posted", "vmx plain", "avic", "svm plain"],
)
def test_self_ipi(options: dict, completion: fx.Fastpath) -> None:
    """Fast, and to nobody else's notice; without APICv the loop has to be left, so that the next entry injects."""
    m = booted(**options)
    v = m.vcpus[0]
    v.rdmsr(0x802)
    out = v.wrmsr(ICR, fx.icr(vector=0xFD, shorthand=1))
    assert (out.path, out.completion, out.accepted, out.effects) == (fx.Path.FAST, completion, 1, fx.Effect.NONE)
    assert irr(v) == {0xFD}
    assert v.mode == 1


@pytest.mark.parametrize("delivery", [2, 4, 5, 6], ids=["SMI", "NMI", "INIT", "SIPI"])
def test_other_modes_to_oneself_leave_the_loop(delivery: int) -> None:
    """What is not an interrupt is a request, and a request turns the re-entry into EXIT_HANDLED."""
    m = booted(smm=True)
    v = m.vcpus[0]
    v.rdmsr(0x802)
    out = v.wrmsr(ICR, fx.icr(dest=0, delivery=delivery, level=True))
    assert (out.path, out.completion, out.accepted) == (fx.Path.FAST, fx.Fastpath.EXIT_HANDLED, 1)


# ------------------------------------------------------------------------------------------------- interrupt remapping


def msi(dest: int, *, logical: bool = False, hint: bool = False) -> int:
    return 0xFEE0_0000 | dest << 12 | logical << 2 | hint << 3


def updates(m: fx.Machine) -> list[tuple[int, ...]]:
    """The kvm_pi_irte_update records: irq, enabled, gsi, vCPU id, vector."""
    records = m.trace.records()
    records = records[records["event"] == L.TP_PI_IRTE_UPDATE]
    low = 0xFFFF_FFFF
    return [(a & low, a >> 32, b & low, b >> 32, c) for a, b, c, *_ in records["args"].tolist()]


def test_device_interrupt_is_posted() -> None:
    """A message to one vCPU: the IRTE names its descriptor, the device posts past KVM, the guest's CPU is notified."""
    m = booted()
    v = m.vcpus[1]
    run(v)
    load(v, 5)
    m.trace.enable()
    entry = m.pi_update_irte(33, 24, msi(1), 0x51)
    assert (entry.vcpu, entry.vector) == (1, 0x51)
    assert updates(m) == [(33, 1, 24, 1, 0x51)]
    m.trace.clear()
    out = m.device_interrupt(33)
    assert (out.path, out.effects, out.accepted) == (fx.Path.HARDWARE, fx.Effect.NOTIFY, 1)
    assert v.notification == (0xF2, 5)
    assert m.device_interrupt(33).effects == fx.Effect.NONE, "ON is set"
    assert len(m.trace) == 0, "KVM saw nothing of it"
    v.hw_notify()
    assert irr(v) == {0x51}


def test_device_wakes_a_sleeper() -> None:
    """The notification of a blocked vCPU is 0xF1, to the pCPU on whose list it is."""
    m = booted()
    sleep(m.vcpus[1], 5)
    m.pi_update_irte(33, 24, msi(1), 0x51)
    assert m.device_interrupt(33).effects == fx.Effect.NOTIFY
    vector, cpu = m.vcpus[1].notification
    assert m.host_interrupt(cpu, vector) == [1]


def test_posting_asks_no_apic() -> None:
    """A software-disabled APIC refuses the message from KVM; the device posts it all the same."""
    m = booted()
    v = m.vcpus[1]
    v.set_msr(0x80F, 0xFF)
    assert m.signal_msi(msi(1), 0x51) == 0
    m.pi_update_irte(33, 24, msi(1), 0x51)
    m.device_interrupt(33)
    assert pir(v) == {0x51}


@pytest.mark.parametrize(
    ("address", "data", "vcpu"),
    [
        (msi(2), 0x51, 2),
        (msi(2), 0x151, 2),
        (msi(2), 0x8051, 2),
        (msi(0x4, logical=True), 0x51, 2),
        (msi(0x6, logical=True), 0x51, None),
        (msi(0x6, logical=True), 0x150, 1),
        (msi(0x6, logical=True), 0x151, 2),
        (msi(0x6, logical=True, hint=True), 0x51, 2),
        (msi(0xFF), 0x51, None),
        (msi(77), 0x51, None),
        (msi(2), 0x251, None),
        (msi(2), 0x451, None),
        (msi(2), 0x551, None),
        (msi(2), 0x751, None),
    ],
    ids=[
        *("fixed", "lowest priority", "level", "logical, one", "logical, two", "hashed to the first"),
        *("hashed to the second", "hint is lowest priority", "broadcast", "nobody", "SMI", "NMI", "INIT", "ExtINT"),
    ],
)
def test_what_can_be_posted(address: int, data: int, vcpu: int | None) -> None:
    """One vCPU, Fixed or lowest priority; several only if vector hashing makes them one."""
    m = booted()
    assert m.pi_update_irte(33, 24, address, data).vcpu == vcpu


def test_broadcast_is_no_id() -> None:
    """0xFF means all, even where a vCPU has the id 255; told apart by the broadcast quirk, it is that vCPU's."""
    for api, vcpu in ((0, None), (fx.X2ApicApi.DISABLE_BROADCAST_QUIRK, 1)):
        m = fx.Machine(apic_ids=[0, 255], vtd_pi=True, x2apic_api=int(api))
        m.boot_x2apic()
        assert m.pi_update_irte(33, 24, msi(0xFF), 0x51).vcpu == vcpu


def test_hash_that_hits_an_empty_slot() -> None:
    """Of the ids 0x3F the fourth, chosen by vector 0x51 mod 6, is nobody's; nor does the scan find a single one."""
    m = booted()
    assert m.pi_update_irte(33, 24, msi(0x3F, logical=True), 0x151).vcpu is None
    assert m.mem[L.H_LOST_LOWEST] == 1


def test_lowest_arbitration_priority() -> None:
    """Without vector hashing the vCPU that got fewest lowest-priority interrupts is posted to."""
    m = booted(vector_hashing=False)
    m.signal_msi(msi(0x2, logical=True), 0x151)
    assert m.pi_update_irte(33, 24, msi(0x6, logical=True), 0x151).vcpu == 2


def test_single_vcpu_without_a_map() -> None:
    """Aliased ids drop the map; the scan over all vCPUs still finds the only match, or sees that there are two."""
    m = fx.Machine(vcpus=4, vtd_pi=True)
    for v in m.vcpus:
        v.set_msr(0x80F, 0x1FF)
    m.vcpus[1].mmio_write(0x20, 2 << 24)
    m.vcpus[1].mmio_write(0xF0, 0x1FF)
    assert m.pi_update_irte(33, 24, msi(3), 0x51).vcpu == 3
    assert m.pi_update_irte(33, 24, msi(2), 0x51).vcpu is None


def test_back_to_remapped_mode() -> None:
    """Once the guest asks for an NMI the entry is given back to the host, which KVM traces; then KVM delivers."""
    m = booted()
    m.trace.enable()
    m.pi_update_irte(33, 24, msi(1), 0x51)
    entry = m.pi_update_irte(33, 24, msi(1), 0x400)
    assert entry.vcpu is None
    assert updates(m) == [(33, 1, 24, 1, 0x51), (33, 0, 24, 0xFFFF_FFFF, 0)]
    out = m.device_interrupt(33)
    assert (out.path, out.accepted) == (fx.Path.SLOW, 1)
    assert m.vcpus[1].events().nmi_pending == 1
    m.pi_update_irte(33, 24, msi(1), 0x400)
    assert len(updates(m)) == 2, "remapped before and after: nothing to do"


def test_without_device_posting() -> None:
    """No posting IOMMU: every entry stays the host's, nothing is traced, KVM delivers each message."""
    m = booted(vtd_pi=False)
    m.trace.enable()
    assert m.pi_update_irte(33, 24, msi(1), 0x51).vcpu is None
    assert updates(m) == []
    out = m.device_interrupt(33)
    assert (out.path, out.accepted) == (fx.Path.SLOW, 1)
    assert m.vcpus[1].pending() == 0x51


def test_entries_that_are_refused() -> None:
    """A route that KVM would refuse, and an interrupt that has no entry."""
    m = booted(x2apic_api=1)
    with pytest.raises(ValueError, match=r"bits 39:32 .*EINVAL"):
        m.pi_update_irte(33, 24, 1 << 32 | msi(1), 0x51)
    with pytest.raises(ValueError, match="host interrupt 33 has no remapping entry"):
        m.device_interrupt(33)
    assert m.pi_update_irte(33, 24, msi(1), 0x51).vcpu == 1
    m.add_vcpu(300)
    m.boot_x2apic()
    assert m.pi_update_irte(34, 25, 1 << 40 | msi(300 - 256), 0x51).vcpu == 3


# ------------------------------------------------------------------------------------------------------------- threads


def native(name: str, arguments: int) -> Any:
    """An entry as a C function, which a compiled loop calls without the GIL."""
    kind = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * arguments)
    return kind(declare.address(name))


@pytest.mark.skipif(not declare.JIT, reason="interpreted kernels are Python: their accesses are atomic towards nobody")
def test_device_races_with_the_scheduler() -> None:
    """A device posts a few vectors while the vCPU is loaded, entered, notified, preempted and blocked in a hurry.

    Each round stops the vCPU blocked or preempted at another moment. When the device has finished, nothing may be
    forgotten: what is in PIR is announced by ON, or SN says that the next load has to look; and whoever sleeps with ON
    set was sent the wake-up vector. From there, every vector that was posted is delivered. A round has few vectors,
    because the next one would set right what went wrong with one.
    """
    m = booted()
    v = m.vcpus[1]
    v.set_mp_state(fx.MpState.RUNNABLE)
    assert v.run()
    v.get_msr(0x1B)  # what booting asked for is served: nothing keeps the vCPU from entering
    assert v.requests == 0
    v.rflags |= IF
    c_load, c_put, c_post = native("pi_load", 3), native("pi_put", 3), native("hardware_post", 3)
    c_enter, c_notify, c_deliver = native("enter", 2), native("process_notification", 2), native("deliver_pending", 2)
    c_eoi, c_pending = native("apicv_wrmsr", 4), native("pi_has_pending", 2)
    none, zero, one, target = np.uint64(L.NONE), np.uint64(0), np.uint64(1), np.uint64(1)
    control_at, mode_at = v.hot + L.PID_CONTROL_WORD, v.hot + L.HOT_MODE
    go, done, wakeups = range(3)

    @numba.njit(nogil=True)
    def device(handle: Any, rounds: Any, vectors: Any, shared: Any) -> None:
        for number in range(rounds):
            while shared[go] <= number:
                c_pending(handle, target)  # a call that may change anything: the compiler has to look again
            for _ in range(number * 7 % 61):
                c_pending(handle, target)
            for i in range(1 + number % 3):
                word = c_post(handle, target, vectors[(number + i) % len(vectors)])
                if (word >> np.uint64(16)) & np.uint64(0xFF) == np.uint64(0xF1):
                    shared[wakeups] += 1
            c_pending(handle, target)
            shared[done] = number + 1

    @numba.njit(nogil=True)
    def turn(handle: Any, words: Any, cpu: Any, blocking: Any, taken: Any) -> Any:
        c_load(handle, target, cpu)
        while c_enter(handle, target) == zero:
            pass
        if words[control_at] & one:  # else nobody sent a notification
            c_notify(handle, target)
        vector = c_deliver(handle, target)
        while vector != none:
            taken[vector] += 1
            c_eoi(handle, target, np.uint64(0x80B), zero)
            vector = c_deliver(handle, target)
        words[mode_at] = zero
        return c_put(handle, target, blocking)

    @numba.njit(nogil=True)
    def scheduler(handle: Any, words: Any, rounds: Any, vectors: Any, shared: Any, counts: Any) -> Any:
        taken = np.zeros(256, np.int64)
        for number in range(rounds):
            taken[:] = 0
            shared[go] = number + 1
            told = zero
            before = 0
            for i in range(1 + number % 5):
                before = shared[wakeups]
                told = turn(handle, words, np.uint64(i // 2 % 3), one if (i + number) % 3 else zero, taken)
            while shared[done] <= number:
                c_pending(handle, target)
            pir = words[control_at - 4] | words[control_at - 3] | words[control_at - 2] | words[control_at - 1]
            word = words[control_at]
            if pir != zero:
                counts[0] += 1
                if word & np.uint64(ON | SN) == zero:
                    return "vectors that nobody knows of", number
                if word & np.uint64(SN) == zero:
                    counts[1] += 1
                    if told == zero and shared[wakeups] == before:
                        return "nobody was told to wake it", number
            turn(handle, words, zero, one, taken)
            for i in range(1 + number % 3):
                if taken[vectors[(number + i) % len(vectors)]] == 0:
                    return "a vector was lost", number
        return "", rounds

    handle, vectors = np.uint64(m.handle), np.arange(32, 256, dtype=np.uint64)
    np.random.default_rng(7).shuffle(vectors)
    shared, counts = np.zeros(3, np.int64), np.zeros(2, np.int64)
    device(handle, 0, vectors, shared)
    scheduler(handle, m.words, 0, vectors, shared, counts)
    rounds = 25_000
    thread = threading.Thread(target=device, args=(handle, rounds, vectors, shared), daemon=True)
    thread.start()
    failure, number = scheduler(handle, m.words, rounds, vectors, shared, counts)
    shared[go] = rounds
    thread.join()
    assert not failure, f"round {number}: {failure}"
    assert counts.min() > 100, f"too few rounds ended with work to do: {counts}"


# ---------------------------------------------------------------------------------------------------- older generations


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("preempted", [False, True])
def test_put_by_generation(kernel: str, preempted: bool) -> None:
    """vmx_vcpu_pi_put of 5.10.262, 5.15.85, 6.1.192, 6.12.118 and 6.16.1 suppresses for the preempted alone."""
    m = booted(kernel=kernel)
    v = m.vcpus[1]
    v.load(5)
    v.put(preempted=preempted)
    assert control(v) == F2 | ndst(5) | (SN if preempted or since(kernel, "6.18") else 0)
    assert m.mem[v.own + L.K_WAKEUP_CPU] == 0


@pytest.mark.parametrize("kernel", kernels("6.1"))
def test_preempted_on_the_way_to_sleep(kernel: str) -> None:
    """Up to 6.16.1 it goes on the list and is suppressed, since 6.18.2 only the latter."""
    m = booted(kernel=kernel)
    v = m.vcpus[1]
    load(v, 5)
    v.rflags |= IF
    m.mem[v.own + L.K_PREEMPTED] = 1
    assert put(v, blocking=True) == fx.Effect.NONE
    later = since(kernel, "6.18")
    assert control(v) == (F2 if later else F1) | ndst(5) | SN
    assert m.mem[v.own + L.K_WAKEUP_CPU] == (0 if later else 6)


def halted(kernel: str, *, interrupts: bool, **options: Any) -> fx.Vcpu:
    m = booted(kernel=kernel, **options)
    v = m.vcpus[1]
    run(v)
    v.rflags = 2 | IF * interrupts
    assert v.exit(fx.VmxExit.HLT).blocked
    return v


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("interrupts", [True, False])
def test_wakeup_vector_by_generation(kernel: str, interrupts: bool) -> None:
    """pi_pre_block up to 5.10.262 sets it whatever IF says; 5.15.85 looks at IF, as put does later. It goes again when
    the thread wakes, or later when it is loaded. A sleeper with IF clear is not suppressed before 6.18.2.
    """
    v = halted(kernel, interrupts=interrupts)
    asks = interrupts or not since(kernel, "5.15")
    assert control(v) == (F1 if asks else F2) | ndst(1) | (SN if not asks and since(kernel, "6.18") else 0)
    assert v.machine.mem[v.own + L.K_WAKEUP_CPU] == (2 if asks else 0)
    v.get_msr(0x808)  # a signal
    if since(kernel, "6.1"):
        v.load()
    assert control(v) & ~SN == F2 | ndst(1)
    assert v.machine.mem[v.own + L.K_WAKEUP_CPU] == 0


@pytest.mark.parametrize("kernel", ["5.10", "5.15"])
def test_load_leaves_a_sleeper_alone(kernel: str) -> None:
    """vmx_vcpu_pi_load of 5.10.262 and 5.15.85: a sleeper that migrates is still woken on its old pCPU."""
    v = halted(kernel, interrupts=True)
    load(v, 6)
    assert control(v) == F1 | ndst(1)
    assert post(v, 0x41) == F1 | ndst(1) | ON
    assert v.machine.host_interrupt(1, 0xF1) == [1]
    assert v.run()
    assert v.notification == (0xF2, 1)


@pytest.mark.parametrize("kernel", ["5.8", "5.10", "5.15", "6.1"])
def test_posted_interrupt_ends_a_halt_with_if_clear(kernel: str) -> None:
    """vcpu_block up to 5.10.262: a thread that must not sleep goes on as if it had been woken, and the halt is over."""
    m = booted(kernel=kernel)
    v = m.vcpus[1]
    run(v)
    v.rflags = 2
    m.mem[v.hot + L.PID_CONTROL_WORD] |= ON
    m.mem[v.hot + L.PID_PIR + 1] = 2
    assert v.exit(fx.VmxExit.HLT).blocked is (kernel in ("5.15", "6.1"))
    assert (v.get_mp_state() == fx.MpState.HALTED) is (kernel in ("5.15", "6.1"))
