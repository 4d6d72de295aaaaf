"""A lab's kernel as a device of `fastexit.kvm.Oracle`: ioctls become records, and answers that will be asked for come
along with them.

Models: nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from fastexit import regs as R
from fastexit.kvm import guest as G
from fastexit.kvm import ioctl as K
from fastexit.kvm.device import Device, KvmUnavailable
from fastexit.kvm.lab.turnstile import Turnstile
from fastexit.kvm.lab.wire import LOOK_SREGS, LOOK_STATES, SET_REGS, Answer, Ask, Record, Wire
from fastexit.reasons import KvmExit

MOST_TEXT = 1 << 16
MOST_LINES = 1 << 17
RUN_SECONDS = 20.0
"""An emulated machine is slow, and the one that it runs on may be busy."""

_PAIR = struct.Struct("<II")
_WORD = struct.Struct("<I")
COUNT = struct.Struct("<Q")
"""What an eventfd is written and read."""
WORKER_NS = 500_000
"""How long a worker of the kernel's may take, in the machine's time."""
_IOCTL = struct.Struct("<IHHQQ")
_PROGRAM = struct.Struct("<IIQQQQQQQQ")
_STOPPED = struct.Struct("<8IQII")
_ACCESS = struct.Struct("<QQ4H")
_SEEN = (
    ("kvm_lapic_state", K.GET_LAPIC, 0, 1024),
    ("kvm_vcpu_events", K.GET_VCPU_EVENTS, 1024, 64),
    ("kvm_mp_state", K.GET_MP_STATE, 1088, 4),
    ("kvm_sregs", K.GET_SREGS, 1096, 312),
)
"""Where a look has what: structure, request, offset, bytes."""
SEEN_BYTES = 1408
REFUSED_AT = 1092
"""Why KVM_GET_LAPIC was refused, an error number, or 0."""
LATCHED_INIT_AT = 1024 + K.ffi.offsetof("struct kvm_vcpu_events", "smi", "latched_init")
BEFORE_STATES = (K.GET_LAPIC, K.GET_VCPU_EVENTS)
"""What a look asks a vCPU before its mp_state, which carries out an INIT."""
SEEN = {request: (at, length) for _, request, at, length in _SEEN}
READS = frozenset((K.CHECK_EXTENSION, K.GET_VCPU_MMAP_SIZE, K.GET_TSC_KHZ, K.GET_IRQCHIP, K.GET_PIT2, *SEEN)) - {
    K.GET_MP_STATE
}
"""Requests that change nothing that a look shows. KVM_GET_MP_STATE carries out INIT and SIPI."""


@dataclass
class _Vm:
    """What is known of one VM: its vCPUs' slots, and what they looked like behind the last change."""

    slots: list[int] = field(default_factory=list)
    seen: list[bytearray] = field(default_factory=list)
    flags: int | None = None
    """What is to be looked at behind each change; None: nothing."""
    fresh: bool = False
    reset: set[int] = field(default_factory=set)
    """vCPUs that were told the mp_state behind an INIT: what the look asked them before is from before it."""
    lines: list[str] | None = None
    """What tracepoints printed since somebody read it; None where nobody wants to know."""


