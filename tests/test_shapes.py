"""Text of every shape becomes canonical lines: what people posted, what tools print, and what mail makes of it."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fastexit.trace import files
from fastexit.trace.events import UNREADABLE, parse
from fastexit.trace.found import TableRow
from fastexit.trace.shapes.line import LINE
from fastexit.trace.text import TraceText

TRACES = Path(__file__).parent / "data" / "traces"
NAME = re.compile(rb"\b(kvm_\w+|vcpu_match_mmio)[:(]")


class Canonical(NamedTuple):
    """A line that was read."""

    number: int
    comm: str
    pid: int
    time: str
    name: str
    text: str


def readable(line: bytes) -> bool:
    match = LINE.fullmatch(line)
    return match is not None and b": kvm_" not in match["body"] and parse(match["body"]) is not UNREADABLE


def read(path: Path, *, perf: bool = False) -> tuple[TraceText, list[bytes]]:
    """What a reader does: lines as they come, and once more those that it cannot read."""
    text = TraceText(path, perf=perf)
    lines: list[bytes] = []

    def take(line: bytes) -> None:
        asked = 0
        found: bytes | None = line
        while found and found.strip() and not readable(found):
            found = text.mend(found, len(lines) + 1)
            asked += 1
            assert asked < 4
        lines.append(found.strip() if found else b"")

    for chunk in text.chunks():
        for line in chunk.split(b"\n"):
            take(line)
    if (last := text.last(len(lines), sum(map(bool, lines)))) is not None:
        take(last)
    return text, lines


def parsed(lines: list[bytes]) -> list[Canonical]:
    found = []
    for number, line in enumerate(lines, 1):
        if line:
            match = LINE.fullmatch(line)
            assert match
            name, _, text = match["body"].decode().removeprefix("kvm:").partition(":")
            pid = int(match["pid"] or match["perf_pid"])
            found.append(Canonical(number, match["comm"].decode(), pid, match["time"].decode(), name, text.strip()))
    return found


def counted(path: Path) -> Counter[str]:
    """KVM's events by name, as grep would count them."""
    return Counter(
        found[1].decode()
        for line in path.read_bytes().split(b"\n")
        if not line.startswith((b"#", b"\t")) and (found := NAME.search(line))
    )


# ---------------------------------------------------------------------------------------------------- the sample files

TABLES = {"s08", "s14", "s15", "s22", "s27"}
TORN = {"d14-silent-cpu-lines": 5, "d14b-same-other-name": 10}
PROSE = {"s08": 1, "s09": 1, "s11": 1, "s19": 1, "s27": 2}
SHAPES = {
    **dict.fromkeys(("s06", "s09", "s16", "s17", "d1-", "d2-", "perfs", "perfk"), "perf script"),
    **dict.fromkeys(("s07", "s20", "s24", "s26", "trace"), "trace-cmd report"),
    **{"perf-": "perf trace", "bpftr": "bpftrace", "d14-": "trace-cmd report"},
    **{"s08": "perf kvm stat", "s14": "perf top", "s15": "kvm_stat", "s22": "bcc kvmexit", "s27": "perf kvm stat"},
}
TICKS = {"ftrace-tsc", "ftrace-uptime", "tracecmd-x86-tsc-clock"}
NO_THREAD = {"s02-amd-idlehlt-nothread", "s20-rfc-hyperv-level-nothread-tracecmd", "s26-msr-hist-gp-nothread"}
NO_TIME = {"s20-rfc-hyperv-level-nothread-tracecmd", "s26-msr-hist-gp-nothread", "ftrace-noctx"}
NO_CPU = NO_THREAD | {"ftrace-noctx", "perf-trace", "perfscript-fields-without-cpu"}

SAMPLES = sorted(TRACES.glob("*/*.txt"))


