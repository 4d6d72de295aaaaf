"""The scanner against the plain reader and against what was printed; and read(), which has it."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastexit
import plain_records
from fastexit.jit.declare import JIT
from fastexit.records import block, read
from fastexit.records.columns import NO_TIME, RECORD, Event, Recording, Rows, Thread
from fastexit.records.interning import Words, vcpu_in
from fastexit.records.scan import Scanner
from fastexit.trace.files import BUNDLED
from printed_records import EVENTS, printed

COLUMNS = "time a b c d line cpu vcpu event flags".split()
EXAMPLES = 300 if JIT else 40
MANY = 20_000 if JIT else 500

Told = dict[str, Any]


def told(rows: Rows, threads: list[Thread], names: list[str]) -> list[Told]:
    """Rows with their threads and names."""
    return [
        {column: int(row[column]) for column in COLUMNS}
        | {"thread": threads[row["thread"]], "name": names[row["name"]] if row["name"] >= 0 else None}
        for row in rows
    ]


def scanned(text: bytes) -> tuple[list[Told], list[int]]:
    words = Words()
    rows, bad = Scanner(words).scan(text, 1)
    return told(rows, words.threads, words.names), [line for line, _ in bad]


def plainly(text: bytes) -> tuple[list[Told], list[int]]:
    found = plain_records.read_text(text)
    return told(one(found.blocks), found.threads, found.names), [line for line, _ in found.unreadable]


def one(blocks: Iterable[Rows]) -> Rows:
    return np.concatenate([np.zeros(0, RECORD), *blocks])


def both(text: bytes) -> list[Told]:
    """What both readers read, which has to be the same."""
    rows, bad = scanned(text)
    assert (rows, bad) == plainly(text)
    return rows


# ------------------------------------------------------------------------------------------------------------ the lines


@pytest.mark.parametrize("event", EVENTS)
def test_what_a_kernel_prints_is_read(event: str) -> None:
    r = Random(event)
    drawn = [printed(r, event) for _ in range(EXAMPLES // 5)]
    rows = both("\n".join(line for line, _ in drawn).encode())
    assert [{**row, "thread": row["thread"].pid} for row in rows] == [
        {"line": i, **row} | {} for i, (_, row) in enumerate(drawn, 1)
    ]


@given(st.integers(0), st.integers(1, 60))
def test_lines_of_all_kinds_mixed(seed: int, count: int) -> None:
    r = Random(seed)
    both("\n".join(printed(r)[0] for _ in range(count)).encode())


ALPHABET = [*b" \t:[]()|=,.-0189afgxXz#\r\x00\xff", *b"kvm_", ord("\n")]
PIECES = [
    b"",
    b": kvm_",
    b"vcpu 1",
    b" rip 0x",
    b"f" * 17,
    b"9" * 21,
    b"[003] ",
    b"kvm:",
    b"-1",
    b"==>",
    b"reason",
    b"  ",
]


@given(st.integers(0), st.integers(1, 8))
def test_damaged_lines_are_read_alike_or_refused_alike(seed: int, times: int) -> None:
    r = Random(seed)
    lines = []
    for _ in range(20):
        line = bytearray(printed(r)[0].encode())
        for _ in range(r.randint(1, times)):
            at, more = r.randrange(len(line) + 1), r.randrange(4)
            piece = bytes([r.choice(ALPHABET)]) if r.random() < 0.7 else r.choice(PIECES)
            line[at : at + more] = piece
        lines.append(bytes(line).replace(b"\n", b"") if r.random() < 0.9 else bytes(line))
    both(b"\n".join(lines).replace(b"\n#", b"\n"))


@pytest.mark.parametrize(
    "body",
    [
        "kvm_msr: msr_write 10000000000000000 = 0x1",
        "kvm_msr: msr_write 1 = 0x1ffffffffffffffff",
        "kvm_set_irq: gsi 18446744073709551616 level 0 source 0",
        "kvm_exit: reason HLT rip 0x1 info 0 fffffffffffffffff",
        "kvm_exit: vcpu 32768 reason HLT rip 0x1",
        "kvm_exit: reason HLT rip 0x1 info1 0x0 info2 0x0 intr_info 0x100000000 error_code 0x0",
        "kvm_exit: reason HLT: kvm_entry: vcpu 0",
        "kvm_exit: reason " + "X" * 65,
        "kvm_entry: kvm_entry: vcpu 0",
        "kvm_entry: vcpu 0, rip 0x1: kvm_exit: reason HLT",
        "kvm_fpu: kvm_entry: vcpu 0",
        "kvm_eoi: apicid 0 vector 256",
        "kvm_eoi: apicid 0 vector 18446744073709551615",
        "kvm_apic: apic_write APIC_NONE = 0x0",
        "kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|assert|edge|everyone)",
        "kvm_apic_ipi: dst 1 vec 253 (Fast|physical|assert|edge|dst)",
        "kvm_apic_ipi: dst 1 vec 256 (Fixed|physical|assert|edge|dst)",
        "kvm_pic_set_irq: chip 2 pin 0 (edge)",
        "kvm_pic_set_irq:",
        "(+3) kvm_msr: msr_write 830 = 0x0",
        "x" * 65 + ": y",
    ],
)
def test_nonsense_is_refused(body: str) -> None:
    assert both(f" x-1 [000] d.... 1.000000: {body}".encode()) == []


@pytest.mark.parametrize(
    "head",
    [
        "x-1 [000] d.... 1: ",
        "x-1 [000] d.... 1.: ",
        "x-1 [000] d.... 1.1234567890: ",
        "x-1 [000] d.... 99999999999999999999.000000: ",
        "x-1 [000] d.... 9223372036.000000: ",
        "x-1 [32768] d.... 1.000000: ",
        "x-1[000] d.... 1.000000: ",
        "x [000] d.... 1.000000: ",
        "x-2147483648 [000] d.... 1.000000: ",
        "x-99999999999999999999 [000] d.... 1.000000: ",
        "x-1 [000] d.. 1.000000: ",
        "x-1 [000] d........ 1.000000: ",
        f"{'x' * 200}-1 [000] d.... 1.000000: ",
        "x-1 [000] d.... 1.000000:",
        "[000] d.... 1.000000: ",
    ],
)
def test_heads_of_other_lines_are_refused(head: str) -> None:
    assert both(f"{head}kvm_entry: vcpu 0".encode()) == []


def test_a_thread_may_be_called_anything() -> None:
    texts = [
        ("  a [1]: 2.3 b-5 (  77) [001] .... 3.000000: x: y", Thread(5, 77, "a [1]: 2.3 b"), 1),
        (" -6 [001] 3.000000: x: y", Thread(6, -1, ""), 1),
        (" kworker/3:1-eve 443349 [003] 3.000000:  kvm:x: y", Thread(443349, -1, "kworker/3:1-eve"), 3),
        (" a 8/9 [003] 3.000000: x:y: z", Thread(9, 8, "a"), 3),
        (" a-000000000012 [3] 3.0: x: y", Thread(12, -1, "a"), 3),
        ("q-10[7] z-11 [004]3.000000: x: y", Thread(11, -1, "q-10[7] z"), 4),
    ]
    for text, thread, cpu in texts:
        (row,) = both(text.encode())
        assert (row["thread"], row["cpu"]) == (thread, cpu)


def test_a_thread_has_one_number_whatever_it_is_called() -> None:
    lines = [
        " <...>-5 [0] 1.0: x: y",
        " qemu-5 (  4) [0] 2.0: x: y",
        " CPU 3/KVM-5 [0] 3.0: x: y",
        " qemu-5 [0] 4.0: x: y",
    ]
    words = Words()
    rows, _ = Scanner(words).scan("\n".join(lines).encode(), 1)
    assert set(rows["thread"].tolist()) == {0}
    assert (words.threads, words.vcpu_of) == ([Thread(5, 4, "CPU 3/KVM")], [3])


@pytest.mark.parametrize(
    ("comm", "vcpu"),
    [
        ("CPU 2/KVM", 2),
        ("CPU 12/KVM", 12),
        ("fc_vcpu 7", 7),
        ("crosvm_vcpu3", 3),
        ("vcpu2", 2),
        ("vcpu 2", 2),
        ("VCPU-2", 2),
        ("kvm-vcpu-11", 11),
        ("vcpu99999", -1),
        ("CPU 2/TCG", -1),
        ("CPU 2/KvM", -1),
        ("vcpu2x", -1),
        ("notvcpu2", -1),
        ("vhost-123", -1),
        ("CPU", -1),
    ],
)
def test_vcpus_in_names(comm: str, vcpu: int) -> None:
    assert (vcpu_in(comm), plain_records.vcpu_in(comm)) == (vcpu, vcpu)


# ------------------------------------------------------------------------------------------------------ room and tables


def test_tables_that_run_full_change_nothing() -> None:
    """More names and threads than the scanner's tables have room for: it asks again, and the numbers stay."""
    heads, names = block.HEAD_ENTRIES + 5, block.NAME_ENTRIES + 5
    lines = [f" t-{i % heads} [0] {i}.0: kvm_exit: reason R{i % names}" for i in range(max(heads, names) + 99)]
    words = Words()
    rows, bad = Scanner(words).scan("\n".join(lines).encode(), 1)
    assert not bad
    assert [words.threads[i].pid for i in rows["thread"]] == [i % heads for i in range(len(lines))]
    assert [words.names[i] for i in rows["name"]] == [f"R{i % names}" for i in range(len(lines))]
    assert (len(words.threads), len(words.names)) == (heads, names + 1)


