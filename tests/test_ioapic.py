"""KVM's IOAPIC: results of lines, EOIs, the RTC's pin, storms, resamplers, handled vectors, routes, generations."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import profiles, since

PAGE, WINDOW = 0xFEC0_0000, 0xFEC0_0010
EOI = 0x80B
LEVEL, MASKED, LOGICAL = r.REDIR_LEVEL, r.REDIR_MASK, r.REDIR_LOGICAL
STATE = struct.Struct("<QIIII24Q")
DISPATCHERS = ["python", "compiled"]


def booted(vcpus: int = 2, **options: Any) -> fx.Machine:
    m = fx.Machine(vcpus=vcpus, **({"apicv": False} | options))
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(0x808, 0)
    return m


def entry(m: fx.Machine, pin: int, value: int, dest: int = 0, v: int = 0) -> None:
    """An entry as a guest writes it: high half first."""
    for index, half in ((0x11 + 2 * pin, dest << 24), (0x10 + 2 * pin, value)):
        m.vcpus[v].mem_write(PAGE, index)
        m.vcpus[v].mem_write(WINDOW, half)


def state(m: fx.Machine) -> dict[str, Any]:
    base, ioregsel, chip_id, irr, pad, *table = STATE.unpack_from(m.get_irqchip(2))
    return {"base": base, "ioregsel": ioregsel, "id": chip_id, "irr": irr, "pad": pad, "table": table}


def end(v: fx.Vcpu) -> tuple[int | None, fx.Outcome]:
    """The guest takes its interrupt and ends it."""
    vector = v.ack()
    return vector, v.wrmsr(EOI, 0)


def lines(m: fx.Machine) -> list[str]:
    text = list(m.trace.lines())
    m.trace.clear()
    return text


# --------------------------------------------------------------------------------------------------------------- lines


def test_edge() -> None:
    """Up delivers; up again without a down coalesces; a down says 1."""
    m = booted()
    entry(m, 17, 0x41)
    assert [m.irq_line(17, level) for level in (1, 1, 0, 0, 1)] == [1, 0, 1, 1, 1]
    assert state(m)["irr"] == 0, "an edge that was delivered does not show"
    assert m.irq_line(17, 1) == 0
    assert state(m)["irr"] == 1 << 17, "an up without a down shows it again"


def test_level() -> None:
    """Up again: -1 while the EOI is to come, a new delivery when it came meanwhile."""
    m = booted()
    entry(m, 17, LEVEL | 0x41)
    assert (m.irq_line(17, 1), m.irq_line(17, 1)) == (1, -1)
    assert state(m)["table"][17] == LEVEL | r.REDIR_REMOTE_IRR | 0x41
    vector, out = end(m.vcpus[0])
    assert (vector, out.accepted) == (0x41, 0)
    assert m.vcpus[0].pending() == 0x41, "the line is still up"
    assert m.irq_line(17, 0) == 1
    end(m.vcpus[0])
    assert (state(m)["table"][17], m.vcpus[0].pending()) == (LEVEL | 0x41, None)


@pytest.mark.parametrize(("value", "dest", "edge", "level"), [
    (MASKED | 0x41, 0, -1, -1),
    (0x41, 0xFF, 2, 2),
    (0x141, 0xFF, 2, 2),
    (0x41, 9, 0, 0),
    (0x741, 0, 0, 0),
    (0x441, 0, 1, 1),
    (0x341, 0, 1, 1),
])  # fmt: skip
def test_results(value: int, dest: int, edge: int, level: int) -> None:
    """Masked, broadcast (LowPrio becomes Fixed), nobody there, ExtINT, NMI, Res3; remote IRR follows the result."""
    for trigger, result in ((0, edge), (LEVEL, level)):
        m = booted()
        entry(m, 17, value | trigger, dest)
        assert m.irq_line(17, 1) == result
        assert bool(state(m)["table"][17] & r.REDIR_REMOTE_IRR) is (trigger != 0 and result > 0)


def test_default_routes() -> None:
    """GSIs 0 to 15 are the PICs' as well, GSI 0 is pin 0; what nobody has is -1."""
    m = booted()
    entry(m, 0, 0x41)
    assert (m.irq_line(0, 1), m.irq_line(0, 0), m.irq_line(24, 1), m.irq_line(1 << 20, 1)) == (2, 2, -1, -1)
    assert m.irq_line(5, 1) == 1, "IOAPIC masked, PIC not"


