"""Who raised the interrupts of a trace: IOAPIC, PICs, PIT, MSIs, SynIC, by the lines of KVM's irqchip.

KVM prints kvm_set_irq before everything, kvm_msi_set_irq before what an MSI does, kvm_ioapic_set_irq and
kvm_hv_synic_set_irq behind what they say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastexit.trace.events import Kind, parse
from fastexit.trace.replay import replay
from fastexit.trace.report import VmReport

VCPU = "CPU 0/KVM-100 [001] ..... "
OTHER_VCPU = "CPU 1/KVM-101 [002] ..... "
WORKER = "kworker/1:0-200 [003] ..... "
PIT_THREAD = "kvm-pit/99-201 [003] ..... "
FIRST = f"{VCPU}9.0: kvm_entry: vcpu 0, rip 0x1", f"{OTHER_VCPU}9.1: kvm_entry: vcpu 1, rip 0x1"
ICR_WRITE = (
    "kvm_apic_ipi: dst 1 vec 251 (Fixed|physical|de-assert|edge|dst)",
    "kvm_apic_accept_irq: apicid 1 vec 251 (Fixed|edge)",
    "kvm_apic: apic_write APIC_ICR = 0x1000000fb",
    "kvm_msr: msr_write 830 = 0x1000000fb",
)


def accept(vector: int, vcpu: int = 0, trigger: str = "edge") -> str:
    return f"kvm_apic_accept_irq: apicid {vcpu} vec {vector} (Fixed|{trigger})"


def line(gsi: int, level: int = 1, source: int = 0) -> str:
    return f"kvm_set_irq: gsi {gsi} level {level} source {source}"


def msi(vector: int) -> str:
    return f"kvm_msi_set_irq: dst 0 vec {vector} (Fixed|physical|edge)"


def ioapic(pin: int, vector: int, more: str = "") -> str:
    return f"kvm_ioapic_set_irq: pin {pin} dst 0 vec {vector} (Fixed|physical|edge){more}"


def pic(pin: int, masked: bool = True) -> str:
    return f"kvm_pic_set_irq: chip {pin >> 3} pin {pin & 7} (edge{'|masked' if masked else ''})"


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., VmReport]:
    """Replay what threads print, one (thread, lines) after the other, with an IPI before it."""

    def run(*parts: tuple[str, list[str]], ipi: bool = True) -> VmReport:
        bodies = [(VCPU, body) for body in ICR_WRITE] if ipi else [(VCPU, ICR_WRITE[-1])]
        bodies += [(thread, body) for thread, lines in parts for body in lines]
        lines = [*FIRST, *(f"{thread}10.{n:06d}: {body}" for n, (thread, body) in enumerate(bodies))]
        path = tmp_path / "trace.txt"
        path.write_text("\n".join(lines) + "\n")
        report = replay(path)
        assert not report.mismatches
        assert not report.problems
        (vm,) = report.vms
        return vm

    return run


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("kvm_set_irq: gsi 4 level -1 source 1", Kind.LINE, (4, -1, 1)),
        ("kvm_msi_set_irq: dst ff vec 50 (LowPrio|logical|level|rh)", Kind.SOURCE, (-1, 50, 0)),
        ("kvm_ioapic_set_irq: pin 4 dst 1 vec 53 (Fixed|physical|edge|masked) (coalesced)", Kind.PIN, (-1, 53, 0)),
        ("kvm_ack_irq: irqchip IOAPIC pin 17", Kind.SOURCE, (-1, -1, 0)),
        ("kvm_ack_irq: irqchip PIC slave pin 9", Kind.OTHER, (-1, -1, 0)),
        ("kvm_pic_set_irq: chip 1 pin 2 (level)", Kind.PIC, (10, 0, 0)),
        ("kvm_pic_set_irq: chip 1 pin 2 (level|masked)", Kind.OTHER, (10, 0, 0)),
    ],
)
def test_lines_of_the_irqchip(text: str, kind: Kind, numbers: tuple[int, int, int]) -> None:
    event = parse(text.encode())
    assert (event.kind, event.a, event.b, event.c) == (kind, *numbers)


@pytest.mark.parametrize("thread", [WORKER, VCPU, OTHER_VCPU])
def test_the_ioapic_is_named_behind_what_it_delivers(told: Callable[..., VmReport], thread: str) -> None:
    """An MSI, a pin, an MSI: the pin's accept line is neither of the MSIs'."""
    lines = [line(24), msi(40), accept(40), line(4), accept(33), ioapic(4, 33), pic(4), line(4, 0), ioapic(4, 33)]
    vm = told((thread, [*lines, line(24), msi(41), accept(41)]))
    assert vm.other_accepts == {"MSI": 2, "IOAPIC": 1}


@pytest.mark.parametrize("thread", [WORKER, VCPU])
def test_a_pin_that_reaches_several(told: Callable[..., VmReport], thread: str) -> None:
    vm = told((thread, [line(4), accept(33), accept(33, 1), ioapic(4, 33)]))
    assert vm.other_accepts == {"IOAPIC": 2}


@pytest.mark.parametrize("thread", [WORKER, VCPU])
def test_a_pin_takes_no_line_from_before_its_gsi(told: Callable[..., VmReport], thread: str) -> None:
    """A coalesced one delivers nothing, though the same vector came before."""
    vm = told((thread, [accept(33), line(4), ioapic(4, 33, " (coalesced)")]))
    assert vm.other_accepts == {"device thread" if thread == WORKER else "MSI or IOAPIC": 1}


def test_an_older_kernel_asks_the_pics_first(told: Callable[..., VmReport]) -> None:
    vm = told((WORKER, [line(0), pic(0), accept(209), ioapic(2, 209)]))
    assert vm.other_accepts == {"IOAPIC": 1}


@pytest.mark.parametrize("thread", [WORKER, VCPU])
def test_without_kvm_set_irq(told: Callable[..., VmReport], thread: str) -> None:
    vm = told((thread, [msi(40), accept(40), accept(33), ioapic(4, 33), accept(34), ioapic(5, 34)]))
    assert vm.other_accepts == {"MSI": 1, "IOAPIC": 2}


def test_the_pit_drives_its_gsi(told: Callable[..., VmReport]) -> None:
    lines = [line(0, source=2), accept(48), ioapic(2, 48), pic(0), line(0, 0, 2), ioapic(2, 48), pic(0)]
    vm = told((PIT_THREAD, lines), (WORKER, [line(24, source=2), msi(49), accept(49)]))
    assert vm.other_accepts == {"PIT": 2}


def test_an_eoi_delivers_a_level_interrupt_again(told: Callable[..., VmReport]) -> None:
    """No kvm_ioapic_set_irq tells of it, kvm_ack_irq does; a resampler's line comes in between."""
    lines = [line(17), accept(66, trigger="level"), ioapic(17, 66)]
    ended = ["kvm_eoi: apicid 0 vector 66", "kvm_ack_irq: irqchip IOAPIC pin 17", line(17, 0, 1), ioapic(17, 66)]
    vm = told((WORKER, lines), (VCPU, [*ended, accept(66, trigger="level"), "kvm_msr: msr_write 80b = 0x0"]))
    assert vm.other_accepts == {"IOAPIC": 2}
    assert vm.eoi.exact == 1


