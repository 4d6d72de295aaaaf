"""The guest of a Windows-like machine: 64-bit code at CPL 0, its memory, and the programs that its vCPUs run.

Models: nothing; this is real code on the real KVM. KVM's hypercalls want protected mode, so there are page tables
(4 GiB one to one), descriptor tables and handlers that tell their vector by an OUT. No program begins with its OUT: KVM
skips an OUT that RIP is still at.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from fastexit import regs as R
from fastexit.kvm import ioctl as K
from fastexit.kvm.lab.device import LabDevice
from fastexit.kvm.lab.wire import Ask, Record
from fastexit.reasons import KvmExit

GDT_AT, IDT_AT, PML4_AT, PDPT_AT, HANDLERS_AT, COMMON_AT, STACK_AT, PROGRAMS_AT, XMM_AT, TSC_PAGE = (
    0x1000,
    0x2000,
    0x3000,
    0x4000,
    0x5000,
    0x6000,
    0x7F00,
    0x8000,
    0x9000,
    0xA000,
)
DATA_AT, DATA_BYTES = 0x10000, 0x8000
"""The part of the guest's memory that KVM is asked to read and write, and that is compared."""
MEMORY_BYTES = DATA_AT + DATA_BYTES
"""Behind it there is no memory: an address from here on is one that KVM cannot read."""
CS64, DATA, CS32 = 0x08, 0x10, 0x18
PORT_DONE, PORT_INTERRUPT = 0x10, 0x12
VECTOR_NMI, VECTOR_UD, VECTOR_GP = 2, 6, 13
HALT_NS = 5_000_000
RUN_NS = 2_000_000_000
"""How long a program may take by the machine's clock, which counts instructions."""

_OUT = bytes((0xE6, PORT_DONE))
_TEST_CLEAR = bytes.fromhex("f0410fba3700 410f92c6")  # lock btr dword [r15], 0; setc r14b
_XMM = b"".join(bytes((0xF3, 0x41, 0x0F, 0x6F, 0x43 | n << 3, 16 * n)) for n in range(6))  # movdqu xmmN, [r11 + 16N]
_VMMCALL = bytes.fromhex("0f01d9")
PROGRAMS: dict[str, bytes] = {
    "nothing": b"\x90" + _OUT,
    "wrmsr": b"\x0f\x30" + _OUT,
    "rdmsr": b"\x0f\x32" + _OUT,
    "halt": b"\xf4" + _OUT,
    "store": b"\x89\x07" + _OUT,
    "load": b"\x8b\x07" + _OUT,
    "test_clear": _TEST_CLEAR + _OUT,
    "window": b"\xfb\x90\x90" + _OUT,
    "hypercall": _XMM + _VMMCALL + _OUT,
    "touch": bytes.fromhex("f0800700 4881c700100000 ffc9 75f1") + _XMM + _OUT,
}
"""By name; "touch" writes RCX pages from RDI on, so that none of them is missing later."""
PROGRAM_BYTES = 64
AT: dict[str, int] = {name: PROGRAMS_AT + PROGRAM_BYTES * n for n, name in enumerate(PROGRAMS)}
AT["hypercall32"] = PROGRAMS_AT + PROGRAM_BYTES * len(PROGRAMS)