def test_room_that_runs_full_loses_nothing() -> None:
    many = max(block.OUT_ROWS, block.BAD_ENTRIES) + 7
    lines = [b" t-1 [0] 1.0: x: y", b"bad"] * many if JIT else [b" t-1 [0] 1.0: x: y", b"bad"] * 300
    rows, bad = Scanner(Words()).scan(b"\n".join(lines), 5)
    assert rows["line"].tolist() == list(range(5, 5 + len(lines), 2))
    assert [number for number, _ in bad] == list(range(6, 6 + len(lines), 2))
    assert {line for _, line in bad} == {b"bad"}


def test_threads_without_end_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastexit.records.interning.MOST_THREADS", 10)
    path = tmp_path / "t"
    path.write_text("".join(f" t-{i} [0] {i}.0: kvm_entry: vcpu 0\n" for i in range(50)))
    found = read(path)
    assert one(found.blocks)["thread"].tolist() == [*range(10), *[-1] * 40]
    assert (len(found.threads), found.unreadable_count) == (10, 0)
    assert any("threads" in problem for problem in found.problems)


@pytest.mark.parametrize("text", [b"", b"x", b"x\n", b"\n\n", b" t-1 [0] 1.0: x: y\n\n", b"\r"])
def test_every_line_is_counted(text: bytes) -> None:
    scanner = Scanner(Words())
    scanner.scan(text, 5)
    assert scanner.line == 5 + text.count(b"\n") + 1