def test_sources_are_a_pins() -> None:
    """Two GSIs of one pin share its sources: the second one's down takes the first one's up."""
    m = booted()
    m.set_gsi_routing([("ioapic", 40, 17), ("ioapic", 41, 17)])
    entry(m, 17, LEVEL | MASKED | 0x41)
    m.irq_line(40, 1)
    m.irq_line(41, 0)
    assert state(m)["irr"] == 0


# ----------------------------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_window(vendor: str, dispatcher: str) -> None:
    m = booted(vendor=vendor, dispatcher=dispatcher)
    v = m.vcpus[0]

    def read(index: int) -> int:
        v.mem_write(PAGE, index)
        return v.mem_read(WINDOW)

    v.mem_write(PAGE, 0x100)
    assert (v.mem_read(PAGE), v.mem_read(WINDOW)) == (0, 0), "IOREGSEL has 8 bits"
    v.mem_write(WINDOW, 0xFF00_0000)
    assert [read(i) for i in (0, 1, 2, 3, 0x0F, 0x10, 0x40)] == [
        *(0x0F00_0000, 0x0017_0011, 0x0F00_0000, 0xFFFF_FFFF, 0xFFFF_FFFF, MASKED, 0xFFFF_FFFF)
    ]
    v.mem_write(PAGE, 0x10)
    v.mem_write(WINDOW, 0xFFFF_FFFF)
    assert read(0x10) == 0xFFFF_FFFF & ~(r.REDIR_STATUS | r.REDIR_REMOTE_IRR)
    v.mem_write(WINDOW, 0x41, length=1)
    assert read(0x10) == 0x41, "zero-extended"
    assert (v.mem_read(PAGE + 0x40), v.mem_read(PAGE + 0x20), v.mem_read(WINDOW, length=8)) == (0, 0, 0x41)
    assert v.mem_write(PAGE + 0xFE, 0, length=4).user == fx.KvmExit.MMIO, "over the end"


def test_moved_base() -> None:
    """Neither place answers: the bus has the old one, the IOAPIC the new one."""
    m = booted()
    image = bytearray(m.get_irqchip(2))
    struct.pack_into("<Q", image, 0, 0xFED1_0000)
    m.set_irqchip(2, bytes(image))
    for gpa in (PAGE, 0xFED1_0000):
        assert m.vcpus[0].mem_write(gpa, 1).user == fx.KvmExit.MMIO


def test_unmask() -> None:
    """A level pin that waits is delivered, a pending edge is not; an entry that becomes edge loses remote IRR."""
    m = booted()
    for pin, trigger in ((17, LEVEL), (18, 0)):
        entry(m, pin, MASKED | trigger | 0x40 | pin)
        assert m.irq_line(pin, 1) == -1
        entry(m, pin, trigger | 0x40 | pin)
    assert m.vcpus[0].pending() == 0x51
    entry(m, 17, 0x51)
    assert not state(m)["table"][17] & r.REDIR_REMOTE_IRR


@pytest.mark.parametrize("kernel", profiles())
def test_unmask_with_a_resampler(kernel: str) -> None:
    """Since 6.4 its device is asked instead of delivering."""
    m = booted(kernel=kernel)
    line = m.irqfd(17, resample=True)
    entry(m, 17, MASKED | LEVEL | 0x41)
    assert line.signal() == -1
    entry(m, 17, LEVEL | 0x41)
    asked = since(kernel, "6.6")
    assert (m.vcpus[0].pending(), line.resampled, state(m)["irr"]) == ((None, 1, 0) if asked else (0x41, 0, 1 << 17))


