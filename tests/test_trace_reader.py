"""The trace reader: known files, every line shape, threads and VMs, and files that are not sound."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastexit.trace import BUNDLED, TraceError, accesses, files
from fastexit.trace.events import Kind, parse
from fastexit.trace.reader import Batch, TraceReader
from fastexit.trace.replay import replay
from fastexit.trace.threads import Survey, Vm

TRACES = Path(__file__).parents[1] / "examples" / "traces"
X2APIC = BUNDLED
XAPIC = TRACES / "linux-6.1-4vcpu-xapic.trace.xz"
SYNTHETIC = TRACES / "synthetic-guest-4vcpu.txt.gz"

LINE = re.compile(
    r" *(?P<comm>\S+)-(?P<pid>\d+) +\[(?P<cpu>\d+)\] (?P<flags>\S+) +(?P<time>[\d.]+): (?P<event>\w+): (?P<rest>.*)"
)


def text(path: Path, lines: int | None = None) -> list[str]:
    """The first lines of a bundled trace, with their line ends."""
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt") as source:
        return [line for _, line in zip(range(lines if lines is not None else 1 << 30), source, strict=False)]


@pytest.fixture(scope="module")
def guest() -> list[str]:
    """Two VMs, one after the other."""
    return text(SYNTHETIC)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def put(content: object, name: str = "trace.txt") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, bytes) else "".join(content).encode()  # type: ignore[arg-type]
        path.write_bytes(data)
        return path

    return put


def read(path: Path) -> tuple[TraceReader, list[Batch]]:
    reader = TraceReader(path)
    return reader, list(reader.batches())


def events(batches: list[Batch]) -> Counter[str]:
    return Counter(event.name for batch in batches for event in batch.events if event.name)


def vms(path: Path) -> list[Vm]:
    reader, batches = read(path)
    survey = Survey(reader.path)
    for batch in batches:
        survey.learn(batch)
    return survey.vms(lambda: batches)


def shape(found: list[Vm]) -> list[dict[int, int]]:
    """For each VM: vCPU id -> thread id."""
    return [{vcpu: clues.task.pid for vcpu, clues in vm.vcpus.items() if clues} for vm in found]


# ------------------------------------------------------------------------------------------------------ the known files


@pytest.mark.parametrize(
    ("path", "lines", "counts"),
    [
        (
            X2APIC,
            160_115,
            {
                "kvm_msr": 41_814,
                "kvm_apic": 40_834,
                "kvm_eoi": 34_420,
                "kvm_apic_accept_irq": 18_926,
                "kvm_apic_ipi": 3_664,
                "kvm_mmio": 4,
            },
        ),
        (XAPIC, 96_412, {"kvm_apic_ipi": 1_980, "kvm_mmio": 16_679, "kvm_eoi": 18_862, "kvm_apic_accept_irq": 11_148}),
        (SYNTHETIC, 19_997, {"kvm_apic_ipi": 1_459, "kvm_apic_accept_irq": 2_379, "kvm_eoi": 3_638}),
    ],
)
def test_known_counts(path: Path, lines: int, counts: dict[str, int]) -> None:
    reader, batches = read(path)
    assert reader.lines == lines
    assert reader.problems == []
    assert sum(len(batch.events) for batch in batches) == lines
    assert counts.items() <= events(batches).items()


def test_a_header_that_promises_more_is_noted(guest: list[str]) -> None:
    reader, _ = read(SYNTHETIC)
    assert reader.notes == ["the header counts 21,891 events, the file holds 19,985: filtered or cut at a line end"]


def test_batches_carry_line_numbers(
    guest: list[str], monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 4096)
    _, batches = read(write(guest))
    assert len(batches) > 100
    for batch in batches[::37]:
        for i, event in enumerate(batch.events):
            if event.kind == Kind.IPI:
                assert guest[batch.first + i - 1].rstrip().endswith(event.text)


# -------------------------------------------------------------------------------------------------------- every shape


SHAPES = {
    "trace-cmd report": "{comm:>16}-{pid:<5} [{cpu}] {time:>13}: {named:<21}{rest}",
    "trace-cmd report with flags": "{comm:>16}-{pid:<5} [{cpu}] {flags} {time:>13}: {named:<21}{rest}",
    "perf script": "{comm:>16} {pid:>6} [{cpu}] {time:>12}: {perf:>28} {rest}",
    "perf script with processes": "CPU 1/KVM  77/{pid} [{cpu}] {time}: {perf} {rest}",
    "four latency flags": "{comm:>16}-{pid:<7} [{cpu}] {flags:.4} {time:>12}: {named} {rest}",
    "process ids": "{comm:>16}-{pid:<7} (  4711) [{cpu}] {flags} {time:>12}: {named} {rest}",
    "latency format": "{comm:>8.8}-{pid:<7} {number:>3}{flags} {time:>12}: {named} {rest}",
    "latency format of ftrace": "{comm:>8.8}-{pid:<7} {number:>3}{flags} {us:>8}us+: {named} {rest}",
    "a clock without a point": "{comm:>16}-{pid:<7} [{cpu}] {flags} {us}000: {named} {rest}",
    "a clock without a blank": "{comm:>16}-{pid:<7} [{cpu}]{us}000: {named} {rest}",
    "differences of time": "{comm:>16}-{pid:<7} [{cpu}] {time:>12}: (+12)    {named} {rest}",
    "a buffer's name": "agb3: {comm:>16}-{pid:<7} [{cpu}] {time:>12}: {named} {rest}",
    "perf script without CPU": "{comm:>16} {pid:>6} {time:>12}: {perf:>28} {rest}",
    "perf script without names": "{comm:>16} {pid:>6} [{cpu}] {time:>12}: {rest}",
    "with a date": "2022-04-22 17:39:26.535148 {comm:>16} {pid:>6} {flags:.4} [{cpu}] {time:>12}: {perf} {rest}",
    "quoted by mail": "> {comm}-{pid} [{cpu}] {flags} {time}: {named} {rest}",
    "without time": "{comm:>16}-{pid:<7} [{cpu}] {flags} {named} {rest}",
    "odd thread names": "vcpu [a]: 4-7-{pid} [{cpu}] {flags} {time:>12}: {named} {rest}",
}


def shaped(line: str, shape: str) -> str:
    """An event line of ftrace in another shape."""
    match = LINE.fullmatch(line.rstrip())
    assert match
    names = {"named": f"{match['event']}:", "perf": f"kvm:{match['event']}:"}
    other = {"number": int(match["cpu"]), "us": match["time"].replace(".", "")}
    return SHAPES[shape].format(**match.groupdict(), **names, **other) + "\n"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_line_shape_says_the_same(guest: list[str], shape: str, write: Callable[..., Path]) -> None:
    lines = guest[12:4000]
    plain = read(write(lines))[1]
    other, batches = read(write([shaped(line, shape) for line in lines], "other.txt"))
    assert other.problems == []
    assert [e for b in batches for e in b.events] == [e for b in plain for e in b.events]
    assert [t.pid for b in batches for t in b.tasks if t] == [t.pid for b in plain for t in b.tasks if t]


@pytest.mark.parametrize(
    ("body", "kind", "fields"),
    [
        ("kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|assert|edge|dst)", Kind.IPI, (1, 0x40FD, 0)),
        (
            "kvm_apic_ipi: dst ffffffff vec 0 (NMI|logical|de-assert|level|all-but-self)",
            Kind.IPI,
            (0xFFFFFFFF, 0xC8C00, 0),
        ),
        ("kvm_apic_accept_irq: apicid 12 vec 65 (LowPrio|edge)", Kind.ACCEPT, (18, 0x141, 0)),
        ("kvm_apic_accept_irq: apicid 1 vec 33 (Fixed|level) (coalesced)", Kind.ACCEPT, (1, 0x8021, 0)),
        ("kvm_eoi: apicid a vector -1", Kind.EOI, (10, -1, 0)),
        ("kvm_pv_eoi: apicid 3 vector 236", Kind.PV_EOI, (3, 236, 0)),
        ("kvm_apic: apic_write APIC_ICR = 0x1000040fd", Kind.APIC_WRITE, (0x300, 0x1000040FD, 0)),
        ("kvm_apic: apic_read 0x110 = 0x0", Kind.APIC_READ, (0x110, 0, 0)),
        ("kvm_msr: msr_write 830 = 0x2000 (#GP)", Kind.MSR_WRITE, (0x830, 0x2000, 1)),
        ("kvm_msr: msr_write 1b = 0xfee00d00", Kind.MSR_WRITE, (0x1B, 0xFEE00D00, 0)),
        ("kvm_msr: msr_read 802 = 0x1", Kind.MSR_READ, (0x802, 1, 0)),
        ("kvm_msr: msr_write 6e0 = 0xbaae2d6da81", Kind.DEADLINE, (0x6E0, 0, 0)),
        ("kvm_msr: msr_write c0000080 = 0xd01", Kind.MARK, (-1, 0, 0)),
        ("kvm_mmio: mmio write len 4 gpa 0xfee00300 val 0x8fb", Kind.MMIO_WRITE, (0xFEE00300, 0x8FB, 4)),
        ("kvm_exit: vcpu 3 reason MSR_WRITE rip 0xffffffff8107f8a8 info1 0x0", Kind.EXIT, (3, 0, 0)),
        ("kvm_exit: vcpu 3 reason MSR_WRITE rip 0xfffff80653f32daf info1 0x0", Kind.EXIT, (3, 0, 1)),
        ("kvm_exit: reason MSR_WRITE rip 0xffffffff8107f8a8 info 0 0", Kind.EXIT, (-1, 0, 0)),
        ("kvm_cr: cr_write 8 = 0xf", Kind.CR8, (-1, 0, 0)),
        ("kvm_cr: cr_write 3 = 0x1000", Kind.MARK, (-1, 0, 0)),
        ("kvm_msr: msr_write 40000071 = 0x10000002f", Kind.HV_MSR, (0x40000071, 0x10000002F, 0)),
        ("kvm_msr: msr_write 400000b0 = 0x9 (#GP)", Kind.HV_MSR, (0x400000B0, 9, 1)),
        ("kvm_msr: msr_read 40000020 = 0x1234", Kind.MARK, (-1, 0, 0)),
        (
            "kvm_hv_hypercall: code 0xb fast var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x2f out 0x6",
            Kind.HV_CALL,
            (0xB, 0x2F, 6),
        ),
        ("kvm_hv_hypercall: code 0x15 slow cnt 0x0 idx 0x0 in 0x1000 out 0x0", Kind.HV_CALL, (0x15, 0x1000, 0)),
        ("kvm_hv_hypercall: code 0x8 fast cnt 0x0 idx 0x0 in 0x0 out 0x0", Kind.MARK, (-1, 0, 0)),
        ("kvm_hv_send_ipi: vector 2f processor_mask 0x6", Kind.HV_SEND, (-1, 6, 0x2F)),
        ("kvm_hv_send_ipi_ex: vector e1 format 1 valid_bank_mask 0x3", Kind.HV_SEND, (1, 3, 0xE1)),
        ("kvm_hv_hypercall_done: result 0x3", Kind.HV_DONE, (-1, 3, 0)),
        ("kvm_hv_synic_set_irq: vcpu_id 2 sint 3 vector 149 ret 1", Kind.RAISED, (2, 149, 0)),
        ("kvm_hv_stimer_expiration: vcpu_id 2 timer 0 direct 1 send result 0", Kind.RAISED, (2, -1, 1 << 4)),
        ("kvm_hv_notify_acked_sint: vcpu_id 2 sint 3", Kind.HYPERV, (-1, 0, 0)),
        ("kvm_entry: vcpu 12, rip 0xfff0 intr_info 0x00000000 error_code 0x00000000", Kind.MARK, (12, 0, 0)),
        ("kvm:kvm_entry:   vcpu 2", Kind.MARK, (2, 0, 0)),
        ("kvm_inj_virq: IRQ 0xec", Kind.INJECT, (-1, 0xEC, 0)),
        ("kvm_inj_virq: IRQ 0xec [reinjected]", Kind.INJECT, (-1, 0xEC, 1)),
        ("kvm_inj_virq: irq 253", Kind.INJECT, (-1, 253, 0)),
        ("kvm_hv_timer_state: vcpu_id 1f hv_timer 0", Kind.HV_TIMER, (31, 0, 0)),
        ("kvm_hv_timer_state: vcpu_id 1f hv_timer 1", Kind.HV_TIMER, (31, 1, 0)),
        ("sched_switch: prev_comm=a prev_pid=1 ==> next_comm=b", Kind.OTHER, (-1, 0, 0)),
    ],
)
def test_payloads(body: str, kind: Kind, fields: tuple[int, int, int]) -> None:
    event = parse(body.encode())
    assert (Kind(event.kind), (event.a, event.b, event.c)) == (kind, fields)
    assert parse(body.encode()) is event


@pytest.mark.parametrize(
    "body",
    [
        "kvm_apic_ipi: dst 1 vec",
        "kvm_apic: apic_write APIC_NONE = 0x1",
        "kvm_eoi: apicid",
        "kvm_mmio: mmio 3",
        "kvm_msr: 8",
        "kvm_hv_timer_state: vcpu_id",
        "kvm_hv_timer_state: vcpu_id 1 hv_timer 2",
        "kvm_hv_timer_state: vcpu_id kvm hv_timer 0",
    ],
)
def test_broken_payloads_are_unreadable(body: str) -> None:
    event = parse(body.encode())
    assert event.kind == Kind.OTHER
    assert event.name == ""


def test_a_thread_id_is_not_taken_for_its_beginning(write: Callable[..., Path]) -> None:
    """Another width of the time stamp moves the place where the thread ends."""
    lines = [
        f"{who} [000] {time}: kvm:kvm_eoi: apicid 0 vector -1\n"
        for who, time in [("qemu 123", "9.000001"), ("qemu 1234", "9.000002"), ("qemu 123", "10.000001")]
    ]
    lines.append("qemu 1234 [000] 9.000003: kvm:kvm_eoi: apicid 0 vector -1\n")
    _, (batch,) = read(write(lines))
    assert [task.pid for task in batch.tasks if task] == [123, 1234, 123, 1234]


def test_a_torn_line_takes_no_lines_from_another_thread(write: Callable[..., Path]) -> None:
    """What stands first in a line that two writers tore is no name for the thread that it ends with."""
    whole = "  CPU 0/KVM-{} [001] 18136.763{}: kvm_eoi: apicid 0 vector -1\n"
    lines = [whole.format(8, 695), f"  CPU 0/KVM-7 [001] 1 {whole.format(8, 696)}", whole.format(7, 697)]
    _, (batch,) = read(write(lines))
    assert [task.pid for task in batch.tasks if task] == [8, 8, 7]


def test_half_an_exit_hides_no_reasons(write: Callable[..., Path]) -> None:
    bodies = "vcpu 1 reason HLT rip 0x1", "vcpu 1 rea", "vcpu 1 reason CPUID rip 0x1", "vcpu 1 reason HLT rip 0x2"
    lines = [f"  vcpu-1  [000] .....  1.00000{i}: kvm_exit: {body}\n" for i, body in enumerate(bodies)]
    _, (batch,) = read(write(lines))
    assert [event.text for event in batch.events] == ["HLT", "", "CPUID", "HLT"]


def test_a_line_without_an_event_is_none_however_long_it_is(write: Callable[..., Path]) -> None:
    """Cut where the line before it was, it has the same thread."""
    lines = ["  vcpu-1 [000] 1.000001: kvm_eoi: apicid 0 vector -1\n", "  vcpu-1 " + "chip 0 pin 0 (".rjust(14) + "\n"]
    assert len("[000] 1.000001") == 14
    reader, (batch,) = read(write(lines * 2))
    assert [task is None for task in batch.tasks] == [False, True] * 2


def test_reinjection_is_not_taken_for_injection_after_it(write: Callable[..., Path]) -> None:
    lines = [
        f"  vcpu-1  [000] .....  1.00000{i}: kvm_inj_virq: IRQ 0xec{s}\n"
        for i, s in enumerate(["", " [reinjected]", ""])
    ]
    _, (batch,) = read(write(lines))
    assert [event.c for event in batch.events] == [0, 1, 0]


# ----------------------------------------------------------------------------------------------------- threads and VMs


def test_two_vms_with_the_same_ids_are_kept_apart() -> None:
    assert shape(vms(SYNTHETIC)) == [
        {0: 25233, 1: 25234, 2: 25236, 3: 25237},
        {0: 25238, 1: 25239, 2: 25241, 3: 25242},
    ]


def moved(lines: list[str], seconds: float, pid: Callable[[int], int]) -> Iterator[tuple[float, str]]:
    """Event lines at another time and of other threads."""
    for line in lines:
        match = LINE.fullmatch(line.rstrip())
        if match:
            time = float(match["time"]) + seconds
            head = f"{match['comm']:>16}-{pid(int(match['pid'])):<7} [{match['cpu']}] ..... {time:12.6f}"
            yield time, f"{head}: {match['event']}: {match['rest']}\n"


def both(first: Iterator[tuple[float, str]], second: Iterator[tuple[float, str]]) -> list[str]:
    return [line for _, line in sorted([*first, *second], key=lambda entry: entry[0])]


def test_vms_at_the_same_time_with_interleaved_thread_ids(guest: list[str], write: Callable[..., Path]) -> None:
    one = guest[12:12000]
    lines = both(
        moved(one, 0, lambda pid: 5000 + 2 * (pid - 25233)), moved(one, 0.0301, lambda pid: 5001 + 2 * (pid - 25233))
    )
    assert shape(vms(write(lines))) == [{0: 5000, 1: 5002, 2: 5006, 3: 5008}, {0: 5001, 1: 5003, 2: 5007, 3: 5009}]


def test_vms_that_nothing_tells_apart_are_refused(guest: list[str], write: Callable[..., Path]) -> None:
    one = guest[12:3000]
    lines = both(moved(one, 0, lambda pid: 2 * pid), moved(one, 0, lambda pid: 2 * pid + 1))
    with pytest.raises(TraceError, match="2 VMs in one trace, and nothing tells .* record-tgid"):
        vms(write(lines))


def test_a_printed_process_id_settles_it(guest: list[str], write: Callable[..., Path]) -> None:
    one = guest[12:3000]
    lines = both(moved(one, 0, lambda pid: 2 * pid), moved(one, 0, lambda pid: 2 * pid + 1))
    lines = [re.sub(r"-(\d+) +\[", lambda m: f"-{m[1]} ({70 + int(m[1]) % 2}) [", line) for line in lines]
    assert [sorted(pid % 2 for pid in vm.values()) for vm in shape(vms(write(lines)))] == [[0] * 4, [1] * 4]


def test_kvm_exit_names_the_vcpu(write: Callable[..., Path]) -> None:
    lines = [
        f"  vmm-{90 + i}  [000] .....  1.00000{i}: {what}\n"
        for i, what in enumerate(
            [
                "kvm_exit: vcpu 7 reason MSR_WRITE rip 0x1",
                "kvm_entry: vcpu 3, rip 0x1",
                "kvm_exit: vcpu 12 reason HLT rip 0x1",
            ]
        )
    ]
    lines += ["  vmm-90  [000] .....  1.000009: kvm_apic: apic_write APIC_ICR = 0x1000000fd\n"]
    assert shape(vms(write(lines))) == [{3: 91, 7: 90, 12: 92}]


def test_a_thread_without_a_name_takes_the_free_place(guest: list[str], write: Callable[..., Path]) -> None:
    lines = [line for line in guest[12:12000] if "-25233" not in line or "kvm_eoi" not in line]
    (vm,) = vms(write(lines))
    assert shape([vm]) == [{0: 25233, 1: 25234, 2: 25236, 3: 25237}]
    assert vm.assumed == ["no line names the vCPU of thread python3-25233: taken by the order of thread ids"]


def test_vcpus_that_nothing_names_are_refused(guest: list[str], write: Callable[..., Path]) -> None:
    lines = [line for line in guest[12:9000] if "kvm_eoi" not in line and "vcpu " not in line]
    with pytest.raises(TraceError, match=r"cannot tell which vCPU thread .*25234.*kvm_eoi"):
        vms(write(lines))


def test_one_thread_for_several_vcpus_is_refused(guest: list[str], write: Callable[..., Path]) -> None:
    lines = [re.sub("2523[3-7]", "25233", line) for line in guest[12:9000]]
    with pytest.raises(TraceError, match="acts for vCPUs 0, 1, 2, 3"):
        vms(write(lines))


def test_device_threads_are_no_vcpus(guest: list[str], write: Callable[..., Path]) -> None:
    lines = guest[12:3000]
    lines.append("     kworker/0:1-99      [000] .....  1641.9: kvm_apic_accept_irq: apicid 2 vec 50 (Fixed|edge)\n")
    (vm,) = vms(write(lines))
    assert [task.pid for task in vm.others] == [99]


# ------------------------------------------------------------------------------------------------------ unsound files


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (b"", "t", "the file is empty"),
        (b"\x17\x08Dtracing6\0rest", "t.dat", "trace-cmd report"),
        (b"PERFILE2rest", "t.data", "perf script"),
        (b"PK\x03\x04rest", "t.zip", "zip archive"),
        (b"\xff\xfek\0v\0m\0", "t.txt", "iconv"),
    ],
)
def test_files_that_need_something_else_first(data: bytes, name: str, said: str, write: Callable[..., Path]) -> None:
    with pytest.raises(TraceError, match=said) as error:
        TraceReader(write(data, name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        TraceReader(tmp_path / "none")


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress])
def test_a_pipe_is_read_as_a_file_is(guest: list[str], pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """From its first byte, as often as it takes: also where a line ends just where a first look would have stopped."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    head = "# tracer: nop\n"
    first = next(i for i in range(len(guest)) if sum(map(len, guest[:i])) > 4096 - len(head))
    pad = 4096 - len(head) - sum(map(len, guest[: first - 1])) - 1
    data = "".join([head, "#" * pad + "\n", *guest]).encode()
    assert data[4095:4096] == b"\n"
    writer = threading.Thread(target=pipe.write_bytes, args=(pack(data),))
    writer.start()
    reader, batches = read(pipe)
    writer.join()
    assert (reader.lines, reader.problems) == (len(guest) + 2, [])
    assert events(batches) == events(read(SYNTHETIC)[1])
    assert [len(batch.events) for batch in reader.batches()] == [len(batch.events) for batch in batches]


