"""What is said in words: each finding once where it has to come, and where it must not."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from answered import answered, recorded, told
from fastexit.answers import findings
from fastexit.answers.analyse import Analysis, analyse
from fastexit.answers.findings import kernels
from fastexit.answers.places import Where
from fastexit.answers.report import Clue, FastRow


def one(text: str, kind: str) -> str:
    """The text of the only finding of a kind."""
    [finding] = [finding for finding in answered(text).findings if finding.kind == kind]
    assert finding.lines
    assert finding.text
    return finding.text


def repeated(lines: str, n: int, step: int, first: int = 1000) -> str:
    """Lines "THREAD OFFSET EVENT", n times."""
    found = []
    for i in range(n):
        for line in filter(str.strip, lines.splitlines()):
            who, offset, event = line.split(maxsplit=2)
            found.append(f"{who} {first + i * step + int(offset)} {event}")
    return "\n".join(found)


RUNS = """
    0 1 kvm_exit: reason HLT rip 0x1 info 0 0
    0 2 kvm_entry: vcpu 0
    0 3 kvm_eoi: apicid 0 vector 236
"""
ACCEPTED = "io 0 kvm_apic_accept_irq: apicid 0 vec 209 (Fixed|edge)\n"


def test_a_vector_that_no_eoi_ends() -> None:
    assert "vCPU 0 accepted vector 209 (0xd1) 20 times in 190 ms" in one(
        repeated(ACCEPTED + RUNS, 20, 10_000), "stuck-vector"
    )


@pytest.mark.parametrize(
    "also",
    [
        "0 4 kvm_eoi: apicid 0 vector 209",  # it is ended
        "0 1 kvm_inj_virq: IRQ 0xd1",  # it is taken anew, so it was ended: by itself
        "io 1 kvm_apicv_accept_irq: apicid 0 vec 209 (Fixed|edge)",  # the CPU ends it
    ],
)
def test_a_vector_that_is_served_is_not_stuck(also: str) -> None:
    assert told(repeated(ACCEPTED + RUNS + also, 20, 10_000)) == []


def test_a_vector_that_ends_by_itself_is_not_stuck() -> None:
    sint = "0 1 kvm_msr: msr_write 40000092 = 0x200d1\n"
    assert told(sint + repeated(ACCEPTED + RUNS, 20, 10_000)) == []


def test_a_vcpu_that_does_not_run_has_no_stuck_vector() -> None:
    runs_first = repeated(RUNS, 20, 100)
    assert told(runs_first + "\n" + repeated(ACCEPTED, 20, 10_000, 10_000)) == []


LINE_ONLY = """
    io 0 kvm_set_irq: gsi 0 level 1 source 0
    io 1 kvm_apic_accept_irq: apicid 0 vec 209 (Fixed|edge)
    io 2 kvm_ioapic_set_irq: pin 2 dst 1 vec 209 (Fixed|logical|edge)
"""


def test_a_trace_of_lines_alone_says_that_no_eoi_was_seen() -> None:
    text = one(repeated(LINE_ONLY, 2, 500), "accepted-without-eoi")
    assert "vector 209 (0xd1) on APIC 0 twice" in text
    assert told(LINE_ONLY) == []
    assert told(repeated(LINE_ONLY, 2, 500) + "\n0 5000 kvm_msr: msr_write 6e0 = 0x1") == []


def test_host_threads_of_several_vms_tell_nothing_of_eois() -> None:
    text = repeated(LINE_ONLY, 3, 500) + "\n0 5000 kvm_entry: vcpu 0\n1 5000 kvm_entry: vcpu 0"
    where = Where(np.array([0, 1, 2, 0], np.int32), np.array([-1, 0, 0, -1], np.int32))
    analysis = Analysis(recorded(text), where)
    assert analysis.vms == [0, 1, 2]
    assert [analysis.report(vm).findings for vm in analysis.vms] == [[], [], []]
    assert [row.source for row in analysis.report(0).vectors] == ["IOAPIC gsi 0"]


AGAIN = """
    0 0 kvm_exit: reason EPT_VIOLATION rip 0x1 info 683 800000d1
    0 1 kvm_page_fault: vcpu 0 rip 0x1 address 0x0000000054200f80 error_code 0x683
    0 2 kvm_inj_virq: IRQ 0xd1 [reinjected]
    0 3 kvm_entry: vcpu 0, rip 0x1