_REGS = tuple("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split())
_PROGRAM = struct.Struct("<II18QQQ")
_CAME = struct.Struct("<iIIIII18Q")
_EXIT = struct.Struct("<II4Q")


class Came(NamedTuple):
    """What a program came to: a vector whose handler ran or None, registers, exits to user space on the way.

    ``ticked``: the kernel's own tick came meanwhile, an exit that the model knows nothing of.
    """

    late: bool
    ticked: bool
    vector: int | None
    regs: dict[str, int]
    exits: tuple[tuple[int, ...], ...]


def image() -> bytes:
    """Memory below the data: tables, handlers, programs."""
    memory = bytearray(DATA_AT)

    def put(at: int, data: bytes) -> None:
        memory[at : at + len(data)] = data

    put(GDT_AT, struct.pack("<4Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_9B00_0000_FFFF))
    put(PML4_AT, struct.pack("<Q", PDPT_AT | 0x63))
    put(PDPT_AT, b"".join(struct.pack("<Q", n << 30 | 0xE3) for n in range(4)))
    for vector in range(256):
        handler = HANDLERS_AT + 16 * vector
        put(IDT_AT + 16 * vector, struct.pack("<HHBBHII", handler, CS64, 0, 0x8E, 0, 0, 0))
        put(handler, bytes((0xB0, vector, 0xE9)) + struct.pack("<i", COMMON_AT - handler - 7))
    skip = bytes((0x4D, 0x85, 0xFF, 0x74, len(_TEST_CLEAR)))  # test r15, r15; jz
    put(COMMON_AT, skip + _TEST_CLEAR + bytes((0xE6, PORT_INTERRUPT)))
    for name, code in PROGRAMS.items():
        put(AT[name], code)
    at = AT["hypercall32"]
    there = at + len(_XMM) + 9
    back = there + 10
    # push CS32; push there; retfq; in 32-bit code: vmmcall; ljmp back
    put(at, _XMM + b"\x6a" + bytes((CS32,)) + b"\x68" + struct.pack("<I", there) + b"\x48\xcb")
    put(there, _VMMCALL + b"\xea" + struct.pack("<IH", back, CS64) + _OUT)
    return bytes(memory)


def long_mode(sregs: Any) -> None:
    """Segments, tables and control registers of 64-bit code."""
    for number, segment in enumerate(sregs.segments):
        segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, DATA
        segment.type, segment.present, segment.s, segment.g = 0x3, 1, 1, 1
        segment.dpl, segment.db, segment.l, segment.avl, segment.unusable = 0, 1, 0, 0, 0
        if number == 0:
            segment.selector, segment.type, segment.db, segment.l = CS64, 0xB, 0, 1
    sregs.gdt.base, sregs.gdt.limit = GDT_AT, 31
    sregs.idt.base, sregs.idt.limit = IDT_AT, 0xFFF
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0031, PML4_AT, 0x620, 0x500


class WindowsGuest:
    """A VM's memory and what runs programs on its vCPUs, each as a record of a batch."""

    def __init__(self, device: LabDevice, vm: int, vcpus: list[int], run_bytes: int) -> None:
        self._device = device
        self.memory: int = device.take_memory()
        self.slots: list[int] = []
        self._sregs: list[bytes] = []
        device.ask((Ask.MEMORY, 0, struct.pack("<III", vm, self.memory, MEMORY_BYTES)), self.store(0, image()))
        for fd in vcpus:
            self.slots.append(device.take_guest())
            device.ask((Ask.GUEST, 0, struct.pack("<III", fd, self.slots[-1], run_bytes)))
            sregs = K.ffi.new("struct kvm_sregs *")
            device.call(fd, K.GET_SREGS, sregs)
            long_mode(sregs)
            device.call(fd, K.SET_SREGS, sregs)
            self._sregs.append(bytes(K.ffi.buffer(sregs)))

    def close(self) -> None:
        """Gives memory and run areas back."""
        for slot in self.slots:
            self._device.give_guest(slot)
        self._device.give_memory(self.memory)

    def store(self, at: int, data: bytes) -> Record:
        """Writes the guest's memory."""
        return (Ask.STORE, 0, struct.pack("<IIII", self.memory, at, len(data), 0) + data)

    def touch(self, i: int) -> Record:
        """Lets the guest write each of its pages."""
        return self.program(i, "touch", rdi=0, rcx=MEMORY_BYTES // 4096, r11=XMM_AT)

    def ready(self, i: int) -> Record:
        """Lets a vCPU run programs again that an INIT or an NMI has taken away from them."""
        return (Ask.MAKE_READY, 0, struct.pack("<II", self.slots[i], 0) + self._sregs[i])

    def program(
        self, i: int, name: str, *, interrupts: bool = False, ns: int = RUN_NS, answer: int = 0, **registers: int
    ) -> Record:
        """One program; ``answer`` is what user space says to whatever it is asked on the way."""
        flags = R.RFLAGS_FIXED | R.RFLAGS_IF * interrupts
        regs = {"rsp": STACK_AT, "rip": AT[name], "rflags": flags} | registers
        values = [regs.get(register, 0) for register in _REGS]
        return (Ask.PROGRAM, 0, _PROGRAM.pack(self.slots[i], 0, *values, ns, answer))


def came(data: bytes) -> Came:
    """What a program's answer says; ChildProcessError for an exit that no program makes."""
    result, late, reason, port, exits, ticked, *values = _CAME.unpack_from(data)
    regs = dict(zip(_REGS, values, strict=True))
    if result < 0 and not late:
        raise ChildProcessError(f"KVM_RUN said {result}")
    if not late and reason != KvmExit.IO:
        raise ChildProcessError(f"the guest stopped with KVM_EXIT {reason} at {regs['rip']:#x}")
    told = tuple(_EXIT.unpack_from(data, _CAME.size + n * _EXIT.size) for n in range(exits))
    vector = regs["rax"] & 0xFF if not late and port == PORT_INTERRUPT else None
    return Came(bool(late), bool(ticked), vector, regs, told)