def test_names_without_end_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastexit.records.interning.MOST_NAMES", 10)
    path = tmp_path / "t"
    path.write_text("".join(f" t-1 [0] {i}.0: kvm_exit: reason R{i}\n" for i in range(50)))
    found = read(path)
    assert len(found.names) == 10
    assert one(found.blocks)["name"].tolist() == [*range(1, 10), *[-1] * 41]
    assert any("names" in problem for problem in found.problems)


_WALLS = """
import ctypes, mmap, sys
from random import Random
import numpy as np
from printed_records import printed
from fastexit.jit.declare import load
from fastexit.records import block
from fastexit.records.interning import Words
from fastexit.records.scan import Scanner

page = mmap.PAGESIZE
walls = mmap.mmap(-1, 4 * page)
begin = ctypes.addressof(ctypes.c_char.from_buffer(walls))
libc = ctypes.CDLL(None, use_errno=True)
for at in 0, 3:
    assert libc.mprotect(ctypes.c_void_p(begin + at * page), page, 0) == 0
inside = np.frombuffer(walls, np.uint8)[page : 3 * page]
class Walled(Scanner):
    def room(self, text):
        size = len(text) + block.PADDING
        return inside[len(inside) - size :]
r = Random(1)
scanner = Walled(Words())
done = 0
for _ in range(400):
    text = "\\n".join(printed(r)[0] for _ in range(3)).encode()
    for _ in range(8):
        cut = text[r.randrange(len(text)) :][: r.randrange(len(text))]
        rows, bad = scanner.scan(cut, 1)
        done += 1
print(done)
"""


@pytest.mark.skipif(not JIT, reason="interpreted kernels read bytes one by one, and slowly")
def test_nothing_is_read_beyond_the_text_and_its_padding() -> None:
    """The text's room lies between two pages that cannot be touched."""
    places = Path(__file__).parent, Path(fastexit.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-c", _WALLS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3200"), done.stderr[-2000:]


# --------------------------------------------------------------------------------------------------------- whole files


def trace(path: Path, *lines: str) -> Recording:
    path.write_text("".join(f"{line}\n" for line in lines))
    return read(path)