class LabDevice(Device):
    """KVM at the other end of a wire."""

    def __init__(self, wire: Wire, name: str) -> None:
        self.wire = wire
        self.turnstile: Turnstile = Turnstile(wire)
        self._name = name
        self._vms: dict[int, _Vm] = {}
        self._vm_of: dict[int, tuple[_Vm, int]] = {}
        self._slots = _Numbers()
        self.pipe: int | None = None
        """trace_pipe, while a trace is open."""
        self._memories = _Numbers()
        self._guests = _Numbers()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    def ask(self, *records: Record) -> list[Answer]:
        """One trip; OSError with the error number of the first record that failed."""
        if self.wire.closed:
            return [Answer(0, b"")] * len(records)  # the machine is gone, and all that it held
        answers = self.turnstile.trip(records)
        for answer in answers:
            if answer.result < 0:
                raise OSError(-answer.result, os.strerror(-answer.result))
        return answers

    # ---------------------------------------------------------------------------------------------------------- files

    def open(self, path: str = "/dev/kvm", flags: int = os.O_RDWR) -> int:
        """A file descriptor of the machine's; KvmUnavailable where it cannot be had."""
        try:
            return self.ask((Ask.OPEN, 0, struct.pack("<I", flags) + path.encode() + b"\0"))[0].result
        except OSError as error:
            raise KvmUnavailable(error.errno, f"no usable {path} in {self.name}: {error.strerror}") from None

    def close(self, fd: int) -> None:
        """Closes a file of the machine's."""
        forget: list[Record] = []
        vm = self._vms.pop(fd, None)
        if vm is not None:
            forget = [(Ask.WATCH, 0, struct.pack("<Ii", slot, -1)) for slot in vm.slots]
        self._vm_of.pop(fd, None)
        self.ask(*forget, (Ask.CLOSE, 0, struct.pack("<I", fd)))
        for slot in vm.slots if vm is not None else ():
            self._slots.give(slot)

    def read(self, fd: int, most: int) -> bytes:
        """What a file has now, up to ``most`` bytes."""
        return self.ask((Ask.READ, 0, _PAIR.pack(fd, most)))[0].data

    def write(self, fd: int, data: bytes) -> None:
        """Writes to a file."""
        self.ask((Ask.WRITE, 0, _PAIR.pack(fd, len(data)) + data))

    def wait(self, seconds: float) -> None:
        """Lets time pass in the machine."""
        self.ask((Ask.SLEEP, 0, struct.pack("<I", min(int(seconds * 1e9), 0xFFFF_FFFF))))

    def eventfd(self) -> int:
        """An eventfd of the machine's."""
        return self.ask((Ask.EVENTFD, 0, b""))[0].result

    def signal(self, vm: int, fd: int, count: int = 1) -> None:
        """Adds to an eventfd, which does something to a VM: soon, where a worker of the kernel's does it."""
        records: list[Record] = [
            (Ask.WRITE, 0, _PAIR.pack(fd, COUNT.size) + COUNT.pack(count)),
            (Ask.SLEEP, 0, _WORD.pack(WORKER_NS)),
        ]
        for answer in self._change(self._vms[vm], records):
            if answer.result < 0:
                raise OSError(-answer.result, os.strerror(-answer.result))

    def drain(self, fd: int) -> int:
        """What an eventfd has counted, which is 0 then."""
        (answer,) = self.turnstile.trip([(Ask.READ, 0, _PAIR.pack(fd, COUNT.size))])
        return int(COUNT.unpack(answer.data)[0]) if len(answer.data) == COUNT.size else 0

    def text(self, path: Path) -> str | None:
        """A file of the kernel's, or None."""
        try:
            fd = self.open(str(path), os.O_RDONLY)
        except OSError:
            return None
        try:
            return self.read(fd, MOST_TEXT).decode(errors="replace")
        finally:
            self.close(fd)

    def exists(self, path: Path) -> bool:
        """Whether there is such a file or directory."""
        try:
            self.close(self.open(str(path), os.O_RDONLY))
        except OSError:
            return False
        return True

    def release(self) -> str:
        """The kernel's release."""
        return (self.text(Path("/proc/sys/kernel/osrelease")) or "").strip()

    # --------------------------------------------------------------------------------------------------------- ioctls

    def call(self, fd: int, request: int, argument: Any = None) -> int:
        """One ioctl; what a look brought along is answered without a trip."""
        vm, index = self._vm_of.get(fd, (None, 0))
        seen = SEEN.get(request)
        if vm is not None and seen is not None and self._is_known(vm, index, request):
            at, length = seen
            if request == K.GET_MP_STATE and vm.seen[index][LATCHED_INIT_AT]:
                vm.reset.add(index)
            (refused,) = _WORD.unpack_from(vm.seen[index], REFUSED_AT)
            if refused and request == K.GET_LAPIC:
                raise OSError(refused, os.strerror(refused))
            K.ffi.memmove(argument, vm.seen[index][at : at + length], length)
            return 0
        vm = vm or self._vms.get(fd)
        record = ioctl_record(fd, request, argument)
        if vm is None or request in READS:
            (first,) = self.turnstile.trip([record])
        else:
            (first,) = self._change(vm, [record])
        if first.result < 0:
            raise OSError(-first.result, os.strerror(-first.result))
        if first.data:
            K.ffi.memmove(argument, first.data, len(first.data))
        if request == K.CREATE_VM:
            self._vms[first.result] = _Vm()
        return first.result

    def calls(self, fd: int, asked: Sequence[tuple[int, Any]]) -> None:
        """Several ioctls that change nothing, in one trip; OSError as `ask`."""
        answers = self.ask(*(ioctl_record(fd, request, argument) for request, argument in asked))
        for (_, argument), answer in zip(asked, answers, strict=True):
            K.ffi.memmove(argument, answer.data, len(answer.data))

    def _is_known(self, vm: _Vm, index: int, request: int) -> bool:
        """Whether the last look has what is asked for, and nothing has changed since."""
        if not vm.fresh or vm.flags is None or (request in BEFORE_STATES and index in vm.reset):
            return False
        if request == K.GET_MP_STATE:
            return bool(vm.flags & LOOK_STATES)
        return request != K.GET_SREGS or bool(vm.flags & LOOK_SREGS)

    def created(self, vm: int, vcpu: int) -> None:
        """A vCPU that looks have to look at."""
        known = self._vms[vm]
        slot = self._slots.take()
        self.ask((Ask.WATCH, 0, struct.pack("<Ii", slot, vcpu)))
        self._vm_of[vcpu] = known, len(known.slots)
        known.slots.append(slot)
        known.seen.append(bytearray(SEEN_BYTES))
        known.fresh = False

    def watch(self, vm: int, *, states: bool) -> None:
        """From now on each change is followed by a look, with ``states`` also at mp_state and segments."""
        self._vms[vm].flags = LOOK_STATES | LOOK_SREGS if states else 0
        self._vms[vm].fresh = False

    def _look(self, vm: _Vm) -> list[Record]:
        vm.fresh = False
        if vm.flags is None or not vm.slots:
            return []
        return [(Ask.LOOK, vm.flags, struct.pack(f"<{1 + len(vm.slots)}I", len(vm.slots), *vm.slots))]

    def look_record(self, vm: int) -> Record:
        """A look at all vCPUs of a VM with their states, for a batch of one's own; `looked` reads what it found."""
        slots = self._vms[vm].slots
        return (Ask.LOOK, LOOK_STATES, struct.pack(f"<{1 + len(slots)}I", len(slots), *slots))

    def looked(self, vm: int, answer: Answer) -> list[bytes]:
        """What each vCPU looks like, page first; SEEN says what is where."""
        known = self._vms[vm]
        if answer.result < 0:
            raise OSError(-answer.result, os.strerror(-answer.result))
        self._note(known, [answer])
        known.fresh = False
        return [bytes(seen) for seen in known.seen]

    def _note(self, vm: _Vm | None, answers: Sequence[Answer]) -> None:
        """Applies what a look found changed."""
        for answer in answers:
            if vm is None:
                continue
            vm.reset.clear()
            if answer.result < 0:
                raise OSError(-answer.result, f"a look failed: {os.strerror(-answer.result)}")
            words = memoryview(answer.data).cast("I")
            at = 0
            for seen in vm.seen:
                changed = words[at]
                at += 1
                if changed:
                    dwords = memoryview(seen).cast("I")
                    for n in range(at, at + 2 * changed, 2):
                        dwords[words[n]] = words[n + 1]
                    at += 2 * changed
            vm.fresh = True

    def act(self, vcpu: int, *records: Record) -> list[Answer]:
        """Records that change a vCPU, then a look at its VM; OSError as `ask`."""
        vm, _ = self._vm_of.get(vcpu, (None, 0))
        answers = self.turnstile.trip(records, RUN_SECONDS * 3) if vm is None else self._change(vm, records)
        for answer in answers:
            if answer.result < 0:
                raise OSError(-answer.result, os.strerror(-answer.result))
        return answers

    def _change(self, vm: _Vm, records: Sequence[Record]) -> list[Answer]:
        """Records that change a VM: what they printed is kept, and a look follows."""
        looks = self._look(vm)
        if vm.lines is None or self.pipe is None:
            answers = self.turnstile.trip([*records, *looks], RUN_SECONDS * 3)
        else:
            read: Record = (Ask.READ, 0, _PAIR.pack(self.pipe, MOST_LINES))
            _, *answers = self.turnstile.trip([read, *records, read, *looks], RUN_SECONDS * 3)
            vm.lines += answers.pop(len(records)).data.decode(errors="replace").splitlines()
        self._note(vm, answers[len(records) :])
        return answers[: len(records)]

    def trace(self, vm: int) -> _Vm:
        """From now on a VM keeps the lines of its changes."""
        self._vms[vm].lines = []
        return self._vms[vm]

    # --------------------------------------------------------------------------------------------------------- guests

    def memory(self, vm: int) -> G.Memory:
        """Memory of the machine's for a VM's guests."""
        return LabMemory(self, vm, self._memories)

    def take_memory(self) -> int:
        """A number for a VM's memory that nobody else has."""
        return self._memories.take()

    def give_memory(self, slot: int) -> None:
        """Frees a VM's memory and its number."""
        self.ask((Ask.FREE, 0, _PAIR.pack(Ask.MEMORY, slot)))
        self._memories.give(slot)

    def take_guest(self) -> int:
        """A number for what runs a vCPU that nobody else has."""
        return self._guests.take()

    def give_guest(self, slot: int) -> None:
        """Frees what runs a vCPU and its number."""
        self.ask((Ask.FREE, 0, _PAIR.pack(Ask.GUEST, slot)))
        self._guests.give(slot)

    def vcpu_slots(self, vm: int) -> list[int]:
        """Numbers under which looks know a VM's vCPUs."""
        return self._vms[vm].slots

    def guest(self, vcpu: int, memory: G.Memory, run_bytes: int) -> G.Guest:
        """What runs programs on a vCPU."""
        return LabGuest(self, vcpu, memory, run_bytes, self._guests)