"""


@pytest.mark.parametrize(("n", "severity"), [(2, "warning"), (100, "problem")])
def test_an_interrupt_that_is_reinjected_for_ever(n: int, severity: str) -> None:
    text = repeated(AGAIN, n, 4)
    assert (severity, "reinjected") in told(text)
    assert "vector 209 (0xd1)" in one(text, "reinjected")
    assert "guest-physical 0x54200f80" in one(text, "reinjected")


def test_an_interrupt_whose_delivery_needs_some_pages_is_no_storm() -> None:
    text = AGAIN + AGAIN.replace("54200f80", "54201f80")
    assert told(text) == []


LEVEL = """
    io 0 kvm_apic_accept_irq: apicid 0 vec 129 (Fixed|level)
    0 5 kvm_eoi: apicid 0 vector 129
"""


def test_a_level_line_that_is_back_at_once() -> None:
    assert "came back within 50 us of its EOI 39 times of 40" in one(repeated(LEVEL, 40, 10), "level-storm")
    assert told(repeated(LEVEL, 40, 100)) == []
    assert told(repeated(LEVEL.replace("level", "edge"), 40, 10)) == []


def test_too_many_interrupts_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastexit.answers.findings.storms.RATE", 50)
    ticks = "io 0 kvm_apic_accept_irq: apicid 0 vec 40 (Fixed|edge)\n0 1 kvm_eoi: apicid 0 vector 40"
    assert "vCPU 0 accepted vector 40 (0x28) 60 times in one second" in one(repeated(ticks, 60, 100), "interrupt-storm")
    assert told(repeated(ticks, 60, 100_000)) == []


SPIN = """
    0 0 kvm_exit: reason EXTERNAL_INTERRUPT rip 0xfffff80135ccba9b info 0 800000ec
    0 1 kvm_entry: vcpu 0
"""
WORK = """
    0 2 kvm_exit: reason MSR_WRITE rip 0x77 info 0 0
    0 3 kvm_entry: vcpu 0