# ----------------------------------------------------------------------------------------------------------------- EOI


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_eoi_delivers_to_others(vendor: str, dispatcher: str) -> None:
    """Its effects are the EOI's: the vCPU that the pin means now is in the guest, and has to leave it."""
    m = booted(vendor=vendor, dispatcher=dispatcher)
    v = m.vcpus[0]
    entry(m, 17, LEVEL | 0x41)
    assert m.irq_line(17, 1) == 1
    entry(m, 17, LEVEL | 0x41, dest=1, v=1)
    v.ack()
    m.vcpus[1].wrmsr(0x808, 0)
    out = v.wrmsr(EOI, 0)
    assert (out.accepted, out.effects, v.targets) == (0, fx.Effect.KICK, ((1, fx.Effect.KICK),))
    assert m.vcpus[1].pending() == 0x41


def test_eoi_reaches_every_pin_with_the_vector() -> None:
    """By TMR, whatever the entry says: a held edge of another vCPU is delivered again."""
    m = booted()
    m.trace.enable()
    entry(m, 17, LEVEL | 0x41)
    entry(m, 18, LEVEL | 0x41, dest=1)
    m.vcpus[0].wrmsr(0x808, 0)
    m.irq_line(18, 1)
    entry(m, 18, 0x41, dest=1)
    m.irq_line(17, 1)
    m.irq_line(17, 0)
    m.vcpus[1].ack()
    m.vcpus[0].ack()
    m.trace.clear()
    m.vcpus[0].set_msr(EOI, 0)
    assert [line for line in lines(m) if "kvm_apic:" not in line] == [
        "kvm_eoi: apicid 0 vector 65",
        "kvm_ack_irq: irqchip IOAPIC pin 17",
        "kvm_ack_irq: irqchip IOAPIC pin 18",
        "kvm_apic_accept_irq: apicid 1 vec 65 (Fixed|edge)",
    ]


def test_suppressed_broadcast() -> None:
    """KVM_SET_LAPIC can set SPIV bit 12, and remote IRR then stays."""
    m = booted()
    entry(m, 17, LEVEL | 0x41)
    page = bytearray(m.vcpus[0].get_lapic())
    page[0xF1] |= 0x10
    m.vcpus[0].set_lapic(bytes(page))
    m.irq_line(17, 1)
    end(m.vcpus[0])
    assert state(m)["table"][17] & r.REDIR_REMOTE_IRR


def test_storm() -> None:
    """After 10,000 EOIs with the line up there is silence for 10 ms, then one delivery."""
    m = booted()
    v = m.vcpus[1]
    entry(m, 17, LEVEL | 0x41, dest=1, v=1)
    m.mem[L.IOAPIC + L.IOAPIC_EOIS + 17] = 9_998
    v.wrmsr(0x808, 0)
    m.irq_line(17, 1)
    end(v)
    assert (v.pending(), m.next_timer()) == (0x41, None)
    m.trace.enable()
    v.ack()
    m.trace.clear()
    v.set_msr(EOI, 0)
    assert "kvm_ioapic_delayed_eoi_inj: dst 1 vec 65 (Fixed|physical|level)" in lines(m)
    assert (v.pending(), m.next_timer()) == (None, 10_000_000)
    assert m.set_time(9_999_999) == []
    v.wrmsr(0x808, 0)
    ((index, out),) = m.set_time(10_000_000)
    assert (index, out.effects, v.pending(), m.next_timer()) == (1, fx.Effect.KICK, 0x41, None)
    assert state(m)["table"][17] & r.REDIR_REMOTE_IRR
    assert m.mem[L.IOAPIC + L.IOAPIC_EOIS + 17] == 0


# ----------------------------------------------------------------------------------------------------------------- RTC


def rtc(m: fx.Machine) -> tuple[int, list[int]]:
    followed = [m.mem[L.IRQ + v.index * L.IRQ_STRIDE + L.IRQ_RTC_VECTOR] for v in m.vcpus]
    return m.mem[L.IOAPIC + L.IOAPIC_RTC_PENDING], followed