def test_the_bundled_trace(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with lzma.open(BUNDLED) as file:
        lines = list(islice(file, MANY))
    path.write_bytes(b"".join(lines))
    found, plain = read(path), plain_records.read_lines(lines)
    assert told(one(found.blocks), found.threads, found.names) == told(one(plain.blocks), plain.threads, plain.names)
    assert (found.unreadable_count, found.problems, found.lines) == (0, [], len(lines))
    assert [thread.comm for thread in found.threads] == [thread.comm for thread in plain.threads]


def test_lines_of_another_shape_stand_where_they_stood(tmp_path: Path) -> None:
    found = trace(
        tmp_path / "t",
        "# tracer: nop",
        " CPU 0/KVM-100 [001] d..1. 1.000001: kvm_entry: vcpu 0",
        "> CPU 0/KVM-100 [001] d..1. 1.000002: kvm_exit: reason HLT rip 0x1 info 0 0",
        "",
        "what a poster says",
        " CPU 0/KVM-100 [001] d..1. 1.000003: kvm_entry: vcpu 0",
    )
    rows = one(found.blocks)
    assert rows["line"].tolist() == [2, 3, 6]
    assert rows["event"].tolist() == [Event.ENTRY, Event.EXIT, Event.ENTRY]
    assert (found.lines, found.unreadable_count) == (6, 0)


def test_a_few_lines_of_another_shape_among_many(tmp_path: Path) -> None:
    lines = [f" CPU 0/KVM-100 [001] d..1. {i}.000000: kvm_entry: vcpu {i}" for i in range(1, 301)]
    for i in 40, 120, 200:
        lines[i] = f" CPU 0/KVM-100 [001] d..1. {i + 1}.000000: kvm_msr: write=1 ecx=0x{i + 1:x} data=0x1 exception=0"
    found = trace(tmp_path / "t", *lines)
    rows = one(found.blocks)
    assert rows["line"].tolist() == list(range(1, 301))
    assert rows["a"][[40, 120, 200]].tolist() == [41, 121, 201]
    assert (found.unreadable_count, found.problems) == (0, [])


def test_what_stays_unreadable_is_counted_and_shown(tmp_path: Path) -> None:
    bad = " CPU 0/KVM-100 [001] d..1. 1.000002: kvm_msr: msr_write 830 = \x1b[31m"
    found = trace(tmp_path / "t", " CPU 0/KVM-100 [001] d..1. 1.000001: kvm_entry: vcpu 0", bad, bad)
    assert found.unreadable_count == 2
    assert [line for line, _ in found.unreadable] == [2, 3]
    assert not any("\x1b" in text for _, text in found.unreadable)


def test_a_last_line_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(" a-1 [0] 1.000000: kvm_entry: vcpu 0\n a-1 [0] 2.000000: kvm_entry: vcpu 1")
    found = read(path)
    assert one(found.blocks)["vcpu"].tolist() == [0, 1]
    assert found.lines == 2


def test_time_that_runs_backwards_is_one_problem(tmp_path: Path) -> None:
    lines = [f" a-1 [0] {time}.000000: kvm_entry: vcpu 0" for time in (5, 6, 4, 7, 3)]
    found = trace(tmp_path / "t", *lines)
    (problem,) = found.problems
    assert problem.startswith(f"{tmp_path / 't'}:3: time goes back from 6.000000 to 4.000000")
    assert "(and 1 times more)" in problem
    assert one(found.blocks)["time"].tolist() == [t * 10**9 for t in (5, 6, 4, 7, 3)]


def test_what_an_excerpt_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    found = trace(tmp_path / "t", " kvm_entry: vcpu 3", " kvm_exit: vcpu 3 reason HLT rip 0x1 info 0 0")
    rows = one(found.blocks)
    assert (rows["time"].tolist(), rows["cpu"].tolist()) == ([NO_TIME] * 2, [-1] * 2)
    assert rows["vcpu"].tolist() == [3, 3]
    assert [(thread.pid, thread.comm) for thread in found.threads] == [(-1, "")]


def test_traces_one_behind_the_other_are_one_problem(tmp_path: Path) -> None:
    head = "# entries-in-buffer/entries-written: 1/9   #P:1"
    lines = [line for i in range(99) for line in (head, f" a-1 [0] {i}.000000: kvm_entry: vcpu 0")]
    found = trace(tmp_path / "t", *lines)
    (problem,) = found.problems
    assert ":3: a second trace begins here" in problem
    assert "(and 97 times more)" in problem
    assert len(found.notes) < 30


def test_blocks_can_be_gone_through_again(tmp_path: Path) -> None:
    count = 40_000 if JIT else 200
    found = trace(tmp_path / "t", *(f" a-1 [0] {i}.000000: kvm_entry: vcpu 0" for i in range(count)))
    first, second = one(found.blocks), one(found.blocks)
    assert first["line"].tolist() == list(range(1, count + 1)) == second["line"].tolist()
    assert max(len(block) for block in found.blocks) < 40_000


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(" a-1 [0] 1.000000: kvm_entry: vcpu 0\n" * 100)
    steps: list[int] = []
    read(path, steps.append)
    assert sum(steps) == path.stat().st_size


def test_reading_needs_nothing_of_the_machine() -> None:
    """Kernels of the machine take a minute to compile; a report of what was recorded does without."""
    code = (
        "import sys, fastexit.records, fastexit.answers.identity; "
        "print([m for m in sys.modules if m.startswith(('fastexit.machine', 'fastexit.kernels.', 'fastexit.kvm'))])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fastexit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() in ("[]", "['fastexit.kernels.typed']")  # the second is numbers