"""


def test_a_vcpu_that_spins() -> None:
    text = one(repeated(SPIN, 4, 4000), "spin")
    assert "vCPU 0 is at 0xfffff80135ccba9b in 4 looks in a row over 12 ms" in text
    assert "0xec 4 times" in text
    assert told(repeated(SPIN, 300, 4000)) == [("warning", "spin")]


def test_a_vcpu_that_works_does_not_spin() -> None:
    assert told(repeated(SPIN + WORK, 300, 4000)) == []
    assert told(repeated(WORK, 300, 4000)) == []
    halts = SPIN.replace("EXTERNAL_INTERRUPT", "HLT")
    assert told(repeated(halts, 300, 4000)) == []


def test_entries_at_one_address() -> None:
    assert told(repeated("0 0 kvm_entry: vcpu 0, rip 0x10", 3, 40)) == [("note", "spin")]


def test_a_halt_that_an_interrupt_does_not_end() -> None:
    halted = """
        0 10 kvm_exit: reason HLT rip 0x1 info 0 0
        1 20 kvm_apic_accept_irq: apicid 0 vec 253 (Fixed|edge)
        1 3000000 kvm_entry: vcpu 1
    """
    assert "halted and accepted an interrupt, and was not entered again in the 3 s" in one(halted, "halt-not-woken")
    assert told(halted + "0 3000001 kvm_entry: vcpu 0") == []
    hlt, accepted, rest = filter(str.strip, halted.splitlines())
    assert told("\n".join([accepted, hlt, rest])) == []
    assert told(halted.replace("3000000", "900000")) == []


def test_inhibits_by_name() -> None:
    text = "0 10 kvm_entry: vcpu 0\n0 11 kvm_apicv_inhibit_changed: set reason=9, inhibits=0x200\n"
    assert "switched off by PIT_REINJ once and stays off" in one(text, "apicv-inhibited")
    old = Analysis(recorded(text)).report(1, {"generation": Clue("6.1", "option")})
    assert "by SEV" in old.findings[0].text
    flaps = text + "0 12 kvm_apicv_inhibit_changed: cleared reason=9, inhibits=0x0\n"
    assert told(flaps) == [("note", "apicv-inhibited")]
    assert "and on again once" in one(flaps, "apicv-inhibited")
    none = "0 11 kvm_apicv_inhibit_changed: set reason=0, inhibits=0x1\n"
    assert told(none) == [("note", "apicv-inhibited")]
    assert "has no APICv" in one(none, "apicv-inhibited")
    assert told("0 11 kvm_apicv_inhibit_changed: cleared reason=9, inhibits=0x0") == []


IPI = """
    0 2 kvm_exit: reason MSR_WRITE rip 0xfffff80653f32daf info 0 0
    0 3 kvm_apic_ipi: dst 1 vec 47 (Fixed|physical|de-assert|edge|dst)
    0 4 kvm_apic_accept_irq: apicid 1 vec 47 (Fixed|edge)
    0 6 kvm_msr: msr_write {msr} = 0x10000002f
    0 7 kvm_entry: vcpu 0