def test_rtc() -> None:
    """Pin 8 coalesces until every vCPU that got it has ended it, for who wants to know."""
    m = booted(3)
    m.set_gsi_routing([("ioapic", 8, 8)])
    entry(m, 8, LOGICAL | 0x41, dest=3)
    for v in m.vcpus:
        v.wrmsr(0x808, 0)
    m.irq_line(8, 1, status=False)
    assert rtc(m) == (0, [0, 0, 0])
    m.irq_line(8, 0)
    assert m.irq_line(8, 1) == 2
    assert rtc(m) == (2, [0x42, 0x42, 0])
    m.irq_line(8, 0)
    assert m.irq_line(8, 1) == 0
    end(m.vcpus[0])
    assert (rtc(m), m.irq_line(8, 1)) == ((1, [0, 0x42, 0]), 0)
    end(m.vcpus[1])
    assert (rtc(m), m.irq_line(8, 1)) == ((0, [0, 0, 0]), 2)


def test_rtc_lowest_priority_without_a_map() -> None:
    """The slow scan names the vCPU that is followed, too."""
    m = booted(3)
    entry(m, 8, 0x141)
    m.mem[m.mem[L.H_MAP] + L.MAP_PRESENT] = 0
    assert m.irq_line(8, 1) == 2
    assert rtc(m) == (1, [0x42, 0, 0])


def test_rtc_nmi_is_stuck() -> None:
    """An NMI is accepted and never ended: KVM_SET_IRQCHIP alone helps."""
    m = booted()
    m.set_gsi_routing([("ioapic", 8, 8)])
    entry(m, 8, 0x441)
    assert m.irq_line(8, 1) == 1
    m.irq_line(8, 0)
    assert (rtc(m), m.irq_line(8, 1)) == ((1, [0, 0]), 0)
    m.irq_line(8, 0)
    m.set_irqchip(2, m.get_irqchip(2))
    assert (rtc(m)[0], m.irq_line(8, 1)) == (0, 1)


def test_set_lapic_restores_rtc() -> None:
    m = booted()
    entry(m, 8, 0x41)
    m.vcpus[0].set_lapic(m.vcpus[0].get_lapic())
    assert rtc(m) == (0, [0, 0])
    m.irq_line(8, 1, status=False)
    m.vcpus[0].set_lapic(m.vcpus[0].get_lapic())
    assert rtc(m) == (1, [0x42, 0])


# -------------------------------------------------------------------------------------------------- routes and irqfds


def test_routing_refused() -> None:
    m = booted(x2apic_api=r.X2ApicApi.USE_32BIT_IDS)
    for table, text in (
        ([("ioapic", 1, 24)], "entry 0: pin"),
        ([("pic", 1, 2, 0)], "entry 0: PIC"),
        ([("pic", 1, 0, 8)], "entry 0: pin"),
        ([("ioapic", 1, 1), ("ioapic", 1, 2)], "entry 1: GSI 1 has a route already"),
        ([("ioapic", 1, 1), ("msi", 1, 0xFEE0_0000, 0x41)], "entry 1: GSI 1 has a route already"),
        ([("msi", 1, 0xFF_FEE0_0000, 0x41)], "entry 0: MSI address"),
        ([("msi", 4096, 0xFEE0_0000, 0x41)], "entry 0: GSI"),
        ([("ioapic", n, 0) for n in range(4096)] + [("ioapic", 1, 0)], "more than 4096"),
    ):
        with pytest.raises(ValueError, match=text):
            m.set_gsi_routing(table)
    assert m.irq_line(17, 0) == 1, "the table is as it was"
    m.set_gsi_routing([("ioapic", 1, 1), ("pic", 1, 0, 1), ("pic", 1, 1, 1)])
    assert (m.irq_line(1, 0), m.irq_line(17, 0)) == (3, -1)
    m.set_gsi_routing([])
    assert m.irq_line(1, 0) == -1
    split = booted(irqchip="split")
    for refused in (
        lambda: split.set_gsi_routing([("ioapic", 1, 1)]),
        lambda: split.set_gsi_routing([("pic", 1, 0, 1)]),
        lambda: split.irqfd(1, resample=True),
        lambda: split.get_irqchip(2),
        lambda: split.set_irqchip(2, bytes(512)),
    ):
        with pytest.raises(ValueError, match="split"):
            refused()


