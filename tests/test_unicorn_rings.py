"""Ring 3 on Unicorn's CPUs: interrupts, faults with their error codes, system calls, and the way back."""

from __future__ import annotations

import struct
from typing import Any

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

import unicorn_rings as G
from fastexit.adapters.unicorn import Ended
from unicorn_guest import NOP, PAUSE, STOP, word, wrmsr
from unicorn_rings import SYSCALL, Seen, rings, seen

MACHINES = [{}, {"apicv": False}, {"vendor": "svm"}, {"dispatcher": "compiled"}]
IF, RF = 1 << 9, 1 << 16
SPIN = PAUSE + b"\xeb\xfc"


def only(host: Any, instructions: int = 20_000) -> Seen:
    """The one thing that a handler saw, in a run that ends by SYSCALL."""
    assert host.run(instructions=instructions) is Ended.IDLE
    cpu = host.cpus[0]
    assert cpu["rip"] & ~0xFFF == G.DONE
    assert (cpu["cs"], cpu["ss"], cpu["rsp"]) == (G.KERNEL_CODE, G.KERNEL_DATA, G.USER_STACK)
    (what,) = seen(host)
    return what


def loop(n: int) -> bytes:
    """mov ecx, n; dec ecx; jnz."""
    return b"\xb9" + word(n) + b"\xff\xc9\x75\xfc"


# ---------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_a_timer_interrupts_ring_3(machine: dict) -> None:
    timer = wrmsr(0x832, 0x40040) + wrmsr(0x6E0, 3_000)
    host = rings(loop(5_000) + SYSCALL, kernel=timer, **machine)
    what = only(host, 50_000)
    assert (what.vector, what.cs, what.ss, what.rsp) == (0x40, G.USER_CODE, G.USER_DATA, G.USER_STACK)
    assert G.USER < what.rip < G.USER + 10
    assert what.rflags & IF
    assert what.own_rsp == G.RSP0
    assert host.cpus[0].counters.taken == {0x40: 1}
    assert host.machine.vcpus[0].pending() is None


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("nmi", [False, True])
def test_an_ipi_reaches_ring_3(machine: dict, nmi: bool) -> None:
    """From another CPU's ring 0; ring 3 polls until its handler has said so."""
    poll = b"\x80\x3c\x25" + word(G.LOG_AT) + bytes((72,)) + b"\x75\xf6"  # cmp byte [LOG_AT], 72; jne
    host = rings(poll + SYSCALL, loop(300) + wrmsr(0x830, 0x4400 if nmi else 0x55) + STOP, **machine)
    page = struct.pack("<Q", 5)
    host.load(G.PT, page)
    what = only(host)
    assert (what.vector, what.cs, what.ss, what.rsp) == (2 if nmi else 0x55, G.USER_CODE, G.USER_DATA, G.USER_STACK)


def test_interrupts_come_again_and_again() -> None:
    """A periodic timer; every frame is on the same stack, and no register of ring 3 is lost."""
    timer = wrmsr(0x832, 0x20041) + wrmsr(0x83E, 0xB) + wrmsr(0x838, 200_000)
    host = rings(b"\xbb\x78\x56\x34\x12" + loop(500_000) + SYSCALL, kernel=timer)
    host.run(lambda host: host.cpus[0].asleep, instructions=2_000_000)
    found = seen(host)
    assert len(found) >= 5
    assert {(what.vector, what.cs, what.own_rsp) for what in found} == {(0x41, G.USER_CODE, G.RSP0)}
    assert host.cpus[0]["rbx"] == 0x1234_5678


def test_an_interrupt_on_a_stack_of_its_own() -> None:
    timer = wrmsr(0x832, 0x40040) + wrmsr(0x6E0, 3_000)
    host = rings(loop(5_000) + SYSCALL, kernel=timer)
    host.memory[G.IDT + 16 * 0x40 + 4] = 1
    assert only(host, 50_000).own_rsp == G.IST1


# ------------------------------------------------------------------------------------------------------- page faults

PRESENT, WRITE, USER, FETCH = 1, 2, 4, 16


def load(page: int) -> bytes:
    return b"\x8b\x04\x25" + word(page + 8)


def store(page: int) -> bytes:
    return b"\xc7\x04\x25" + word(page + 8) + word(7)


