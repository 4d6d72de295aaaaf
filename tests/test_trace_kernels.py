"""Which kernel recorded a trace: what its lines tell, what is made of it, what a report says."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastexit as fx
from fastexit.trace.kernels import Dating
from fastexit.trace.reader import TraceReader
from fastexit.trace.replay import replay

ICR = 0x830
KERNELS = fx.profiles()


def recorded(tmp_path: Path, kernel: str, *, vendor: str = "vmx", apicv: bool = False, fast: bool = True) -> Path:
    """A trace that the model prints: IPIs between two vCPUs, a #GP, an interrupt that goes in."""
    m = fx.Machine(vcpus=2, kernel=kernel, vendor=vendor, apicv=apicv)
    m.boot_x2apic()
    m.fastpath = fast and m.fastpath
    for v in m.vcpus:
        v.run()
    m.trace.enable()
    v, w = m.vcpus
    for vector in (0xFD, 0xFB):
        v.wrmsr(ICR, fx.icr(dest=1, vector=vector))
        w.wrmsr(0x80B, 0)
    w.rflags |= 1 << 9
    v.wrmsr(ICR, fx.icr(dest=1, vector=0x61))
    w.wrmsr(0x80B, 0)
    v.rdmsr(0x802)
    path = tmp_path / "trace.txt"
    path.write_text(m.trace.text())
    return path


def dated(path: Path) -> Dating:
    dating = Dating()
    for batch in TraceReader(path, dating).batches():
        dating.see_order(batch)
    return dating


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_generation_is_among_those_that_its_lines_allow(kernel: str, vendor: str, fast: bool, tmp_path: Path) -> None:
    """What the model prints as a generation never speaks against it."""
    found = dated(recorded(tmp_path, kernel, vendor=vendor, fast=fast)).kernels()
    assert kernel in found


@pytest.mark.parametrize(
    ("kernel", "first", "last"),
    [
        ("seed-v3", "seed-v3", "5.6"),
        ("5.6", "seed-v3", "5.6"),
        ("5.7", "seed-v3", "5.8"),
        ("5.8", "seed-v3", "5.8"),
        ("5.10", "5.10", "5.10"),
        ("5.15", "5.10", "5.15"),
        ("6.1", "6.1", "6.12"),
        ("6.8", "6.1", "6.12"),
        ("6.12", "6.1", "6.12"),
        ("6.16", "6.12", "7.3"),
        ("6.18", "6.18", "7.3"),
        ("7.3", "6.18", "7.3"),
    ],
)
def test_how_far_lines_narrow_it_down(kernel: str, first: str, last: str, tmp_path: Path) -> None:
    found = dated(recorded(tmp_path, kernel)).kernels()
    assert (found[0], found[-1]) == (first, last)


def test_a_report_says_what_tells(tmp_path: Path) -> None:
    """Without a kernel, a trace is replayed as the newest that its lines allow; each kind of line has its number."""
    report = replay(recorded(tmp_path, "6.6"))
    assert (report.kernel, report.kernel_from, report.kernels) == ("6.12", "trace", ("6.1", "6.6", "6.8", "6.12"))
    says = {e.says: (e.line, e.since, e.before) for e in report.evidence}
    assert says["kvm_exit with info1, without requests"] == (1, "5.10", "6.16")
    assert says["five characters or more before the time"] == (1, "5.13", "")
    facts = report.as_dict()
    assert facts["kernel_from"] == "trace"
    assert facts["kernels"] == ["6.1", "6.6", "6.8", "6.12"]
    assert {"line": 1, "says": "five characters or more before the time", "since": "5.13", "before": ""} in facts[
        "evidence"
    ]


def test_the_kernel_that_is_asked_for(tmp_path: Path) -> None:
    report = replay(recorded(tmp_path, "6.6"), kernel="6.6.87")
    assert (report.kernel, report.kernel_from, report.kernels[-1]) == ("6.6.87", "option", "6.12")
    assert report.exact


def test_every_generation_is_replayed_as_its_like(tmp_path: Path) -> None:
    """Old traces, too: what the lines tell is enough to predict them all."""
    for kernel in ("5.6", "5.8", "5.10", "5.15", "6.1", "6.18"):
        report = replay(recorded(tmp_path, kernel))
        assert report.exact, (kernel, report.kernel, report.mismatches)
        assert report.ipi.exact == report.ipi.total == 3