def test_message_routes() -> None:
    m = booted()
    m.set_gsi_routing([("msi", 30, 0xFEE0_1000, 0x41), ("msi", 31, 0xFEE0_9000, 0x42)])
    assert [m.irq_line(30, level) for level in (0, 1, 1)] == [-1, 1, 1]
    assert m.irq_line(31, 1) == 0
    assert m.vcpus[1].pending() == 0x41


def test_irqfd() -> None:
    """One message goes at once; everything else by the worker, up and down on user space's source."""
    m = booted()
    m.set_gsi_routing([("msi", 30, 0xFEE0_1000, 0x41), ("ioapic", 17, 17)])
    entry(m, 17, LEVEL | 0x42)
    message, line = m.irqfd(30), m.irqfd(17)
    m.trace.enable()
    m.trace.clear()
    assert message.signal(5) == 1
    assert [text.partition(":")[0] for text in lines(m)] == ["kvm_msi_set_irq", "kvm_apic_accept_irq"]
    m.irq_line(17, 1)
    end(m.vcpus[0])
    m.trace.clear()
    assert line.signal() == -1
    assert [text for text in lines(m) if "kvm_set_irq" in text] == [
        "kvm_set_irq: gsi 17 level 1 source 0",
        "kvm_set_irq: gsi 17 level 0 source 0",
    ]
    assert state(m)["irr"] == 0, "the pulse takes away what user space held up"
    line.close()
    with pytest.raises(ValueError, match="closed"):
        line.signal()


def test_resampler() -> None:
    """The EOI lowers its source and tells it, ahead of remote IRR; others that hold the line up are delivered again."""
    m = booted()
    fds = [m.irqfd(17, resample=True), m.irqfd(17, resample=True)]
    entry(m, 17, LEVEL | 0x41)
    m.vcpus[0].wrmsr(0x808, 0)
    assert fds[0].signal() == 1
    end(m.vcpus[0])
    assert ([fd.resampled for fd in fds], m.vcpus[0].pending(), state(m)["irr"]) == ([1, 1], None, 0)
    m.irq_line(17, 1)
    fds[1].signal()
    end(m.vcpus[0])
    assert ([fd.resampled for fd in fds], m.vcpus[0].pending()) == ([2, 2], 0x41)
    m.irq_line(17, 0)
    fds[0].signal()
    fds[0].close()
    assert state(m)["irr"] == 1 << 17
    fds[1].close()
    assert (state(m)["irr"], [fd.resampled for fd in fds]) == (0, [2, 2])


# ------------------------------------------------------------------------------------------------------ handled vectors


@pytest.mark.parametrize("kernel", profiles())
def test_handled_vectors(kernel: str) -> None:
    """They follow the table at an entry that was asked; what waits of an older entry is in them, and rescans (6.15)."""
    m = booted(kernel=kernel)
    v = m.vcpus[0]
    assert v.ioapic_handled == {0}
    entry(m, 17, LEVEL | 0x41)
    m.irq_line(17, 1)
    assert 0x41 in v.ioapic_handled
    entry(m, 17, LEVEL | 0x42, v=1)
    v.wrmsr(0x808, 0)
    assert v.ioapic_handled == {0, 0x42}, "nobody sends 0x41 any more"
    entry(m, 17, LEVEL | 0x41, dest=1, v=1)
    v.wrmsr(0x808, 0)
    assert v.ioapic_handled == {0, 0x41}
    end(v)
    v.wrmsr(0x808, 0)
    assert v.ioapic_handled == ({0} if since(kernel, "6.18") else {0, 0x41})


def test_given_vectors_stay() -> None:
    m = booted()
    v = m.vcpus[0]
    v.ioapic_handled = {0x55}
    entry(m, 17, LEVEL | 0x41)
    v.wrmsr(0x808, 0)
    assert v.ioapic_handled == {0x55}