def call(page: int) -> bytes:
    return b"\xb8" + word(page + 8) + b"\xff\xd0"  # mov eax; call rax


@pytest.mark.parametrize(
    ("access", "page", "error"),
    [
        (load, G.GONE, USER),
        (store, G.GONE, USER | WRITE),
        (call, G.GONE, USER | FETCH),
        (load, G.SUPERVISOR, USER | PRESENT),
        (store, G.SUPERVISOR, USER | PRESENT | WRITE),
        (store, G.READ_ONLY, USER | PRESENT | WRITE),
        (call, G.NO_EXECUTE, USER | PRESENT | FETCH),
    ],
)
@pytest.mark.parametrize("machine", MACHINES[:2], ids=str)
def test_page_faults_of_ring_3_are_repaired(access: Any, page: int, error: int, machine: dict) -> None:
    """The handler maps the page and returns; the instruction is carried out then."""
    code = access(page) + b"\x89\xc3" + SYSCALL  # mov ebx, eax
    host = rings(code, **machine)
    host.load(page + 8, b"\xc3\x11\x22\x33")  # ret
    what = only(host)
    at = page + 8 if access is call else G.USER
    assert what == Seen(14, error, at, G.USER_CODE, IF | RF | 2, what.rsp, G.USER_DATA, page + 8, G.RSP0)
    assert what.rsp == G.USER_STACK - (8 if access is call else 0)
    if access is load:
        assert host.cpus[0]["rbx"] == 0x3322_11C3
    if access is store:
        assert host.memory[page + 8] == 7


def test_ring_0_has_error_codes_without_user() -> None:
    host = rings(SYSCALL, kernel=load(G.GONE))
    what = only(host)
    assert (what.vector, what.error, what.cr2, what.cs, what.ss) == (14, 0, G.GONE + 8, 8, 0x10)


def test_many_faults_in_a_row() -> None:
    """Each by itself: none is taken for a double fault of the one before."""
    codes = [store(G.GONE), b"\x0f\x20\xd8" + NOP * 8, load(G.SUPERVISOR), b"\xfa" + NOP * 10, store(G.READ_ONLY)]
    codes += [b"\x31\xc9\xf7\xf1" + NOP * 7, b"\x66\xb8\x9c\x06\x8e\xd8" + NOP * 5]
    host = rings(b"".join(codes) + SYSCALL, skip=3)
    assert host.run(instructions=20_000) is Ended.IDLE
    assert [(what.vector, what.error) for what in seen(host)] == [
        (14, 6),
        (13, 0),
        (14, 5),
        (13, 0),
        (14, 7),
        (0, 0),
        (13, 0x69C),
    ]
    assert host.cpus[0].counters.exceptions == {14: 3, 13: 3, 0: 1}


# --------------------------------------------------------------------------------------------------- protection faults


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (b"\xfa", 0),  # cli
        (b"\xfb", 0),  # sti
        (b"\xf4", 0),  # hlt
        (b"\xec", 0),  # in al, dx
        (b"\xee", 0),  # out dx, al
        (b"\x0f\x20\xc0", 0),  # mov rax, cr0
        (b"\x44\x0f\x22\xc0", 0),  # mov cr8, rax
        (b"\x44\x0f\x20\xc0", 0),
        (b"\x0f\x30", 0),  # wrmsr
        (b"\x0f\x32", 0),
        (b"\x0f\x01\x38", 0),  # invlpg
        (b"\x0f\x00\xd8", 0),  # ltr
        (b"\xcd\x40", 0x40 << 3 | 2),  # int 0x40, whose gate is ring 0's
        (b"\xcd\x0e", 14 << 3 | 2),
        (b"\x8e\xd8", 0x10),  # mov ds, ax: ring 0's data
        (b"\x8e\xd0", 0x10),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else str(value),
)
@pytest.mark.parametrize("machine", MACHINES[::2], ids=str)
def test_ring_3_may_not(code: bytes, error: int, machine: dict) -> None:
    host = rings(b"\xb8\x10\x00\x00\x00" + code + SYSCALL, skip=len(code), **machine)
    what = only(host)
    assert what == Seen(13, error, G.USER + 5, G.USER_CODE, IF | RF | 2, G.USER_STACK, G.USER_DATA, 0, G.RSP0)
    assert host.cpus[0].counters.ipis == 0


