"""The code of the VMX lab's guests: memory of a VM, and for each vCPU one step after the other.

Models: nothing; this runs on the real KVM. Protected mode, flat, 32 bits. A word of memory is the baton: a step waits
for its number, does one thing, lets the effects of that settle, and passes it on, so vCPUs really run at once and take
turns all the same. Handlers note which step an interrupt came in, and end it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastexit import regs as R
from fastexit.kvm.lab.vmxsteps import VMXON_AT, VMXON_POINTER_AT, Step

MEMORY_BYTES = 1 << 20
STUB_BYTES = 16
GDT_AT, IDT_AT, STUBS_AT, HANDLER_AT, FAULT_AT = 0x1000, 0x2000, 0x3000, 0x4000, 0x4100
GDTR_AT, IDTR_AT = 0x1018, 0x1020
STARTUP_AT, FLAT_OFFSET = 0x5000, 0x80
"""One page a vCPU, for SIPI: real mode, and behind it the code in protected mode."""
BATON_AT = 0x8000
AREA_AT, AREA_BYTES = 0x9000, 0x1000
STACK_AT = 0xE000
PAGES_AT = 0x12000
"""A page directory, for vCPUs that have paging: 4 MiB pages, each at its own address."""
SMM_AT = 0x38000
CODE_AT, CODE_BYTES = 0x40000, 0x8000
TOUCHED = ((0, 0x14000), (SMM_AT, CODE_AT + 4 * CODE_BYTES))
"""Everything above, for four vCPUs."""
APIC_PAGE = R.APIC_DEFAULT_PHYS_BASE

SLOWER = 3
"""So many times as long each step takes with INIT, SIPI and SMI."""
OPEN = 2
"""The vCPU that shares the host's processor never has interrupts off."""
LOG, EOI_MODE, RESUME, FLAG, STARTED, RESTART = 0, 4, 8, 12, 16, 20
"""Words of a vCPU's area: where the next note goes, how interrupts end, where a fault goes on, what faulted, that it
began anew, where it goes on then."""
RESTART_BYTES = 7
NOTES, RESULTS, RESULT_BYTES = 0x100, 0x800, 16
NO_EOI, X2APIC_EOI, XAPIC_EOI = range(3)
FAULTED_GP, FAULTED_UD = 1, 2
PORT_READY, PORT_DONE, PORT_HOST = 0x30, 0x31, 0x32
MSR_VMX_BASIC = 0x480
STI, CLI, HLT, RDMSR, WRMSR, RDTSC = b"\xfb", b"\xfa", b"\xf4", b"\x0f\x32", b"\x0f\x30", b"\x0f\x31"


def u32(value: int) -> bytes:
    """Four bytes."""
    return struct.pack("<I", value & 0xFFFF_FFFF)


def area(vcpu: int) -> int:
    """Where a vCPU's own words are."""
    return AREA_AT + vcpu * AREA_BYTES


def out(port: int) -> bytes:
    """OUT of AL."""
    return bytes((0xE6, port))


def done() -> bytes:
    """The end of a program, over and over: one that is let run again must not stay where no interrupt gets in."""
    return out(PORT_DONE) + b"\xeb\xfc"


def set_word(address: int, value: int) -> bytes:
    """MOV of a constant to memory."""
    return b"\xc7\x05" + u32(address) + u32(value)


def settle(count: int) -> bytes:
    """As many turns of a loop."""
    return b"\xb9" + u32(count) + b"\x49\x75\xfd" if count else b""


def wait_for(number: int) -> bytes:
    """Spins until the baton has a number; where it has NOBODY the program is over."""
    end = done()
    mine = b"\x81\x3d" + u32(BATON_AT) + u32(number)
    over = b"\x83\x3d" + u32(BATON_AT) + b"\xff"
    back = len(mine) + 2 + len(over) + 2
    skipped = len(over) + 2 + len(end)
    return mine + b"\x74" + bytes((skipped,)) + over + b"\x75" + struct.pack("<b", -back) + end


@dataclass
class Image:
    """Pieces of a VM's memory, by address."""

    pieces: dict[int, bytes] = field(default_factory=dict)

    def put(self, address: int, data: bytes) -> None:
        """One piece; what is longer than its place is a fault of whoever makes it."""
        self.pieces[address] = data


def startup_vector(vcpu: int) -> int:
    """The vector of a SIPI that lets a vCPU begin where its own code is."""
    return STARTUP_AT + 0x1000 * vcpu >> 12