def test_a_write_of_the_ioapics_page_delivers(told: Callable[..., VmReport]) -> None:
    write = "kvm_mmio: mmio write len 4 gpa 0xfec00010 val 0x8042"
    vm = told((VCPU, [write, accept(66, trigger="level"), "kvm_entry: vcpu 0, rip 0x1", accept(67)]))
    assert vm.other_accepts == {"IOAPIC": 1, "MSI or IOAPIC": 1}


def test_a_gsi_of_the_synic(told: Callable[..., VmReport]) -> None:
    sint = "kvm_hv_synic_set_irq: vcpu_id 0 sint 2 vector 97 ret 1"
    vm = told((WORKER, [line(24), accept(97), sint, line(4), accept(33), ioapic(4, 33)]))
    assert vm.other_accepts == {"SynIC": 1, "IOAPIC": 1}


def test_an_ipi_keeps_its_accept_line(told: Callable[..., VmReport]) -> None:
    """An ICR write of 6.18, its accept line first, right behind a pin with the same vector."""
    late = [accept(251, 1), *(body for body in ICR_WRITE if "accept" not in body)]
    vm = told((VCPU, [line(4), accept(251, 1), ioapic(4, 251), *late]))
    assert vm.other_accepts == {"IOAPIC": 1}
    assert vm.accepted.exact == 2


def test_what_lines_tell_is_known_without_kvm_apic_ipi(told: Callable[..., VmReport]) -> None:
    lines = [line(24), msi(40), accept(40), line(4), accept(33), ioapic(4, 33), "kvm_entry: vcpu 0, rip 0x1"]
    vm = told((VCPU, [*lines, accept(50)]), ipi=False)
    assert vm.other_accepts == {"MSI": 1, "IOAPIC": 1, "unknown, as kvm_apic_ipi was not recorded": 1}


def test_the_pics_go_past_the_apic(told: Callable[..., VmReport]) -> None:
    """kvm_inj_virq of a vector that nothing has put into IRR, after the pin that it fits."""
    inject = "kvm_inj_virq: IRQ 0x30"
    vm = told((WORKER, [line(0), pic(0, masked=False)]), (VCPU, [inject, "kvm_inj_virq: IRQ 0x31"]))
    assert vm.pic_interrupts == 1
    assert vm.as_dict()["pic_interrupts"] == 1
    vm = told((WORKER, [line(0), pic(0), line(24), msi(48), accept(48)]), (VCPU, [inject]))
    assert vm.pic_interrupts == 0
