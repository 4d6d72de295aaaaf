"""Tables of a report: counts by hand, durations, real guests that counted themselves."""

from __future__ import annotations

import lzma
import re
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import plain_records
from answered import DATA, answered, guest, recorded
from fastexit.answers import durations
from fastexit.answers.analyse import Analysis, analyse
from fastexit.answers.durations import Durations
from fastexit.answers.exits import SECONDS
from fastexit.answers.places import Where
from fastexit.answers.tally import Tally, often
from fastexit.records.columns import NO_TIME
from fastexit.trace.replay import replay

EXITS = """
    0 1000000 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x10 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 1000004 kvm_entry: vcpu 0, rip 0x12
    0 1000010 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x10 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 1000016 kvm_entry: vcpu 0, rip 0x12
    1 1500000 kvm_exit: vcpu 1 reason HLT rip 0x20 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 3000000 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x14 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    1 3000000 kvm_vcpu_wakeup: wait time 1400000 ns, polling valid
    1 3000000 kvm_entry: vcpu 1, rip 0x21
    0 3000001 kvm_exit: vcpu 0 reason CPUID rip 0x30 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
"""


def test_exits_by_reason_vcpu_and_second() -> None:
    report = answered(EXITS)
    assert report.seconds == pytest.approx(2.000001)
    msr, cpuid, hlt = report.exits
    assert (msr.reason, msr.count, msr.share) == ("MSR_WRITE", 3, 0.6)
    assert msr.per_second == pytest.approx(3 / 2.000001)
    assert msr.time is not None
    assert (msr.time.count, msr.time.median, msr.time.maximum, msr.time.total) == (2, 4000, 6000, 10_000)
    assert (cpuid.reason, cpuid.time, cpuid.time_share) == ("CPUID", None, None)
    assert hlt.time is not None
    assert hlt.time.total == 1_500_000_000
    assert hlt.time_share == pytest.approx(1.5 / 1.50001)
    first, second = report.vcpus
    assert (first.vcpu, first.thread, first.exits) == (0, "CPU 0/KVM", 4)
    assert first.by_reason == {"MSR_WRITE": 3, "CPUID": 1}
    assert first.rips == [(0x10, 2), (0x14, 1), (0x30, 1)]
    assert (second.vcpu, second.exits, second.rips) == (1, 1, [(0x20, 1)])
    assert report.by_second == [{"MSR_WRITE": 2, "HLT": 1}, {}, {"CPUID": 1, "MSR_WRITE": 1}]
    assert report.halts is not None
    assert (report.halts.hlts, report.halts.waits, report.halts.polls) == (1, 1, 0)
    assert report.halts.asleep == hlt.time


def test_what_else_may_be_taken_fast() -> None:
    text = """
        0 1 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x10 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
        0 2 kvm_nested_vmexit: vcpu 0 reason MSR_WRITE
        0 3 kvm_msr: msr_write 6e0 = 0x5
        0 4 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x10 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
        0 5 kvm_msr: msr_write 6e0 = 0x5
        0 6 kvm_exit: vcpu 0 reason VMCALL rip 0x10 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
        0 7 kvm_hypercall: nr 0x5 a0 0x2 a1 0x0 a2 0x0 a3 0xfd
        0 8 kvm_exit: reason EXIT_INVD rip 0x10 info 0 0
        0 9 kvm_cpuid: func 1 idx 0 rax 0 rbx 0 rcx 0 rdx 0, cpuid entry found
    """
    exits = {("MSR_WRITE", True): 1, ("MSR_WRITE", False): 1, ("HYPERCALL", False): 1, ("INVD", False): 1}
    deadlines = {("TSC_DEADLINE write", True): 1, ("TSC_DEADLINE write", False): 1}
    assert Analysis(recorded(text)).others(1) == exits | deadlines
    lines = "\n".join(line for line in text.splitlines() if "exit" not in line) + "\n0 10 kvm_entry: vcpu 0"
    assert Analysis(recorded(lines)).others(1) == {
        ("CPUID", False): 1,
        ("HYPERCALL", False): 1,
        ("TSC_DEADLINE write", False): 2,
    }


def test_a_trace_without_entries_gives_counts_alone() -> None:
    report = answered("\n".join(line for line in EXITS.splitlines() if "entry" not in line))
    assert {row.reason: row.count for row in report.exits} == {"MSR_WRITE": 3, "HLT": 1, "CPUID": 1}
    assert [row.time for row in report.exits] == [None] * 3
    assert report.latency == []


