"""32-bit protected mode on Unicorn's CPUs: gates of both sizes, inner stacks, segments with bases, every paging."""

from __future__ import annotations

import struct
from typing import Any

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

from unicorn import x86_const

import fastexit as fx
from fastexit.adapters.unicorn import GuestError, UnicornHost
from fastexit.adapters.unicorn.state import Segment
from unicorn_guest import STOP

CODE, HANDLER, USER, GDT, IDT, TASK, LDT = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x6800
ESP0, ESP3, BASE = 0x8000, 0x9000, 0x1_0000
INT_80, SPIN = b"\xcd\x80", b"\xeb\xfe"
CODE_0, DATA_0, DATA_3, CODE_3, TASK_32, CODE_16, BASED, CONFORMING, TASK_16, TABLE, OF_LDT = (
    *(0x08, 0x10, 0x1B, 0x23, 0x28, 0x30, 0x38, 0x40, 0x48, 0x50, 0x0C),
)
DESCRIPTORS = (
    0,
    0x00CF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
    0x0000_8900_0000_0067 | TASK << 16,
    0x0000_9B00_0000_FFFF,
    0x0000_9301_0000_FFFF,  # 16-bit stack at BASE
    0x00CF_9F00_0000_FFFF,
    0x0000_8100_0000_002B | TASK << 16,
    0x0000_8200_0000_000F | LDT << 16,
)
FLAT = {CODE_0: 0x00CF_9B00, DATA_0: 0x00CF_9300, DATA_3: 0x00CF_F300, CODE_3: 0x00CF_FB00}


def gate(selector: int = CODE_0, *, kind: int = 0xE, dpl: int = 3, handler: int = HANDLER) -> bytes:
    return struct.pack("<HHBBH", handler & 0xFFFF, selector, 0, 0x80 | dpl << 5 | kind, handler >> 16)


def start(
    ring: int, gates: dict[int, bytes], *, code: bytes = INT_80 + STOP, task: int = TASK_32, **more: Any
) -> UnicornHost:
    """A CPU in protected mode without paging, in that ring, about to run ``code``."""
    host = UnicornHost(fx.Machine(vcpus=1), memory=1 << 20)
    host.load(CODE, code)
    host.load(HANDLER, STOP)
    host.load(USER, SPIN)
    host.load(GDT, struct.pack(f"<{len(DESCRIPTORS)}Q", *DESCRIPTORS))
    host.load(IDT, b"".join(gates.get(vector, bytes(8)) for vector in range(256)))
    ss0, esp0 = more.get("ss0", DATA_0), more.get("esp0", ESP0)
    host.load(TASK, struct.pack("<III", 0, esp0, ss0) if task == TASK_32 else struct.pack("<HHH", 0, esp0, ss0))
    host.load(LDT, struct.pack("<2Q", 0, DESCRIPTORS[1]))
    cpu = host.cpus[0]
    cpu.start(CODE, rsp=ESP3 if ring else ESP0)
    cpu.write("CR0", 0x11)
    cpu.uc.msr_write(0xC000_0080, 0)
    cpu.write("CR4", 0)
    stack = more.get("stack", DATA_3 if ring else DATA_0)
    segments = {"CS": CODE_3 if ring else CODE_0, "DS": stack, "ES": stack}
    loaded = {name: Segment(selector, 0, 0xFFFF_FFFF, FLAT[selector]) for name, selector in segments.items()}
    task_type = 0x8B00 if task == TASK_32 else 0x8300
    loaded["SS"] = more.get("ss") or Segment(stack, 0, 0xFFFF_FFFF, FLAT[stack])
    cpu.load(ring, **loaded, TR=Segment(task, TASK, 0x67, task_type), LDTR=Segment(TABLE, LDT, 0xF, 0x8200))
    for name, base, limit in (("GDTR", GDT, 8 * len(DESCRIPTORS) - 1), ("IDTR", IDT, 0x7FF)):
        cpu.uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name}"), (0, base, limit, 0))
    return host


def at_handler(host: UnicornHost) -> tuple[int, int, int, int]:
    """Where it went: CS, SS, ESP, RIP's page."""
    host.run(instructions=50)
    cpu = host.cpus[0]
    return cpu["cs"], cpu["ss"], cpu["rsp"], cpu["rip"] & ~0xFFF