def stack(vcpu: int) -> int:
    """Where a vCPU's stack begins."""
    return STACK_AT + 0x1000 * (vcpu + 1) - 16


def common(vcpus: int, eoi_mode: int) -> Image:
    """Tables and handlers, which all vCPUs share, and each one's words."""
    image = Image()
    image.put(GDT_AT, struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
    idt, stubs = bytearray(), bytearray()
    for vector in range(256):
        at = STUBS_AT + STUB_BYTES * vector
        idt += struct.pack("<HHHH", at & 0xFFFF, 8, 0x8E00, at >> 16)
        fault = vector in (R.VECTOR_GP, R.VECTOR_UD)
        code = (b"\x6a\x00" if vector == R.VECTOR_UD else b"") + b"\x68" + u32(vector) + b"\xe9"
        stubs += (code + u32((FAULT_AT if fault else HANDLER_AT) - at - len(code) - 4)).ljust(STUB_BYTES, b"\x90")
    image.put(IDT_AT, bytes(idt))
    image.put(STUBS_AT, bytes(stubs))
    image.put(HANDLER_AT, _handler())
    image.put(FAULT_AT, _fault())
    image.put(SMM_AT, b"\x0f\xaa")
    image.put(BATON_AT, u32(0))
    for i in range(vcpus):
        image.put(area(i), u32(area(i) + NOTES) + u32(eoi_mode) + bytes(12))
        # real mode: [STARTED] = 1, and wait; interrupts stay off
        started = b"\x67\x66\xc7\x05" + u32(area(i) + STARTED) + u32(1) + b"\xeb\xfe"
        image.put(STARTUP_AT + 0x1000 * i, b"\x31\xc0\x8e\xd8" + started)
    return image


def beginnings(image: Image, vcpus: int) -> None:
    """Adds what a vCPU does that begins anew: to protected mode, and on with its next step."""
    image.put(GDTR_AT, struct.pack("<HI", 23, GDT_AT))
    image.put(IDTR_AT, struct.pack("<HI", 0x7FF, IDT_AT))
    for i in range(vcpus):
        at = STARTUP_AT + 0x1000 * i
        real = b"\x31\xc0\x8e\xd8"  # ds = 0
        real += b"\x66\x0f\x01\x16" + struct.pack("<H", GDTR_AT) + b"\x66\x0f\x01\x1e" + struct.pack("<H", IDTR_AT)
        real += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # CR0.PE
        real += b"\x66\xea" + struct.pack("<IH", at + FLAT_OFFSET, 8)
        flat = b"\x66\xb8\x10\x00" + b"".join(b"\x8e" + bytes([0xC0 | n << 3]) for n in (0, 2, 3, 4, 5))
        flat += b"\xbc" + u32(stack(i)) + b"\xbd" + u32(area(i)) + (STI if i == OPEN else b"")
        image.put(at, real.ljust(FLAT_OFFSET, b"\x90") + flat + bytes((0xFF, 0x65, RESTART)))


def paging(image: Image) -> None:
    """Adds a page directory that maps each address to itself, and VMXON's operand."""
    image.put(PAGES_AT, b"".join(u32(n << 22 | 0x83) for n in range(1024)))
    image.put(VMXON_POINTER_AT, struct.pack("<Q", VMXON_AT))


def _handler() -> bytes:
    """Notes baton << 8 | vector, ends the interrupt, and returns."""
    code = b"\x50\x51\x52\x8b\x44\x24\x0c\x8b\x0d" + u32(BATON_AT) + b"\xc1\xe1\x08\x09\xc8"
    code += b"\x8b\x55\x00\x89\x02\x83\x45\x00\x04"
    end = b"\x5a\x59\x58\x83\xc4\x04\xcf"
    xapic = b"\xc7\x05" + u32(APIC_PAGE + R.APIC_EOI) + u32(0)
    x2apic = b"\xb9" + u32(R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4)) + b"\x31\xc0\x31\xd2" + WRMSR
    x2apic += b"\xeb" + bytes((len(xapic),))
    ways = b"\x83\x7d\x04\x01\x75" + bytes((len(x2apic),)) + x2apic + xapic
    asked = b"\x83\x7d\x04\x00\x74" + bytes((len(ways),)) + ways
    return code + b"\x3c\x02\x74" + bytes((len(asked),)) + asked + end


