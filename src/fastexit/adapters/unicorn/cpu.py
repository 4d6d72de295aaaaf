"""One emulated CPU: which instructions of the guest become what of its vCPU.

An access to the APIC is ``Vcpu.hw_wrmsr`` and its like: the instruction as the CPU under fastexit's hypervisor does it,
with an exit or without. An access to the IOAPIC's page is ``Vcpu.mem_write``, IN and OUT are ``Vcpu.io_read`` and
``io_write``; where no device of the machine is, nobody answers. What comes of it all between two instructions is in
interrupts.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import unicorn
from unicorn import x86_const

from fastexit import layout as L
from fastexit import regs as R
from fastexit.adapters.unicorn import firmware as firmware
from fastexit.adapters.unicorn import hook as H
from fastexit.adapters.unicorn.engine import CR0_PE
from fastexit.adapters.unicorn.fault import DB, UD, Fault
from fastexit.adapters.unicorn.gate import RF, TF, Event, canonical
from fastexit.adapters.unicorn.hook import Stop
from fastexit.adapters.unicorn.interrupts import Interruptible
from fastexit.adapters.unicorn.state import LONG, SIZE_32
from fastexit.adapters.unicorn.syscall import syscall, sysenter
from fastexit.checks import integer
from fastexit.outcome import CODE_GP, OUTCOMES, Outcome, Path, UserRead
from fastexit.reasons import KvmExit, SvmExit, VmxExit
from fastexit.vcpu import HYPERCALL_REGISTERS

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.host import UnicornHost

MSR_TSC_AUX = 0xC000_0103
OURS = frozenset(
    {
        R.MSR_TSC,
        R.MSR_APICBASE,
        R.MSR_TSC_ADJUST,
        R.MSR_TSC_DEADLINE,
        *range(R.MSR_X2APIC_BASE, R.MSR_X2APIC_BASE + 0x100),
    }
)
"""MSRs that fastexit answers for; all others are Unicorn's."""
ICRS = frozenset(R.MSR_X2APIC_BASE + (offset >> 4) for offset in (R.APIC_ICR, R.APIC_SELF_IPI))
CLOCKED = frozenset({R.MSR_TSC_DEADLINE, R.MSR_X2APIC_BASE + (R.APIC_TMICT >> 4)})
"""MSRs whose writes start a timer."""
CPUID_X2APIC, CPUID_DEADLINE, CPUID_APIC = 1 << 21, 1 << 24, 1 << 9
"""Of leaf 1: the first two of ECX, the last of EDX."""
LEAF_TOPOLOGY, LEAF_ADDRESSES = 0xB, 0x8000_0008
TOPOLOGY_LEVELS = 1, 2
"""SMT and core: sub-leaves 0 and 1. Each CPU is a package by itself, as Unicorn's leaf 1 and 4 have it."""
PRIVILEGED = frozenset({Stop.WRMSR, Stop.RDMSR, Stop.HLT, Stop.CR8_WRITE, Stop.CR8_READ})
DR6_BS = 1 << 14
CR4_TSD = 1 << 2
PREFIXES = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3, *range(0x40, 0x50)))
_U32 = 0xFFFF_FFFF
_CR8_REGISTERS = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16)))


