"""A vCPU whose APIC, and every chip behind it, is fastexit: what happens between two runs of the real CPU.

The real CPU's state that interrupts depend on (RFLAGS.IF, the interrupt shadow, CR8) is told to the model behind each
run; what the model then wants to go in goes in by KVM_INTERRUPT, KVM_NMI or KVM_SMI, and by new registers for INIT and
SIPI. KVM keeps NMIs and SMIs that cannot go in yet, so the model's are free for the next ones at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import fastexit as fx
from fastexit import regs as R
from fastexit.adapters.kvmhost.emulate import instruction
from fastexit.adapters.kvmhost.power import Ended
from fastexit.adapters.kvmhost.vcpu import FAILED, HostVcpu
from fastexit.kvm import ioctl as K
from fastexit.outcome import Effect, Outcome, Target
from fastexit.reasons import KvmExit, SvmExit, VmxExit

if TYPE_CHECKING:
    from fastexit.adapters.kvmhost.host import KvmHost

ICRS = frozenset(R.MSR_X2APIC_BASE + (offset >> 4) for offset in (R.APIC_ICR, R.APIC_SELF_IPI))
EOI_MSR = R.MSR_X2APIC_BASE + (R.APIC_EOI >> 4)
TIME_STAMPS = frozenset((R.MSR_TSC, R.MSR_TSC_ADJUST))
IF_SET = R.RFLAGS_FIXED | R.RFLAGS_IF
STUCK_NS = 20_000_000
HYPERCALLS = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
IN_SMM = 1
"""KVM_RUN_X86_SMM of run->flags."""


class ModelVcpu(HostVcpu):
    """A vCPU of a KvmHost with irqchip="fastexit"; ``v`` is its vCPU of the model.

    ``taken``: interrupts that went into the guest, by vector; ``events``: everything that did, by name.
    """

    def __init__(self, host: KvmHost, index: int, fd: int, kvm_run: Any) -> None:
        super().__init__(host, index, fd, kvm_run)
        self.v: fx.Vcpu = host.machine.vcpus[index]
        self.taken: Counter[int] = Counter()
        self.external: Counter[int] = Counter()
        self.events: Counter[str] = Counter()
        self._cr8 = 0
        self._looks = -1
        """Names of deadlines at which a slow CPU is looked at."""
        self._stood_at = 0
        self._waits = False
        """An access of the guest's is answered, and KVM has not been told yet."""
        self._queued = False
        """KVM was given an NMI or an SMI, and may still have it."""
        self._moved = self._behind = 0
        """By how much the guest has moved its TSC, and how far KVM had put it back at the last deadline."""
        svm = host.machine.vendor == "svm"
        self._hlt = SvmExit.HLT if svm else VmxExit.HLT
        self._gate = host.gate
        self._has_smm = bool(host.vm.has(K.CAP_X86_SMM))
        self._interrupt = K.ffi.new("struct kvm_interrupt *")
        self._msr = K.ffi.new("struct one_msr *", {"nmsrs": 1})

    def turn(self) -> None:
        """What the model has for this vCPU, and a run of the real one with its exit."""
        v, kick, host = self.v, self.kick, self.host
        kick.taken()  # before anything is looked at: what comes later ends the run or the sleep
        with self._gate:
            if host.clock() >= self.pace.earliest():
                for outcome in v.run_timers():
                    self.pace.fired()
                    self.tell(outcome.targets)
            runs = self._settled()
            due = v.next_timer()
            window = runs and (v.irq_window or (v.apicv and v.pending() is not None))
        if host.ended is not None:
            return
        if due is not None:
            due = max(due, self.pace.earliest())
        wait = None if due is None else max(0, due - host.clock())
        if not runs:
            if v.exit_reason is not None and v.exit_reason is not KvmExit.INTR:
                host.end(Ended(f"the model's vCPU {self.index} left with {v.exit_reason.name}", FAILED))
                return
            kick.sleep(None if wait is None else wait / 1e9)
            return
        if host.slow and (wait is None or wait > STUCK_NS):
            due, wait = self._looks, STUCK_NS
        kick.arm(due, wait or 0)
        run = self.kvm_run
        run.request_interrupt_window = window
        run.cr8 = self._cr8 = v.cr8
        stood, ran = v.rip, self.enter()
        self._waits = False
        with self._gate:
            self._look(ran)
            self.pace.left(host.clock(), free=v.rflags == IF_SET, moved=ran or v.rip != stood)
            if ran:
                self._exit(int(run.exit_reason))
            elif host.slow:
                self._hypercall()

    def _settled(self) -> bool:
        """Vcpu.settle and take until the CPU goes on (True) or the vCPU sleeps or has left."""
        v = self.v
        while v.settle():
            self.tell(v.targets)
            event = v.take()
            if event is None:
                return True
            self._deliver(event)
        self.tell(v.targets)
        return False

    def _look(self, ran: bool) -> None:
        """The model learns how the CPU has left the guest."""
        v, run = self.v, self.kvm_run
        v.rip = int(run.regs.rip)
        if run.cr8 != self._cr8:
            # Told while nothing may go in: with IF set it would have been an exit of its own (KVM_EXIT_SET_TPR).
            # What it lets through goes in behind the exit that is told next, which may be a HLT that it has to wake.
            v.rflags = R.RFLAGS_FIXED
            v.cr8 = self._cr8 = int(run.cr8)
            self.tell(v.targets)
        # KVM says whether an interrupt may go in, not why not. An interrupt shadow that the model knew of would keep
        # NMIs out as well, which KVM keeps by itself.
        halted = ran and run.exit_reason == KvmExit.HLT
        v.rflags = IF_SET if run.if_flag and (run.ready_for_interrupt_injection or halted) else R.RFLAGS_FIXED
        if v.smm and not run.flags & IN_SMM:
            v.rsm()

    def _deliver(self, event: Any) -> None:
        """An event goes into the real CPU."""
        v = self.v
        self.events[type(event).__name__] += 1
        self.pace.delivered(self.host.clock())
        if isinstance(event, fx.Interrupt | fx.ExtInt):
            (self.taken if isinstance(event, fx.Interrupt) else self.external)[event.vector] += 1
            self._interrupt.irq = event.vector
            K.call(self.fd, K.INTERRUPT, self._interrupt)
            v.rflags = R.RFLAGS_FIXED  # its gate clears IF, and there is room for one
        elif isinstance(event, fx.Nmi):
            K.call(self.fd, K.NMI)
            self._queued = True
            v.nmi_masked = False
        elif isinstance(event, fx.Smi):
            if self._has_smm:
                K.call(self.fd, K.SMI)
                self._queued = True
            elif v.smm:
                v.rsm()
        elif isinstance(event, fx.Init):
            self._complete()
            self.registers.init(v.apic_base)
            self._begins()
        elif isinstance(event, fx.Sipi):
            self._complete()
            self.registers.sipi(event.vector, v.apic_base)
            self._begins()

    def _wakes(self) -> bool:
        """Whether an NMI or SMI that KVM was given has yet to go in, so that HLT does not wait.

        An interrupt shadow keeps it off: STI; HLT comes out as KVM_EXIT_HLT, for without an APIC KVM does not look.
        """
        if not self._queued:
            return False
        events = K.ffi.new("struct kvm_vcpu_events *")
        K.call(self.fd, K.GET_VCPU_EVENTS, events)
        nmi, smi = events.nmi, events.smi
        self._queued = bool(nmi.pending or nmi.injected or smi.pending)
        return bool(nmi.injected or (nmi.pending and not nmi.masked) or (smi.pending and not smi.smm))

    def _begins(self) -> None:
        v = self.v
        v.rflags, v.shadow, self._cr8 = R.RFLAGS_FIXED, 0, v.cr8

    def _complete(self) -> None:
        """KVM ends an access of the guest's that waits for its answer: it would change the registers afterwards."""
        if self._waits:
            self.kvm_run.immediate_exit = 1
            self.enter()
            self.kvm_run.immediate_exit = 0
            self._waits = False

    def tell(self, targets: Iterable[Target]) -> None:
        """Effects of what this vCPU did: the others' threads look."""
        vcpus = self.host.vcpus
        for vcpu, effect in targets:
            if vcpu != self.index and effect != Effect.NONE:
                vcpus[vcpu].kick.kick()

    def _hypercall(self) -> None:
        """A KVM that emulates ring 0 may stay at VMCALL for ever: a kick shows it, and the model has the answer."""
        self._looks -= 1
        at = int(self.kvm_run.regs.rip)
        again, self._stood_at = at == self._stood_at, at
        if not again or instruction(self.host.memory, self.fd, at)[0:3] not in HYPERCALLS:
            return
        regs, v = self.registers.read(), self.v
        outcome = v.hypercall(int(regs.rax), int(regs.rbx), int(regs.rcx), int(regs.rdx), int(regs.rsi))
        self.tell(outcome.targets)
        regs.rax, regs.rip = v.read_data, at + 3
        K.call(self.fd, K.SET_REGS, regs)
        self.host.completed["VMCALL"] += 1

    # ---------------------------------------------------------------------------------------------------------- exits

    def _exit(self, reason: int) -> None:
        self.exits[KvmExit(reason)] += 1
        if reason == KvmExit.X86_WRMSR:
            self._waits = True
            self._wrmsr()
        elif reason == KvmExit.X86_RDMSR:
            self._waits = True
            self._rdmsr()
        elif reason == KvmExit.HLT:
            if not self._wakes():
                self.pace.rests()
                self._told(self.v.exit(self._hlt))
        elif reason in (KvmExit.IO, KvmExit.MMIO):
            self._waits = True
            self.common(reason)
        elif reason not in (KvmExit.IRQ_WINDOW_OPEN, KvmExit.SET_TPR, KvmExit.INTR) and not self.common(reason):
            self.host.end(Ended(f"vCPU {self.index} left with KVM_EXIT {reason}", FAILED))

    def _told(self, outcome: Outcome) -> None:
        self.tell(outcome.targets)

    def _wrmsr(self) -> None:
        """KVM_EXIT_X86_WRMSR."""
        v, run = self.v, self.kvm_run
        msr, value = int(run.msr.index), int(run.msr.data)
        if not self.host.models_msr(msr):
            run.msr.error = 1
            self.host.unknown_msrs[msr] += 1
            return
        if msr in ICRS:
            self.host.recorder.ipi(v, msr, value)
        before = int(run.apic_base)
        if msr == R.MSR_TSC_DEADLINE and value and not self.host.tsc.steady:
            self._behind = self.host.tsc.behind(self.fd, self._moved)
            value = min(max(value + self._behind, 1), (1 << 64) - 1)
        outcome = v.wrmsr(msr, value)
        self.host.recorder.wrote(self.index, msr, outcome)
        self.tell(outcome.targets)
        if msr == EOI_MSR:
            self.host.clockwork.ended()
        run.msr.error = outcome.fault is not None
        if outcome.fault is None:
            if msr == R.MSR_APICBASE and v.apic_base != before:
                self._put_msr(msr, v.apic_base)
            elif msr in TIME_STAMPS:
                self._move_tsc(msr, value)

    def _rdmsr(self) -> None:
        """KVM_EXIT_X86_RDMSR."""
        v, run = self.v, self.kvm_run
        msr = int(run.msr.index)
        run.msr.error = 1
        if not self.host.models_msr(msr):
            self.host.unknown_msrs[msr] += 1
            return
        try:
            value = v.rdmsr(msr)
        except fx.GeneralProtection:
            return
        finally:
            self.tell(v.targets)
        if msr == R.MSR_TSC_DEADLINE and value:
            value = value - self._behind & (1 << 64) - 1
        run.msr.data, run.msr.error = value, 0

    def _put_msr(self, msr: int, value: int) -> None:
        self._msr.index, self._msr.data = msr, value
        K.call(self.fd, K.SET_MSRS, self._msr)

    def _get_msr(self, msr: int) -> int:
        self._msr.index = msr
        K.call(self.fd, K.GET_MSRS, self._msr)
        return int(self._msr.data)

    def _move_tsc(self, msr: int, value: int) -> None:
        """The guest moves its TSC: KVM's follows. What it writes to IA32_TSC moves IA32_TSC_ADJUST as much."""
        now, adjust = self._get_msr(R.MSR_TSC), self._get_msr(R.MSR_TSC_ADJUST)
        by = value - (now if msr == R.MSR_TSC else adjust)
        self._put_msr(R.MSR_TSC_ADJUST, adjust + by & (1 << 64) - 1)
        self.host.tsc.move(self.fd, by)
        self._moved += by

    def port_read(self, port: int, size: int) -> int:
        """IN: a chip of the model's answers, or the host."""
        value = self.v.io_read(port, size)
        if isinstance(value, fx.UserRead):
            value = self.host.ports.read(port, size)
            self.v.complete_access(value)
        self.tell(self.v.targets)
        return int(value)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        outcome = self.v.io_write(port, value, size)
        self.tell(outcome.targets)
        if outcome.user is KvmExit.IO:
            self.host.ports.write(port, size, value)
            self.v.complete_access()
        else:
            self.host.clockwork.look()

    def memory_read(self, at: int, size: int) -> int:
        """A read of the xAPIC page, the IOAPIC or nothing."""
        value = self.v.mem_read(at, size)
        if isinstance(value, fx.UserRead):
            value = (1 << 8 * size) - 1
            self.v.complete_access(value)
        self.tell(self.v.targets)
        return int(value)

    def memory_write(self, at: int, size: int, value: int) -> None:
        """A write to the xAPIC page, the IOAPIC or nothing."""
        v = self.v
        if at - v.apic_page in (R.APIC_ICR, R.APIC_EOI):
            self.host.recorder.page(v, at - v.apic_page, value)
        outcome = v.mem_write(at, value, size)
        self.host.recorder.wrote(self.index, R.MSR_X2APIC_BASE, outcome)
        self.tell(outcome.targets)
        if outcome.user is KvmExit.MMIO:
            v.complete_access()
        else:
            self.host.clockwork.ended()