def _fault() -> bytes:
    """Sets what faulted and goes on where the step says."""
    code = b"\x50\x8b\x45\x08\x89\x44\x24\x0c"  # EIP = [RESUME]
    code += b"\x8b\x44\x24\x04\x3c\x06\xb8" + u32(FAULTED_GP) + b"\x75\x05\xb8" + u32(FAULTED_UD)
    return code + b"\x89\x45\x0c\x58\x83\xc4\x08\xcf"


def prelude(touch_apic_page: bool, paged: bool = False) -> bytes:
    """Writes to every page once that a program has, so that nothing is missing later, and stops.

    ``paged``: the VMXON region gets its revision, from IA32_VMX_BASIC.
    """
    code = b""
    for first, end in TOUCHED:
        # eax = first; again: or [eax], 0; eax += 4096; cmp eax, end; jne
        code += b"\xb8" + u32(first) + b"\x83\x08\x00\x05" + u32(0x1000) + b"\x3d" + u32(end) + b"\x75\xf1"
    if touch_apic_page:
        code += b"\xa1" + u32(APIC_PAGE + R.APIC_LVR)
    if paged:
        code += b"\xb9" + u32(MSR_VMX_BASIC) + RDMSR + b"\x25" + u32(0x7FFF_FFFF) + b"\xa3" + u32(VMXON_AT)
    return code + out(PORT_READY)


@dataclass(frozen=True)
class Way:
    """How programs are written: all but the steps themselves.

    Attributes:
        touch: they begin with a load from the APIC page. count: turns of the loop in which effects settle. taken: how
            many interrupts are taken while the baton has a number, by the model: each takes its time. restarts: a vCPU
            may have to begin anew, and knows where it goes on then. paged: it has paging, and may enter VMX operation.
    """

    touch: bool = False
    count: int = 0
    taken: Mapping[int, int] = field(default_factory=dict)
    restarts: bool = False
    paged: bool = False

    def settling(self, number: int) -> int:
        """Turns of the loop in which what happens at a number is over."""
        return self.count * max(1, self.taken.get(number, 0))


def program(vcpu: int, steps: Sequence[Step], way: Way) -> bytes:
    """All of a vCPU's code: its own of all ``steps``, and the end behind the last."""
    code = prelude(way.touch, way.paged) + (STI if vcpu == OPEN else b"")
    base = CODE_AT + CODE_BYTES * vcpu
    if way.restarts:
        code += set_word_at_ebp(RESTART, base + len(code) + RESTART_BYTES)
    for number, step in enumerate(steps):
        if step.vcpu != vcpu:
            continue
        code += _turn(number, steps, way)
        if way.restarts:
            at = base + len(code) + RESTART_BYTES
            body = _guarded(step, at, number, way.settling(number))
            code += set_word_at_ebp(RESTART, at + len(body)) + body
        else:
            code += _guarded(step, base + len(code), number, way.settling(number))
    code += _turn(len(steps), steps, way) + done()
    if len(code) > CODE_BYTES:
        raise ValueError(f"{len(code)} bytes of code for vCPU {vcpu}: a program of fewer steps is needed")
    return code


def _turn(number: int, steps: Sequence[Step], way: Way) -> bytes:
    """Waits until it is a step's turn, and until what the one before does late is over."""
    return wait_for(number) + settle(way.settling(number) * _late(steps, number))


def _late(steps: Sequence[Step], number: int) -> bool:
    """Whether the step before passed the baton on before it had done what it does."""
    return number > 0 and (steps[number - 1].passes_first or steps[number - 1].kind == "host")


def _guarded(step: Step, at: int, number: int, count: int) -> bytes:
    """One step: where a fault goes on is set first, what it did is stored behind it."""
    turn = set_word(BATON_AT, number + 1)
    result = area(step.vcpu) + RESULTS + RESULT_BYTES * number
    if step.passes_first:
        return turn + step.code
    if step.kind == "host":
        return out(PORT_HOST)
    head = set_word_at_ebp(FLAG, 0)
    length = len(head) + 7 + len(step.code)
    stored = b"\xa3" + u32(result) + b"\x89\x15" + u32(result + 4)
    flag = b"\x8b\x45\x0c\xa3" + u32(result + 8)
    # a fault skips what would be stored: registers of an instruction that was not done mean nothing
    body = b"\xc7\x45\x08" + u32(at + length + len(stored)) + step.code
    return head + body + stored + flag + settle(count) + turn


def set_word_at_ebp(offset: int, value: int) -> bytes:
    """MOV of a constant to a word of the vCPU's area."""
    return b"\xc7\x45" + bytes((offset,)) + u32(value)