class _Numbers:
    """Numbers that are free; threads may take and give."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._fresh = count()

    def take(self) -> int:
        try:
            return self._free.pop()
        except IndexError:
            return next(self._fresh)

    def give(self, number: int) -> None:
        self._free.append(number)


def ioctl_record(fd: int, request: int, argument: Any) -> Record:
    """An ioctl with what its pointer points to, and, of an MSR filter, what that points to."""
    if argument is None or isinstance(argument, int):
        return (Ask.IOCTL, 0, _IOCTL.pack(fd, 0, 0, request, argument or 0))
    data = bytes(K.ffi.buffer(argument))
    if request != K.X86_SET_MSR_FILTER:
        return (Ask.IOCTL, 0, _IOCTL.pack(fd, 1, 0, request, len(data)) + data)
    pointers, more = [], b""
    base = K.ffi.cast("char *", argument)
    for one in argument.ranges:
        if one.bitmap != K.ffi.NULL and one.nmsrs:
            at = K.ffi.cast("char *", K.ffi.addressof(one, "bitmap")) - base
            pointers.append(_PAIR.pack(at, len(data) + len(more)))
            more += bytes(K.ffi.buffer(one.bitmap, (one.nmsrs + 63) // 64 * 8))
    head = _IOCTL.pack(fd, 1, len(pointers), request, len(data) + len(more))
    return (Ask.IOCTL, 0, head + b"".join(pointers) + data + more)


def accesses(data: bytes) -> list[G.Access]:
    """Accesses that an EXECUTE left to user space."""
    *_, eois, count = _STOPPED.unpack_from(data)
    found = _ACCESS.iter_unpack(data[_STOPPED.size + eois :][: count * _ACCESS.size])
    return [
        G.Access(bool(port), address, length, bool(write), value) for address, value, port, length, write, _ in found
    ]


def stopped(data: bytes) -> tuple[G.Stopped | None, int, tuple[int, int, int], bytes]:
    """What an EXECUTE came to: None when it was too late; exit reason, MSR access, IOAPIC EOIs."""
    late, reason, port, eax, edx, user, why, index, value, eois, _ = _STOPPED.unpack_from(data)
    told = data[_STOPPED.size : _STOPPED.size + eois]
    if late:
        return None, reason, (index, value, why), told
    if reason in (KvmExit.X86_RDMSR, KvmExit.X86_WRMSR):
        return G.Stopped(0, 0, 0, KvmExit(reason)), reason, (index, value, why), told
    if reason != KvmExit.IO:
        raise ChildProcessError(f"the guest stopped with KVM_EXIT {reason}")
    return G.Stopped(port, eax, edx, KvmExit(user) if user else None), reason, (index, value, why), told


class LabMemory(G.Memory):
    """A VM's memory, which is the machine's."""

    def __init__(self, device: LabDevice, vm: int, numbers: _Numbers) -> None:
        self._device = device
        self._numbers = numbers
        self.slot: int = numbers.take()
        super().__init__(vm)

    def create(self, vm: int) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        self._device.ask((Ask.MEMORY, 0, _PAIR.pack(vm, self.slot)))

    def write(self, at: int, data: bytes) -> None:
        """Stores bytes."""
        self._device.ask((Ask.STORE, 0, struct.pack("<IIII", self.slot, at, len(data), 0) + data))

    def close(self) -> None:
        """Gives the memory back."""
        self._device.ask((Ask.FREE, 0, _PAIR.pack(Ask.MEMORY, self.slot)))
        self._numbers.give(self.slot)


class LabGuest(G.Guest):
    """One vCPU of the lab that runs programs: preparing, running and what came of it are one trip."""

    def __init__(self, device: LabDevice, fd: int, memory: G.Memory, run_bytes: int, numbers: _Numbers) -> None:
        self._device = device
        self._fd = fd
        self._memory = memory
        self._numbers = numbers
        self._slot = numbers.take()
        self._seconds: float | None = None
        self._reason = 0
        self._access = (0, 0, 0)
        self.ioapic_eois: list[int] = []
        self.left: list[G.Access] = []
        device.ask((Ask.GUEST, 0, struct.pack("<III", fd, self._slot, run_bytes)))

    def close(self) -> None:
        """Unmaps the run area."""
        self._device.ask((Ask.FREE, 0, _PAIR.pack(Ask.GUEST, self._slot)))
        self._numbers.give(self._slot)

    def call(self, request: int, argument: Any = None) -> int:
        """One ioctl of the vCPU."""
        return self._device.call(self._fd, request, argument)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Within this, programs are interrupted after so long."""
        before = self._seconds
        self._seconds = seconds if before is None else before
        try:
            yield
        finally:
            self._seconds = before

    def execute(
        self, code: bytes, *, rax: int = 0, rcx: int = 0, rdx: int = 0, rdi: int = 0, interrupts: bool = False
    ) -> G.Stopped:
        """Runs one instruction, as `fastexit.kvm.guest.Guest.execute`."""
        flags = R.RFLAGS_FIXED | R.RFLAGS_IF * interrupts
        return self._run(SET_REGS, rax, rcx, rdx, rdi, G.STACK_AT, self._memory.program(code), flags)

    def go_on(self) -> G.Stopped:
        """KVM_RUN until the program ends or an MSR access is left to user space."""
        return self._run(0, 0, 0, 0, 0, 0, 0, 0)

    def _run(self, set_regs: int, *registers: int) -> G.Stopped:
        seconds = RUN_SECONDS if self._seconds is None else self._seconds
        payload = _PROGRAM.pack(self._slot, 0, *registers, int(seconds * 1e9))
        data = self._device.act(self._fd, (Ask.EXECUTE, set_regs, payload))[0].data
        came, self._reason, self._access, eois = stopped(data)
        self.ioapic_eois.extend(eois)
        self.left.extend(accesses(data))
        if came is None:
            raise TimeoutError(f"the guest did not come back in {seconds} s")
        return came

    def program_record(self, code: bytes, *, interrupts: bool = False) -> Record:
        """One program as a record, for a batch of one's own."""
        flags = R.RFLAGS_FIXED | R.RFLAGS_IF * interrupts
        registers = 0, 0, 0, 0, G.STACK_AT, self._memory.program(code), flags
        return (Ask.EXECUTE, SET_REGS, _PROGRAM.pack(self._slot, 0, *registers, int(RUN_SECONDS * 1e9)))

    @property
    def exit_reason(self) -> KvmExit:
        """run->exit_reason of the last return of KVM_RUN."""
        return KvmExit(self._reason)

    @property
    def msr_access(self) -> tuple[int, int, int]:
        """run->msr of the access that waits: index, data, reason."""
        return self._access

    def answer_msr(self, error: bool, data: int) -> None:
        """What user space says to the access that waits."""
        self._device.ask((Ask.ANSWER, 0, struct.pack("<IIQ", self._slot, error, data & (1 << 64) - 1)))