@pytest.mark.parametrize("perf", [False, True])
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_event_of_a_sample_is_read(path: Path, perf: bool) -> None:
    text, lines = read(path, perf=perf)
    name = path.stem
    expected = counted(path)
    if name in TORN:
        expected["kvm_msr"] -= TORN[name]
    found = Counter(line.name for line in parsed(lines))
    assert {n: count for n, count in found.items() if n.startswith(("kvm", "vcpu"))} == +expected
    assert text.unreadable_count == TORN.get(name, 0)
    assert text.prose == PROSE.get(name[:3], 0)
    assert len(lines) == len(path.read_bytes().rstrip(b"\n").split(b"\n"))
    assert bool(text.tables) == (name[:3] in TABLES)
    shape = next((shape for begin, shape in SHAPES.items() if name.startswith(begin)), "ftrace text")
    assert (text.shape, text.clock) == (shape, "ticks" if name in TICKS else "ns")
    if name[:3] not in TABLES:
        threads = name not in NO_THREAD | {"ftrace-noctx"}
        no_time = name in NO_TIME or name.startswith("d4")
        assert text.real == (threads, threads, name not in NO_CPU, not no_time)


@pytest.mark.parametrize(
    ("name", "number", "line"),
    [
        (
            "public/s02-amd-idlehlt-nothread",
            1,
            "CPU 0/KVM-1 [000] 220.696238: kvm_apic_ipi: dst b0 vec 176 (Fixed|physical|assert|edge|self)",
        ),
        (
            "public/s05-win2012-trace_pipe-wrapped",
            4,
            "<...>-3441924 [004] .... 1907374.582979: kvm_apic_accept_irq: apicid 0 vec 209 (Fixed|edge)",
        ),
        (
            "public/s05-win2012-trace_pipe-wrapped",
            8,
            "<...>-3441924 [004] .... 1907374.582983: kvm_set_irq: gsi 0 level 0 source 0",
        ),
        (
            "public/s16-perfprof-windows-apicwrite",
            1,
            "<...>-126953 [078] .... 96822671.255015: kvm_exit: reason APIC_WRITE rip 0xfffff801b782acff info 300 0",
        ),
        (
            "public/s17-firecracker-perfscript",
            3,
            "fc_vcpu 0-599499 [002] 1377662.550644: kvm_entry:  vcpu 0 rip 0xffffffff815cf36e",
        ),
        (
            "public/s26-msr-hist-gp-nothread",
            2,
            "<...>-1 [000] 0.000002: kvm_msr:              msr_write 40000118 = 0x60000000001 (#GP)",
        ),
        (
            "derived/d4-docs-no-timestamp",
            1,
            "CPU 0/KVM-82557 [002] 0.000001: kvm_entry: vcpu 0, rip 0xffffffffae1b603b",
        ),
        (
            "recorded/bpftrace-printf",
            3,
            "CPU 0/KVM-27504 [001] 896.201037: kvm_apic_ipi: dst 0 vec 251 "
            "(Fixed|physical|de-assert|edge|all-but-self)",
        ),
        ("recorded/ftrace-fields", 16, "<...>-26275 [000] ..... 876.148619: kvm_msr: msr_write 830 = 0x1000000fd"),
        (
            "recorded/ftrace-lat",
            20,
            "<...>-25918 [000] ..... 0.234436: kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)",
        ),
        ("recorded/ftrace-noctx", 5, "<...>-1 [000] 0.000005: kvm_apic: apic_write APIC_ICR = 0x1000000fd"),
        (
            "recorded/ftrace-uptime",
            13,
            "<...>-26022 [000] ..... 0.000087343: kvm_userspace_exit: reason KVM_EXIT_IO (2)",
        ),
        (
            "recorded/perf-trace",
            4,
            "CPU 0/KVM-25341 [000] 0.001509: kvm_apic_ipi: dst 0 vec 251 (Fixed|physical|de-assert|edge|all-but-self)",
        ),
        (
            "recorded/tracecmd-lat",
            21,
            "CPU 0/KVM-20965 [000] ..... 745.626918: kvm_apic_ipi:         dst 1 vec 253 "
            "(Fixed|physical|de-assert|edge|dst)",
        ),
    ],
)
def test_lines_in_full(name: str, number: int, line: str) -> None:
    _, lines = read(TRACES / f"{name}.txt")
    assert re.sub(r" +", " ", lines[number - 1].decode()) == re.sub(r" +", " ", line)