def test_a_device_is_no_trace() -> None:
    with pytest.raises(TraceError, match="a device, not a trace"):
        TraceReader("/dev/null")


@pytest.mark.parametrize("path", [X2APIC, SYNTHETIC])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_cut_compressed_file_gives_all_it_has(path: Path, share: float, write: Callable[..., Path]) -> None:
    data = path.read_bytes()
    reader, batches = read(write(data[: int(len(data) * share)], path.name))
    assert len(reader.problems) == 1
    assert "cut short" in reader.problems[0]
    assert f":{reader.lines}: " in reader.problems[0]
    kept = sum(len(batch.events) for batch in batches)
    assert reader.lines - kept in (0, 1)  # the line that was cut
    assert reader.events == sum(not line.startswith("#") for line in text(path, kept))


def test_a_damaged_gzip_gives_what_comes_before(guest: list[str], write: Callable[..., Path]) -> None:
    data = bytearray(gzip.compress("".join(guest).encode(), mtime=0))
    data[-6] ^= 0xFF
    reader, _ = read(write(bytes(data), "t.gz"))
    assert reader.lines == len(guest)
    assert "damaged" in reader.problems[0]


def test_concatenated_streams_are_one_file(guest: list[str], write: Callable[..., Path]) -> None:
    parts = "".join(guest[:5001]).encode(), "".join(guest[5001:]).encode()
    for pack, name in ((lzma.compress, "t.xz"), (gzip.compress, "t.gz")):
        reader, batches = read(write(b"".join(map(pack, parts)), name))
        assert (reader.lines, reader.problems) == (len(guest), [])
        assert events(batches) == events(read(SYNTHETIC)[1])


