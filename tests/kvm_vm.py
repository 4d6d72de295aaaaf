"""A VM of the running kernel, behind the face of `fastexit.Machine` as far as tests need it.

Ioctls on VMs and vCPUs, and a guest in real mode that carries out one instruction for each call: code that ends with
an OUT, so that KVM_RUN comes back, with handlers that tell faults and interrupts by the port that they write to.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from types import TracebackType
from typing import Self

import oracle
import oracle_apic
from fastexit import regs as r
from fastexit.reasons import KvmExit

KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_CREATE_IRQCHIP = 0xAE60
KVM_ENABLE_CAP = 0x4068AEA3
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_REGS = 0x8090AE81
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SIGNAL_MSI = 0x4020AEA5
KVM_GET_MSRS = 0xC008AE88
KVM_SET_MSRS = 0x4008AE89
KVM_GET_LAPIC = 0x8400AE8E
KVM_SET_LAPIC = 0x4400AE8F
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_MP_STATE = 0x8004AE98
KVM_SET_MP_STATE = 0x4004AE99
KVM_GET_VCPU_EVENTS = 0x8040AE9F
KVM_SET_VCPU_EVENTS = 0x4040AEA0
KVM_GET_TSC_KHZ = 0xAEA3
KVM_SET_BOOT_CPU_ID = 0xAE78
KVM_INTERRUPT = 0x4004AE86
KVM_X86_SET_MSR_FILTER = 0x4188AEC6
KVM_SET_GSI_ROUTING = 0x4008AE6A

CAP_SPLIT_IRQCHIP = 121
CAP_X2APIC_API = 129
CAP_DISABLE_QUIRKS = 116
CAP_X86_USER_SPACE_MSR = 188
CAP_X86_APIC_BUS_CYCLES_NS = 237
IOAPIC_PINS = 24
CPUID_ENTRY = struct.Struct("<7I12x")
CPUID_1_ECX_X2APIC = 1 << 21
CPUID_1_ECX_DEADLINE = 1 << 24
MAXPHYADDR = 48

SREGS_BYTES, SREGS_CS_SELECTOR, SREGS_CR8, SREGS_APIC_BASE = 312, 12, 256, 272

GUEST_BYTES = 0x10000
CODE_AT = 0x1000
FAULT_HANDLER_AT = 0x800
STACK_AT = 0x7000
VECTOR_HANDLERS_AT = 0x2000
PORT_DONE, PORT_FAULT, PORT_INTERRUPT = 0x10, 0x11, 0x12
OUT_DONE = bytes((0xE6, PORT_DONE))
WRMSR, RDMSR, HLT = b"\x0f\x30", b"\x0f\x32", b"\xf4"
ASLEEP_SECONDS = 0.01
STORES = {4: b"\x67\x66\x89\x07", 2: b"\x67\x89\x07", 1: b"\x67\x88\x07"}
LOADS = {4: b"\x67\x66\x8b\x07", 2: b"\x67\x8b\x07", 1: b"\x67\x8a\x07"}
"""16-bit encodings: [EDI] with EAX, AX, AL."""


class RealVcpu:
    """One vCPU file descriptor behind the face of `fastexit.Machine`'s vCPUs."""

    def __init__(self, vm: RealKvm, apic_id: int) -> None:
        self.id = apic_id
        self.msr_error = False
        self.fd = fcntl.ioctl(vm.fd, KVM_CREATE_VCPU, apic_id)
        vm.fds.append(self.fd)
        fcntl.ioctl(self.fd, KVM_SET_CPUID2, bytearray(vm.cpuid), True)

    def set_msr(self, msr: int, value: int) -> bool:
        return self._msrs(KVM_SET_MSRS, msr, value)[0] == 1

    def get_msr(self, msr: int) -> int | None:
        done, value = self._msrs(KVM_GET_MSRS, msr, 0)
        return value if done == 1 else None

    def _msrs(self, request: int, msr: int, value: int) -> tuple[int, int]:
        buffer = bytearray(struct.pack("<IIIIQ", 1, 0, msr, 0, value))
        done = fcntl.ioctl(self.fd, request, buffer, True)
        return done, struct.unpack_from("<Q", buffer, 16)[0]

    def get_lapic(self) -> bytes:
        page = bytearray(r.LAPIC_PAGE_BYTES)
        fcntl.ioctl(self.fd, KVM_GET_LAPIC, page, True)
        return bytes(page)

    def set_lapic(self, data: bytes) -> None:
        try:
            fcntl.ioctl(self.fd, KVM_SET_LAPIC, bytearray(data), True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("KVM_SET_LAPIC: EINVAL") from error

    def get_mp_state(self) -> int:
        buffer = bytearray(4)
        fcntl.ioctl(self.fd, KVM_GET_MP_STATE, buffer, True)
        return struct.unpack("<I", buffer)[0]

    def set_mp_state(self, state: int) -> None:
        fcntl.ioctl(self.fd, KVM_SET_MP_STATE, struct.pack("<I", state))

    def events(self) -> oracle_apic.Events:
        buffer = self._events()
        return oracle_apic.Events(nmi_pending=buffer[13], latched_init=buffer[27], nmi_masked=bool(buffer[14]))

    def _events(self) -> bytearray:
        buffer = bytearray(64)
        fcntl.ioctl(self.fd, KVM_GET_VCPU_EVENTS, buffer, True)
        return buffer

    def set_events(
        self,
        *,
        nmi_pending: int | None = None,
        nmi_masked: bool = False,
        sipi_vector: int | None = None,
        smm: bool | None = None,
        latched_init: bool = False,
    ) -> None:
        flags = 1 * (nmi_pending is not None) | 2 * (sipi_vector is not None) | 8 * (smm is not None)
        buffer = bytearray(64)
        buffer[13:15] = nmi_pending or 0, nmi_masked
        struct.pack_into("<II", buffer, 16, sipi_vector or 0, flags)
        buffer[27] = latched_init
        fcntl.ioctl(self.fd, KVM_SET_VCPU_EVENTS, buffer)

    def set_sregs(self, *, apic_base: int, cr8: int) -> None:
        sregs = self._sregs()
        struct.pack_into("<Q", sregs, SREGS_CR8, cr8)
        struct.pack_into("<Q", sregs, SREGS_APIC_BASE, apic_base)
        try:
            fcntl.ioctl(self.fd, KVM_SET_SREGS, sregs)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("KVM_SET_SREGS: EINVAL") from error

    @property
    def cr8(self) -> int:
        return struct.unpack_from("<Q", self._sregs(), SREGS_CR8)[0]

    @property
    def cs(self) -> int:
        return struct.unpack_from("<H", self._sregs(), SREGS_CS_SELECTOR)[0]

    def _sregs(self) -> bytearray:
        sregs = bytearray(SREGS_BYTES)
        fcntl.ioctl(self.fd, KVM_GET_SREGS, sregs, True)
        return sregs

    def interrupt(self, vector: int) -> None:
        try:
            fcntl.ioctl(self.fd, KVM_INTERRUPT, struct.pack("<I", vector))
        except OSError as error:
            raise ValueError(f"KVM_INTERRUPT: {error.strerror}") from error

    # ----------------------------------------------------------------------------------- as the guest, by real code

    def start(self, vm: RealKvm, mapping_bytes: int) -> None:
        """Makes the vCPU able to run: real mode, interrupts off, data segment over the whole 4 GiB."""
        self.memory = vm.memory
        self.run_area = mmap.mmap(self.fd, mapping_bytes)
        vm.mappings.append(self.run_area)
        self.flat_real_mode()
        self.set_mp_state(r.MP_RUNNABLE)

    def flat_real_mode(self) -> None:
        """Segments from 0 to 4 GiB, as code expects them that a test runs."""
        sregs = self._sregs()
        for segment in range(6):
            # struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g
            kind = 0xB if segment == 0 else 0x3
            struct.pack_into("<QIH8B", sregs, 24 * segment, 0, 0xFFFF_FFFF, 0, kind, 1, 0, 0, 1, 0, 1, 0)
        fcntl.ioctl(self.fd, KVM_SET_SREGS, sregs, True)

    def _run(self, program: bytes, registers: list[int], rflags: int) -> tuple[int, int, int]:
        """Runs a program until it writes to a port: the port, then EAX and EDX.

        What asks user space on the way is in ``asked``: an access to an MSR is answered as ``msr_error`` says, what
        goes to memory that is not there with zeros.
        """
        self.memory[CODE_AT : CODE_AT + len(program)] = program
        fcntl.ioctl(self.fd, KVM_SET_REGS, struct.pack("<18Q", *registers, *([0] * 8), CODE_AT, rflags))
        self.asked: list[tuple[int, ...]] = []
        while True:
            fcntl.ioctl(self.fd, KVM_RUN, 0)
            reason = struct.unpack_from("<I", self.run_area, 8)[0]
            if reason in (KvmExit.X86_RDMSR, KvmExit.X86_WRMSR):
                self.asked.append((reason, *struct.unpack_from("<IIQ", self.run_area, 40)))
                struct.pack_into("<B", self.run_area, 32, self.msr_error)
            elif reason == KvmExit.MMIO:
                self.asked.append((reason,))
                struct.pack_into("<Q", self.run_area, 40, 0)
            elif reason == KvmExit.IOAPIC_EOI:
                self.asked.append((reason, self.run_area[32]))
            else:
                break
        port = struct.unpack_from("<H", self.run_area, 34)[0]
        assert reason == KvmExit.IO, f"the guest stopped with exit {reason}"
        after = bytearray(144)
        fcntl.ioctl(self.fd, KVM_GET_REGS, after, True)
        eax, _, _, edx = struct.unpack_from("<4Q", after)
        return port, eax & 0xFFFF_FFFF, edx & 0xFFFF_FFFF

    def _execute(self, code: bytes, *, rax: int = 0, rcx: int = 0, rdx: int = 0, rdi: int = 0) -> tuple[bool, int, int]:
        """Runs one instruction; whether it went through, then EAX and EDX."""
        port, eax, edx = self._run(code + OUT_DONE, [rax, 0, rcx, rdx, 0, rdi, STACK_AT, 0], r.RFLAGS_FIXED)
        return port == PORT_DONE, eax, edx

    def _user(self) -> bool:
        """Whether user space had to do the last instruction."""
        return any(asked[0] != KvmExit.IOAPIC_EOI for asked in self.asked)

    def run_through(self) -> None:
        """KVM_RUN of a guest that does nothing but leave to user space, interrupts off."""
        self._run(OUT_DONE, [0, 0, 0, 0, 0, 0, STACK_AT, 0], r.RFLAGS_FIXED)

    def taken(self) -> int | None:
        """The vector of the interrupt that the guest takes with RFLAGS.IF set, or None."""
        port, al, _ = self._run(OUT_DONE, [0, 0, 0, 0, 0, 0, STACK_AT, 0], r.RFLAGS_FIXED | r.RFLAGS_IF)
        return al & 0xFF if port == PORT_INTERRUPT else None

    def halt_and_take(self, *, interrupts: bool) -> int | str:
        """A guest that halts: the vector that ended it, "went on" behind the HLT, or "asleep"."""
        handler = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, ASLEEP_SECONDS)
        try:
            flags = r.RFLAGS_FIXED | r.RFLAGS_IF * interrupts
            port, al, _ = self._run(HLT + OUT_DONE, [0, 0, 0, 0, 0, 0, STACK_AT, 0], flags)
        except InterruptedError:
            return "asleep"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        return al & 0xFF if port == PORT_INTERRUPT else "went on"

    def guest_wrmsr(self, msr: int, value: int) -> str:
        done, _, _ = self._execute(WRMSR, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
        return "user" if self._user() else "ok" if done else "gp"

    def guest_rdmsr(self, msr: int) -> int | None:
        done, eax, edx = self._execute(RDMSR, rcx=msr)
        return edx << 32 | eax if done else None

    def mmio_write(self, offset: int, value: int, length: int = 4) -> str | None:
        self._execute(STORES[length], rax=value, rdi=r.APIC_DEFAULT_PHYS_BASE + offset)
        return "user" if self._user() else None

    def mmio_read(self, offset: int, length: int = 4) -> int | str:
        _, eax, _ = self._execute(LOADS[length], rdi=r.APIC_DEFAULT_PHYS_BASE + offset)
        if self._user():
            return "user"
        return eax & (1 << 8 * length) - 1


class RealKvm:
    """A VM of the running kernel; a context manager, because file descriptors must not outlive a test."""

    def __init__(
        self,
        *,
        apic_ids: list[int],
        irqchip: str = "full",
        x2apic_api: int = 0,
        x2apic: bool = True,
        tsc_deadline: bool = True,
        bus_cycle_ns: int = 1,
        disable_quirks: int = 0,
        boot_cpu_id: int = 0,
        **_unused: object,
    ) -> None:
        self.fds: list[int] = []
        self.mappings: list[mmap.mmap] = []
        self.vcpus: list[RealVcpu] = []
        try:
            system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
            self.fds.append(system)
            self.fd = fcntl.ioctl(system, KVM_CREATE_VM, 0)
            self.fds.append(self.fd)
            if irqchip == "split":
                self._enable_cap(CAP_SPLIT_IRQCHIP, IOAPIC_PINS)
            else:
                fcntl.ioctl(self.fd, KVM_CREATE_IRQCHIP)
            if x2apic_api:
                self._enable_cap(CAP_X2APIC_API, x2apic_api)
            if bus_cycle_ns != 1:
                self._enable_cap(CAP_X86_APIC_BUS_CYCLES_NS, bus_cycle_ns)
            if disable_quirks:
                self._enable_cap(CAP_DISABLE_QUIRKS, disable_quirks)
            if boot_cpu_id:
                fcntl.ioctl(self.fd, KVM_SET_BOOT_CPU_ID, boot_cpu_id)
            self.system = system
            self.cpuid = self._guest_cpuid(system, x2apic, tsc_deadline)
            for apic_id in apic_ids:
                self.add_vcpu(apic_id)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self.mappings:
            self.mappings.pop().close()
        while self.fds:
            os.close(self.fds.pop())

    def _enable_cap(self, cap: int, argument: int) -> None:
        fcntl.ioctl(self.fd, KVM_ENABLE_CAP, struct.pack("<IIQ24x64x", cap, 0, argument))

    @staticmethod
    def _guest_cpuid(system: int, x2apic: bool, tsc_deadline: bool) -> bytes:
        room = 256
        buffer = bytearray(8 + room * CPUID_ENTRY.size)
        struct.pack_into("<I", buffer, 0, room)
        fcntl.ioctl(system, KVM_GET_SUPPORTED_CPUID, buffer, True)
        count = struct.unpack_from("<I", buffer, 0)[0]
        for at in range(8, 8 + count * CPUID_ENTRY.size, CPUID_ENTRY.size):
            entry = list(CPUID_ENTRY.unpack_from(buffer, at))
            if entry[0] == 1:
                wanted = CPUID_1_ECX_X2APIC * x2apic | CPUID_1_ECX_DEADLINE * tsc_deadline
                entry[5] = entry[5] & ~(CPUID_1_ECX_X2APIC | CPUID_1_ECX_DEADLINE) | wanted
            elif entry[0] == 0x8000_0008:
                entry[3] = entry[3] & ~0xFF | MAXPHYADDR
            CPUID_ENTRY.pack_into(buffer, at, *entry)
        return bytes(buffer[: 8 + count * CPUID_ENTRY.size])

    def add_vcpu(self, apic_id: int) -> RealVcpu:
        vcpu = RealVcpu(self, apic_id)
        self.vcpus.append(vcpu)
        return vcpu

    def start_guests(self) -> None:
        """Gives the VM memory with fault handlers in it and makes every vCPU able to run code."""
        self.memory = mmap.mmap(-1, GUEST_BYTES)
        self.mappings.append(self.memory)
        view = ctypes.c_char.from_buffer(self.memory)
        region = struct.pack("<IIQQQ", 0, 0, 0, GUEST_BYTES, ctypes.addressof(view))
        del view  # the mapping cannot be closed while a view of it lives
        fcntl.ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, region)
        for number in range(16, 256):
            handler = VECTOR_HANDLERS_AT + 4 * number
            struct.pack_into("<HH", self.memory, 4 * number, handler, 0)
            self.memory[handler : handler + 4] = bytes((0xB0, number, 0xE6, PORT_INTERRUPT))  # mov al, number; out
        struct.pack_into("<HH", self.memory, 13 * 4, FAULT_HANDLER_AT, 0)
        self.memory[FAULT_HANDLER_AT : FAULT_HANDLER_AT + 2] = bytes((0xE6, PORT_FAULT))
        mapping_bytes = fcntl.ioctl(self.system, KVM_GET_VCPU_MMAP_SIZE, 0)
        for vcpu in self.vcpus:
            vcpu.start(self, mapping_bytes)

    def set_msr_filter(self, default_deny: bool, ranges: list[oracle.MsrRange]) -> None:
        """KVM_X86_SET_MSR_FILTER."""
        keep = []
        packed = struct.pack("<II", default_deny, 0)
        for one in [*ranges, *[oracle.MsrRange(0, 0, 0, 0)] * (16 - len(ranges))]:
            bitmap = ctypes.create_string_buffer(one.bitmap.to_bytes((one.count + 63) // 64 * 8 or 8, "little"))
            keep.append(bitmap)
            packed += struct.pack("<IIIIQ", one.flags, one.count, one.base, 0, ctypes.addressof(bitmap))
        fcntl.ioctl(self.fd, KVM_X86_SET_MSR_FILTER, packed)

    def ask_user_space(self, reasons: int) -> None:
        """KVM_CAP_X86_USER_SPACE_MSR."""
        self._enable_cap(CAP_X86_USER_SPACE_MSR, reasons)

    def route(self, vectors: list[int]) -> None:
        """KVM_SET_GSI_ROUTING: level-triggered messages to physical 0, one a pin of user space's IOAPIC."""
        entries = b"".join(
            struct.pack("<IIIIIII20x", pin, 2, 0, 0, 0xFEE0_0000, 0, vector | 0x8000)
            for pin, vector in enumerate(vectors)
        )
        fcntl.ioctl(self.fd, KVM_SET_GSI_ROUTING, bytearray(struct.pack("<II", len(vectors), 0) + entries))

    def tsc_khz(self) -> int:
        return fcntl.ioctl(self.vcpus[0].fd, KVM_GET_TSC_KHZ)

    def signal_msi(self, address: int, data: int) -> int:
        message = struct.pack("<IIIII12x", address & 0xFFFF_FFFF, address >> 32, data, 0, 0)
        try:
            return fcntl.ioctl(self.fd, KVM_SIGNAL_MSI, bytearray(message), True)
        except OSError as error:
            if error.errno == errno.EPERM:
                return -1
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("KVM_SIGNAL_MSI: EINVAL") from error


def look_at_kernel() -> tuple[int, int, str | None]:
    """KVM_CAP_X2APIC_API flags of full and split irqchips, and why the oracle cannot be held against this kernel."""
    try:
        with RealKvm(apic_ids=[0]) as vm, RealKvm(apic_ids=[0], irqchip="split") as split:
            flags, on_split = (fcntl.ioctl(one.fd, KVM_CHECK_EXTENSION, CAP_X2APIC_API) for one in (vm, split))
    except OSError as error:
        return 0, 0, f"no usable /dev/kvm: {error.strerror}"
    return flags, on_split, None if flags & 3 == 3 else "this kernel lacks KVM_CAP_X2APIC_API"


API_FLAGS, API_FLAGS_SPLIT, UNUSABLE = look_at_kernel()