@pytest.mark.parametrize("name", ["ns", "raw", "diff", "buf", "lat"])
def test_one_recording_in_all_forms_of_trace_cmd(name: str) -> None:
    """Threads, events and their texts are the same; of -R, those whose fields are known."""
    plain = parsed(read(TRACES / "recorded" / "tracecmd-plain.txt")[1])
    other = parsed(read(TRACES / "recorded" / f"tracecmd-{name}.txt")[1])
    assert len(plain) == len(other)
    same = 0
    for a, b in zip(plain, other):
        assert (a.number, a.comm.strip(), a.pid, a.name) == (b.number, b.comm.strip(), b.pid, b.name)
        assert float(a.time) == pytest.approx(float(b.time), abs=1e-6)
        if a.name not in ("kvm_inj_exception", "kvm_apicv_inhibit_changed") and "=" not in b.text.split()[0]:
            assert a.text == b.text
            same += 1
    assert same >= (60 if name == "raw" else 78) - 10


def test_perf_script_with_and_without_a_cpu() -> None:
    whole = parsed(read(TRACES / "recorded" / "perfscript-plain.txt")[1])
    without = parsed(read(TRACES / "recorded" / "perfscript-fields-without-cpu.txt")[1])
    assert [line._replace(comm=line.comm.strip()) for line in whole[:60]] == [
        line._replace(comm=line.comm.strip()) for line in without
    ]


def test_text_that_is_canonical_passes_untouched() -> None:
    path = TRACES / "recorded" / "ftrace-default.txt"
    assert b"\n".join(TraceText(path).chunks()) + b"\n" == path.read_bytes()
    path = TRACES / "recorded" / "perfkvmstat-record-as-script.txt"
    assert b"\n".join(TraceText(path, perf=True).chunks()) + b"\n" == path.read_bytes()


@pytest.mark.parametrize("perf", [False, True])
def test_events_that_perf_cannot_print(perf: bool) -> None:
    found = parsed(read(TRACES / "recorded" / "perfscript-plain.txt", perf=perf)[1])
    assert [(line.number, line.text) for line in found if line.name == "kvm_inj_exception"] == [(45, "#PF (0x0)")]


# ------------------------------------------------------------------------------------------------------------- tables


def rows(name: str) -> list[TableRow]:
    text, _ = read(TRACES / "public" / f"{name}.txt")
    return [row for table in text.tables for row in table.rows]


def test_perf_kvm_stat() -> None:
    first, *_, last = rows("s08-perfkvmstat-hyperv-windows")
    assert first == TableRow("MSR_WRITE", 924_045, 0.8996, 924_045 * 1260.0, 420.0, 1260.0, 68_420.0)
    assert last.label == "VMCALL"
    before, after = rows("s27-perfkvmstat-wanpeng-before-after")
    assert (before.mean, after.mean) == (1080.0, 580.0)
    text, _ = read(TRACES / "public" / "s27-perfkvmstat-wanpeng-before-after.txt")
    assert [(table.title, table.line) for table in text.tables] == [("Before patch", 3), ("After patch", 8)]


def test_perf_kvm_stat_with_its_columns_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "stat.txt"
    path.write_text(
        "\nAnalyze events for all VMs, all VCPUs:\n\n"
        "    Event name    Samples  Sample%  Time (ns)   Time%  Max Time (ns)  Min Time (ns)  Mean Time (ns)\n"
        "     MSR_WRITE      1,200   60.00%    2400000  10.00%           9000            500            2000\n\n"
    )
    text, _ = read(path)
    assert text.tables[0].rows == [TableRow("MSR_WRITE", 1200, 0.6, 2_400_000.0, 500.0, 2000.0, 9000.0)]


def test_perf_stat_and_maps_of_bpftrace(tmp_path: Path) -> None:
    path = tmp_path / "stat.txt"
    path.write_text(
        "\n Performance counter stats for 'system wide':\n\n"
        "         5,198,976      kvm:kvm_exit              #  277.006 K/sec\n"
        "                12      kvm:kvm_entry\n\n       1.001 seconds time elapsed\n\n"
        "@exits[MSR_WRITE]: 12\n@exits[HLT]: 3\n@msrs[0x830]: 4\n"
    )
    text, _ = read(path)
    assert [(table.kind, table.title, [row[:2] for row in table.rows]) for table in text.tables] == [
        ("perf stat", "system wide", [("kvm_exit", 5_198_976), ("kvm_entry", 12)]),
        ("bpftrace map", "@exits", [("MSR_WRITE", 12), ("HLT", 3)]),
        ("bpftrace map", "@msrs", [("0x830", 4)]),
    ]