def test_a_trace_without_time_gives_counts_alone() -> None:
    recording = recorded(EXITS)
    for block in recording.blocks:
        block["time"] = NO_TIME
    [report] = analyse(recording)
    assert {row.reason: (row.count, row.per_second, row.time) for row in report.exits}["MSR_WRITE"] == (3, None, None)
    assert (report.seconds, report.by_second) == (None, [])


def test_a_clock_that_is_no_time_gives_ticks_and_no_seconds() -> None:
    recording = recorded(EXITS)
    recording.clock = "ticks"
    [report] = analyse(recording)
    assert (report.seconds, report.by_second, report.findings) == (None, [], [])
    assert report.exits[0].per_second is None


def test_a_time_that_runs_backwards_is_no_duration() -> None:
    report = answered("0 20 kvm_exit: reason HLT rip 0x1 info 0 0\n0 10 kvm_entry: vcpu 0")
    assert report.exits[0].time is None


def test_vms_are_told_apart() -> None:
    where = Where(np.array([1, 2, 0], np.int32), np.array([0, 0, -1], np.int32))
    analysis = Analysis(recorded(EXITS), where)
    assert analysis.vms == [1, 2]
    one, two = (analysis.report(vm) for vm in analysis.vms)
    assert [sum(row.count for row in vm.exits) for vm in (one, two)] == [4, 1]
    assert [row.vcpu for row in two.vcpus] == [0]


def test_entries_tell_where_a_vcpu_is_where_exits_were_not_recorded() -> None:
    report = answered(
        "0 1 kvm_entry: vcpu 0, rip 0x10\n0 2 kvm_entry: vcpu 0, rip 0x10\n0 3 kvm_entry: vcpu 0, rip 0x20"
    )
    assert report.vcpus[0].rips == [(0x10, 2), (0x20, 1)]
    assert report.vcpus[0].exits == 0


def test_seconds_are_bounded() -> None:
    report = answered(EXITS.replace("0 3000001 ", f"0 {(SECONDS + 5) * 10**6} "))
    assert len(report.by_second) == 3


def test_msrs() -> None:
    report = answered(
        """
        0 1 kvm_msr: msr_write 6e0 = 0x123
        0 2 kvm_msr: msr_write 6e0 = 0x124
        0 3 kvm_msr: msr_read 3a = 0x5
        1 4 kvm_msr: msr_read 3a = 0x5
        1 5 kvm_msr: msr_read ce = 0x0 (#GP)
        1 6 kvm_msr: msr_write 40000071 = 0x10000002f
        """
    )
    rows = {(row.name, row.write): (row.count, row.faults, row.values) for row in report.msrs}
    assert rows == {
        ("TSC_DEADLINE", True): (2, 0, []),
        ("FEATURE_CONTROL", False): (2, 0, [(5, 2)]),
        ("PLATFORM_INFO", False): (1, 1, []),
        ("HV_ICR", True): (1, 0, []),
    }
    assert sum(row.share for row in report.msrs) == pytest.approx(1)


def test_the_bundled_guest_is_counted_as_grep_counts_it() -> None:
    trace = files("fastexit") / "data" / "linux-6.1-4vcpu-x2apic.trace.xz"
    text = lzma.decompress(trace.read_bytes())
    analysis = Analysis(plain_records.read_lines(text.splitlines(keepends=True)))
    [vm] = analysis.vms
    report = analysis.report(vm)

    def grep(pattern: bytes) -> int:
        return len(re.findall(pattern, text))

    assert sum(row.count for row in report.msrs) == grep(rb"kvm_msr:")
    assert sum(row.accepted for row in report.vectors) == grep(rb"kvm_apic_accept_irq:")
    assert analysis.others(vm) == {("TSC_DEADLINE write", False): grep(rb"msr_write 6e0 ")}
    doors = {(row.doing, row.door): row.count for row in report.doors}
    assert doors["IPI", "x2APIC MSR"] == grep(rb"kvm_apic_ipi:") == grep(rb"msr_write 830 ")
    assert doors["EOI", "x2APIC MSR"] == grep(rb"msr_write 80b ")
    assert doors["timer", "x2APIC MSR"] == grep(rb"msr_write 838 ")
    vectors = {(row.vector, row.source): row.accepted for row in report.vectors}
    assert vectors[0xEC, "timer"] == grep(rb"accept_irq: apicid \d vec 236 ")
    ipis = {vector: n for (vector, source), n in vectors.items() if source == "IPI (x2APIC MSR)" and vector >= 0xF8}
    assert ipis == {0xFB: 2765, 0xFD: 518, 0xFC: 116 + 252 * 3, 0xF8: 3}
    classes = next(dict(row.classes) for row in report.msrs if row.msr == 0x830)
    assert classes["Fixed physical, unicast"] == 3399
    assert classes["Fixed all-but-self, 3 targets"] == 253
    assert sum(classes.values()) == 3664
    assert report.halts is not None
    assert report.halts.waits + report.halts.polls == grep(rb"kvm_vcpu_wakeup:")
    assert {finding.severity for finding in report.findings} <= {"note"}


