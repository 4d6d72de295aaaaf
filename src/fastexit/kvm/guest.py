"""A guest in real mode that carries out one instruction for each call.

Models: nothing; this is real code on the real KVM. Segments reach over 4 GiB, so that 32-bit addresses get to the xAPIC
page. Each program ends with an OUT, which brings KVM_RUN back; handlers tell faults and interrupts by other ports.
"""

from __future__ import annotations

import mmap
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fastexit import regs as R
from fastexit.kvm import ioctl as K
from fastexit.reasons import KvmExit

if TYPE_CHECKING:
    from types import FrameType

MEMORY_BYTES = 0x10000
FAULT_HANDLER_AT = 0x800
VECTOR_HANDLERS_AT = 0x2000
STACK_AT = 0x7000
CODE_AT = 0x8000
CODE_BYTES = 16
"""What each program has for itself, whoever runs it: code that is written once is never written again."""
PORT_DONE, PORT_FAULT, PORT_INTERRUPT = 0x10, 0x11, 0x12
PORTS = frozenset((PORT_DONE, PORT_FAULT, PORT_INTERRUPT))
VECTOR_GP = 13

OUT = 0xE6
MOV_AL = 0xB0
WRMSR, RDMSR, HLT, NOTHING = b"\x0f\x30", b"\x0f\x32", b"\xf4", b"\x90"
"""No program begins with its OUT: KVM skips an OUT that RIP is still at, so the next program would lose its first
instruction if it began there."""
OUTS = {4: b"\x66\xef", 2: b"\xef", 1: b"\xee"}
INS = {4: b"\x66\xed", 2: b"\xed", 1: b"\xec"}
"""EAX, AX, AL to and from the port in DX, by length, for 16-bit code."""
STORES = {4: b"\x67\x66\x89\x07", 2: b"\x67\x89\x07", 1: b"\x67\x88\x07"}
LOADS = {4: b"\x67\x66\x8b\x07", 2: b"\x67\x8b\x07", 1: b"\x67\x8a\x07"}
"""[EDI] from and to EAX, AX, AL, by length, for 16-bit code."""

RUN_SECONDS = 5.0
"""After so long a KVM_RUN that does not come back is interrupted, in the main thread."""


class Access(NamedTuple):
    """A guest's access to memory or to a port that was left to user space; ``data`` of a write."""

    port: bool
    address: int
    length: int
    write: bool
    data: int


class Stopped(NamedTuple):
    """Why a guest stopped: a port that it wrote to, with EAX and EDX, or an exit that is user space's."""

    port: int
    eax: int
    edx: int
    user: KvmExit | None

    @property
    def interrupt(self) -> int | None:
        """The vector whose handler ran, or None. The handler of a fault is an interrupt's of that vector, too."""
        if self.port == PORT_FAULT:
            return VECTOR_GP
        return self.eax & 0xFF if self.port == PORT_INTERRUPT else None


def first_bytes() -> bytes:
    """Memory below the programs: an interrupt vector table, and handlers that report themselves."""
    memory = bytearray(CODE_AT)

    def handler(vector: int, at: int, code: bytes) -> None:
        struct.pack_into("<HH", memory, 4 * vector, at, 0)
        memory[at : at + len(code)] = code

    for vector in range(256):
        handler(vector, VECTOR_HANDLERS_AT + 4 * vector, bytes((MOV_AL, vector, OUT, PORT_INTERRUPT)))
    handler(VECTOR_GP, FAULT_HANDLER_AT, bytes((OUT, PORT_FAULT)))
    return bytes(memory)