@pytest.mark.parametrize("kernel", profiles())
def test_split(kernel: str) -> None:
    """Level messages of reserved GSIs; since 6.6 also those that are still to be ended."""
    m = booted(irqchip="split", kernel=kernel)
    v = m.vcpus[0]
    m.set_gsi_routing(
        [("msi", 3, 0xFEE0_0000, 0x8041), ("msi", 4, 0xFEE0_0000, 0x42), ("msi", 24, 0xFEE0_0000, 0x8043)]
    )
    assert v.ioapic_handled == set()
    v.wrmsr(0x808, 0)
    assert v.ioapic_handled == {0x41}
    assert m.irq_line(3, 1) == 1
    m.set_gsi_routing([("msi", 3, 0xFEE0_1000, 0x8041)])
    v.wrmsr(0x808, 0)
    assert v.ioapic_handled == ({0x41} if since(kernel, "6.6") else set())
    m.set_gsi_routing([("msi", 3, 0xFEE0_0000, 0x8041)])
    v.wrmsr(0x808, 0)
    vector, out = end(v)
    assert (vector, out.user, v.ioapic_eoi) == (0x41, fx.KvmExit.IOAPIC_EOI, (0x41, False))


def posted_before_a_scan(kernel: str) -> tuple[fx.Machine, fx.Vcpu]:
    """The second vCPU of a split irqchip is asked to scan, and vector 0x41, which TPR holds back, waits in its PIR."""
    m = booted(irqchip="split", kernel=kernel, apicv=True)
    v = m.vcpus[1]
    v.set_mp_state(fx.MpState.RUNNABLE)
    v.wrmsr(0x808, 0xF0)
    m.set_gsi_routing([("msi", 3, 0xFEE0_1000, 0x8041)])
    v.settle()
    m.signal_msi(0xFEE0_1000, 0x8041)
    m.set_gsi_routing([("msi", 3, 0xFEE0_0000, 0x8041)])
    return m, v


@pytest.mark.parametrize("kernel", [*profiles(), "6.6.35", "6.6.36", "6.9", "6.10"])
def test_what_is_posted_counts_for_a_split_scan(kernel: str) -> None:
    """A vector that is still to be ended is handled where it is: KVM looked for it in IRR before it was there."""
    _, v = posted_before_a_scan(kernel)
    v.settle()
    looks = kernel in {"6.6", "6.6.36", "6.10", "6.12", "6.18", "7.3"}
    assert v.ioapic_handled == ({0x41} if looks else set())


@pytest.mark.parametrize("kernel", [*profiles(), "5.15.161", "5.15.162"])
def test_an_init_behind_a_split_scan(kernel: str) -> None:
    """Up to 5.15, INIT keeps what a falling PPR takes out of PIR; nothing is left there behind a scan that looked."""
    m, v = posted_before_a_scan(kernel)
    m.vcpus[0].wrmsr(0x830, 1 << 32 | 0x4500)
    v.settle()
    kept = kernel in {"seed-v3", "5.6", "5.7", "5.8", "5.10", "5.15.161"}
    assert struct.unpack_from("<I", v.get_lapic(), 0x220)[0] == (1 << 1 if kept else 0)


# --------------------------------------------------------------------------------------------- APICv swallows an EOI


@pytest.mark.parametrize("kernel", profiles())
def test_lazy_eoi(kernel: str) -> None:
    """A rising edge makes up for it: 5.6 and 5.7 with all of an EOI, 5.6 for level pins as well."""
    m = booted(kernel=kernel, apicv=True)
    m.trace.enable()
    for pin, trigger in ((17, 0), (18, LEVEL)):
        entry(m, pin, trigger | 0x40 | pin)
        m.trace.clear()
        m.irq_line(pin, 1)
        acks = f"kvm_ack_irq: irqchip IOAPIC pin {pin}" in lines(m)
        assert acks is (kernel == "5.6" or (kernel == "5.7" and not trigger))


@pytest.mark.parametrize("kernel", ["seed-v3", "5.6", "5.8", "6.18"])
def test_lazy_eoi_of_the_rtc(kernel: str) -> None:
    m = booted(kernel=kernel, apicv=True)
    m.set_gsi_routing([("ioapic", 8, 8)])
    entry(m, 8, 0x41)
    v = m.vcpus[0]
    assert m.irq_line(8, 1) == 1
    v.hw_notify()
    assert v.ack() == 0x41
    for i in range(4):
        m.mem[v.own + L.K_ISR + i] = 0
    m.irq_line(8, 0)
    assert m.irq_line(8, 1) == (0 if kernel == "seed-v3" else 1)