"""


def test_a_windows_guests_ipis() -> None:
    text = one(IPI.format(msr="40000071"), "windows-ipis-never-fast")
    assert "1 by MSR 0x40000071 (hv-vapic)" in text
    assert "hv-avic" in answered(IPI.format(msr="40000071")).findings[0].advice
    assert told(IPI.format(msr="830")) == []
    assert told(IPI.format(msr="40000071").replace("kvm_msr", "kvm_other")) == [("note", "windows-ipis-never-fast")]
    assert told(IPI.format(msr="830").replace("0xfffff80653f32daf", "0xffffffff81000000")) == []


def test_msrs_that_fault() -> None:
    probe = "0 1 kvm_msr: msr_read ce = 0x0 (#GP)\n1 2 kvm_msr: msr_read ce = 0x0 (#GP)"
    assert "vCPU 0 and 1 read MSR 0xce (PLATFORM_INFO) with #GP, twice in all" in one(probe, "msr-fault")
    assert told(repeated("0 1 kvm_msr: msr_write 123 = 0x0 (#GP)", 100, 10)) == [("warning", "msr-fault-loop")]


FAULTS = """
    0 1 kvm_exit: reason EXIT_MSR rip 0x4015c2 info 0 0
    0 2 kvm_msr: msr_read ce = 0x0 (#GP)
    0 3 kvm_inj_exception: #GP (0x0)
    0 4 kvm_entry: vcpu 0
"""


@pytest.mark.parametrize(("n", "severity"), [(2, "note"), (300, "warning")])
def test_an_exception_at_one_address(n: int, severity: str) -> None:
    text = repeated(FAULTS, n, 10)
    assert (severity, "exception-loop") in told(text)
    assert f"vCPU 0 is given #GP {n if n > 2 else 'twice'}" in one(text, "exception-loop")
    assert "in a row at 0x4015c2" in one(text, "exception-loop")
    between = FAULTS + "0 5 kvm_exit: reason CPUID rip 0x4015d0 info 0 0\n0 6 kvm_entry: vcpu 0"
    assert "exception-loop" not in {kind for _, kind in told(repeated(between, n, 10))}


def test_msrs_that_differ_between_vcpus() -> None:
    alike = """
        0 1 kvm_msr: msr_read 3a = 0x0
        0 2 kvm_msr: msr_write 3a = 0x5
        1 3 kvm_msr: msr_write 3a = {}
        2 4 kvm_msr: msr_read 3a = 0x5
    """
    assert told(alike.format("0x5")) == []
    text = one(alike.format("0x40005"), "msr-differs")
    assert text == ("MSR 0x3a (FEATURE_CONTROL) differs between vCPUs: 0x5 on vCPU 0 and 2; 0x40005 on vCPU 1")
    assert told("0 1 kvm_msr: msr_write c0000101 = 0x1\n1 1 kvm_msr: msr_write c0000101 = 0x2") == []


def test_an_msr_that_was_lost() -> None:
    text = "0 1 kvm_msr: msr_write 40000083 = 0xfa1001\n0 2 kvm_msr: msr_read 40000083 = {}"
    assert told(text.format("0xfa1001")) == []
    assert "vCPU 0 wrote 0xfa1001 to MSR 0x40000083 (HV_SIMP) and reads 0x0" in one(text.format("0x0"), "msr-lost")


def test_slow_exits() -> None:
    text = "0 1 kvm_exit: reason APIC_WRITE rip 0x1 info 300 0\n0 11629 kvm_entry: vcpu 0"
    assert "an exit took more than 5 ms: APIC_WRITE of vCPU 0 11.6 ms" in one(text, "slow-exit")
    assert told(text.replace("11629", "111629")) == [("warning", "slow-exit")]
    assert told(text.replace("11629", "4000")) == []
    assert told(text.replace("APIC_WRITE", "HLT")) == []


def test_two_excerpts_in_one_file() -> None:
    text = "0 1 kvm_exit: reason MSR_WRITE rip 0x1 info 0 0\n0 100000000 kvm_entry: vcpu 0"
    assert told(text) == [("note", "gap")]
    assert answered(text).exits[0].time is None
    assert told(text.replace("MSR_WRITE", "HLT")) == []


def test_every_kind_is_declared() -> None:
    found = set()
    for source in Path(findings.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(source.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding":
                kind = call.args[0]
                options = [kind.body, kind.orelse] if isinstance(kind, ast.IfExp) else [kind]
                found |= {option.value for option in options if isinstance(option, ast.Constant)}
    assert found == findings.KINDS.keys()


def test_lost_events() -> None:
    recording = recorded("0 1 kvm_entry: vcpu 0")
    recording.lost, recording.lost_lines = 123, [7]
    [report] = analyse(recording)
    assert [(finding.kind, finding.lines) for finding in report.findings] == [("lost-events", [7])]


def test_exits_that_another_kernel_would_save() -> None:
    report = answered(repeated("0 1 kvm_exit: reason HLT rip 0x1 info 0 0\n0 2 kvm_entry: vcpu 0", 10, 100_000))
    report.fast = [
        FastRow("6.1", "HLT", 0, 10, {"no fast handler": 10}),
        FastRow("6.12", "HLT", 8, 10, {"an event is pending": 2}, saved_total=(800.0, 1600.0)),
    ]
    assert kernels.find(report) == []
    report.clues["generation"] = Clue("6.1", "trace")
    [finding] = kernels.find(report)
    assert finding.text == (
        "6.12 would take 8 of 10 exits of class HLT fast and save 800 to 1,600 cycles; this kernel takes 0: 8 more,"
        " 9 a second"
    )
    assert "no fast handler (10)" in finding.advice
    report.clues["generation"] = Clue("6.1.20", "option")
    assert len(kernels.find(report)) == 1
    report.fast[1].saved_total = (-5.0, 1600.0)
    assert kernels.find(report) == []
    report.fast[1].saved_total = None
    report.fast.insert(0, FastRow("seed-v3", "HLT", 10, 10, {}))
    assert "6.12 would take 8 of 10" in kernels.find(report)[0].text
    for text in "6.12", "6.1 to 7.3", "unknown", "a kernel":
        report.clues["generation"] = Clue(text, "trace")
        assert kernels.find(report) == []