class Memory:
    """A VM's memory from 0: an interrupt vector table, handlers, a stack, and programs that its vCPUs share."""

    def __init__(self, vm: int) -> None:
        self._programs: dict[bytes, int] = {}
        self.create(vm)
        self.write(0, first_bytes())

    def create(self, vm: int) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        self.bytes: mmap.mmap = mmap.mmap(-1, MEMORY_BYTES)
        address = int(K.ffi.cast("uintptr_t", K.ffi.from_buffer(self.bytes)))
        region = K.ffi.new(
            "struct kvm_userspace_memory_region *", {"memory_size": MEMORY_BYTES, "userspace_addr": address}
        )
        K.call(vm, K.SET_USER_MEMORY_REGION, region)

    def write(self, at: int, data: bytes) -> None:
        """Stores bytes."""
        self.bytes[at : at + len(data)] = data

    def program(self, code: bytes) -> int:
        """Where a program is: ``code``, then an OUT. Each has a place of its own."""
        at = self._programs.get(code)
        if at is None:
            at = CODE_AT + CODE_BYTES * len(self._programs)
            if len(code) + 2 > CODE_BYTES or at + CODE_BYTES > MEMORY_BYTES:
                raise ValueError(f"no room for a program of {len(code)} bytes")
            self.write(at, code + bytes((OUT, PORT_DONE)))
            self._programs[code] = at
        return at

    def close(self) -> None:
        """Gives the memory back."""
        self.bytes.close()