def test_a_cut_last_line_is_left_out_and_named(guest: list[str], write: Callable[..., Path]) -> None:
    reader, _ = read(write(["".join(guest)[:1_000_123]]))
    assert len(reader.problems) == 1
    assert f":{reader.lines}: the last line has no end and was left out" in reader.problems[0]


def test_a_whole_last_line_without_an_end_counts(guest: list[str], write: Callable[..., Path]) -> None:
    reader, batches = read(write(["".join(guest[12:100]).rstrip("\n")]))
    assert reader.problems == []
    assert sum(events(batches).values()) == 88
    assert reader.lines == 88


def test_lines_that_two_writers_tore_are_named(guest: list[str], write: Callable[..., Path]) -> None:
    torn = guest[:100] + [guest[100][:60] + guest[101]] + guest[102:500] + [guest[500][30:]] + guest[501:1000]
    reader, _ = read(write(torn))
    (problem,) = reader.problems
    assert ":101: not ftrace text" in problem
    assert "1 times more" in problem


def test_binary_in_the_middle_costs_its_lines_only(guest: list[str], write: Callable[..., Path]) -> None:
    data = "".join(guest[:2000]).encode()
    reader, batches = read(write(data[:90_000] + b"\0\1\2" + data[90_000:]))
    assert sum(events(batches).values()) == 2000 - 12 - 1
    assert "binary data" in reader.problems[0]