def test_a_trace_that_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(" CPU 0/KVM-11 [000]  1.000000: kvm_apic_ipi: dst 0 vec 65 (Fixed|physical|de-assert|edge|dst)\n")
    report = replay(path)
    assert (report.kernel, report.kernel_from, report.kernels) == (KERNELS[-1], "assumed", KERNELS)
    assert report.evidence == []


def test_lines_of_several_kernels(tmp_path: Path) -> None:
    """No kernel prints both: the report says so, and is made as if nothing told."""
    old, new = (
        recorded(tmp_path, kernel).read_text().replace("vcpu0", name).replace("vcpu1", f"{name}b")
        for kernel, name in (("5.8", "a"), ("6.18", "b"))
    )
    path = tmp_path / "both.txt"
    path.write_text(old + new)
    dating = dated(path)
    assert dating.kernels() == ()
    report = replay(path)
    assert (report.kernel_from, report.kernels) == ("assumed", ())
    assert "no kernel has both: " in report.notes[-1]


@pytest.mark.parametrize(
    ("sample", "first", "last"),
    [
        ("kvm_entry: vcpu 0, rip 0x406a89", "5.10", "6.12"),
        ("kvm_entry: vcpu 0, rip 0xfff0[immediate exit]", "5.10", "6.12"),
        ("kvm_entry: vcpu 0, rip 0xfff0 intr_info 0x00000000 error_code 0x00000000", "6.12", "7.3"),
        ("kvm_apicv_update_request: deactivate bit=3", "5.6", "5.15"),
        ("kvm_apicv_inhibit_changed: set reason=7, inhibits=0x80", "6.1", "6.8"),
        ("kvm_apicv_inhibit_changed: set reason=8, inhibits=0x100 IRQWIN", "6.12", "7.3"),
        ("kvm_inj_virq: irq 65", "seed-v3", "5.15"),
        ("kvm_inj_virq: Soft/INTn 0x80", "6.1", "7.3"),
        ("kvm_inj_exception: #GP (0x0)", "seed-v3", "7.3"),
        ("kvm_inj_exception: #GP", "6.1", "7.3"),
        ("kvm_pi_irte_update: PI is disabled for irq 42, vcpu -1, gsi: 0x18, gvec: 0x0", "6.18", "7.3"),
        ("kvm_apic: apic_write APIC_ICR = 0x1000000fd", "6.1", "7.3"),
        ("kvm_apic: apic_write APIC_ICR = 0xfd", "seed-v3", "7.3"),
    ],
)
def test_what_a_text_tells(sample: str, first: str, last: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(f" CPU 0/KVM-11 [000]  1.000000: {sample}\n")
    found = dated(path).kernels()
    assert (found[0], found[-1]) == (first, last)


def test_where_a_wait_stands(tmp_path: Path) -> None:
    """Behind kvm_exit up to 5.15, in front of it since: vcpu_enter_guest traced it last (5.10.262)."""
    entry, exit = "kvm_entry: vcpu 0, rip 0xfff0", "kvm_exit: vcpu 0 reason MSR_WRITE rip 0xfff0"
    wait = "kvm_wait_lapic_expire: vcpu 0: delta -250 (early)"
    for lines, last in (([entry, exit, wait], "5.15"), ([entry, wait, exit], "6.12")):
        path = tmp_path / "trace.txt"
        path.write_text("".join(f" CPU 0/KVM-11 [000]  1.00000{n}: {line}\n" for n, line in enumerate(lines)))
        assert dated(path).kernels()[-1] == last


def test_characters_before_the_time(tmp_path: Path) -> None:
    """5.13 added one; trace-cmd prints four of its own accord."""
    for flags, header, first, last in (
        ("d..1.", "", "5.10", "7.3"),
        ("d..1", "", "seed-v3", "5.10"),
        ("d..1", "cpus=4\n", "seed-v3", "7.3"),
    ):
        path = tmp_path / "trace.txt"
        path.write_text(f"{header} CPU 0/KVM-11 [000] {flags} 1.000000: kvm_apic: apic_write APIC_TASKPRI = 0x0\n")
        found = dated(path).kernels()
        assert (found[0], found[-1]) == (first, last)