class Guest:
    """One vCPU that runs programs."""

    def __init__(self, fd: int, memory: Memory, run_bytes: int) -> None:
        self._fd = fd
        self._memory = memory
        self._mapping = mmap.mmap(fd, run_bytes)
        self._run = K.ffi.cast("struct kvm_run *", K.ffi.from_buffer(self._mapping))
        self._regs = K.ffi.new("struct kvm_regs *")
        self.ioapic_eois: list[int] = []
        """Vectors of KVM_EXIT_IOAPIC_EOI since somebody emptied the list."""
        self.left: list[Access] = []
        """Accesses that came to user space since somebody emptied the list."""

    def close(self) -> None:
        """Unmaps the run area."""
        self._run, self._fd = None, K.CLOSED
        self._mapping.close()

    def call(self, request: int, argument: Any = None) -> int:
        """One ioctl of the vCPU."""
        return K.call(self._fd, request, argument)

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """Within this, `go_on` raises TimeoutError after so long."""
        return alarm(seconds)

    def flatten(self) -> None:
        """Segments from 0 to 4 GiB by KVM_SET_SREGS, which also writes APICBASE and CR8 as they are."""
        sregs = K.ffi.new("struct kvm_sregs *")
        self.call(K.GET_SREGS, sregs)
        for number, segment in enumerate(sregs.segments):
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0
            segment.type, segment.present, segment.s, segment.g = 0xB if number == 0 else 0x3, 1, 1, 1
            segment.dpl = segment.db = segment.l = segment.avl = segment.unusable = 0
        self.call(K.SET_SREGS, sregs)

    def is_flat(self) -> bool:
        """Whether segments are as flatten left them: an INIT changes them."""
        sregs = K.ffi.new("struct kvm_sregs *")
        self.call(K.GET_SREGS, sregs)
        return bool(sregs.segments[0].base == 0 and sregs.segments[0].limit == 0xFFFF_FFFF)

    def execute(
        self, code: bytes, *, rax: int = 0, rcx: int = 0, rdx: int = 0, rdi: int = 0, interrupts: bool = False
    ) -> Stopped:
        """Runs one instruction; an MSR access that is user space's stops here and waits for `go_on`."""
        regs = self._regs
        regs.rax, regs.rcx, regs.rdx, regs.rdi = rax, rcx, rdx, rdi
        regs.rsp, regs.rip = STACK_AT, self._memory.program(code)
        regs.rflags = R.RFLAGS_FIXED | R.RFLAGS_IF * interrupts
        self.call(K.SET_REGS, regs)
        return self.go_on()

    def go_on(self) -> Stopped:
        """KVM_RUN until the program ends or an MSR access is left to user space.

        An access to what the kernel has no device for is answered here: with zeros. TimeoutError when the guest does
        not come back, as one that waits for INIT, SIPI or the end of a halt does not.
        """
        user = None
        with self.limit(RUN_SECONDS):
            while True:
                try:
                    self.call(K.RUN)
                except InterruptedError:
                    if time.monotonic() < _due:
                        continue  # somebody else's signal
                    raise TimeoutError(f"the guest did not come back in {RUN_SECONDS} s") from None
                reason = self._run.exit_reason
                if reason == KvmExit.IO:
                    if self._run.io.port in PORTS:
                        break
                    user = KvmExit.IO
                    self._answer_port()
                elif reason in (KvmExit.X86_RDMSR, KvmExit.X86_WRMSR):
                    return Stopped(0, 0, 0, KvmExit(reason))
                elif reason == KvmExit.MMIO:
                    user = KvmExit.MMIO
                    self._answer_memory()
                elif reason == KvmExit.IOAPIC_EOI:
                    self.ioapic_eois.append(self._run.eoi.vector)
                else:
                    raise RuntimeError(f"the guest stopped with KVM_EXIT {reason}")
        port = self._run.io.port
        self.call(K.GET_REGS, self._regs)
        return Stopped(port, self._regs.rax & 0xFFFF_FFFF, self._regs.rdx & 0xFFFF_FFFF, user)

    def _answer_memory(self) -> None:
        mmio, data = self._run.mmio, K.ffi.buffer(self._run.mmio.data)
        value = int.from_bytes(data[: mmio.len], "little") if mmio.is_write else 0
        self.left.append(Access(False, mmio.phys_addr, mmio.len, bool(mmio.is_write), value))
        data[:] = bytes(8)

    def _answer_port(self) -> None:
        io = self._run.io
        data = K.ffi.buffer(K.ffi.cast("char *", self._run) + io.data_offset, io.size)
        value = int.from_bytes(data[:], "little") if io.direction else 0
        self.left.append(Access(True, io.port, io.size, bool(io.direction), value))
        if not io.direction:
            data[:] = bytes(io.size)

    def halt(self, seconds: float, *, interrupts: bool) -> Stopped | None:
        """HLT: what the guest did then, or None when it sleeps.

        Each try lasts ``seconds``. A guest counts as asleep when it was halted at the beginning of a try and nothing
        woke it during that: one that a busy host kept from running gets another.
        """
        state = K.ffi.new("struct kvm_mp_state *")
        halted = False
        run: Callable[[], Stopped] = partial(self.execute, HLT, interrupts=interrupts)
        while True:
            try:
                with self.limit(seconds):
                    return run()
            except TimeoutError:
                self.call(K.GET_MP_STATE, state)
                if halted and state.mp_state == R.MP_HALTED:
                    return None
                halted, run = state.mp_state == R.MP_HALTED, self.go_on

    @property
    def exit_reason(self) -> KvmExit:
        """run->exit_reason of the last return of KVM_RUN."""
        return KvmExit(self._run.exit_reason)

    @property
    def msr_access(self) -> tuple[int, int, int]:
        """run->msr of the access that waits: index, data, reason."""
        msr = self._run.msr
        return msr.index, msr.data, msr.reason

    def answer_msr(self, error: bool, data: int) -> None:
        """What user space says to the access that waits."""
        self._run.msr.error, self._run.msr.data = error, data


_armed = False
_due = 0.0
"""When the alarm that is armed, or was last, is over."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Interrupts system calls of the main thread every ``seconds``; an alarm inside another's does nothing.

    Again and again, because the first signal may come before the call that is to be interrupted. In other threads
    nothing is set, for Python hands signals to the main thread alone.
    """
    global _armed, _due
    if _armed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _ignored)
    _armed, _due = True, time.monotonic() + seconds
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _armed = False
        signal.signal(signal.SIGALRM, before)


def _ignored(_number: int, _frame: FrameType | None) -> None:
    """That it came is all: KVM_RUN returns with EINTR."""
