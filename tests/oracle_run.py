"""What a vCPU's thread does, for the oracle: KVM_RUN's loop, entries, exits, sleep, and what they make of requests.

Models: the outer loop (the tick goes to the LVT after an iteration that stayed in the kernel), one entry (requests
in order, INIT/SIPI, NMI and interrupt injection, what makes an entry turn back), the fast handlers of every generation
as far as they decide which of the two comes next, HLT and its wake-ups, hypercalls, MSR filters and MSR exits.

Not modelled: nested guests, single-stepping, interrupt windows that user space asks for, failed entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastexit import regs as r
from fastexit.reasons import KvmExit

if TYPE_CHECKING:
    from oracle import Vcpu

GUEST, BLOCKED = "guest", "blocked"
INSN_LEN = {"wrmsr": 2, "hlt": 1, "invd": 2, "pause": 2, "vmcall": 3}


@dataclass
class Result:
    """What an exit came to: how the fast path fared, whether the guest faulted, why user space got it."""

    completion: str = "none"
    fault: bool = False
    accepted: int = 0
    user: KvmExit | None = None
    blocked: bool = False


class RunLoop:
    """The thread of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.v = vcpu
        self.m = vcpu.m
        self.sleeps_on_hv = False  # sleeping, with the host counting for the preemption timer
        self.sleeping = False
        self.in_kvm_run = False  # not between two calls, in an ioctl
        self.msr_asked = 0  # why user space was asked about the last MSR, MSR_EXIT_*
        self.user: KvmExit | None = None

    # ---------------------------------------------------------------------------------------------- the outer loop

    def run(self) -> str | KvmExit:
        """KVM_RUN: until the vCPU is in the guest, sleeps, or user space has to do something."""
        if self.v.in_guest:
            return GUEST
        self.in_kvm_run = True
        self.v.blocked = False
        state = self._run()
        self.v.blocked = state == BLOCKED
        return state

    def refused(self) -> bool:
        """Waiting for SIPI where it is blocked is not possible; a sleeper is not asked, for it is in KVM_RUN."""
        v = self.v
        waits = v.mp_state == r.MP_INIT_RECEIVED and not v.init_allowed() and not self.sleeping
        return waits and self.m.generation >= self.m.at("6.17")

    def _run(self) -> str | KvmExit:
        self._answer()
        if self.refused():
            raise ValueError("EINVAL")
        if self.v.mp_state == r.MP_UNINITIALIZED:
            # not the loop's business; user space calls again after EAGAIN
            if self.runnable():
                self.v.accept_events()
            elif not self._pending_timer():
                self.v.requests.discard("UNBLOCK")
            if self.v.mp_state == r.MP_UNINITIALIZED:
                return BLOCKED
        while True:
            state = self._enter() if self.v.mp_state == r.MP_RUNNABLE else self._block()
            if state:
                return state
            self._after_iteration()

    def _answer(self) -> None:
        """KVM_RUN by user space that was asked about an MSR and has not said that it failed."""
        if self.msr_asked:
            self.v.complete_msr()

    def _after_iteration(self) -> None:
        v = self.v
        v.requests.discard("UNBLOCK")
        if self._pending_timer():
            v.timer.deliver()
            v.timer.pending = False

    def _pending_timer(self) -> bool:
        v = self.v
        return v.timer.pending and v.hw_enabled and v.sw_enabled and not v.reg(r.APIC_LVTT) & r.LVT_MASKED

    def force(self) -> None:
        """KVM_RUN up to the entry, on the caller's word that the vCPU runs guest code, whatever its mp_state says.

        User space, where it is asked for something before, calls KVM_RUN again.
        """
        if self.v.in_guest:
            return
        self.m.told.clear()
        self.in_kvm_run = True
        self.v.blocked = False
        self._answer()
        self._awake()
        while (state := self._enter(forced=True)) != GUEST:
            if state is None:
                self._after_iteration()
        self.m.told[:] = self._seen_by_others(self.m.told)

    def exit(self) -> None:
        """The guest leaves by itself, wherever it was before."""
        self.force()
        self.v.store_v_tpr()

    def _enter(self, *, forced: bool = False) -> str | KvmExit | None:
        """One attempt to enter: "guest", a reason for user space, or None to go round again."""
        v = self.v
        if "SMI" in v.requests:
            v.requests.discard("SMI")
            v.smi_pending = True
            v.requests.add("EVENT")
        if "NMI" in v.requests:
            v.requests.discard("NMI")
            v.process_nmi()
        if "IOAPIC_EOI" in v.requests:
            v.requests.discard("IOAPIC_EOI")
            if v.ioapic_eoi in v.ioapic_handled:
                return KvmExit.IOAPIC_EOI
        if "SCAN_IOAPIC" in v.requests:
            v.requests.discard("SCAN_IOAPIC")
            v.scan_ioapic()
        if (user := v.hyperv_requests()) is not None:
            return user
        if "APICV_UPDATE" in v.requests:
            v.update_apicv()
        behind = False
        if "EVENT" in v.requests:
            v.requests.discard("EVENT")
            v.accept_events()
            if v.mp_state == r.MP_INIT_RECEIVED and not forced:
                return None
            behind = self._inject()
            if v.hw_enabled and v.sw_enabled:
                v.update_cr8_intercept()
                v.offer_pv_eoi()
        if v.hw_enabled and v.sw_enabled:
            v.sync_pir()
        if v.requests:
            v.take_pv_eoi()
            if self._under_way() or behind:
                v.request("EVENT")  # what was to be delivered by this entry comes first in the next one
            return None
        if forced:
            v.mp_state = r.MP_RUNNABLE
        v.in_guest, v.kicked = True, False
        v.load_v_tpr()
        if self._under_way() and (behind or v.timer.hv_due()):
            v.rflags &= ~r.RFLAGS_IF  # delivered before the guest leaves again
        v.exception = None
        v.nmi_injected = False
        v.interrupt_injected = False
        if behind:
            v.request("EVENT")
            v.store_v_tpr()
            self.out()
            return None
        return self._exits_at_once()

    def _exits_at_once(self) -> str | None:
        """A preemption timer that has run out already lets the guest in and out again."""
        v = self.v
        while v.timer.hv_due():
            v.timer.hv_exit()
            v.sync_pir()
            if self.m.generation < self.m.at("5.8") or v.requests:
                self.out()
                return None
        return GUEST

    def _inject(self) -> bool:
        """The most urgent event that the guest can take; whether the next one wants an entry of its own at once."""
        v = self.v
        can = not self._under_way()
        if v.smi_pending:
            if not can:
                return True
            if not v.smm and v.gif:
                v.smi_pending = False
                v.enter_smm()
                can = False
        if v.nmi_pending:
            if not can:
                return True
            if not v.nmi_masked and v.gif and not v.shadow:
                v.nmi_pending -= 1
                v.nmi_masked = v.nmi_injected = True
                can = False
        if self._waits():
            if not can:
                return True
            if self._interrupts_on():
                v.injected = v.take_extint() if v.has_extint() else v.ack()
                v.interrupt_injected = True
                v.taken.append(v.injected)
                if not self._waits():
                    self._count_window(False)
            if self._waits():
                self._window()
        return False

    def _waits(self) -> bool:
        """An interrupt that KVM has to bring in."""
        return self.v.has_extint() or (not self.v.apicv and self.v.pending() is not None)

    def _window(self) -> None:
        """An exit is asked for when the guest takes interrupts again; SVM's way to ask does not work beside AVIC."""
        if self.m.svm:
            if self.m.windows_are_counted:
                self._count_window(True)
            else:
                self.m.inhibit(r.Inhibit.IRQWIN, True)
            if not self.m.apicv_changes_at_entry and "APICV_UPDATE" in self.v.requests:
                self.v.update_apicv()

    def _count_window(self, on: bool) -> None:
        """The first vCPU with a window and the last one without tell, unless something else keeps AVIC off."""
        if not self.m.apicv or self.v.window_inhibits is on:
            return
        self.v.window_inhibits = on
        others = any(v.window_inhibits for v in self.m.vcpus if v is not self.v)
        if not others and not self.m.inhibits - {r.Inhibit.IRQWIN}:
            self.m.inhibit(r.Inhibit.IRQWIN, on)

    def _under_way(self) -> bool:
        return self.v.exception is not None or self.v.nmi_injected or self.v.interrupt_injected

    def _interrupts_on(self) -> bool:
        return bool(self.v.rflags & r.RFLAGS_IF) and self.v.gif and not self.v.shadow

    def runnable(self) -> bool:
        v = self.v
        return v.mp_state == r.MP_RUNNABLE or v.pv_unhalted or self._has_events()

    def _wakes_anyway(self) -> bool:
        """Before 6.1 an INIT that has to wait ended a halt; who waits for SIPI sleeps here, as in the library."""
        halted = self.v.mp_state not in (r.MP_INIT_RECEIVED, r.MP_UNINITIALIZED)
        return halted and self.m.generation < self.m.at("6.1")

    def _has_events(self) -> bool:
        v = self.v
        return (
            ((v.pending_init or v.pending_sipi) and (v.init_allowed() or self._wakes_anyway()))
            or v.exception is not None
            or "NMI" in v.requests
            or (v.nmi_pending > 0 and not v.nmi_masked and v.gif)
            or "SMI" in v.requests
            or (v.smi_pending and not v.smm and v.gif)
            or (self._interrupts_on() and (v.has_extint() or v.pending() is not None))
            or v.stimer_waits()
        )

    def _block(self) -> str | None:
        """Sleeps unless there is something to do; None to go round again."""
        v = self.v
        if not self.runnable():
            if not self.sleeping:
                self.sleeping = True
                self.sleeps_on_hv = v.timer.block()
            if not (self.runnable() or self._pending_timer()):
                v.requests.discard("UNBLOCK")
                return BLOCKED
        self._awake()
        if not self.runnable():
            return None
        v.accept_events()
        if v.mp_state in (r.MP_HALTED, r.MpState.AP_RESET_HOLD):
            v.set_mp(r.MP_RUNNABLE)
            v.pv_unhalted = False
        if v.mp_state == r.MP_RUNNABLE:
            return None
        # a vCPU that waits for SIPI has nothing to do with an NMI: the thread goes round and round
        self._after_iteration()
        self.sleeping, self.sleeps_on_hv = True, False
        return BLOCKED

    def _awake(self) -> None:
        if self.sleeping:
            self.sleeping = False
            self.v.timer.unblock(self.sleeps_on_hv)

    def leave(self) -> None:
        """A signal takes the thread out of KVM_RUN, as every ioctl on the vCPU needs it."""
        if self.v.in_guest:
            self.v.store_v_tpr()
            self.out()
            self._after_iteration()
        elif self.sleeping:
            self._awake()
            self._after_iteration()
        self.in_kvm_run = False

    # -------------------------------------------------------------------------------------------------------- exits

    def out(self) -> None:
        """The vCPU is out of the guest for good, and not in the short loop of a fast exit."""
        if self.v.in_guest:
            self.v.in_guest = False
            self.v.take_pv_eoi()

    def _seen_by_others(self, told: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """Of what its thread asked on the way to the entry, what it does not see for itself there.

        Its own notification comes behind the entry: a preemption timer that had run out has made an exit of its guest.
        """
        return [one for one in told if one[0] != self.v.index or one[1] == "NOTIFY"]

    def _finish(self, result: Result) -> Result:
        """A slow exit is over: back into the guest, unless user space is asked."""
        self.out()
        if result.user is None:
            told = len(self.m.told)
            self._after_iteration()
            state = self.run()
            self.m.told[told:] = self._seen_by_others(self.m.told[told:])
            if isinstance(state, KvmExit):
                result.user = state
            result.blocked = state == BLOCKED
        return result

    def _finish_fast(self, result: Result) -> Result:
        """A fast exit is over; what asks for the thread meanwhile takes the vCPU out of the short loop."""
        v = self.v
        if result.completion == "reenter":
            if v.hw_enabled and v.sw_enabled:
                v.sync_pir()
            if not v.requests:
                v.load_v_tpr()
                return result
            result.completion = "handled"
        return self._finish(result)

    def skip(self, length: int) -> None:
        self.v.rip += length
        self.v.shadow = 0

    def wrmsr(self, msr: int, value: int) -> Result:
        v = self.v
        result = Result(completion=self.fast_wrmsr(msr, value))
        v.last_accepted = 0
        if result.completion != "none":
            assert v.write_msr(msr, value, host=False), "the fast path took a write that faults"
            result.accepted = v.last_accepted
            self.skip(INSN_LEN["wrmsr"])
            return self._finish_fast(result)
        self.out()
        why = self._refused(msr, value, write=True)
        result.accepted = v.last_accepted
        return self._finish(self._msr_outcome(result, why, KvmExit.X86_WRMSR))

    def rdmsr(self, msr: int) -> tuple[Result, int | None]:
        v = self.v
        self.out()
        why = r.MSR_EXIT_FILTER if self.m.filtered(msr, write=False) else 0
        value = None if why else v.read_msr(msr)
        if value is None and not why:
            why = self._unknown_or_bad(msr)
        return self._finish(self._msr_outcome(Result(), why, KvmExit.X86_RDMSR)), value

    def _refused(self, msr: int, value: int, *, write: bool) -> int:
        """Why the generic path does not carry out a write, MSR_EXIT_*; 0 when it did."""
        if self.m.filtered(msr, write=write):
            return r.MSR_EXIT_FILTER
        return 0 if self.v.write_msr(msr, value, host=False) else self._unknown_or_bad(msr)

    @staticmethod
    def _unknown_or_bad(msr: int) -> int:
        known = (
            msr in (r.MSR_APICBASE, r.MSR_TSC_DEADLINE, r.MSR_KVM_PV_EOI_EN)
            or r.MSR_X2APIC_BASE <= msr <= r.MSR_X2APIC_END
        )
        return r.MSR_EXIT_INVAL if known else r.MSR_EXIT_UNKNOWN

    def _msr_outcome(self, result: Result, why: int, exit_reason: KvmExit) -> Result:
        self.msr_asked = why if self.m.user_space_msr & why else 0
        if not why:
            self.skip(INSN_LEN["wrmsr"])
        elif self.msr_asked:
            result.user = exit_reason
        else:
            result.fault = True
            self.v.queue_exception(13)
        return result

    def page(self, *, claimed: bool) -> Result:
        """Behind an access to the page; nobody in the kernel claims it where the APIC is off and the quirk too."""
        self.out()
        return self._finish(Result(user=None if claimed else KvmExit.MMIO))

    def other(self) -> Result:
        """An exit that KVM has nothing to do for, such as a host interrupt."""
        self.out()
        return self._finish(Result())

    def hlt(self) -> Result:
        v = self.v
        fast = self.m.fastpath and self.m.generation >= self.m.at("6.12")
        if not fast:
            self.out()
        self.skip(INSN_LEN["hlt"])
        v.set_mp(r.MP_RUNNABLE if v.pv_unhalted or self._has_events() else r.MP_HALTED)
        if v.mp_state == r.MP_RUNNABLE:
            v.pv_unhalted = False
        if fast:
            return self._finish_fast(Result("reenter" if v.mp_state == r.MP_RUNNABLE else "handled"))
        return self._finish(Result())

    def preemption_timer(self) -> Result:
        """VMX: the timer that the CPU counted for the guest ran out."""
        fast = self.m.fastpath and self.m.generation >= self.m.at("5.8")
        if not fast:
            self.out()
        self.v.timer.hv_exit()
        return self._finish_fast(Result("reenter")) if fast else self._finish(Result())

    def hypercall(self, nr: int, a0: int, a1: int, a2: int, a3: int, *, bits64: bool = True) -> tuple[Result, int]:
        if not bits64:
            nr, a0, a1, a2, a3 = (value & 0xFFFF_FFFF for value in (nr, a0, a1, a2, a3))
        self.out()
        value = self._hypercall(nr, a0, a1, a2, a3, 64 if bits64 else 32)
        self.skip(INSN_LEN["vmcall"])
        return self._finish(Result()), value & ((1 << 64) - 1 if bits64 else 0xFFFF_FFFF)

    def _hypercall(self, nr: int, a0: int, a1: int, a2: int, a3: int, width: int) -> int:
        if nr == r.HC_SEND_IPI:
            return self.m.pv_ipi(a0, a1, a2 & 0xFFFF_FFFF, a3, width)
        if nr == r.HC_KICK_CPU:
            self.m.pv_kick(a1 & 0xFFFF_FFFF)
            return 0
        return 0 if nr in (r.HC_VAPIC_POLL_IRQ, r.HC_SCHED_YIELD) else -r.HC_ENOSYS

    # ------------------------------------------------------------------------------------------------ the fast path

    def fast_wrmsr(self, msr: int, value: int) -> str:
        """Whether this generation handles the write early, and how that ends if nothing interferes."""
        m = self.m
        if not m.fastpath or (m.svm and m.generation < m.at("5.6")):
            return "none"
        if msr == r.MSR_TSC_DEADLINE:
            if m.generation >= m.at("6.18") or (m.generation >= m.at("5.8") and self.v.timer.can_use_hv()):
                return "reenter"
            return "none"
        if msr != r.MSR_X2APIC_ICR or not self.v.x2apic or not self._fast_icr(value):
            return "none"
        if m.generation < m.at("5.8"):
            return "skip"
        return "handled" if m.generation < m.at("6.12") else "reenter"

    def _fast_icr(self, value: int) -> bool:
        m = self.m
        generation = m.generation
        shorthand = (value & r.ICR_SHORTHAND) >> r.ICR_SHORTHAND_SHIFT
        mode = (value & r.ICR_DM) >> r.ICR_DM_SHIFT
        if m.icr_reserved_faults and value & r.ICR_RESERVED:
            return False
        if generation >= m.at("6.18"):
            irq = self.v.irq_of(value & 0xFFFF_FFFF, value >> r.ICR_DEST_SHIFT)
            return shorthand == r.SH_SELF or m.resolve(self.v, irq) is not None
        if mode != r.DM_FIXED or value & r.ICR_LOGICAL:
            return False
        if generation >= m.at("5.6") and shorthand:
            return False
        return generation < m.at("5.7") or value >> r.ICR_DEST_SHIFT != r.X2APIC_BROADCAST


class Doors:
    """What a guest does, as methods of the oracle's vCPU."""

    thread: RunLoop

    def run(self: Vcpu) -> str | KvmExit:
        """KVM_RUN."""
        return self.thread.run()

    def wrmsr(self: Vcpu, msr: int, value: int) -> Result:
        self.thread.exit()
        return self.thread.wrmsr(msr, value)

    def rdmsr(self: Vcpu, msr: int) -> tuple[Result, int | None]:
        self.thread.exit()
        return self.thread.rdmsr(msr)

    def page_write(self: Vcpu, offset: int, value: int, length: int = 4) -> Result:
        self.thread.exit()
        claimed = not self._nobody_there()
        self.thread.out()  # an interrupt to itself needs no notification
        if claimed:
            self.store(offset, value, length)
        return self.thread.page(claimed=claimed)

    def page_read(self: Vcpu, offset: int, length: int = 4) -> tuple[Result, int | None]:
        self.thread.exit()
        claimed = not self._nobody_there()
        value = self.load(offset, length) if claimed else None
        return self.thread.page(claimed=claimed), value

    def _nobody_there(self: Vcpu) -> bool:
        return bool(self.m.disable_quirks & r.QUIRK_LAPIC_MMIO_HOLE) and (not self.hw_enabled or self.x2apic)

    def hlt(self: Vcpu) -> Result:
        self.thread.exit()
        return self.thread.hlt()

    def host_interrupt(self: Vcpu) -> Result:
        """The exit that the host's own interrupts make."""
        self.thread.exit()
        return self.thread.other()

    def hypercall(self: Vcpu, nr: int, a0: int, a1: int, a2: int, a3: int, bits64: bool = True) -> tuple[Result, int]:
        self.thread.exit()
        return self.thread.hypercall(nr, a0, a1, a2, a3, bits64=bits64)

    def complete_msr(self: Vcpu, *, error: bool = False) -> None:
        """User space has dealt with the MSR that KVM_RUN came back for."""
        self.thread.msr_asked = 0
        if error:
            self.queue_exception(13)
        else:
            self.thread.skip(2)

    # ------------------------------------------------------------- in the words of a guest that runs one instruction

    def guest_wrmsr(self: Vcpu, msr: int, value: int) -> str:
        """``"ok"``, ``"gp"``, or ``"user"`` where user space is asked."""
        result = self.wrmsr(msr, value)
        return "gp" if result.fault else "user" if result.user is KvmExit.X86_WRMSR else "ok"

    def guest_rdmsr(self: Vcpu, msr: int) -> int | None:
        return self.rdmsr(msr)[1]

    def mmio_write(self: Vcpu, offset: int, value: int, length: int = 4) -> str | None:
        return "user" if self.page_write(offset, value, length).user is KvmExit.MMIO else None

    def mmio_read(self: Vcpu, offset: int, length: int = 4) -> int | str | None:
        result, value = self.page_read(offset, length)
        return "user" if result.user is KvmExit.MMIO else value

    def run_through(self: Vcpu) -> None:
        """KVM_RUN of a guest that does nothing but leave to user space: no iteration ends inside the kernel."""
        self.thread.exit()
        self.in_guest = False

    def next_interrupt(self: Vcpu) -> int | None:
        """What a guest with interrupts on is interrupted by next: user space's PIC first."""
        return self.take_extint() if self.has_extint() else self.pending()

    def halt_and_take(self: Vcpu, *, interrupts: bool) -> int | str:
        """A guest that halts: the vector that ended it, "went on" behind the HLT, or "asleep"."""
        self.taken.clear()
        self.rflags = r.RFLAGS_FIXED | r.RFLAGS_IF * interrupts
        self.thread.exit()
        asleep = not self.taken and self.thread.hlt().blocked
        if self.in_guest and not self.taken:
            self.store_v_tpr()
        self.in_guest = False
        self.rflags = r.RFLAGS_FIXED
        if asleep:
            self.thread.leave()
            return "asleep"
        return self.taken[0] if self.taken else "went on"  # whose handler then runs with interrupts off
