"""Windows guests in traces: each door to the APIC is told, and no generation takes fast what is no WRMSR of 0x830.

The small traces under data/windows are written by hand in the order in which KVM prints. The large ones are real
kernels': `fastexit kernels windows VERSION --output FILE [--x2apic]` records them anew.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import fastexit as fx
from fastexit import hyperv as HV
from fastexit.kvm.lab.windows import DOORS, Count, counts
from fastexit.trace.doors import Doing, Door
from fastexit.trace.render import render
from fastexit.trace.replay import replay
from fastexit.trace.report import IcrClass, Report
from framed import exit_line, recorded

__all__ = ["recorded"]

WINDOWS = Path(__file__).parent / "data" / "windows"
NONE_FAST = dict.fromkeys(fx.profiles(), 0)


def doors(report: Report) -> dict[tuple[Doing, Door], int]:
    return dict(report.vms[0].doors)


def refusals(report: Report) -> dict[str, dict[str, int]]:
    assert all(g.fast == 0 for g in report.vms[0].generations)
    return {g.kernel: g.refusals for g in report.vms[0].generations}


# ------------------------------------------------------------------------------------------------------- the small ones


@pytest.mark.parametrize(
    ("name", "door", "why", "n"),
    [
        ("icr-by-synthetic-msr", Door.SYNTHETIC, "synthetic MSR: no fast handler", 2),
        ("ipi-hypercall", Door.HYPERCALL, "hypercall: no fast handler", 1),
        ("icr-behind-apic-write", Door.TRAP, "APIC_WRITE trap: no fast handler", 1),
        ("icr-behind-avic", Door.AVIC, "AVIC exit: no fast handler", 1),
    ],
)
def test_no_generation_takes_it_fast(name: str, door: Door, why: str, n: int) -> None:
    report = replay(WINDOWS / f"{name}.txt")
    (vm,) = report.vms
    assert report.exact, report.mismatches
    assert doors(report) == {(Doing.IPI, door): n}
    assert refusals(report) == {kernel: {why: n} for kernel in fx.profiles()}
    assert vm.sent == {(0, 1): n}
    assert vm.icr_writes + vm.hypercalls == n
    (use,) = vm.door_uses
    assert use.fast == NONE_FAST


def test_without_kvm_msr_a_windows_is_not_counted_fast() -> None:
    """0x830 or 0x40000071: the lines are the same, and the RIPs are of a Windows."""
    report = replay(WINDOWS / "icr-without-msr-lines.txt")
    assert report.exact
    assert doors(report) == {(Doing.IPI, Door.UNTOLD): 2}
    assert all("kvm_msr was not recorded" in why for reasons in refusals(report).values() for why in reasons)
    assert any("kvm:kvm_msr was not recorded" in said for said in report.vms[0].assumptions)


def test_json_and_text_say_it() -> None:
    report = replay(WINDOWS / "icr-by-synthetic-msr.txt")
    (vm,) = json.loads(json.dumps(report.as_dict()))["vms"]
    assert vm["hyperv"] is True
    assert vm["doors"] == [
        {"access": "IPI", "door": "synthetic MSR", "count": 2, "exits": True, "fast": NONE_FAST},
    ]
    assert vm["fast_path"][0]["refusals"] == {"synthetic MSR: no fast handler": 2}
    out = Console(file=io.StringIO(), width=160)
    render(report, out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "Doors of this guest, which uses Hyper-V's interface" in text
    assert "in no generation" in text
    assert "2 synthetic MSR: no fast handler" in text


# ------------------------------------------------------------------------------------------------------- synthetic MSRs


def test_the_synthetic_icr_in_xapic_mode(recorded: Callable[..., Report]) -> None:
    """Its destination is in bits 63:56 there, and 64 bits of an ICR do not mean x2APIC mode."""
    report = recorded(
        exit_line("MSR_WRITE"),
        (0, "kvm_apic_ipi: dst 2 vec 65 (Fixed|physical|de-assert|edge|dst)"),
        (0, "kvm_apic_accept_irq: apicid 2 vec 65 (Fixed|edge)"),
        (0, "kvm_apic: apic_write APIC_ICR = 0x200000000000041"),
        (0, "kvm_msr: msr_write 40000071 = 0x200000000000041"),
        exit_line("EPT_VIOLATION", 1),
        (1, "kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0"),
        (1, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (1, "kvm_eoi: apicid 1 vector -1"),
    )
    assert report.exact, report.mismatches
    assert "x2APIC" not in report.vms[0].start
    assert doors(report) == {(Doing.IPI, Door.SYNTHETIC): 1, (Doing.EOI, Door.PAGE): 1}


def test_a_refused_synthetic_icr(recorded: Callable[..., Report]) -> None:
    report = recorded(
        exit_line("MSR_WRITE"), (0, "kvm_msr: msr_write 40000071 = 0x100002041 (#GP)"), kernel="6.12", vcpus=2
    )
    (vm,) = report.vms
    assert report.exact, report.mismatches
    assert (vm.faults.exact, vm.faults.total) == (1, 1)
    assert doors(report) == {(Doing.IPI, Door.SYNTHETIC): 1}


def test_eoi_tpr_timers_and_the_rest_by_synthetic_msr(recorded: Callable[..., Report]) -> None:
    report = recorded(
        exit_line("MSR_WRITE"),
        (0, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (0, "kvm_eoi: apicid 0 vector -1"),
        (0, "kvm_msr: msr_write 40000070 = 0x0"),
        (0, "kvm_apic: apic_write APIC_TASKPRI = 0x1f0"),
        (0, "kvm_msr: msr_write 40000072 = 0x1f0"),
        (0, "kvm_apic: apic_read APIC_TASKPRI = 0xf0"),
        (0, "kvm_msr: msr_read 40000072 = 0xf0"),
        (0, "kvm_hv_stimer_set_count: vcpu_id 0 timer 0 count 100 host 0"),
        (0, "kvm_hv_stimer_cleanup: vcpu_id 0 timer 0"),
        (0, "kvm_msr: msr_write 400000b1 = 0x64"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000084 data 0x0 host 0"),
        *((0, f"kvm_hv_notify_acked_sint: vcpu_id 0 sint {sint}") for sint in range(16)),
        (0, "kvm_msr: msr_write 40000084 = 0x0"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000093 data 0x95 host 0"),
        (0, "kvm_msr: msr_write 40000093 = 0x95"),
        (0, "kvm_msr: msr_write 40000073 = 0x1001"),
        exit_line("CR_ACCESS"),
        (0, "kvm_cr: cr_write 8 = 0xf"),
    )
    assert report.exact, report.mismatches
    assert doors(report) == {
        (Doing.EOI, Door.SYNTHETIC): 1,
        (Doing.TPR, Door.SYNTHETIC): 1,
        (Doing.TIMER, Door.SYNTHETIC): 1,
        (Doing.EOM, Door.SYNTHETIC): 1,
        (Doing.SINT, Door.SYNTHETIC): 1,
        (Doing.ASSIST, Door.SYNTHETIC): 1,
        (Doing.TPR, Door.CR8): 1,
    }
    assert all(not use.fast for use in report.vms[0].door_uses)
    assert (report.vms[0].hv_lines.exact, report.vms[0].hv_lines.total) == (19, 19)


# ----------------------------------------------------------------------------------------------------------------- EOIs


def test_an_eoi_without_an_exit_is_one_eoi(recorded: Callable[..., Report]) -> None:
    """kvm_pv_eoi stands behind the kvm_eoi of the same interrupt."""
    report = recorded(
        exit_line("HLT"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 64 (Fixed|edge)"),
        (0, "kvm_inj_virq: IRQ 0x40"),
        exit_line("MSR_WRITE"),
        (0, "kvm_eoi: apicid 0 vector 64"),
        (0, "kvm_pv_eoi: apicid 0 vector 64"),
        vcpus=1,
    )
    (vm,) = report.vms
    assert report.exact, report.mismatches
    assert (vm.eoi.exact, vm.eoi.total) == (1, 1)
    assert doors(report) == {(Doing.EOI, Door.ASSIST): 1}
    assert [use.exits for use in vm.door_uses] == [False]


@pytest.mark.parametrize(
    ("reason", "lines", "door"),
    [
        ("EOI_INDUCED", ("kvm_eoi: apicid 0 vector -1",), Door.INDUCED),
        ("APIC_ACCESS", ("kvm_apic: apic_write APIC_EOI = 0x0", "kvm_eoi: apicid 0 vector -1"), Door.PAGE),
        (
            "APIC_ACCESS",
            (
                "kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0",
                "kvm_apic: apic_write APIC_EOI = 0x0",
                "kvm_eoi: apicid 0 vector -1",
            ),
            Door.PAGE,
        ),
        (
            "avic_unaccelerated_access",
            ("kvm_apic: apic_write APIC_EOI = 0x0", "kvm_eoi: apicid 0 vector -1"),
            Door.AVIC,
        ),
        (
            "MSR_WRITE",
            (
                "kvm_apic: apic_write APIC_EOI = 0x0",
                "kvm_eoi: apicid 0 vector -1",
                "kvm_msr: msr_write 80b = 0x0",
            ),
            Door.X2APIC,
        ),
    ],
)
def test_the_door_of_an_eoi(recorded: Callable[..., Report], reason: str, lines: tuple[str, ...], door: Door) -> None:
    report = recorded(exit_line(reason), *((0, line) for line in lines), vcpus=1)
    assert report.exact, report.mismatches
    assert doors(report) == {(Doing.EOI, door): 1}


# ----------------------------------------------------------------------------------------------------------- hypercalls


def send(code: int, vector: int, mask: int, *targets: int, result: int = 0) -> list[tuple[int, str]]:
    """A fast HvCallSendSyntheticClusterIpi of vCPU 0."""
    return [
        exit_line("VMCALL"),
        (0, f"kvm_hv_hypercall: code 0x{code:x} fast var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x{vector:x} out 0x{mask:x}"),
        (0, f"kvm_hv_send_ipi: vector {vector:x} processor_mask 0x{mask:x}"),
        *((0, f"kvm_apic_accept_irq: apicid {target:x} vec {vector} (Fixed|edge)") for target in targets),
        (0, f"kvm_hv_hypercall_done: result 0x{result:x}"),
    ]


def test_targets_of_a_hypercall(recorded: Callable[..., Report]) -> None:
    report = recorded(
        *send(0xB, 0x40, 0b110, 1, 2),
        *send(0xB, 0x41, 0b1001, 0),
        *send(0xB, 0x42, 0),
        *send(0xB, 0xF, 0b1, result=3),
        *send(0xB, 0x10, 0b1, 0),
        *send(0xB, 0x100, 0b1, result=3),
    )
    (vm,) = report.vms
    assert report.exact, report.mismatches
    assert (vm.hypercalls, vm.hv_sends.exact, vm.hv_results.exact, vm.accepted.exact) == (6, 6, 6, 4)
    assert vm.sent == {(0, 1): 1, (0, 2): 1, (0, 0): 2}
    assert vm.classes[IcrClass("Fixed", "VP set", "none", 2, False)] == 1


@pytest.mark.parametrize(
    ("lines", "event"),
    [
        (send(0xB, 0x40, 0b110, 1), "kvm_apic_accept_irq"),
        (send(0xB, 0x40, 0b10, 1, 2), "kvm_apic_accept_irq"),
        (send(0xB, 0x40, 0b110, 2, 1), "kvm_apic_accept_irq"),
        (send(0xB, 0x40, 0b10, 1, result=3), "kvm_hv_hypercall_done"),
        (send(0xB, 0xF, 0b10), "kvm_hv_hypercall_done"),
        ([*send(0xB, 0x40, 0)[:2], (0, "kvm_hv_send_ipi: vector 41 processor_mask 0x0")], "kvm_hv_send_ipi"),
    ],
)
def test_a_wrong_hypercall_line_is_listed(
    recorded: Callable[..., Report], lines: list[tuple[int, str]], event: str
) -> None:
    report = recorded(*lines)
    assert {m.event for m in report.mismatches} == {event}


def test_a_vector_in_decimal_is_said(recorded: Callable[..., Report]) -> None:
    lines = [(vcpu, line.replace("vector 2f", "vector 47")) for vcpu, line in send(0xB, 0x2F, 0b10, 1)]
    report = recorded(*lines)
    assert report.exact, report.mismatches
    assert any("in decimal" in said for said in report.vms[0].assumptions)


def test_the_larger_hypercall(recorded: Callable[..., Report]) -> None:
    """Targets of format 1 are everybody; sparse banks are in memory or in XMM registers, which no line shows."""

    def ex(set_format: int, mask: int, *targets: int) -> list[tuple[int, str]]:
        return [
            exit_line("VMCALL"),
            (0, "kvm_hv_hypercall: code 0x15 slow var_cnt 0x1 rep_cnt 0x0 idx 0x0 in 0x7000 out 0x0"),
            (0, f"kvm_hv_send_ipi_ex: vector d1 format {set_format:x} valid_bank_mask 0x{mask:x}"),
            *((0, f"kvm_apic_accept_irq: apicid {target:x} vec 209 (Fixed|edge)") for target in targets),
            (0, "kvm_hv_hypercall_done: result 0x0"),
        ]

    report = recorded(*ex(1, 1, 0, 1, 2), *ex(0, 1, 1, 2), *ex(0, 0))
    (vm,) = report.vms
    assert report.exact, report.mismatches
    assert vm.classes == {
        IcrClass("Fixed", "VP set", "none", 3, True): 1,
        IcrClass("Fixed", "VP set", "none", 2, False): 1,
        IcrClass("Fixed", "VP set", "none", 0, False): 1,
    }
    assert recorded(*ex(1, 1, 0, 2)).mismatched


def test_other_hypercalls_send_nothing(recorded: Callable[..., Report]) -> None:
    report = recorded(
        exit_line("VMCALL"),
        (0, "kvm_hv_hypercall: code 0x3 fast var_cnt 0x0 rep_cnt 0x1 idx 0x0 in 0x0 out 0x1"),
        (0, "kvm_hv_flush_tlb: processor_mask 0x2 address_space 0x0 flags 0x2 "),
        (0, "kvm_hv_hypercall_done: result 0x100000000"),
        *send(0xB, 0x40, 0b10, 1),
    )
    assert report.exact, report.mismatches
    assert report.vms[0].hypercalls == 1


# ------------------------------------------------------------------------------------------- SynIC and synthetic timers


def test_who_raised_an_interrupt(recorded: Callable[..., Report]) -> None:
    report = recorded(
        exit_line("HLT"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 149 (Fixed|edge)"),
        (0, "kvm_hv_synic_set_irq: vcpu_id 0 sint 3 vector 149 ret 1"),
        (0, "kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct 0 send result 0"),
        (0, "kvm_entry: vcpu 0, rip 0x1"),
        exit_line("HLT"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 150 (Fixed|edge)"),
        (0, "kvm_hv_stimer_expiration: vcpu_id 0 timer 1 direct 1 send result 0"),
        (0, "kvm_entry: vcpu 0, rip 0x1"),
        (-1, "kvm_apic_accept_irq: apicid 1 vec 148 (Fixed|edge)"),
        (-1, "kvm_hv_synic_set_irq: vcpu_id 1 sint 2 vector 148 ret 1"),
        (-1, "kvm_apic_accept_irq: apicid 1 vec 147 (Fixed|edge)"),
        *send(0xB, 0x40, 0b10, 1),
    )
    assert report.vms[0].other_accepts == {"Hyper-V timer": 2, "SynIC": 1, "device thread": 1}


def test_lines_of_the_synic_are_predicted(recorded: Callable[..., Report]) -> None:
    lines = [
        exit_line("MSR_WRITE"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000093 data 0x95 host 0"),
        (0, "kvm_msr: msr_write 40000093 = 0x95"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000094 data 0x20096 host 0"),
        (0, "kvm_msr: msr_write 40000094 = 0x20096"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 149 (Fixed|edge)"),
        (0, "kvm_hv_synic_set_irq: vcpu_id 0 sint 3 vector 149 ret 1"),
        (0, "kvm_inj_virq: IRQ 0x95"),
        (0, "kvm_entry: vcpu 0, rip 0x1"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 150 (Fixed|edge)"),
        (0, "kvm_hv_synic_set_irq: vcpu_id 0 sint 4 vector 150 ret 1"),
        (0, "kvm_inj_virq: IRQ 0x96"),
        exit_line("MSR_WRITE"),
        (0, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (0, "kvm_eoi: apicid 0 vector 149"),
        (0, "kvm_hv_synic_send_eoi: vcpu_id 0 vector 149"),
        (0, "kvm_hv_notify_acked_sint: vcpu_id 0 sint 3"),
        (0, "kvm_msr: msr_write 40000070 = 0x0"),
        (0, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (0, "kvm_eoi: apicid 0 vector -1"),
        (0, "kvm_msr: msr_write 40000070 = 0x0"),
    ]
    report = recorded(*lines, vcpus=1)
    (vm,) = report.vms
    assert report.exact, report.mismatches
    assert (vm.eoi.exact, vm.eoi.total) == (2, 2)
    assert (vm.hv_lines.exact, vm.hv_lines.total) == (4, 4)
    for old, new, event in (
        ("data 0x95", "data 0x94", "kvm_hv_synic_set_msr"),
        ("send_eoi: vcpu_id 0 vector 149", "send_eoi: vcpu_id 0 vector 148", "kvm_hv_synic_send_eoi"),
        ("sint: vcpu_id 0 sint 3", "sint: vcpu_id 0 sint 5", "kvm_hv_notify_acked_sint"),
    ):
        forged = [(vcpu, text.replace(old, new)) for vcpu, text in lines]
        assert forged != lines
        assert [m.event for m in recorded(*forged, vcpus=1).mismatches] == [event]
    shorter = [line for line in lines if "kvm_hv_notify_acked_sint" not in line[1]]
    told = "kvm_hv_notify_acked_sint: vcpu_id 0 sint 3"
    again = [*shorter, exit_line("MSR_WRITE"), (0, "kvm_eoi: apicid 0 vector -1"), (0, told)]
    assert ["kvm_hv_notify_acked_sint"] == sorted({m.event for m in recorded(*again, vcpus=1).mismatches})


def test_a_sint_of_earlier_is_learned(recorded: Callable[..., Report]) -> None:
    lines = [
        exit_line("MSR_WRITE"),
        (0, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (0, "kvm_eoi: apicid 0 vector 149"),
        (0, "kvm_hv_synic_send_eoi: vcpu_id 0 vector 149"),
        (0, "kvm_hv_notify_acked_sint: vcpu_id 0 sint 3"),
        (0, "kvm_msr: msr_write 40000070 = 0x0"),
    ]
    report = recorded(*lines, vcpus=1)
    assert report.exact, report.mismatches
    assert any("had vector 149 in SINT 3 before" in said for said in report.vms[0].assumptions)


def test_an_interrupt_that_ends_itself_shows_no_eoi(recorded: Callable[..., Report]) -> None:
    """Nor its injection, where kvm_inj_virq was not recorded: the next EOI is another's."""
    report = recorded(
        exit_line("MSR_WRITE"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000094 data 0x20096 host 0"),
        (0, "kvm_msr: msr_write 40000094 = 0x20096"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 64 (Fixed|edge)"),
        (0, "kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct 1 send result 0"),
        (0, "kvm_entry: vcpu 0, rip 0x1"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 150 (Fixed|edge)"),
        (0, "kvm_hv_synic_set_irq: vcpu_id 0 sint 4 vector 150 ret 1"),
        exit_line("MSR_WRITE"),
        (0, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (0, "kvm_eoi: apicid 0 vector 64"),
        (0, "kvm_msr: msr_write 40000070 = 0x0"),
        vcpus=1,
    )
    assert report.exact, report.mismatches


def test_an_induced_eoi_tells_no_sint(recorded: Callable[..., Report]) -> None:
    """The bitmap makes the exit, and KVM does not look at the SynIC on it."""
    report = recorded(
        exit_line("MSR_WRITE"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000093 data 0x95 host 0"),
        (0, "kvm_msr: msr_write 40000093 = 0x95"),
        (0, "kvm_apic_accept_irq: apicid 0 vec 149 (Fixed|edge)"),
        (0, "kvm_hv_synic_set_irq: vcpu_id 0 sint 3 vector 149 ret 1"),
        exit_line("EOI_INDUCED"),
        (0, "kvm_eoi: apicid 0 vector 149"),
        exit_line("MSR_WRITE"),
        (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000093 data 0x10095 host 0"),
        (0, "kvm_msr: msr_write 40000093 = 0x10095"),
        vcpus=1,
    )
    assert report.exact, report.mismatches
    assert doors(report)[Doing.EOI, Door.INDUCED] == 1


def test_only_the_kernels_that_are_asked_for() -> None:
    report = replay(WINDOWS / "icr-by-synthetic-msr.txt", kernels=["5.8", "6.18"])
    assert [g.kernel for g in report.vms[0].generations] == ["5.8", "6.18"]
    assert report.vms[0].door_uses[0].fast == {"5.8": 0, "6.18": 0}
    with pytest.raises(ValueError, match="4.19"):
        replay(WINDOWS / "icr-by-synthetic-msr.txt", kernels=["4.19"])


# ------------------------------------------------------------------------------------------- the model's own, at length


def a_windows(kernel: str, vendor: str, x2apic: bool) -> str:
    """What a model of this generation prints when a guest uses Hyper-V's doors."""
    rng = random.Random(15)
    m = fx.Machine(vcpus=4, kernel=kernel, vendor=vendor, apicv=False, hyperv=True)
    if x2apic:
        m.boot_x2apic()
    for v in m.vcpus:
        v.real_mode = False
        v.enable_synic(2)
    m.trace.enable()
    if not x2apic:
        for i, v in enumerate(m.vcpus):
            v.mmio_write(0xF0, 0x1FF)
            v.mmio_write(0xD0, 1 << 24 + i)
    m.vcpus[0].wrmsr(HV.MSR_HV_GUEST_OS_ID, 1)
    for _ in range(150):
        v = rng.choice(m.vcpus)
        vector = rng.randrange(16, 256)
        low = vector | rng.choice([0, 0, 0x800]) | rng.choice([0, 0, 0, 0x40000, 0x80000, 0xC0000])
        dest = rng.choice([0, 1, 2, 3, 9, 0xFFFF_FFFF if x2apic else 0xFF])
        kind = rng.randrange(9)
        if kind == 0:
            while v.ack() is not None:
                v.wrmsr(HV.MSR_HV_EOI, 0)
        elif kind == 1:
            v.wrmsr(HV.MSR_HV_TPR, rng.choice([0, 0x20, 0x1F0]))
        elif kind == 2:
            v.wrmsr(HV.MSR_HV_SINT0 + rng.randrange(16), vector | rng.choice([0, 0, 1 << 16, 1 << 17]))
        elif kind == 3:
            v.wrmsr(HV.MSR_HV_EOM, 0)
        elif kind == 4:
            mask = rng.getrandbits(5)
            v.hv_hypercall(HV.HvCall.SEND_IPI | HV.HV_CALL_FAST, rng.choice([vector, vector, 0x100, 5]), mask)
        elif kind == 5 and kernel not in fx.profiles()[: fx.profiles().index("5.15")]:
            # Everybody; a sparse set's bank stands in XMM0, which no line shows.
            code, everybody = HV.HvCall.SEND_IPI_EX | HV.HV_CALL_FAST, rng.random() < 0.5
            banks = 0 if kernel == "5.15" else 1 << HV.HV_CALL_VAR_COUNT_SHIFT
            v.hv_hypercall(code | banks, vector, everybody, (1, rng.getrandbits(4)))
        elif kind == 6:
            v.wrmsr(HV.MSR_HV_STIMER0_CONFIG, HV.HV_STIMER_AUTO_ENABLE | 3 << HV.HV_STIMER_SINT_SHIFT)
            v.wrmsr(HV.MSR_HV_STIMER0_CONFIG + 1, 1 << 40)
        else:
            value = low | (dest << 32 if x2apic else dest << 56)
            v.wrmsr(HV.MSR_HV_ICR, value | rng.choice([0, 0, 0, 1 << 13]))
    return m.trace.text()


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("x2apic", [True, False])
def test_the_trace_of_every_generation(kernel: str, vendor: str, x2apic: bool, tmp_path: Path) -> None:
    text = a_windows(kernel, vendor, x2apic)
    path = tmp_path / "trace.txt"
    path.write_text(text)
    report = replay(path, kernel=kernel, vendor=vendor)
    (vm,) = report.vms
    assert report.mismatches == []
    assert report.ipi.exact == report.ipi.total == text.count(" kvm_apic_ipi:") > 10
    assert vm.doors[Doing.IPI, Door.SYNTHETIC] > 15
    assert vm.doors[Doing.IPI, Door.HYPERCALL] == vm.hypercalls > 5
    assert vm.hv_sends.exact > 5
    assert vm.hv_lines.exact > 30
    assert all(g.fast == 0 and g.total == vm.icr_writes + vm.hypercalls for g in vm.generations)


# --------------------------------------------------------------------------------------- senders that lose their CPU


def taken(vcpu: int, vector: int) -> list[tuple[int, str]]:
    """An interrupt is injected and ended."""
    return [
        (vcpu, f"kvm_inj_virq: IRQ 0x{vector:x}"),
        exit_line("MSR_WRITE", vcpu),
        (vcpu, "kvm_apic: apic_write APIC_EOI = 0x0"),
        (vcpu, f"kvm_eoi: apicid {vcpu:x} vector {vector}"),
        (vcpu, "kvm_msr: msr_write 40000070 = 0x0"),
    ]


def accepted(sender: int, target: int, vector: int) -> tuple[int, str]:
    return sender, f"kvm_apic_accept_irq: apicid {target:x} vec {vector} (Fixed|edge)"


@pytest.mark.parametrize("by_call", [True, False])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("served", ["before", "between"])
def test_a_target_takes_an_earlier_interrupt_before_it_accepts(
    recorded: Callable[..., Report], by_call: bool, same: bool, served: str
) -> None:
    """Real hosts preempt senders, also between the accept lines of one IPI: each target gets it at its own line."""
    earlier = 0xE1 if same else 0x2F
    if by_call:
        begin, _, _, end = send(0xB, 0xE1, 0b110), *[()] * 2, send(0xB, 0xE1, 0b110)[-1:]
        begin = begin[:-1]
    else:
        begin = [(0, "kvm_apic_ipi: dst 0 vec 225 (Fixed|physical|de-assert|edge|all-but-self)")]
        end = [(0, "kvm_apic: apic_write APIC_ICR = 0xc00e1"), (0, "kvm_msr: msr_write 40000071 = 0xc00e1")]
    meanwhile = [*taken(2, earlier)]
    first, second = accepted(0, 1, 0xE1), accepted(0, 2, 0xE1)
    report = recorded(
        (-1, f"kvm_apic_accept_irq: apicid 2 vec {earlier} (Fixed|edge)"),
        *begin,
        *([*meanwhile, first] if served == "before" else [first, *meanwhile]),
        second,
        *end,
        *taken(2, 0xE1),
        *taken(1, 0xE1),
    )
    assert report.exact, report.mismatches
    assert report.vms[0].accepted.total == 2


def msr_ipi(sender: int, target: int, vector: int) -> list[tuple[int, str]]:
    """A synthetic MSR's IPI in xAPIC mode, begun and ended."""
    value = target << 56 | vector
    return [
        (sender, f"kvm_apic_ipi: dst {target:x} vec {vector} (Fixed|physical|de-assert|edge|dst)"),
        accepted(sender, target, vector),
        (sender, f"kvm_apic: apic_write APIC_ICR = 0x{value:x}"),
        (sender, f"kvm_msr: msr_write 40000071 = 0x{value:x}"),
    ]


@pytest.mark.parametrize("certain", [True, False])
def test_what_comes_between_an_exit_and_its_injection(recorded: Callable[..., Report], certain: bool) -> None:
    """KVM takes a vector out of IRR before it prints kvm_inj_virq: what is accepted meanwhile may come behind it."""
    exits = exit_line("MSR_WRITE", 2)
    report = recorded(
        *msr_ipi(0, 2, 0x2F),
        *(() if certain else (exits,)),
        *msr_ipi(1, 2, 0xE1),
        *((exits,) if certain else ()),
        *taken(2, 0x2F),
        *taken(2, 0xE1),
        *msr_ipi(0, 2, 0x30),
        *taken(2, 0x30),
    )
    assert report.exact is not certain, report.mismatches
    if certain:
        first = min(report.mismatches)
        assert (first.recorded, first.predicted) == ("apicid 2 vector 47", "apicid 2 vector 225")


@pytest.mark.parametrize("certain", [True, False])
def test_a_vector_that_comes_again_while_it_is_injected(recorded: Callable[..., Report], certain: bool) -> None:
    """Whether it was the same interrupt or one more, only its second injection tells."""
    exits = exit_line("MSR_WRITE", 2)
    report = recorded(
        *msr_ipi(0, 2, 0xE1),
        *(() if certain else (exits,)),
        *msr_ipi(1, 2, 0xE1),
        *((exits,) if certain else ()),
        *taken(2, 0xE1),
        *taken(2, 0xE1),
        *msr_ipi(0, 2, 0x30),
        *taken(2, 0x30),
    )
    assert report.exact is not certain, report.mismatches


# ------------------------------------------------------------------------------------------------- real kernels' traces

RECORDED = ("6.1-xapic", "6.12-xapic", "6.18-x2apic", "7.3-x2apic")
OF_TIMERS = ("stimer_start_periodic", "stimer_start_one_shot", "stimer_callback", "stimer_cleanup", "stimer_expiration")
OF_WRITES_AND_EOIS = ("synic_set_msr", "synic_send_eoi", "notify_acked_sint", "stimer_set_config", "stimer_set_count")


@pytest.mark.parametrize("name", RECORDED)
def test_a_real_kernels_trace(name: str) -> None:
    """Every line that can be predicted is, and each door has what the guest itself counted."""
    path = WINDOWS / f"kvm-{name}.trace.xz"
    text = lzma.open(path, "rt").read()
    lines = Counter(re.findall(r"\d: (kvm_\w+): ", text))
    for kernel in (name.split("-")[0], None):
        report = replay(path, kernel=kernel, vendor="svm")
        (vm,) = report.vms
        assert report.mismatches == []
        assert not report.problems
        assert not vm.assumptions
        assert (vm.start, len(vm.threads), vm.hyperv) == ("reset", 4, True)
        told = counts(text)
        assert {count: vm.doors[door] for count, door in DOORS.items()} == {count: told[count] for count in DOORS}
        assert set(vm.doors) == set(DOORS.values())
        assert all(told[count] > 3 for count in Count)
        assert vm.ipi.exact == vm.ipi.total == lines["kvm_apic_ipi"] == told[Count.IPI_MSR]
        assert vm.eoi.exact == vm.eoi.total == lines["kvm_eoi"] == told[Count.EOI_MSR] + told[Count.EOI_ASSIST]
        assert vm.accepted.exact == vm.accepted.total
        assert vm.accepted.total + sum(vm.other_accepts.values()) == lines["kvm_apic_accept_irq"]
        assert vm.other_accepts["SynIC"] == len(re.findall(r" device-.*kvm_hv_synic_set_irq", text)) > 3
        assert vm.hv_sends.exact == vm.hv_sends.total > 10
        assert vm.hv_results.exact == vm.hv_results.total > vm.hv_sends.total
        assert lines["kvm_hv_hypercall"] == told[Count.IPI_CALL] + told[Count.SPIN_WAIT]
        assert vm.hv_lines.exact == vm.hv_lines.total >= sum(lines[f"kvm_hv_{one}"] for one in OF_WRITES_AND_EOIS)
        assert vm.hv_timers.exact == vm.hv_timers.total == sum(lines[f"kvm_hv_{one}"] for one in OF_TIMERS) > 200
        assert all(use.fast.get(kernel, 0) == 0 for use in vm.door_uses for kernel in fx.profiles())


@pytest.mark.parametrize(
    ("old", "new", "event"),
    [
        (r"(kvm_eoi: apicid 2 vector) 225", r"\1 209", "kvm_eoi"),
        (r"(kvm_apic_ipi: dst 3 vec) \d+", r"\1 99", "kvm_apic_ipi"),
        (r"(kvm_hv_stimer_set_config: vcpu_id 1 timer 0 config) 0x\w+", r"\1 0x0", "kvm_hv_stimer_set_config"),
        (r"(kvm_hv_notify_acked_sint: vcpu_id 1 sint) 4", r"\1 5", "kvm_hv_notify_acked_sint"),
        (r"(kvm_hv_send_ipi: vector e1 processor_mask) 0x\w+", r"\1 0x0", "kvm_apic_accept_irq"),
        (r"(kvm_hv_stimer_start_periodic: .* exp_time \d+)(\d)", r"\g<1>9\2", "kvm_hv_stimer_start_periodic"),
        (r"(kvm_hv_stimer_start_one_shot: .* count) (\d+)", r"\1 1\2", "kvm_hv_stimer_start_one_shot"),
        (r"(kvm_hv_stimer_expiration: vcpu_id 2 timer 0 direct) 1", r"\1 0", "kvm_hv_stimer_expiration"),
        (r".*kvm_hv_stimer_start_periodic: .*\n", "", "kvm_hv_stimer_callback"),
        (r"(kvm_hv_stimer_set_count.*\n).*kvm_hv_stimer_cleanup.*\n", r"\1", "kvm_hv_stimer_cleanup"),
    ],
)
def test_a_forged_line_of_a_real_trace_is_found(tmp_path: Path, old: str, new: str, event: str) -> None:
    text = lzma.open(WINDOWS / "kvm-6.12-xapic.trace.xz", "rt").read()
    forged, n = re.subn(old, new, text, count=1)
    assert n == 1
    (tmp_path / "forged").write_text(forged)
    assert event in {m.event for m in replay(tmp_path / "forged", vendor="svm").mismatches}


def test_a_trace_without_counts_says_so() -> None:
    with pytest.raises(ValueError, match="no counts"):
        counts("# tracer: nop\n")