@pytest.mark.parametrize("name", ["6.1-xapic", "6.12-xapic", "6.18-x2apic", "7.3-x2apic"])
def test_a_windows_like_guest_is_counted_as_it_counted_itself(name: str) -> None:
    path = f"windows/kvm-{name}.trace.xz"
    with lzma.open(DATA / path, "rt") as file:
        own = {key: int(n) for key, n in re.findall(r"(\w+) (\d+)", file.readline().partition(":")[2])}
    analysis = Analysis(guest(path))
    [vm] = analysis.vms
    report = analysis.report(vm)
    doors = {(row.doing, row.door): row.count for row in report.doors}
    assert doors == {
        ("IPI", "synthetic MSR"): own["IPI_MSR"],
        ("IPI", "hypercall"): own["IPI_CALL"],
        ("EOI", "synthetic MSR"): own["EOI_MSR"],
        ("EOI", "EOI assist"): own["EOI_ASSIST"],
        ("TPR", "synthetic MSR"): own["TPR_MSR"],
        ("timer", "synthetic MSR"): own["TIMER"],
        ("EOM", "synthetic MSR"): own["END_OF_MESSAGE"],
        ("SynIC set-up", "synthetic MSR"): own["SINT_SET_UP"],
        ("VP assist page", "synthetic MSR"): own["ASSIST_PAGE"],
    }
    assert report.halts is not None
    assert report.halts.hlts == own["HALTS"]
    assert {finding.kind for finding in report.findings} == {"windows-ipis-never-fast", "slow-exit"}


def test_replay_counts_the_same() -> None:
    path = DATA / "windows" / "kvm-7.3-x2apic.trace.xz"
    [vm] = replay(path, kernels=()).vms
    [report] = analyse(guest("windows/kvm-7.3-x2apic.trace.xz"))
    assert {(row.doing, row.door): row.count for row in report.doors} == {
        (doing.value, door.value): n for (doing, door), n in vm.doors.items()
    }
    assert {(row.sender, row.target): row.interrupts for row in report.sent} == dict(vm.sent)


@given(st.lists(st.integers(0, 1 << 45), min_size=1, max_size=60), st.booleans())
def test_quantiles_are_exact_or_as_near_as_is_said(values: list[int], exact: bool) -> None:
    kept = Durations(1000 if exact else 0)
    for value in values:
        kept.feed(np.array([3]), np.array([value]))
    found = kept.of(3)
    assert found is not None
    assert (found.count, found.maximum, found.total) == (len(values), max(values), sum(values))
    for share, got in (0.5, found.median), (0.9, found.p90), (0.99, found.p99):
        want = sorted(values)[max(int(np.ceil(share * len(values))) - 1, 0)]
        if exact:
            assert got == want
        elif want < 1 << 40:
            assert abs(got - want) <= max(want * durations.ERROR, 1) or got == found.maximum


def test_exact_durations_become_a_histogram() -> None:
    few, many = Durations(8), Durations()
    rng = np.random.default_rng(1)
    for _ in range(9):
        groups, values = rng.integers(0, 3, 5) * 10, rng.integers(1, 10**6, 5)
        few.feed(groups, values)
        many.feed(groups, values)
    for group in 0, 10, 20:
        one, other = few.of(group), many.of(group)
        assert one is not None
        assert other is not None
        assert (one.count, one.total, one.maximum) == (other.count, other.total, other.maximum)
        assert one.median == pytest.approx(other.median, rel=durations.ERROR)
    assert few.of(1) is None
    assert few.groups() == [0, 10, 20]


def test_what_is_frequent_is_kept() -> None:
    tally: Tally[int] = Tally(4)
    for i in range(100):
        tally.add([(i, 1), (1000, 5)])
    assert tally.counts[1000] == 500
    assert len(tally.counts) <= 8


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=50), st.integers(1, 4))
def test_often_counts_rows(rows: list[tuple[int, int]], most: int) -> None:
    columns = [np.array([row[i] for row in rows], np.int64) for i in (0, 1)]
    counts = {row: rows.count(row) for row in rows}
    assert dict(often(columns)) == counts
    kept = dict(often(columns, most))
    for first in {row[0] for row in rows}:
        mine = sorted((n for row, n in counts.items() if row[0] == first), reverse=True)
        left = sorted((n for row, n in kept.items() if row[0] == first), reverse=True)
        assert left == mine[: len(left)]
        assert len(counts) <= most or len(left) == min(len(mine), most)
