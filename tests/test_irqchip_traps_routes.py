"""What a naive table of GSI routes gets wrong: order, sums, shared pins, messages, eventfds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from irqchip_scene import JUDGES, LEVEL, MASKED, scene

PIN, OTHER = 17, 19
VECTOR = 0x41
MSI = 0xFEE0_0000
pytestmark = pytest.mark.parametrize("judge", JUDGES)


@pytest.mark.parametrize("pic_first", [False, True])
def test_trap_10_routes_are_worked_in_the_tables_order(judge: str, pic_first: bool) -> None:
    if judge == "kvm":
        pytest.skip("trace lines of the kernel take root, and fastexit verify --trace compares them")
    with scene(judge, traced=True) as s:
        rows = [("ioapic", 3, PIN), ("pic", 3, 0, 3)]
        s.do("set_gsi_routing", tuple(rows[::-1] if pic_first else rows))
        s.line(3, 1)
        names = [line.partition(":")[0] for line in s.model_lines()]
        chips = ["kvm_ioapic_set_irq", "kvm_pic_set_irq"]
        assert names == ["kvm_set_irq", *(chips[::-1] if pic_first else chips)]


def test_trap_11_a_chip_that_ignores_a_line_is_left_out(judge: str) -> None:
    with scene(judge) as s:
        assert s.line(5, 1) == 1  # the IOAPIC's pin is masked: -1, the PIC's takes it: 1
        s.line(5, 0)
        s.do("io_write", 0, 0x21, 0xFF, 1)
        assert s.line(5, 1) == -1


def test_trap_58_two_gsis_of_a_pin_share_their_bit(judge: str) -> None:
    with scene(judge) as s:
        s.do("set_gsi_routing", (("ioapic", 1, PIN), ("ioapic", 2, PIN)))
        s.entry(PIN, VECTOR | LEVEL | MASKED)
        s.line(1, 1)
        s.line(2, 1)
        assert s.chip["irr"] == 1 << PIN
        s.line(2, 0)
        assert s.chip["irr"] == 0


def test_a_pin_is_told_by_its_last_gsi(judge: str) -> None:
    with scene(judge) as s:
        s.do("set_gsi_routing", (("ioapic", 9, PIN), ("ioapic", 2, PIN)))
        s.entry(PIN, VECTOR | LEVEL)
        for number, gsi in ((1, 9), (2, 2)):
            s.do("irqfd", number, gsi, True)
        s.do("irqfd_signal", 1, 1)
        s.run()
        s.serve()
        s.eoi()
        assert [s.model_irqfds[n].resampled for n in (1, 2)] == [0, 1]


@pytest.mark.parametrize("asserted", [0, 0x4000])
def test_trap_61_a_messages_level_bit_is_not_looked_at(judge: str, asserted: int) -> None:
    with scene(judge) as s:
        assert s.do("signal_msi", MSI, VECTOR | 0x8000 | asserted) == 1
        s.do("set_gsi_routing", (("msi", 30, MSI, VECTOR + 1 | 0x8000 | asserted),))
        assert s.line(30, 1) == 1
        assert s.line(30, 0) == -1
        assert s.waits() == {VECTOR, VECTOR + 1}


@pytest.mark.parametrize("count", [1, 5])
def test_trap_62_an_irqfd_is_a_pulse(judge: str, count: int) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.do("irqfd", 1, PIN, False)
        s.do("irqfd_signal", 1, count)
        assert s.waits() == {VECTOR}
        assert s.chip["irr"] == 0
        s.run()
        s.serve()
        s.eoi()
        assert s.waits() == set()


def test_an_irqfds_down_takes_user_spaces_up_away(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL | MASKED)
        s.line(PIN, 1)
        s.do("irqfd", 1, PIN, False)
        s.do("irqfd_signal", 1, 1)
        assert s.chip["irr"] == 0


def test_a_resampler_lets_go_before_the_pin_is_free(judge: str) -> None:
    with scene(judge) as s:
        s.entry(PIN, VECTOR | LEVEL)
        s.do("irqfd", 1, PIN, True)
        s.do("irqfd_signal", 1, 1)
        s.run()
        s.serve()
        s.eoi()
        assert s.model_irqfds[1].resampled == 1
        assert s.waits() == set()
        s.do("irqfd_signal", 1, 1)
        s.line(PIN, 1)
        s.serve()
        s.eoi()
        assert s.waits() == {VECTOR}  # user space holds it up


@pytest.mark.parametrize("gsi", [4096, 1 << 31])
def test_resamplers_of_a_gsi_without_routes_make_everybody_scan(judge: str, gsi: int) -> None:
    with scene(judge) as s:

        def scanned(change: Callable[[], Any]) -> bool:
            """Whether a vCPU that has the pin's vector, which is another's, ends it for the pin as well."""
            before = s.model_irqfds[1].resampled
            s.put()  # everybody scans, and nobody has the vector
            s.run()
            s.do("signal_msi", MSI, VECTOR)
            change()
            s.run()
            s.serve()
            s.eoi()
            return bool(s.model_irqfds[1].resampled > before)

        s.entry(PIN, VECTOR | LEVEL, dest=1, i=1)
        s.do("irqfd", 1, PIN, True)
        for what, change in {
            "nothing": lambda: None,
            "first": lambda: s.do("irqfd", 2, gsi, True),
            "second": lambda: s.do("irqfd", 3, gsi, True),
            "not the last": lambda: s.do("irqfd_close", 2),
            "last": lambda: s.do("irqfd_close", 3),
            "no resampler": lambda: s.do("irqfd", 4, gsi, False),
        }.items():
            assert scanned(change) is (what in ("first", "last")), what


def test_trap_65_gsi_0_is_pin_0(judge: str) -> None:
    with scene(judge) as s:
        s.entry(0, VECTOR)
        assert s.line(0, 1) == 2
        assert s.waits() == {VECTOR}


@pytest.mark.parametrize(
    "row",
    [
        ("ioapic", 4096, 0),
        ("ioapic", 3, 24),
        ("pic", 3, 1, 8),
        ("pic", 3, 3, 1),
        ("ioapic", 5, 3),
        ("msi", 5, MSI, VECTOR),
        ("msi", 6, 1 << 32 | MSI, VECTOR),
    ],
)
def test_a_refused_table_changes_nothing(judge: str, row: tuple[object, ...]) -> None:
    with scene(judge, x2apic_api=1) as s:
        s.entry(PIN, VECTOR)
        assert s.do("set_gsi_routing", (("ioapic", 5, OTHER), row)) == "refused"
        assert s.line(PIN, 1) == 1