def words(host: UnicornHost, at: int, n: int, size: int = 4) -> tuple[int, ...]:
    return struct.unpack_from(f"<{n}{'I' if size == 4 else 'H'}", host.memory, at)


def test_gate_in_ring_0() -> None:
    host = start(0, {0x80: gate()})
    assert at_handler(host) == (CODE_0, DATA_0, ESP0 - 12, HANDLER)
    assert words(host, ESP0 - 12, 3) == (CODE + 2, CODE_0, 2)


def test_gate_from_ring_3() -> None:
    host = start(3, {0x80: gate()})
    assert at_handler(host) == (CODE_0, DATA_0, ESP0 - 20, HANDLER)
    assert words(host, ESP0 - 20, 5) == (CODE + 2, CODE_3, 2, ESP3, DATA_3)


def test_16_bit_gates() -> None:
    host = start(0, {0x80: gate(kind=6)})
    assert at_handler(host) == (CODE_0, DATA_0, ESP0 - 6, HANDLER)
    assert words(host, ESP0 - 6, 3, 2) == (CODE + 2, CODE_0, 2)
    host = start(3, {0x80: gate(kind=7)})
    assert at_handler(host) == (CODE_0, DATA_0, ESP0 - 10, HANDLER)
    assert words(host, ESP0 - 10, 5, 2) == (CODE + 2, CODE_3, 2, ESP3, DATA_3)


def test_16_bit_task_state() -> None:
    host = start(3, {0x80: gate()}, task=TASK_16)
    assert at_handler(host) == (CODE_0, DATA_0, ESP0 - 20, HANDLER)


def test_16_bit_code_segment() -> None:
    """Another segment of the same ring, whose code is of another size."""
    host = start(0, {0x80: gate(CODE_16)})
    host.load(HANDLER, b"\xb8\x34\x12" + STOP)  # mov ax, 0x1234
    assert at_handler(host) == (CODE_16, DATA_0, ESP0 - 12, HANDLER)
    assert host.cpus[0]["rax"] & 0xFFFF == 0x1234


def test_stacks_with_a_base() -> None:
    """One that a 16-bit segment has: SP wraps, the upper half of ESP stays."""
    based = Segment(BASED, BASE, 0xFFFF, DESCRIPTORS[BASED >> 3] >> 32)
    host = start(0, {0x80: gate()}, ss=based)
    host.cpus[0]["rsp"] = 0x5555_0100
    assert at_handler(host) == (CODE_0, BASED, 0x5555_00F4, HANDLER)
    assert words(host, BASE + 0xF4, 3) == (CODE + 2, CODE_0, 2)
    host = start(3, {0x80: gate()}, ss0=BASED, esp0=0x200)
    assert at_handler(host) == (CODE_0, BASED, 0x1EC, HANDLER)
    assert words(host, BASE + 0x1EC, 5) == (CODE + 2, CODE_3, 2, ESP3, DATA_3)


def test_conforming_code_stays_in_its_ring() -> None:
    host = start(3, {0x80: gate(CONFORMING, handler=USER)})
    assert at_handler(host) == (CONFORMING | 3, DATA_3, ESP3 - 12, USER)


def test_a_segment_of_the_ldt() -> None:
    assert at_handler(start(3, {0x80: gate(OF_LDT)})) == (OF_LDT, DATA_0, ESP0 - 20, HANDLER)


@pytest.mark.parametrize(
    ("gates", "more", "vector", "error"),
    [
        ({0x80: gate(dpl=0)}, {}, 13, 0x80 << 3 | 2),
        ({0x80: gate()}, {"ss0": 0}, 10, 0),
        ({0x80: gate()}, {"ss0": DATA_3}, 10, DATA_3 & ~3),
        ({0x80: gate()}, {"ss0": DATA_0 | 3}, 10, DATA_0),
        ({0x80: gate()}, {"ss0": CODE_0}, 10, CODE_0),
        ({0x80: gate()}, {"ss0": 0x100}, 10, 0x100),
        ({0x80: gate(0x100)}, {}, 13, 0x100),
        ({0x80: gate(DATA_0)}, {}, 13, DATA_0),
        ({0x80: gate(kind=5)}, {}, 13, 0x80 << 3 | 2),  # a task gate, which is not modelled
    ],
)
def test_faults_on_the_way_in(gates: dict[int, bytes], more: dict, vector: int, error: int) -> None:
    """INT n is begun again, so EXT is clear; the handler is ring 3's own, on its own stack."""
    own = gate(CODE_3, handler=USER)
    host = start(3, gates | {vector: own}, **more)
    assert at_handler(host) == (CODE_3, DATA_3, ESP3 - 16, USER)
    assert words(host, ESP3 - 16, 4) == (error, CODE, CODE_3, 0x1_0002)