class UnicornCpu(Interruptible):
    """One CPU of a UnicornHost: ``host.cpus[i]``. ``uc`` is its engine, ``vcpu`` its APIC."""

    started: bool
    asleep: bool
    poked: bool
    waits: bool
    put_off: bool

    def __init__(self, host: UnicornHost, index: int) -> None:
        super().__init__(host, index)
        self._hardware = host.machine.hardware
        svm = host.machine.vendor == "svm"
        self._hlt = SvmExit.HLT if svm else VmxExit.HLT
        self._hypercall_reason = SvmExit.VMMCALL if svm else VmxExit.VMCALL
        self._cr8 = (SvmExit.READ_CR8, SvmExit.WRITE_CR8) if svm else None
        self._apic_pages: set[int] = set()
        self._slice_began = 0
        self.put_off = False
        self._map_apic()
        self._reach_devices()

    def __repr__(self) -> str:
        return f"<UnicornCpu {self.index} {self.state} at {self.read('RIP'):#x}>"

    @property
    def state(self) -> str:
        """not started, running, halted, or waiting for SIPI."""
        if self.waits:
            return "waiting for SIPI"
        if not self.started:
            return "not started"
        return "halted" if self.asleep else "running"

    @property
    def instructions(self) -> int:
        """Instructions begun so far. One that writes to its own page of code begins twice, as Unicorn has it."""
        return self.words[H.COUNT]

    def start(self, rip: int, *, rsp: int = 0, bits: int = 64) -> None:
        """Let it run at ``rip`` in 64-bit mode, whatever it waited for: 4 GiB mapped as they are, interrupts off.

        CS and SS are the firmware's (64-bit code 0x08, data 0x10), and there is no IDT. With ``bits=32`` it is
        protected mode without paging, all segments flat, as a Multiboot loader leaves it. A CPU that is not started
        waits for INIT and SIPI, and begins in real mode. TypeError or ValueError for what is no address, or no such
        mode.
        """
        if integer(bits, "bits") not in (32, 64):
            raise ValueError(f"bits {bits}: 64 or 32")
        for name, value in (("rip", rip), ("rsp", rsp)):
            if not canonical(integer(value, name)) or bits == 32 and value > _U32:
                raise ValueError(f"{name} {value:#x} is not a{' 32-bit' if bits == 32 else ' canonical'} address")
        self.long_mode(rip, rsp) if bits == 64 else self.protected_mode(rip, rsp)
        if self.vcpu.get_mp_state() != R.MP_RUNNABLE:
            self.vcpu.set_mp_state(R.MP_RUNNABLE)
        self.waits = False
        self.started, self.asleep, self.poked = True, False, True

    def slice(self, budget: int) -> int:
        """Up to ``budget`` instructions: how many they were. Fewer where the CPU falls asleep."""
        words = self.words
        self._slice_began = first = words[H.COUNT]
        end = first + budget
        self.poked = self.put_off = False
        if not self._settle():
            return 0
        while words[H.COUNT] < end:
            words[H.LIMIT], words[H.ARMED] = end, self._armed()
            stop = self._emulate()
            if stop is not None:
                self.counters.stops[stop] += 1
                if stop in PRIVILEGED and self.ring():
                    self._begin(stop)
                    self._general_protection()
                elif stop in _HANDLERS:
                    _HANDLERS[stop](self, stop)
            if self._trap is not None:
                self._exception(self._trap)
            if self.asleep or self.put_off or not self._settle():
                break
        self._sync()
        return words[H.COUNT] - first

    # ------------------------------------------------------------------------------------- the APIC's page and devices

    def _reach_devices(self) -> None:
        """What is no memory is devices, up to the firmware: the APIC's page and the IOAPIC's are among them."""
        base, end = self.host.memory_bytes, firmware.BASE
        self.uc.mmio_map(base, end - base, self._device_read, base, self._device_write, base)
        for instruction, act in (
            (x86_const.UC_X86_INS_IN, self._port_read),
            (x86_const.UC_X86_INS_OUT, self._port_write),
        ):
            self.uc.hook_add(unicorn.UC_HOOK_INSN, act, None, 1, 0, instruction)

    def _map_apic(self) -> None:
        """The page at APICBASE is a device above 4 GiB, too. Memory hides it, as KVM's memslots do."""
        page = self.vcpu.apic_page
        if page > firmware.BASE and page not in self._apic_pages:
            self._apic_pages.add(page)
            self.uc.mmio_map(page, 0x1000, self._device_read, page, self._device_write, page)

    def _device_read(self, uc: Any, offset: int, size: int, base: int) -> int:
        address, v = base + offset, self.vcpu
        self._begin_access()
        if address & ~0xFFF == v.apic_page:
            self.counters.mmio += 1
            outcome = OUTCOMES[self._hardware.mmio_read(v, address & 0xFFF, size)]
            self._after_access(outcome)
            if outcome.user is None:
                return v.read_data
            return self._answer_to(self.host.devices.memory_read(self, address, size), size)
        self.counters.devices += 1
        value = v.mem_read(address, size)
        if isinstance(value, UserRead):
            return self._answer_to(self.host.devices.memory_read(self, address, size), size)
        return value

    def _device_write(self, uc: Any, offset: int, size: int, value: int, base: int) -> None:
        address, v = base + offset, self.vcpu
        value &= (1 << 8 * size) - 1
        self._begin_access()
        if address & ~0xFFF == v.apic_page:
            self.counters.mmio += 1
            outcome = v.hw_mmio_write(address & 0xFFF, value, size)
            if address & 0xFFF == R.APIC_ICR:
                self._count_ipi(outcome)
        else:
            self.counters.devices += 1
            outcome = v.mem_write(address, value, size)
        if outcome.user is KvmExit.MMIO:
            self.host.devices.memory_write(self, address, value, size)
        self._after_access(outcome)

    def _port_read(self, uc: Any, port: int, size: int, data: Any) -> int:
        self._begin_access()
        self.counters.devices += 1
        value = self.vcpu.io_read(port, size)
        if isinstance(value, UserRead):
            return self._answer_to(self.host.devices.port_read(self, port, size), size)
        return value

    def _port_write(self, uc: Any, port: int, size: int, value: int, data: Any) -> None:
        self._begin_access()
        self.counters.devices += 1
        value &= (1 << 8 * size) - 1
        outcome = self.vcpu.io_write(port, value, size)
        if outcome.user is KvmExit.IO:
            self.host.devices.port_write(self, port, value, size)
        self._after_access(outcome)

    def _begin_access(self) -> None:
        """Whatever comes of an access to a device is looked at before the next instruction."""
        self.words[H.LIMIT] = 0
        self._flags = self.read("EFLAGS")
        self._sync()

    def _answer_to(self, value: int, size: int) -> int:
        """User space's answer to a read."""
        value &= (1 << 8 * size) - 1
        if self.vcpu.user_io or self.vcpu.user_mmio:
            self.vcpu.complete_access(value)
        return value

    def _after_access(self, outcome: Outcome) -> None:
        self.counters.paths[outcome.path] += 1
        if outcome.effects or outcome.accepted:
            self.host.poke()

    def _count_ipi(self, outcome: Outcome) -> None:
        self.counters.ipis += 1
        self.counters.ipis_fast += outcome.path is Path.FAST

    def _begin(self, stop: Stop) -> int:
        """RIP of the instruction that stopped, which is behind it where Unicorn hooks it by name."""
        self._flags = self.read("EFLAGS")
        if self.words[H.NAMED] >> stop & 1:
            self.write("RIP", self.read("RIP") - self.words[H.SIZE])
        else:
            self.words[H.COUNT] += 1
        self._sync()
        return self._rip

    def _end(self, rip: int) -> None:
        """The instruction at ``rip`` is done."""
        self.write("RIP", rip + self.words[H.SIZE])
        self.words[H.SHADOW] = self.words[H.DUE] = 0
        if self._flags & (RF | TF):
            self._flags &= ~RF
            self.write("EFLAGS", self._flags)
            if self._flags & TF:
                self.write("DR6", self.read("DR6") | DR6_BS)
                self._trap = DB

    def _leave_to_unicorn(self, stop: Stop) -> None:
        """The instruction is Unicorn's."""
        self.words[H.PASS] = 1
        self.words[H.COUNT] -= 1

    def _put_it_off(self) -> None:
        """The instruction is the next slice's first: the machine's clock is then where the guest's TSC is."""
        self.words[H.COUNT] -= 1
        self.put_off = True

    def _wrmsr(self, stop: Stop) -> None:
        rip = self._begin(stop)
        msr = self.read("RCX") & _U32
        if msr not in OURS:
            return self._leave_to_unicorn(stop)
        if msr in CLOCKED and self.words[H.COUNT] - 1 != self._slice_began:
            return self._put_it_off()
        value = (self.read("RDX") & _U32) << 32 | self.read("RAX") & _U32
        if msr == R.MSR_TSC:  # the machine's clock is at the slice's beginning
            value = value - self._ticks() & L.NONE
        outcome = self.vcpu.hw_wrmsr(msr, value)
        if outcome.fault:
            return self._general_protection()
        if msr in ICRS:
            self._count_ipi(outcome)
        self._after_access(outcome)
        if msr == R.MSR_APICBASE:
            self._map_apic()
        self._end(rip)
        return None

    def _rdmsr(self, stop: Stop) -> None:
        rip = self._begin(stop)
        msr = self.read("RCX") & _U32
        if msr not in OURS:
            return self._leave_to_unicorn(stop)
        if msr == R.MSR_TSC:
            self._answer(self.tsc())  # the CPU reads it by itself
        else:
            code = self._hardware.rdmsr(self.vcpu, msr)
            if code & CODE_GP:
                return self._general_protection()
            self.counters.paths[OUTCOMES[code].path] += 1
            self._answer(self.vcpu.read_data)
        self._end(rip)
        return None

    def _answer(self, value: int) -> None:
        """In EDX:EAX."""
        self.write("RAX", value & _U32)
        self.write("RDX", value >> 32)

    def _ticks(self) -> int:
        """What the TSC has counted in this slice, which the machine's clock has not."""
        time, done = self.host.machine.time, self.words[H.COUNT] - self._slice_began
        row = L.TSC + self.vcpu.index * L.TSC_STRIDE
        khz = self._mem[L.H_TSC_KHZ] ^ self._mem[row + L.TSC_RATE]
        return (time + self.host.ns(done)) * khz // 1_000_000 - time * khz // 1_000_000

    def tsc(self) -> int:
        """The guest's TSC: the vCPU's at the machine's clock, and what this slice has done since."""
        return self.vcpu.tsc + self._ticks() & L.NONE

    def _rdtsc(self, stop: Stop) -> None:
        rip = self._begin(stop)
        if self.read("CR4") & CR4_TSD and self.ring():
            return self._general_protection()
        self._answer(self.tsc())
        if stop is Stop.RDTSCP:
            self.write("RCX", self.uc.msr_read(MSR_TSC_AUX) & _U32)
        self._end(rip)
        return None

    def _port(self, stop: Stop) -> None:
        """IN, OUT, INS or OUTS, which Unicorn lets every ring do."""
        self._begin(stop)
        iopl = self._flags >> 12 & 3
        if self.ring() > iopl and not self._port_allowed():
            return self._general_protection()
        return self._leave_to_unicorn(stop)

    def _port_allowed(self) -> bool:
        """What the I/O map of the task state says of the instruction's port."""
        code = self.instruction().lstrip(PREFIXES)
        port = code[1] if code[0] & 0xFC == 0xE4 else self.read("RDX") & 0xFFFF
        size = 1 if not code[0] & 1 else 2 if self._small_operand() else 4
        _, base, limit = self.table("TR")
        if limit < 103:
            return False
        at = int.from_bytes(self.linear_read(base + 102, 2), "little") + (port >> 3)
        if at + 1 > limit:
            return False
        bits = int.from_bytes(self.linear_read(base + at, 2), "little") >> (port & 7)
        return not bits & (1 << size) - 1

    def _small_operand(self) -> bool:
        """The instruction's operand has 16 bits."""
        code = self.instruction()
        prefixed = 0x66 in code[: len(code) - len(code.lstrip(PREFIXES))]
        return prefixed != (not self.segment("CS").attributes & (LONG | SIZE_32))

    def _system_call(self, stop: Stop) -> None:
        """SYSCALL or SYSENTER."""
        rip = self._begin(stop)
        try:
            (syscall if stop is Stop.SYSCALL else sysenter)(self, rip, self._flags)
        except Fault as fault:
            self.counters.exceptions[fault.vector] += 1
            return self._through_idt(Event.EXCEPTION, fault.vector, None if fault.vector == UD else fault.error)
        self.words[H.SHADOW] = self.words[H.DUE] = 0
        self._flags = self.read("EFLAGS")
        return None

    def _cpuid(self, stop: Stop) -> None:
        """Unicorn's answer, with what fastexit offers and the CPU's own ids in it."""
        leaf, subleaf = self.read("RAX") & _U32, self.read("RCX") & _U32
        rip = self._begin(stop)
        if self._flags & TF:
            self.write("EFLAGS", self._flags & ~TF)
        self._carry_out(rip, 1)
        vcpu_id = self.vcpu.vcpu_id
        if leaf == 1:
            self.write("RBX", self.read("RBX") & 0x00FF_FFFF | (vcpu_id & 0xFF) << 24)
            config = self._mem[L.H_CONFIG]
            offered = CPUID_X2APIC if config & L.CONFIG_X2APIC_CPUID else 0
            offered |= CPUID_DEADLINE if config & L.CONFIG_DEADLINE_CPUID else 0
            self.write("RCX", self.read("RCX") & ~(CPUID_X2APIC | CPUID_DEADLINE) | offered)
            if not self.vcpu.apic_base & R.APICBASE_EN:
                self.write("RDX", self.read("RDX") & ~CPUID_APIC)
        elif leaf == LEAF_ADDRESSES:
            self.write("RAX", self.read("RAX") & 0xFFFF_FF00 | self._mem[L.H_MAXPHYADDR])
        elif leaf == LEAF_TOPOLOGY:
            level = TOPOLOGY_LEVELS[subleaf] if subleaf < len(TOPOLOGY_LEVELS) else 0
            self.write("RBX", 1 if level else 0)
            self.write("RCX", subleaf & 0xFF | level << 8)
            self.write("RDX", vcpu_id)
        self._end(rip)

    def _halt(self, stop: Stop) -> None:
        rip = self._begin(stop)
        outcome = self.vcpu.exit(self._hlt)
        self._end(rip)
        self._after_access(outcome)
        self.asleep = outcome.user is None and self.vcpu.mode == R.OUTSIDE_GUEST_MODE

    def _hypercall(self, stop: Stop) -> None:
        """VMCALL or VMMCALL: KVM takes either for its vendor's own. User space leaves a call that is its to KVM."""
        rip = self._begin(stop)
        self.words[H.SIZE] = 3  # which Unicorn does not know: it has no VMX
        v, wide = self.vcpu, self.in_64_bit_mode()
        v.real_mode = not self.read("CR0") & CR0_PE
        registers = {name: self.read(name.upper()) for name in HYPERCALL_REGISTERS}
        xmm: list[int] = []
        if self._mem[L.H_CONFIG] & L.CONFIG_HYPERV:
            for n in range(6):
                both = self.uc.reg_read(x86_const.UC_X86_REG_XMM0 + n)
                xmm += both & L.NONE, both >> 64
        outcome = v.exit(self._hypercall_reason, **registers, xmm=xmm, bits64=wide, cpl=self.ring())
        if outcome.user is not None:
            v.run()
        if outcome.fault:
            self._trap = outcome.fault
            return
        self.write("RAX", v.read_data)
        self._after_access(outcome)
        self._end(rip)

    def _move_cr8(self, stop: Stop) -> None:
        """MOV to or from CR8, which a TPR shadow makes an access to TPR."""
        rip = self._begin(stop)
        v, write = self.vcpu, stop is Stop.CR8_WRITE
        register = _CR8_REGISTERS[self.words[H.REGISTER]]
        value = self.read(register) if write else 0
        if value > 0xF:
            return self._general_protection()
        if v.apicv and v.apic_base & R.APICBASE_EN:
            if write and v.apic_base & R.APICBASE_EXTD:
                self._after_access(v.hw_wrmsr(R.MSR_X2APIC_BASE + (R.APIC_TASKPRI >> 4), value << 4))
            elif write:
                self._after_access(v.hw_mmio_write(R.APIC_TASKPRI, value << 4))
            got = v.cr8
        else:
            if self._cr8:
                outcome = v.exit(self._cr8[write], value=value)
            else:
                outcome = v.exit(VmxExit.CR_ACCESS, info1=8 | (0 if write else 1 << 4), value=value)
            self._after_access(outcome)
            got = v.read_data
        if not write:
            self.write(register, got)
        self._end(rip)
        return None


_HANDLERS = {
    Stop.WRMSR: UnicornCpu._wrmsr,
    Stop.RDMSR: UnicornCpu._rdmsr,
    Stop.RDTSC: UnicornCpu._rdtsc,
    Stop.RDTSCP: UnicornCpu._rdtsc,
    Stop.CPUID: UnicornCpu._cpuid,
    Stop.HLT: UnicornCpu._halt,
    Stop.HYPERCALL: UnicornCpu._hypercall,
    Stop.CR8_WRITE: UnicornCpu._move_cr8,
    Stop.CR8_READ: UnicornCpu._move_cr8,
    Stop.SYSCALL: UnicornCpu._system_call,
    Stop.SYSENTER: UnicornCpu._system_call,
    Stop.PORT: UnicornCpu._port,
}