def test_noise_is_no_trace(write: Callable[..., Path]) -> None:
    reader, batches = read(write(random.Random(1).randbytes(300_000)))
    assert events(batches) == Counter()
    assert reader.events == 0
    assert len(reader.problems) >= 1


def test_lost_events_are_named(guest: list[str], write: Callable[..., Path]) -> None:
    reader, _ = read(write([*guest[:3000], "CPU:1 [LOST 234 EVENTS]\n", *guest[3234:4000]]))
    assert ":3001: 234 events" in reader.problems[0]


def test_mixed_traces_go_back_in_time(guest: list[str], write: Callable[..., Path]) -> None:
    other = text(XAPIC, 400)
    mixed = [line for pair in zip(guest[12:400], other[12:400], strict=True) for line in pair]
    reader, batches = read(write(mixed))
    assert sum(events(batches).values()) == len(mixed)
    (problem,) = reader.problems
    assert ":3: time" in problem
    assert "goes back" in problem


def test_a_second_header_is_named(guest: list[str], write: Callable[..., Path]) -> None:
    reader, _ = read(write(guest[:3000] + text(X2APIC, 3000)))
    assert any(":3003: a second trace begins here" in problem for problem in reader.problems)


def test_seconds_may_grow_a_digit(write: Callable[..., Path]) -> None:
    lines = [
        f"  vcpu-1  [000] .....  {t}: kvm_eoi: apicid 0 vector -1\n"
        for t in ("9999.999998", "9999.999999", "10000.000001")
    ]
    assert read(write(lines * 1))[0].problems == []


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_times_of_unlike_widths(chunk: int, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    stamps = "..... 123456.000001", "....... 0.000000002", "....... 0.000000001"
    lines = [f"  vcpu-1 [000] {stamp}: kvm_eoi: apicid 0 vector -1\n" for stamp in stamps]
    reader, batches = read(write(lines))
    assert sum(events(batches).values()) == 3
    (problem,) = reader.problems
    assert "goes back" in problem


def numbered(batches: Iterator[Batch]) -> list[tuple[int, int | None, str]]:
    """Every line as its number, its thread's id and its event."""
    return [
        (batch.first + i, task.pid if task else None, repr(event))
        for batch in batches
        for i, (task, event) in enumerate(zip(batch.tasks, batch.events, strict=True))
    ]


@pytest.mark.parametrize("end", ["", "\n", "torn"])
@pytest.mark.parametrize("chunk", [300, 4096, 1 << 18])
def test_the_same_batches_once_more(
    guest: list[str], monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path], chunk: int, end: str
) -> None:
    """Kept from the first pass or read again, whole or damaged: lines, threads and events are the same."""
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    lines = [*guest[:700], "CPU:1 [LOST 234 EVENTS]\n", "hello\n", guest[2], *guest[3234:3600]]
    lines[-1] = {"": lines[-1].rstrip(), "\n": lines[-1], "torn": lines[-1][:30]}[end]
    reader = TraceReader(write([line for line in lines if "# entries" not in line] if end == "" else lines))
    batches = list(reader.batches())
    found = reader.lines, reader.events, list(reader.problems), list(reader.notes)
    expected = numbered(batches)
    assert expected[0][0] == 1
    assert len(expected) == len(lines) - (end == "torn") - 2 * (end == "")
    for kept in range(0, len(batches) + 1, max(1, len(batches) // 3)):
        told: list[int] = []
        assert numbered(reader.again(batches[:kept], told.append)) == expected
        assert sum(told) == reader.size
        assert (reader.lines, reader.events, reader.problems, reader.notes) == found


def test_a_write_that_never_ends_does_not_stop_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastexit.trace.replay import replay

    monkeypatch.setattr(accesses, "WINDOW", 2)
    report = replay(SYNTHETIC)
    assert report.ipi.total == 1_459
    assert report.accepted.total + sum(sum(vm.other_accepts.values()) for vm in report.vms) == 2_379


def test_a_threads_name_tells_its_vcpu_where_no_line_does(write: Callable[..., Path]) -> None:
    lines = [f" CPU {n}/KVM-{n + 50}  [000] .....  1.00000{n}: kvm_msr: msr_write 830 = 0x2000000fd\n" for n in (0, 2)]
    assert shape(vms(write(lines))) == [{0: 50, 2: 52}]


def test_a_vm_that_cannot_be_resolved_is_left_out(guest: list[str], write: Callable[..., Path]) -> None:
    foreign = [f"  other-{n}  [000] .....  1.00000{n}: kvm_msr: msr_write 830 = 0x2000000fd\n" for n in (7, 8)]
    path = write(foreign + guest[12:3000])
    assert len(vms(path)) == 1
    report = replay(path)
    assert len(report.vms) == 1
    assert any("left out: cannot tell which vCPU thread other-7, other-8 is" in note for note in report.notes)


def test_targets_are_not_invented(write: Callable[..., Path]) -> None:
    line = " CPU 0/KVM-50  [000] .....  1.000001: kvm_msr: msr_write 830 = 0x2000000fd\n"
    (found,) = replay(write([line])).vms[0].classes
    assert found.cast == "targets not recorded"