def test_back_to_ring_3() -> None:
    host = start(3, {0x80: gate()}, code=INT_80 * 3 + b"\xb9\x07\x00\x00\x00" + SPIN)
    host.load(HANDLER, b"\xcf")  # iretd
    assert at_handler(host) == (CODE_3, DATA_3, ESP3, CODE)
    assert (host.cpus[0]["rcx"], host.cpus[0].counters.exceptions) == (7, {0x80: 3})


def test_sysenter() -> None:
    host = start(3, {}, code=b"\x0f\x34")
    for msr, value in ((0x174, CODE_0), (0x175, ESP0), (0x176, HANDLER)):
        host.cpus[0].uc.msr_write(msr, value)
    assert at_handler(host) == (CODE_0, DATA_0, ESP0, HANDLER)


def test_virtual_8086_mode_is_not_modelled() -> None:
    host = start(3, {0x80: gate()})
    host.cpus[0].write("EFLAGS", 1 << 17 | 3 << 12 | 2)
    with pytest.raises(GuestError, match="virtual-8086 mode"):
        host.run(instructions=50)


# -------------------------------------------------------------------------------------------------------------- paging

PAGES, SECOND, THIRD = 0x2_0000, 0x2_1000, 0x2_2000


@pytest.mark.parametrize("kind", ["4 KiB", "4 MiB", "PAE", "PAE, 2 MiB"])
@pytest.mark.parametrize("user", [False, True])
def test_tables_are_found_by_any_paging(kind: str, user: bool) -> None:
    """From ring 3 the CPU looks as the supervisor; accessed and dirty bits are set."""
    host = start(3, {0x80: gate()})
    rights = 7 if user else 3
    cpu = host.cpus[0]
    if kind == "4 KiB":
        host.load(PAGES, struct.pack("<I", SECOND | 7))
        host.load(SECOND, struct.pack("<256I", *(page << 12 | rights for page in range(256))))
    elif kind == "4 MiB":
        host.load(PAGES, struct.pack("<I", 0x87 if user else 0x83))
        cpu.write("CR4", 0x10)
    else:
        host.load(PAGES, struct.pack("<4Q", SECOND | 1, 0, 0, 0))
        large = struct.pack("<Q", 0x87 if user else 0x83)
        host.load(SECOND, large if "2 MiB" in kind else struct.pack("<Q", THIRD | 7))
        host.load(THIRD, struct.pack("<256Q", *(page << 12 | rights for page in range(256))))
        cpu.write("CR4", 0x20)
    if not user:  # the guest's own code has to be the user's all the same
        if kind in ("4 MiB", "PAE, 2 MiB"):
            pytest.skip("one page for all")
        size = 4 if kind == "4 KiB" else 8
        table = SECOND if kind == "4 KiB" else THIRD
        host.memory[table + size * (CODE >> 12)] |= 4
    cpu.write("CR3", PAGES)
    cpu.write("CR0", 0x8000_0011)
    assert at_handler(host) == (CODE_0, DATA_0, ESP0 - 20, HANDLER)
    assert words(host, ESP0 - 20, 5) == (CODE + 2, CODE_3, 2, ESP3, DATA_3)
    if kind in ("4 KiB", "PAE"):
        table, size = (SECOND, 4) if kind == "4 KiB" else (THIRD, 8)
        pages = [host.memory[table + size * (at >> 12)] >> 5 & 3 for at in (GDT, IDT, TASK, ESP0 - 4, ESP3)]
        assert pages == [1, 1, 1, 3, 0]