@pytest.mark.parametrize(
    ("code", "port", "size"),
    [
        (b"\xe4\x21", 0x21, 1),  # in al, 0x21
        (b"\xe5\x60", 0x60, 4),
        (b"\xec", 0x3F8, 1),  # in al, dx
        (b"\x66\xed", 0x3FF, 2),
        (b"\xed", 0x3FE, 4),
        (b"\xee", 0x3F8, 1),  # out dx, al
        (b"\x66\xef", 0x3FF, 2),
        (b"\x6e", 0x3F8, 1),  # outsb
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else f"{value:#x}",
)
def test_ports_of_ring_3_as_iopl_and_the_io_map_say(code: bytes, port: int, size: int) -> None:
    """The map is behind the task state; one bit that is set among the access's is enough."""
    set_up = b"\xba" + word(port) + b"\xbe" + word(G.SPARE)  # mov edx, port; mov esi, ...
    for wrong in (None, *range(port, port + size)):
        host = rings(set_up + code + SYSCALL, skip=len(code))
        host.load(G.GDT + 0x30, struct.pack("<H", 0x67 + 0x90))
        bits = 0 if wrong is None else 1 << wrong
        host.load(G.TASK + 0x68, bits.to_bytes(0x90, "little"))
        if wrong is None:
            assert host.run(instructions=1_000) is Ended.IDLE
            assert seen(host) == []
            assert host.cpus[0].counters.devices == 1
        else:
            what = only(host)
            assert (what.vector, what.error, what.rip) == (13, 0, G.USER + 10)
    host = rings(set_up + code + SYSCALL, kernel=b"", skip=len(code))
    start = G.BOOT + len(G.boot()) + 11
    assert host.memory[start : start + 4] == word(0x202)
    host.memory[start + 1] = 0x32  # IOPL 3
    assert host.run(instructions=1_000) is Ended.IDLE
    assert seen(host) == []


def test_rdtsc_as_cr4_says() -> None:
    tsd = b"\x0f\x20\xe0\x48\x83\xc8\x04\x0f\x22\xe0"  # mov rax, cr4; or rax, 4; mov cr4, rax
    assert only(rings(b"\x0f\x31" + SYSCALL, kernel=tsd, skip=2)).vector == 13
    host = rings(b"\x0f\x31" + SYSCALL, kernel=b"")
    assert host.run(instructions=1_000) is Ended.IDLE
    assert seen(host) == []


@pytest.mark.parametrize(
    ("attributes", "vector"),
    [(0x00CF_7300_0000_FFFF, 11), (0x00CF_F900_0000_FFFF, 13)],
    ids=["not present", "code that may not be read"],
)
def test_segments_that_are_no_good(attributes: int, vector: int) -> None:
    host = rings(b"\xb8\x2b\x00\x00\x00\x8e\xd8" + SYSCALL, skip=2)
    host.load(G.GDT + 0x28, struct.pack("<Q", attributes))
    what = only(host)
    assert (what.vector, what.error) == (vector, 0x28)


def test_divide_error_and_undefined_instruction() -> None:
    host = rings(b"\x31\xc9" + b"\xf7\xf1" + b"\x0f\x0b" + SYSCALL, skip=2)
    assert host.run(instructions=20_000) is Ended.IDLE
    assert [(what.vector, what.error, what.rip) for what in seen(host)] == [(0, 0, G.USER + 2), (6, 0, G.USER + 4)]


# --------------------------------------------------------------------------------------------------------- system calls


def test_int_80() -> None:
    """A gate that ring 3 may use; RIP is behind the INT."""
    what = only(rings(b"\xcd\x80" + SYSCALL))
    assert what == Seen(0x80, 0, G.USER + 2, G.USER_CODE, IF | 2, G.USER_STACK, G.USER_DATA, 0, G.RSP0)


def test_syscall_and_sysret() -> None:
    """RCX and R11 have what comes back; FMASK closes the interrupt window until then, where an IPI waits."""
    # mov r8, rcx; an IPI to itself; mov rcx, r8; sysretq
    save = b"\x49\x89\xc8" + wrmsr(0x83F, 0x61) + b"\x4c\x89\xc1\x48\x0f\x07"
    host = rings(SYSCALL + b"\xbb\x05\x00\x00\x00" + loop(50) + SPIN)
    host.load(G.DONE, save)
    host.run(lambda host: seen(host) != [], instructions=20_000)
    (what,) = seen(host)
    assert (what.vector, what.rip, what.rsp) == (0x61, G.USER + 2, G.USER_STACK)
    assert (what.cs, what.ss) == (G.USER_CODE, G.USER_DATA)
    host.run(instructions=1_000)
    assert host.cpus[0]["rbx"] == 5
    assert (host.cpus[0]["cs"], host.cpus[0]["ss"]) == (G.USER_CODE, G.USER_DATA)


def test_syscall_is_undefined_without_efer_sce() -> None:
    host = rings(SYSCALL + b"\xcd\x80" + SPIN, kernel=wrmsr(G.EFER, 0xD00), skip=2)
    host.run(lambda host: len(seen(host)) == 2, instructions=20_000)
    assert [(what.vector, what.rip) for what in seen(host)] == [(6, G.USER), (0x80, G.USER + 4)]


def test_sysenter_and_sysexit() -> None:
    msrs = wrmsr(0x174, G.KERNEL_CODE) + wrmsr(0x175, G.RSP0) + wrmsr(0x176, G.DONE)
    host = rings(b"\x0f\x34" + SPIN, kernel=msrs)
    stays = b"\xbb\x09\x00\x00\x00" + STOP
    host.load(G.DONE, stays)
    assert host.run(instructions=20_000) is Ended.IDLE
    cpu = host.cpus[0]
    assert (cpu["rbx"], cpu["cs"], cpu["ss"], cpu["rsp"]) == (9, G.KERNEL_CODE, G.KERNEL_DATA, G.RSP0)
    back = b"\x48\xc7\xc2" + word(G.USER + 2) + b"\x48\xc7\xc1" + word(G.USER_STACK) + b"\x48\x0f\x35"  # sysexitq
    host = rings(b"\x0f\x34" + b"\xbb\x09\x00\x00\x00" + SPIN, kernel=msrs)
    host.load(G.DONE, back)
    host.run(instructions=20_000)
    cpu = host.cpus[0]
    assert (cpu["rbx"], cpu["cs"] & 3, cpu["ss"] & 3, cpu["rsp"]) == (9, 3, 3, G.USER_STACK)
    host = rings(b"\x0f\x34" + SYSCALL, skip=2)
    assert only(host).vector == 13


# ------------------------------------------------------------------------------------------------- faults on the way in


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("no RSP0", (8, 0)),  # not canonical: #SS while an exception of page or protection is delivered
        ("RSP0 gone", (8, 0)),
        ("short task state", (8, 0)),
    ],
)
def test_a_fault_that_cannot_be_delivered_is_a_double_fault(spoil: str, expected: tuple[int, int]) -> None:
    host = rings(store(G.GONE) + SYSCALL)
    host.memory[G.IDT + 16 * 8 + 4] = 1  # on a stack of its own
    if spoil == "no RSP0":
        host.load(G.TASK + 4, struct.pack("<Q", 1 << 63))
    elif spoil == "RSP0 gone":
        host.load(G.TASK + 4, struct.pack("<Q", G.GONE + 0x800))
    else:
        host.load(G.GDT + 0x30, struct.pack("<H", 8))
        host.memory[G.IDT + 16 * 8 + 4] = 0
        with pytest.raises(RuntimeError, match="triple fault, vector 0xe"):
            host.run(instructions=20_000)
        return
    host.run(lambda host: seen(host) != [], instructions=20_000)
    what = seen(host)[0]
    assert (what.vector, what.error, what.cs, what.own_rsp) == (*expected, G.USER_CODE, G.IST1)


def test_an_interrupt_whose_stack_is_gone_is_a_page_fault() -> None:
    """Error code: a write of the supervisor's, whatever ring was interrupted."""
    timer = wrmsr(0x832, 0x40040) + wrmsr(0x6E0, 3_000)
    host = rings(loop(5_000) + SYSCALL, kernel=timer)
    host.memory[G.IDT + 16 * 14 + 4] = 1
    host.load(G.TASK + 4, struct.pack("<Q", G.GONE + 0x800))
    host.run(lambda host: seen(host) != [], instructions=50_000)
    what = seen(host)[0]
    assert (what.vector, what.error, what.cr2) == (14, 2, G.GONE + 0x800 - 40)
