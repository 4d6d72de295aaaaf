"""What a naive IOAPIC gets wrong of handled vectors: which EOIs it hears of, and since when."""

from __future__ import annotations

import pytest

from fastexit import regs as r
from fastexit.layout import HOT_REQUESTS
from irqchip_scene import JUDGES, LEVEL, MASKED, NMI, REMOTE_IRR, Scene, scene

PIN, OTHER, RTC = 17, 19, 8
VECTOR, NEW = 0x41, 0x52
REQ_SCAN = r.REQ_SCAN_IOAPIC
pytestmark = pytest.mark.parametrize("judge", JUDGES)


def heard(s: Scene, pin: int, i: int = 0, vector: int = VECTOR) -> bool:
    """Whether an EOI of a level vector on a vCPU, which does not run before it, reaches a pin that waits for one."""
    s.page(i, isr=(vector,))
    s.eoi(i)
    return not s.remote_irr(pin)


def test_trap_15_the_mask_does_not_count(judge: str) -> None:
    with scene(judge) as s:
        s.put(entries={PIN: VECTOR | LEVEL | MASKED | REMOTE_IRR})
        s.run()
        assert heard(s, PIN)


def test_trap_16_edge_pins_that_somebody_follows(judge: str) -> None:
    with scene(judge) as s:
        s.put(entries={RTC: VECTOR, PIN: VECTOR | MASKED | REMOTE_IRR, OTHER: NEW | MASKED | REMOTE_IRR})
        s.run()
        assert heard(s, PIN)  # by the RTC's pin, which has the vector
        assert not heard(s, OTHER, vector=NEW)
        s.do("irqfd", 1, OTHER, True)
        s.run()
        assert heard(s, OTHER, vector=NEW)


def test_trap_17_the_set_follows_at_kvm_run(judge: str) -> None:
    with scene(judge) as s:
        s.put(entries={PIN: VECTOR | LEVEL | MASKED | REMOTE_IRR})
        assert not heard(s, PIN)
        s.run()
        s.put(entries={PIN: NEW | LEVEL | MASKED | REMOTE_IRR, OTHER: VECTOR | LEVEL | MASKED | REMOTE_IRR})
        assert heard(s, OTHER)  # by the old set
        assert not heard(s, PIN, vector=NEW)
        s.run()
        assert heard(s, PIN, vector=NEW)


def test_trap_18_what_is_pending_counts(judge: str) -> None:
    with scene(judge) as s:
        s.put(entries={PIN: VECTOR | LEVEL | MASKED | REMOTE_IRR | 1 << 56})
        s.run()
        assert not heard(s, PIN)
        s.page(isr=(VECTOR,))
        s.run()
        s.eoi()
        assert not s.remote_irr(PIN)


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_trap_19_a_stale_vector_asks_for_another_scan(judge: str, kernel: str) -> None:
    if judge == "kvm":
        pytest.skip("ISR without KVM_SET_LAPIC, which asks for a scan itself, takes a kernel that does not end it")
    with scene(judge, kernel=kernel) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.run()
        s.line(PIN, 1)
        assert s.do("take", 0) == VECTOR
        s.write(0x11 + 2 * PIN, 1 << 24, i=1)  # to vCPU 1; this vCPU has it in service
        s.run(0)
        s.line(PIN, 0)
        s.eoi(0)
        assert not s.remote_irr(PIN)
        s.run(0)
        s.do("signal_msi", 0xFEE0_0000, VECTOR | 0x8000)
        assert s.do("take", 0) == VECTOR
        s.line(PIN, 1)
        s.line(PIN, 0)
        s.eoi(0)
        assert s.remote_irr(PIN) == (kernel == "6.18")


@pytest.mark.parametrize(("mode", "asked"), [(0, False), (NMI, True)])
def test_traps_20_22_whom_an_entry_asks(judge: str, mode: int, asked: bool) -> None:
    """The new destination's and the old one's vCPUs; of any mode but Fixed all."""
    if judge == "kvm":
        pytest.skip("ISR without KVM_SET_LAPIC, which asks for a scan itself, takes a kernel that does not end it")
    with scene(judge, 3) as s:
        s.entry(PIN, VECTOR | LEVEL | MASKED, dest=0)
        for i in range(3):
            s.run(i)
        s.write(0x10 + 2 * OTHER, NEW | LEVEL | MASKED | mode)
        s.write(0x11 + 2 * PIN, 1 << 24)
        waiting = [bool(s.model.mem[v.hot + HOT_REQUESTS] & REQ_SCAN) for v in s.model.vcpus]
        assert waiting[1]  # the new destination, which has not run since
        assert waiting[2] is asked
        s.line(PIN, 1)
        s.write(0x10 + 2 * PIN, VECTOR | LEVEL)
        s.run(0)
        s.run(1)
        s.do("signal_msi", 0xFEE0_0000, VECTOR | 0x8000)
        assert s.do("take", 0) == VECTOR
        s.eoi(0)
        assert s.remote_irr(PIN)  # the old destination has scanned: it does not handle the vector any more


@pytest.mark.parametrize("kernel", ["6.18", "7.3"])
def test_trap_21_the_old_destination_is_read_in_the_new_mode(judge: str, kernel: str) -> None:
    """Logical 2 is vCPU 1, physical 2 is vCPU 2: a write that makes 2 logical asks vCPU 1, from 7.2 on vCPU 2, too."""
    if judge == "kvm":
        pytest.skip("requests are not to be seen there")
    with scene(judge, 3, kernel=kernel) as s:
        s.entry(PIN, VECTOR | LEVEL | MASKED, dest=2)
        for i in range(3):
            s.run(i)
        s.write(0x10 + 2 * PIN, VECTOR | LEVEL | MASKED | 1 << 11)
        waiting = [bool(s.model.mem[v.hot + HOT_REQUESTS] & REQ_SCAN) for v in s.model.vcpus]
        assert waiting[1:] == [True, kernel == "7.3"]