def test_perf_report(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text(
        "# Samples: 1K of event 'kvm:kvm_exit'\n# Event count (approx.): 1000\n#\n"
        "# Overhead  Trace output\n# ........\n#\n"
        "    60.00%  reason MSR_WRITE rip 0x1\n    40.00%  reason HLT rip 0x2\n"
    )
    text, _ = read(path)
    (table,) = text.tables
    assert (table.kind, table.title) == ("perf top", "kvm:kvm_exit")
    assert [row[:3] for row in table.rows] == [("reason MSR_WRITE rip 0x1", 600, 0.6), ("reason HLT rip 0x2", 400, 0.4)]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (
            "TGID     PID      KVM_EXIT_REASON                     STAT\n"
            "^C4036993  4037007  EXIT_REASON_HLT     1447    \n",
            TableRow("HLT, thread 4037007", 1447, -1.0),
        ),
        (
            "TGID     TID      COMM             KVM_EXIT_REASON  COUNT    AVG_TIME    \n"
            "24877    24901    b'CPU 3/KVM'     HLT              7        500.5\n",
            TableRow("HLT, thread 24901", 7, -1.0, 3503.5, mean=500.5),
        ),
        (
            "kvm-exit latency\n"
            "exit_reason             calls        total(us)   min(us)   avg(us)      max(us)  %gsys\n"
            "-------------------- -------- ---------------- --------- --------- ------------ ------\n"
            "HLT                      1208       903477.145     1.061   747.911     4621.338 100.00\n",
            TableRow("HLT", 1208, -1.0, 903_477_145.0, 1061.0, 747_911.0, 4_621_338.0),
        ),
        (
            "Event name                    Samples  Sample%       Time(ns)\n"
            "---------------------------  --------  --------  ------------\n"
            "MSR_WRITE                      211271    58.00%  738298680600\n",
            TableRow("MSR_WRITE", 211_271, 0.58, 738_298_680_600.0),
        ),
    ],
)
def test_tables_of_exit_reasons(text: str, row: TableRow, tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text(text)
    (table,) = read(path)[0].tables
    assert table.rows_are == "exit reasons"
    assert table.rows == [row]


def test_other_tables() -> None:
    assert rows("s14-perftop-msr-histogram")[0] == TableRow("msr_write 830 = 0x1000000fb", 10_976, 0.6078)
    assert rows("s15-kvm_stat-migration-hang")[1] == TableRow("kvm_exit", 5_198_976, 0.231)
    assert len(rows("s15-kvm_stat-migration-hang")) == 10
    assert rows("s22-bcc-kvmexit-table")[2] == TableRow("HLT, thread 1274261", 12, -1.0)


# ------------------------------------------------------------------------------------------------- other writers' lines


@pytest.fixture
def one(tmp_path: Path) -> Callable[..., tuple[TraceText, list[bytes]]]:
    def write(*lines: str) -> tuple[TraceText, list[bytes]]:
        path = tmp_path / "trace.txt"
        path.write_text("\n".join(lines) + "\n")
        return read(path)

    return write


IPI = "kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)"


@pytest.mark.parametrize(
    "line",
    [
        f"CPU 0/KVM-7 [001] d..1. 5.000001: {IPI}",
        f"CPU 0/KVM-7 [001] d..1.12 5.000001: {IPI}",
        f"CPU 0/KVM-7 (  5) [001] 5.000001: {IPI}",
        f"guest.dat:   CPU 0/KVM-7 [001] 5.000001: {IPI}",
        f"   agb3: CPU 0/KVM-7 [001] d..1. 5.000001: {IPI}",
        f"CPU 0/KVM-7 [001] 5.000001: (+12.5) {IPI}",
        f"CPU 0/KV-7     1d..1.   5.000001: {IPI}",
        f"CPU 0/KV-7     1d..1. 5000001us+: {IPI}",
        f"CPU 0/KV-7     1d..1. 5000001us : {IPI}",
        f"   CPU 0/KVM     7 [001] 5.000001:   kvm:{IPI}",
        f"   CPU 0/KVM     7/7 [001] 5.000001:   kvm:{IPI}",
        f"   CPU 0/KVM     7 [001] 5.000001:     1   kvm:{IPI}",
        f"   CPU 0/KVM     7 5.000001:   kvm:{IPI}",
        f"2022-04-22 17:39:26.535148 CPU 0/KVM 7 d... [001] 5.000001: kvm:{IPI}",
        "5000.001 CPU 0/KVM/7 kvm:kvm_apic_ipi(icr_low: 253, dest_id: 1)",
        "5000.001 ( 0.000 ms): CPU 0/KVM/7 kvm:kvm_apic_ipi(icr_low: 253, dest_id: 1)",
        f"5000.001 CPU 0/KVM/7 kvm:{IPI.replace(': ', ':', 1)}",
        "CPU 0/KVM-7 [001] 5.000001: kvm_apic_ipi: icr_low=0xfd (253) dest_id=0x1 (1)",
        "CPU 0/KVM-7 [001] 5.000001: kvm_apic_ipi: icr_low=0xfd dest_id=0x1",
        f"> CPU 0/KVM-7 [001] 5.000001: {IPI}",
        f">> > | CPU 0/KVM-7 [001] 5.000001: {IPI}",
        f"CPU 0/KVM-7 [001] 5.000001: {IPI.split(':')[1].strip()}",
        f"CPU 0/KVM-7 [001] 5.000001: {IPI}\r",
        f"\ufeffCPU 0/KVM-7 [001] 5.000001: {IPI}",
        f"[   12.345678] CPU 0/KV-7     1d..1. 5000001us : {IPI}",
        f"trace.txt:123:   CPU 0/KVM-7 [001] d..1. 5.000001: {IPI}",
        f"123:   CPU 0/KVM-7 [001] d..1. 5.000001: {IPI}",
        f"CPU 0/KVM-7\t[001]\td..1.\t5.000001:\t{IPI}",
        f"CPU 0/KVM-7 [001] 5.000001: {IPI}".replace(" ", "\u00a0"),
        f"&gt; CPU 0/KVM-7 [001] 5.000001: {IPI}",
        f"CPU 0/KVM-7 [001] 5.000001: {IPI}        <debug_before_write>",
        f"CPU 0/KVM-7 [001] 5.000001: {IPI} // why?",
        f"CPU 0/KVM-7 [001] 5.000001: {IPI.replace(' (', '    (')}",
        f"   5.000001 |   1)  CPU 0/KVM-7  |               |  /* {IPI} */",
    ],
)
def test_one_event_in_all_its_forms(line: str, one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, lines = one(line)
    (found,) = parsed(lines)
    assert (text.unreadable, text.prose) == ([], 0)
    assert (found.comm, found.pid, found.time) == ("CPU 0/KVM", 7, "5.000001")
    assert f"{found.name}: {found.text}" == IPI


FIELDS = {
    "kvm_msr: write=1 ecx=0x830 data=0xfd exception=1": "kvm_msr: msr_write 830 = 0xfd (#GP)",
    "kvm_apic: rw=0 reg=0x20 val=0x0": "kvm_apic: apic_read APIC_ID = 0x0",
    "kvm_eoi: apicid=0x1 vector=-1": "kvm_eoi: apicid 1 vector -1",
    "kvm_apic_accept_irq: apicid=0x10 (16) dm=0x100 (256) tm=0x1 (1) vec=' '(32)": (
        "kvm_apic_accept_irq: apicid 10 vec 32 (LowPrio|level)"
    ),
    "kvm_exit: exit_reason=0x20 (32) guest_rip=0x1000 isa=0x1 (1) info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 "
    "vcpu_id=0x2 (2)": (
        "kvm_exit: vcpu 2 reason MSR_WRITE rip 0x1000 info1 0x0000000000000000 info2 0x0000000000000000 "
        "intr_info 0x00000000 error_code 0x00000000"
    ),
    "kvm_exit: exit_reason=0x7c (124) guest_rip=0x1000 isa=0x2 (2) info1=0x1 info2=0x0 intr_info=0x0 error_code=0x0 "
    "vcpu_id=0x0 (0)": (
        "kvm_exit: vcpu 0 reason msr rip 0x1000 info1 0x0000000000000001 info2 0x0000000000000000 "
        "intr_info 0x00000000 error_code 0x00000000"
    ),
    "kvm_entry: vcpu_id=0x1 (1) rip=0x1000": "kvm_entry: vcpu 1, rip 0x1000",
    "kvm_inj_virq: vector=0xec (236) soft=0x0 (0) reinjected=0x1 (1)": "kvm_inj_virq: IRQ 0xec [reinjected]",
    "kvm_inj_exception: [FAILED TO PARSE] exception=14 has_error=1 error_code=3 reinjected=0": (
        "kvm_inj_exception: #PF (0x3)"
    ),
    "kvm_set_irq: gsi=0x4 (4) level=1 irq_source_id=0x0 (0)": "kvm_set_irq: gsi 4 level 1 source 0",
    "kvm_msi_set_irq: address=0xfee0400c data=0x4152": "kvm_msi_set_irq: dst 4 vec 82 (LowPrio|logical|edge|rh)",
    "kvm_ioapic_set_irq: e=0x100000000018921 pin=0x4 (4) coalesced=0": (
        "kvm_ioapic_set_irq: pin 4 dst 1 vec 33 (LowPrio|logical|level|masked)"
    ),
    "kvm_pic_set_irq: chip=0x1 (1) pin=0x3 (3) elcr=0x8 (8) imr=0xff (255) coalesced=1": (
        "kvm_pic_set_irq: chip 1 pin 3 (level|masked) (coalesced)"
    ),
    "kvm_ack_irq: irqchip=0x2 (2) pin=0x4 (4)": "kvm_ack_irq: irqchip IOAPIC pin 4",
    "kvm_pio: rw=0x1 (1) port=0x3f8 (1016) size=0x1 (1) count=0x1 (1) val=0x41 (65)": (
        "kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x41"
    ),
    "kvm_mmio: type=0x2 (2) len=0x4 (4) gpa=0xfee00300 val=0xfd": "kvm_mmio: mmio write len 4 gpa 0xfee00300 val 0xfd",
    "kvm_userspace_exit: reason=0x2 (2) errno=0x0 (0)": "kvm_userspace_exit: reason KVM_EXIT_IO (2)",
    "kvm_hypercall: nr=0xa a0=0x6 a1=0x0 a2=0x0 a3=0xfd": "kvm_hypercall: nr 0xa a0 0x6 a1 0x0 a2 0x0 a3 0xfd",
    "kvm_hv_timer_state: vcpu_id=0x1 (1) hv_timer_in_use=0x1 (1)": "kvm_hv_timer_state: vcpu_id 1 hv_timer 1",
    "kvm_cr: rw=0x1 (1) cr=0x8 (8) val=0xf": "kvm_cr: cr_write 8 = 0xf",
    "kvm_fpu: load=0x0 (0)": "kvm_fpu: unload",
    "kvm_apicv_inhibit_changed: reason=0x1 set=0x1 inhibits=0x2": (
        "kvm_apicv_inhibit_changed: set reason=1, inhibits=0x2"
    ),
}


@pytest.mark.parametrize("body", FIELDS)
def test_fields_become_kvms_text(body: str, one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, lines = one(f"   vcpu-7 [001] ..... 5.000001: {body}")
    (found,) = parsed(lines)
    assert f"{found.name}: {found.text}" == FIELDS[body]
    assert text.retold


@pytest.mark.parametrize(
    "body",
    [
        "kvm_msr: write=1 ecx=0x830",
        "kvm_msr: write=1 ecx=0x830 data=0x10000000000000000 exception=0",
        "kvm_apic_ipi: icr_low=zz dest_id=1",
        "kvm_exit: exit_reason=99999999999999999999 guest_rip=0x0",
    ],
)
def test_fields_that_make_no_event(body: str, one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, lines = one(f"   vcpu-7 [001] ..... 5.000001: {body}")
    assert text.unreadable_count + sum(map(bool, lines)) == 1


def test_put_in_threads_follow_the_vcpus_that_lines_name(
    one: Callable[..., tuple[TraceText, list[bytes]]],
) -> None:
    text, lines = one(
        " kvm_msr: msr_write 830 = 0xfd",
        " kvm_entry: vcpu 1, rip 0x1",
        " kvm_exit: vcpu 3 reason HLT rip 0x1",
        " kvm_eoi: apicid 3 vector -1",
    )
    assert [(line.comm, line.pid) for line in parsed(lines)] == [("CPU 1/KVM", 2)] * 2 + [("CPU 3/KVM", 4)] * 2
    assert text.real == (False, False, False, False)
    assert len(text.notes(4)) == 2


def test_names_without_ids_are_threads(one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, lines = one(*(f"  fc_vcpu {i} 1.00000{i}: kvm:kvm_entry: vcpu {i}" for i in (0, 1, 0)))
    assert [(line.comm, line.pid) for line in parsed(lines)] == [("fc_vcpu 0", 1), ("fc_vcpu 1", 2), ("fc_vcpu 0", 1)]
    assert text.real == (True, False, False, True)


# ---------------------------------------------------------------------------------------------------------------- mail

EXIT = (
    "CPU 0/KVM-7 [001] d.... 5.000001: kvm_exit: vcpu 0 reason MSR_WRITE rip 0xffffffff8107f8a8 info1 "
    "0x0000000000000000 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000"
)


@pytest.mark.parametrize("quote", ["", "> "])
@pytest.mark.parametrize("width", [30, 45, 60, 72, 78])
def test_wrapped_lines_are_joined(width: int, quote: str, one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    """At any width that mail programs use: also in a line's head, where the event's name alone looks like a line."""
    whole = [
        EXIT,
        f"CPU 0/KVM-7 [001] ..... 5.000002: {IPI}",
        "CPU 0/KVM-7 [001] ..... 5.000003: kvm_eoi: apicid 1 vector 9",
    ]
    wrapped = [
        quote + part
        for line in whole * 3
        for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    ]
    text, lines = one(*wrapped)
    assert [" ".join(line.decode().split()) for line in lines if line] == whole * 3
    assert (text.unreadable, text.prose, len(lines)) == ([], 0, len(wrapped))


def test_quoted_printable_is_decoded(one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, lines = one(
        "CPU 0/KVM-7 [001] ..... 5.000001: kvm_msr: msr_write 830 =3D 0xfd=20",
        "CPU 0/KVM-7 [001] ..... 5.000002: kvm_msr: msr_wri=",
        "te 830 =3D 0xfd",
    )
    assert [line.text for line in parsed(lines)] == ["msr_write 830 = 0xfd"] * 2
    assert text.unreadable == []


def test_prose_is_not_joined_to_lines_and_no_damage(one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, lines = one(
        "Hi all,",
        "> this is what I see when the guest hangs in kvm_exit for ever:",
        "",
        f"CPU 0/KVM-7 [001] ..... 5.000001: {IPI}",
        "and then nothing more.",
        f"CPU 0/KVM-7 [001] ..... 5.000002: {IPI}",
    )
    assert [line.number for line in parsed(lines)] == [4, 6]
    assert (text.prose, text.unreadable_count) == (3, 0)
    assert text.problems(6, 2) == []
    assert "Hi all," in text.notes(2)[0]


def test_a_long_preface_tells_nothing_of_the_lines_behind_it(
    monkeypatch: pytest.MonkeyPatch, one: Callable[..., tuple[TraceText, list[bytes]]]
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 10)
    text, lines = one(*["A word before."] * 500, *(f" 5.00000{i}: {IPI}" for i in range(3)))
    assert [line.number for line in parsed(lines)] == [501, 502, 503]
    assert (text.prose, text.real) == (500, (False, False, False, True))
    assert len([line for chunk in text.chunks() for line in chunk.split(b"\n") if line]) in (3, 503)


def test_half_a_line_is_unreadable_where_others_are_whole(one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    """Half a line looks like one of an excerpt without threads."""
    whole = [f"CPU 0/KVM-7 [001] ..... 5.00000{i}: {IPI}" for i in range(3)]
    text, lines = one(*whole, f"..... 5.000004: {IPI}", f" 5.000004: {IPI}", IPI)
    assert len(parsed(lines)) == 3
    assert [entry.line for entry in text.unreadable] == [4, 5, 6]


def test_lines_of_threads_named_cpu_are_not_dropped(one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, _ = one(f"CPU 0/KVM-7 [001] ..... 5.000001: {IPI}", "CPU 0/KVM-7 [001] kvm_apic_ipi: dst", "CPU 1 is empty")
    assert [entry.line for entry in text.unreadable] == [2]
    assert text.prose == 0


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("CPU:1 [LOST 234 EVENTS]", 234),
        (" CPU:3 [123 EVENTS DROPPED]", 123),
        ("CPU:3 [EVENTS DROPPED]", 1),
        ("CPU:3 [LOST EVENTS]", 1),
        ("Lost 55 events", 55),
        (" vcpu-7  [003]  5.000001: [EVENTS DROPPED]", 1),
        ("   swapper     0 [000] 5.000001: PERF_RECORD_LOST lost 7", 7),
    ],
)
@pytest.mark.parametrize("perf", [False, True])
def test_lost_events(line: str, lost: int, perf: bool, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(f"   vcpu 7 [001] 5.000001: kvm:{IPI}\n{line}\n   vcpu 7 [001] 5.000002: kvm:{IPI}\n")
    text, lines = read(path, perf=perf)
    assert (text.lost, text.lost_lines, len(parsed(lines))) == (lost, [2], 2)


# -------------------------------------------------------------------------------------------------------------- hostile

NASTY = [
    *(piece * (4090 // len(piece)) for piece in (b" ", b"a", b"1", b"1 ", b"a ", b"-1 ", b"[1] ", b"1: ", b"(1) ")),
    *(piece * (4090 // len(piece)) for piece in (b"> ", b"|", b"=3D", b"/1 ", b"x: ", b"0% ", b"\t", b". ", b"a=1 ")),
    b"0.000 (" + b" " * 4000 + b"x",
    b"a-1 [001] .... 1.000000: kvm_apic_ipi: " + b"icr_low=1 " * 300,
    b"0.000 x/1 kvm:kvm_msr(" + b"write: 1, " * 400 + b")",
    b"a" * 100_000,
    b"[001] " * 100_000,
]


@pytest.mark.parametrize("head", ["", " ", "vcpu-7 [001] ..... ", "> vcpu-7 [001] ..... "])
@pytest.mark.parametrize("number", range(len(NASTY)))
def test_nasty_lines_cost_little_and_are_no_events(number: int, head: str, tmp_path: Path) -> None:
    """A pattern that goes back over a line again and again would take minutes for these."""
    path = tmp_path / "trace.txt"
    good = f"{head}1.000001: {IPI}\n".encode()
    path.write_bytes(good * 3 + (NASTY[number] + b"\n") * 20 + good)
    text, lines = read(path)
    assert len(parsed(lines)) in (4, 24)
    assert len(lines) == 24


def test_control_characters_are_not_passed_on(one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    text, _ = one("vcpu\x1b[31m-7 [001] ..... 5.000001: kvm_msr: \x1b]0;x\x07\u202e", f" a-1 [000] 5.000001: {IPI}")
    (entry,) = text.unreadable
    assert not set(entry.text) & set("\x1b\x07\u202e")
    assert "\x1b" not in text.problems(2, 1)[0]


@pytest.mark.parametrize("digits", ["9" * 30, "9" * 400])
def test_numbers_beyond_64_bits(digits: str, one: Callable[..., tuple[TraceText, list[bytes]]]) -> None:
    good = f"vcpu-7 [001] ..... 5.000001: {IPI}"
    text, lines = one(good, f"vcpu-{digits} [001] ..... 5.000001: {IPI}", f"vcpu-7 [{digits}] ..... 5.000001: {IPI}")
    assert len(parsed(lines)) == 1
    assert text.unreadable_count == 2
    text, lines = one(good, good, f"vcpu-7 [001] ..... {digits}.000001: {IPI}", f"vcpu-7 [001] {digits}: {IPI}")
    assert len(parsed(lines)) == 2


@pytest.mark.parametrize("size", [100, 5000])
@pytest.mark.parametrize("blank", ["", " ", " d..1. "])
def test_clocks_without_a_point_a_chunk_at_a_time(size: int, blank: str, tmp_path: Path) -> None:
    """The same as line by line, up to where a chunk and a number end; numbers in the text stay."""
    path = tmp_path / "trace.txt"
    body = "sched_stat_wait: delay 12345678901234: 1 [ns]"
    lines = [f"  vcpu-{i % 7}     [00{i % 7}]{blank}{10**9 + i * 997}: {body}" for i in range(size)]
    path.write_text("\n".join(lines) + "\n")
    text, found = read(path)
    assert (text.clock, text.unreadable_count) == ("ticks", 0)
    for i, line in enumerate(parsed(found)):
        assert (line.number, line.pid, line.time) == (i + 1, i % 7, f"1.{i * 997:09}")
        assert f"{line.name}: {line.text}" == body
