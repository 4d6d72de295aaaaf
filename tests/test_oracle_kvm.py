"""The oracle against a real /dev/kvm: the same random operations on both, everything compared after each.

Where no usable /dev/kvm exists these tests skip and say why. Everything else that is tested against the oracle leans
on this file, so a long run is worth its time: `FASTEXIT_KVM_OPS=300000 pytest -m long tests/test_oracle_kvm.py`
(`FASTEXIT_KVM_SEED` picks other sequences).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import pytest

import oracle
import strategies as s
from fastexit import regs as r

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

CAP_SPLIT_IRQCHIP = 121
CAP_X2APIC_API = 129
IOAPIC_PINS = 24
CPUID_ENTRY = struct.Struct("<7I12x")
CPUID_1_ECX_X2APIC = 1 << 21
CPUID_1_ECX_DEADLINE = 1 << 24
MAXPHYADDR = 48

SHORT_OPS = 4_000
SHORT_SECONDS = 2.5
OPS_PER_VM = 400
LONG_OPS = int(os.environ.get("FASTEXIT_KVM_OPS", "100000"))

GUEST_BYTES = 0x10000
CODE_AT = 0x1000
FAULT_HANDLER_AT = 0x800
STACK_AT = 0x7000
VECTOR_HANDLERS_AT = 0x2000
PORT_DONE, PORT_FAULT, PORT_INTERRUPT = 0x10, 0x11, 0x12
EXIT_IO = 2
OUT_DONE = bytes((0xE6, PORT_DONE))
WRMSR, RDMSR = b"\x0f\x30", b"\x0f\x32"
STORES = {4: b"\x67\x66\x89\x07", 2: b"\x67\x89\x07", 1: b"\x67\x88\x07"}
LOADS = {4: b"\x67\x66\x8b\x07", 2: b"\x67\x8b\x07", 1: b"\x67\x8a\x07"}
"""16-bit encodings: [EDI] with EAX, AX, AL."""


class RealVcpu:
    """One vCPU file descriptor behind the face of `fastexit.Machine`'s vCPUs."""

    def __init__(self, vm: RealKvm, apic_id: int) -> None:
        self.id = apic_id
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

    def events(self) -> oracle.Events:
        buffer = bytearray(64)
        fcntl.ioctl(self.fd, KVM_GET_VCPU_EVENTS, buffer, True)
        return oracle.Events(nmi_pending=buffer[13], latched_init=buffer[27])

    # ----------------------------------------------------------------------------------- as the guest, by real code

    def start(self, vm: RealKvm, mapping_bytes: int) -> None:
        """Makes the vCPU able to run: real mode, interrupts off, data segment over the whole 4 GiB."""
        self.memory = vm.memory
        self.run_area = mmap.mmap(self.fd, mapping_bytes)
        vm.mappings.append(self.run_area)
        sregs = bytearray(312)
        fcntl.ioctl(self.fd, KVM_GET_SREGS, sregs, True)
        for segment in range(6):
            # struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g
            kind = 0xB if segment == 0 else 0x3
            struct.pack_into("<QIH8B", sregs, 24 * segment, 0, 0xFFFF_FFFF, 0, kind, 1, 0, 0, 1, 0, 1, 0)
        fcntl.ioctl(self.fd, KVM_SET_SREGS, sregs, True)
        self.set_mp_state(r.MP_RUNNABLE)

    def _run(self, program: bytes, registers: list[int], rflags: int) -> tuple[int, int, int]:
        """Runs a program until it writes to a port: the port, then EAX and EDX."""
        self.memory[CODE_AT : CODE_AT + len(program)] = program
        fcntl.ioctl(self.fd, KVM_SET_REGS, struct.pack("<18Q", *registers, *([0] * 8), CODE_AT, rflags))
        fcntl.ioctl(self.fd, KVM_RUN, 0)
        reason = struct.unpack_from("<I", self.run_area, 8)[0]
        port = struct.unpack_from("<H", self.run_area, 34)[0]
        assert reason == EXIT_IO, f"the guest stopped with exit {reason}"
        after = bytearray(144)
        fcntl.ioctl(self.fd, KVM_GET_REGS, after, True)
        eax, _, _, edx = struct.unpack_from("<4Q", after)
        return port, eax & 0xFFFF_FFFF, edx & 0xFFFF_FFFF

    def _execute(self, code: bytes, *, rax: int = 0, rcx: int = 0, rdx: int = 0, rdi: int = 0) -> tuple[bool, int, int]:
        """Runs one instruction; whether it went through, then EAX and EDX."""
        port, eax, edx = self._run(code + OUT_DONE, [rax, 0, rcx, rdx, 0, rdi, STACK_AT, 0], r.RFLAGS_FIXED)
        return port == PORT_DONE, eax, edx

    def taken(self) -> int | None:
        """The vector of the interrupt that the guest takes with RFLAGS.IF set, or None."""
        port, al, _ = self._run(OUT_DONE, [0, 0, 0, 0, 0, 0, STACK_AT, 0], r.RFLAGS_FIXED | r.RFLAGS_IF)
        return al & 0xFF if port == PORT_INTERRUPT else None

    def guest_wrmsr(self, msr: int, value: int) -> str:
        done, _, _ = self._execute(WRMSR, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
        return "ok" if done else "gp"

    def guest_rdmsr(self, msr: int) -> int | None:
        done, eax, edx = self._execute(RDMSR, rcx=msr)
        return edx << 32 | eax if done else None

    def mmio_write(self, offset: int, value: int, length: int = 4) -> None:
        self._execute(STORES[length], rax=value, rdi=r.APIC_DEFAULT_PHYS_BASE + offset)

    def mmio_read(self, offset: int, length: int = 4) -> int:
        _, eax, _ = self._execute(LOADS[length], rdi=r.APIC_DEFAULT_PHYS_BASE + offset)
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


def look_at_kernel() -> tuple[int, str | None]:
    """KVM_CAP_X2APIC_API flags that this kernel knows, and why the oracle cannot be held against it, if so."""
    try:
        with RealKvm(apic_ids=[0]) as vm:
            flags = fcntl.ioctl(vm.fd, KVM_CHECK_EXTENSION, CAP_X2APIC_API)
    except OSError as error:
        return 0, f"no usable /dev/kvm: {error.strerror}"
    return flags, None if flags & 3 == 3 else "this kernel lacks KVM_CAP_X2APIC_API"


API_FLAGS, UNUSABLE = look_at_kernel()
pytestmark = [pytest.mark.kvm, pytest.mark.skipif(UNUSABLE is not None, reason=UNUSABLE or "")]


@contextmanager
def pair(config: s.Config) -> Iterator[tuple[oracle.Machine, RealKvm]]:
    """The same machine twice: expected and real."""
    with config.build(RealKvm) as real:
        yield config.build(oracle.Machine), real


def step(expected: oracle.Machine, real: RealKvm, op: s.Op, history: list[s.Op], config: s.Config) -> None:
    """One operation on both sides, then a comparison of all that is visible."""
    history.append(op)
    want, got = s.apply(expected, op), s.apply(real, op)
    if op[0] == "get_msr" and op[2] == r.MSR_X2APIC_BASE + (r.APIC_TMCCT >> 4):
        want, got = want is None, got is None
    assert got == want, f"expected {want!r}, KVM says {got!r} after {s.story(config, history)}"
    for i, (model, vcpu) in enumerate(zip(expected.vcpus, real.vcpus)):
        page, real_page = s.masked(model.get_lapic()), s.masked(vcpu.get_lapic())
        assert page == real_page, f"vCPU {i} {s.differences(page, real_page)} after {s.story(config, history)}"


def run_sequences(operations: int, first_seed: int, seconds: float | None = None) -> int:
    """Random machines until so many operations (or so much time) are used up; how many it were."""
    done, seed, start = 0, first_seed, time.monotonic()
    while done < operations and (seconds is None or time.monotonic() - start < seconds):
        rng = random.Random(seed)
        irqchip = rng.choice(("full", "split"))
        config = s.random_config(
            rng,
            least=4,
            most=9,
            kernel="6.18",
            vendor="vmx",
            apicv=False,
            irqchip=irqchip,
            x2apic_api=rng.randrange(4) | rng.choice((0, 0, 0, r.X2API_NO_SUPPRESS_EOI)) & API_FLAGS,
        )
        late = [i for i in s.ID_POOL if i not in config.apic_ids]
        with pair(config) as (expected, real):
            history: list[s.Op] = []
            for op in s.setup_ops(rng, expected):
                step(expected, real, op, history, config)
            for number in range(min(OPS_PER_VM, operations - done)):
                op = s.host_op(rng, expected)
                if rng.random() < 0.004:
                    op = ("add_vcpu", late.pop(rng.randrange(len(late))))
                elif rng.random() < 0.01:
                    op = ("set_mp_state", rng.randrange(len(expected.vcpus)), rng.randrange(5))
                step(expected, real, op, history, config)
                done += 1
                if seconds is not None and number % 50 == 0 and time.monotonic() - start > seconds:
                    break
            for i in range(len(expected.vcpus)):
                step(expected, real, ("events", i), history, config)
        seed += 1
    return done


PPR_MSR = r.MSR_X2APIC_BASE + (r.APIC_PROCPRI >> 4)
NOT_FOR_GUESTS = (r.DM_NMI, r.DM_INIT)
"""Delivery modes that would take the vCPU away from the instruction under test."""


def tame(op: s.Op) -> bool:
    """Whether an operation leaves every vCPU able to run the next one: no NMI, no INIT, no timer, no other page."""
    name, *arguments = op
    if name == "signal_msi":
        return arguments[1] >> 8 & 7 not in NOT_FOR_GUESTS
    if name in ("set_msr", "guest_wrmsr"):
        _, msr, value = arguments
        if msr == r.MSR_X2APIC_ICR:
            return value >> 8 & 7 not in NOT_FOR_GUESTS
        if msr == r.MSR_APICBASE:
            # bits that fault may stay; a page that moves would have to be followed
            return value & r.APICBASE.mask("BASE") & (1 << MAXPHYADDR) - 1 == r.APIC_DEFAULT_PHYS_BASE
        return msr not in (r.MSR_TSC_DEADLINE, r.MSR_X2APIC_BASE + (r.APIC_TMICT >> 4))
    if name == "mmio_write":
        _, offset, value, length = arguments
        icr_ok = offset != r.APIC_ICR or value >> 8 & 7 not in NOT_FOR_GUESTS
        return icr_ok and offset != r.APIC_TMICT and length in STORES and offset + length <= 0x1000
    if name == "mmio_read":
        return arguments[1] + arguments[2] <= 0x1000
    if name == "set_lapic":
        return struct.unpack_from("<I", arguments[1], r.APIC_TMICT)[0] == 0
    return name not in ("pending", "ack", "eoi", "get_mp_state")


def run_guests(operations: int, first_seed: int, seconds: float | None = None) -> int:
    """As run_sequences, with operations that vCPUs carry out themselves: MMIO and WRMSR by real instructions."""
    done, seed, start = 0, first_seed, time.monotonic()
    while done < operations and (seconds is None or time.monotonic() - start < seconds):
        rng = random.Random(seed)
        api = rng.randrange(4)
        config = s.random_config(rng, least=3, most=6, kernel="6.18", vendor="vmx", apicv=False, x2apic_api=api)
        with pair(config) as (expected, real):
            real.start_guests()
            for model in expected.vcpus:
                model.set_mp_state(r.MP_RUNNABLE)
            history: list[s.Op] = []
            for op in s.setup_ops(rng, expected):
                step(expected, real, op, history, config)
            for _ in range(min(OPS_PER_VM, operations - done)):
                op = s.guest_op(rng, expected)
                if not tame(op):
                    continue
                guest_step(expected, real, op, history, config)
                done += 1
        seed += 1
    return done


def guest_step(expected: oracle.Machine, real: RealKvm, op: s.Op, history: list[s.Op], config: s.Config) -> None:
    """One operation; running a vCPU may or may not refresh its PPR, so both sides do so before and after."""
    history.append(op)
    runs = op[0] in s.GUEST_OPS
    if runs:
        refresh_ppr(expected.vcpus[op[1]], real.vcpus[op[1]])
    want, got = s.apply(expected, op), s.apply(real, op)
    if runs:
        expected.vcpus[op[1]].get_mp_state()  # the run carried out what was pending
        refresh_ppr(expected.vcpus[op[1]], real.vcpus[op[1]])
    unknown = op[0] == "mmio_read" and want is None
    assert unknown or got == want, f"expected {want!r}, KVM says {got!r} after {s.story(config, history)}"
    for i, (model, vcpu) in enumerate(zip(expected.vcpus, real.vcpus)):
        page, real_page = s.masked(model.get_lapic()), s.masked(vcpu.get_lapic())
        assert page == real_page, f"vCPU {i} {s.differences(page, real_page)} after {s.story(config, history)}"


def refresh_ppr(model: oracle.Vcpu, vcpu: RealVcpu) -> None:
    """Reads PPR on both sides, which stores it; a disabled APIC offers no way to."""
    for side in (model, vcpu):
        if model.x2apic:
            side.get_msr(PPR_MSR)
        elif model.hw_enabled:
            side.mmio_read(r.APIC_PROCPRI)


def test_guest_instructions() -> None:
    """Stores, loads and WRMSRs that a guest really executes."""
    assert run_guests(SHORT_OPS, first_seed=1, seconds=SHORT_SECONDS) > 0


def run_interrupts(trials: int, seed: int) -> None:
    """Pages at random: what the oracle calls pending is what a guest with interrupts on takes."""
    rng = random.Random(seed)
    config = s.Config(apic_ids=(0, 1))
    with pair(config) as (expected, real):
        real.start_guests()
        model, vcpu = expected.vcpus[0], real.vcpus[0]
        for _ in range(trials):
            base = r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_BSP | rng.choice((0, r.APICBASE_EN, r.APICBASE_EN, 0xC00))
            page = bytearray(model.get_lapic())
            for words, chance in ((r.APIC_IRR, 0.4), (r.APIC_ISR, 0.1), (r.APIC_TMR, 0.1)):
                for word in range(8):
                    bits = 1 << rng.randrange(32) if rng.random() < chance else 0
                    struct.pack_into("<I", page, words + 0x10 * word, bits)
            struct.pack_into("<I", page, r.APIC_TASKPRI, rng.choice((0, 0, rng.randrange(256))))
            struct.pack_into("<I", page, r.APIC_SPIV, rng.choice((0xFF, 0x1FF)))
            story = f"APICBASE {base:#x}, {s.describe(('set_lapic', 0, bytes(page)))}"
            for side in (model, vcpu):
                side.set_msr(r.MSR_APICBASE, base)
                side.set_lapic(bytes(page))
            want, got = model.pending(), vcpu.taken()
            assert got == want, f"expected {want}, the guest took {got}; {story}"


def test_pending_is_what_a_guest_takes() -> None:
    run_interrupts(300, seed=1)


def test_random_sequences() -> None:
    """A few seconds' worth, so that every run of the suite looks at the real kernel at all."""
    assert run_sequences(SHORT_OPS, first_seed=1, seconds=SHORT_SECONDS) > 0


@pytest.mark.long
def test_random_sequences_at_length() -> None:
    first_seed = int(os.environ.get("FASTEXIT_KVM_SEED", "1000000"))
    assert run_sequences(LONG_OPS, first_seed) >= LONG_OPS
    assert run_guests(LONG_OPS // 4, first_seed) >= LONG_OPS // 4
    run_interrupts(LONG_OPS // 20, first_seed)
