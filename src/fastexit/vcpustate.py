"""State of a vCPU that an embedder reads and sets: the guest's CPU, its interrupt state, KVM's words about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer, member
from fastexit.jit.declare import load
from fastexit.outcome import OUTCOMES

if TYPE_CHECKING:
    from fastexit.machine import Machine


class VcpuState:
    """The half of Vcpu that is words in the machine's memory."""

    __slots__ = ("hot", "index", "machine", "own", "vcpu_id", "_handle", "_mem")

    if TYPE_CHECKING:
        machine: Machine
        index: int
        vcpu_id: int
        hot: int
        own: int
        _handle: int
        _mem: memoryview

    @property
    def rip(self) -> int:
        """Guest RIP; an emulated WRMSR moves it by 2, a fault leaves it."""
        return self._mem[self.own + L.K_RIP]

    @rip.setter
    def rip(self, value: int) -> None:
        self._mem[self.own + L.K_RIP] = integer(value, "RIP", L.NONE)

    @property
    def cs(self) -> int:
        """Selector of the code segment: 0xF000 after RESET and INIT, the vector times 0x100 after SIPI."""
        return self._mem[self.own + L.K_CS]

    @property
    def rflags(self) -> int:
        """Guest RFLAGS. IF is 0 after reset: the embedder then delivers by ack(); with IF set, an entry injects.

        It is the embedder's to keep as its CPU has it, before each settle() and exit. An entry that injects and is left
        at once, because more waits behind, clears IF, as the gate does through which the event went.
        """
        return self._mem[self.own + L.K_RFLAGS]

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._mem[self.own + L.K_RFLAGS] = integer(value, "RFLAGS", L.NONE)

    @property
    def apic_base(self) -> int:
        """IA32_APICBASE."""
        return self._mem[self.own + L.K_APIC_BASE]

    @property
    def apic_page(self) -> int:
        """Guest-physical address of its xAPIC page, as APICBASE has it, whatever the APIC's mode."""
        return self._mem[self.own + L.K_APIC_BASE] & R.APICBASE_PAGE

    @property
    def mode(self) -> int:
        """vcpu->mode: 0 outside, 1 in guest, 2 exiting."""
        return self._mem[self.hot + L.HOT_MODE]

    @property
    def nmi_masked(self) -> bool:
        """NMIs are blocked since one was injected; an IRET of the guest, here setting False, unblocks them.

        With VMX's virtual NMIs KVM hears nothing of an IRET; where it waits for one, it asked for an NMI window, whose
        exit comes next. The request for an EVENT that it makes is made here, so the exit may be left out.
        """
        return bool(self._mem[self.own + L.K_NMI_MASKED])

    @nmi_masked.setter
    def nmi_masked(self, on: bool) -> None:
        self._mem[self.own + L.K_NMI_MASKED] = int(bool(on))
        svm = self._mem[L.H_CONFIG] & L.CONFIG_SVM
        if not on and (svm or self._mem[self.own + L.K_NMI_WINDOW]):
            load("make_request")(self._handle, self.index, R.REQ_EVENT)

    @property
    def shadow(self) -> int:
        """Interrupt shadow: regs.SHADOW_STI, regs.SHADOW_MOV_SS; any emulated instruction ends it."""
        return self._mem[self.own + L.K_SHADOW]

    @shadow.setter
    def shadow(self, value: int) -> None:
        self._mem[self.own + L.K_SHADOW] = integer(value, "interrupt shadow", R.SHADOW_STI | R.SHADOW_MOV_SS)

    @property
    def l1_wants_exits(self) -> bool:
        """Whether L1 intercepts what L2 does, so that exits of a nested vCPU are reflected to it. True at first."""
        return bool(self._mem[self.own + L.K_L1_WANTS_EXIT])

    @l1_wants_exits.setter
    def l1_wants_exits(self, on: bool) -> None:
        self._mem[self.own + L.K_L1_WANTS_EXIT] = int(bool(on))

    @property
    def requests(self) -> int:
        """Pending KVM_REQ_* bits."""
        return self._mem[self.hot + L.HOT_REQUESTS] & ~R.REQ_SIGNAL

    @property
    def injected(self) -> int | None:
        """Vector of the interrupt that the last injecting entry delivered, or None."""
        vector = self._mem[self.own + L.K_INTERRUPT]
        return vector - 1 if vector else None

    @property
    def tsc(self) -> int:
        """What RDTSC gives the guest at the machine's clock: no exit, and no call of the host's."""
        row = L.TSC + self.index * L.TSC_STRIDE
        khz = self._mem[L.H_TSC_KHZ] ^ self._mem[row + L.TSC_RATE]
        return self.machine.time * khz // 1_000_000 + self._mem[row + L.TSC_OFFSET] & L.NONE

    @property
    def read_data(self) -> int:
        """Data of the last read that was emulated."""
        return self._mem[self.own + L.K_MSR_DATA]

    @property
    def dr0(self) -> int:
        """Guest DR0, for SVM's read_dr0 exit."""
        return self._mem[self.own + L.K_DR0]

    @dr0.setter
    def dr0(self, value: int) -> None:
        self._mem[self.own + L.K_DR0] = integer(value, "DR0", L.NONE)

    @property
    def dr_intercepts(self) -> bool:
        """Whether the guest's MOVs of debug registers exit (SVM); one that did clears it until the next exit."""
        return self._mem[self.own + L.K_DR_CLEARED] != self._mem[self.own + L.K_IRQ_WINDOWS] + 1

    @property
    def nested(self) -> bool:
        """Whether the vCPU runs L2."""
        return bool(self._mem[self.hot + L.HOT_FLAGS] & L.FLAG_L2)

    @nested.setter
    def nested(self, on: bool) -> None:
        flags = self._mem[self.hot + L.HOT_FLAGS]
        self._mem[self.hot + L.HOT_FLAGS] = flags | L.FLAG_L2 if on else flags & ~L.FLAG_L2
        if bool(flags & L.FLAG_L2) is not bool(on):
            load("nested_changed")(self._handle, self.index)

    @property
    def apicv(self) -> bool:
        """Whether APICv is active on this vCPU; it follows Machine.inhibits, L2 (SVM) and APICBASE at an entry."""
        return bool(self._mem[self.hot + L.HOT_FLAGS] & L.FLAG_APICV)

    @property
    def singlestep(self) -> bool:
        """KVM_GUESTDBG_SINGLESTEP: user space steps the guest; it takes effect through RFLAGS.TF."""
        return bool(self._mem[self.own + L.K_GUEST_DEBUG] & R.GUESTDBG_SINGLESTEP)

    @singlestep.setter
    def singlestep(self, on: bool) -> None:
        self._mem[self.own + L.K_GUEST_DEBUG] = R.GUESTDBG_SINGLESTEP if on else 0
        flags = self.rflags
        self.rflags = flags | R.RFLAGS_TF if on else flags & ~R.RFLAGS_TF

    @property
    def pid(self) -> np.ndarray:
        """The posted-interrupt descriptor: 8 words of 64 bits in hardware layout, shared with the machine."""
        return self.machine.words[self.hot : self.hot + 8]

    def counters(self) -> dict[str, int]:
        """Statistics of the run loop: exits, how often SRCU was taken and host interrupts let in, reflected exits."""
        mem, own = self._mem, self.own
        return {
            "exits": mem[own + L.K_EXITS],
            "srcu_locks": mem[own + L.K_SRCU_LOCKS],
            "irq_windows": mem[own + L.K_IRQ_WINDOWS],
            "nested_exits": mem[own + L.K_NESTED_EXITS],
            "indirect_calls": mem[own + L.K_INDIRECT_CALLS],
            "smis": mem[own + L.K_SMI_COUNT],
            "ioapic_eois": mem[own + L.K_IOAPIC_EOIS],
        }

    # ------------------------------------------------------------------------------------- switches of the guest's CPU

    def _hflag(self, flag: int) -> bool:
        return bool(self._mem[self.own + L.K_HFLAGS] & flag)

    def _set_hflag(self, flag: int, on: bool) -> None:
        flags = self._mem[self.own + L.K_HFLAGS]
        self._mem[self.own + L.K_HFLAGS] = flags | flag if on else flags & ~flag
        load("make_request")(self._handle, self.index, R.REQ_EVENT)

    @property
    def vmxon(self) -> bool:
        """In VMX root operation: INIT is blocked, except in L2."""
        return self._hflag(L.HF_VMXON)

    @vmxon.setter
    def vmxon(self, on: bool) -> None:
        self._set_hflag(L.HF_VMXON, bool(on))

    @property
    def real_mode(self) -> bool:
        """CR0.PE is clear, as after RESET, INIT and in an SMI's handler: an exception then has no error code.

        The guest's own MOV to CR0 is for the embedder to tell. Machine.boot_x2apic leaves protected mode behind.
        """
        return self._hflag(L.HF_REAL_MODE)

    @real_mode.setter
    def real_mode(self, on: bool) -> None:
        flags = self._mem[self.own + L.K_HFLAGS]
        self._mem[self.own + L.K_HFLAGS] = flags | L.HF_REAL_MODE if on else flags & ~L.HF_REAL_MODE

    @property
    def gif(self) -> bool:
        """SVM's global interrupt flag; clear, it blocks INIT, NMI, SMI and interrupts."""
        return not self._hflag(L.HF_GIF_CLEAR)

    @gif.setter
    def gif(self, on: bool) -> None:
        self._set_hflag(L.HF_GIF_CLEAR, not on)

    @property
    def smm(self) -> bool:
        """In system management mode; an SMI's entry sets it, rsm() ends it."""
        return self._hflag(L.HF_SMM)

    def rsm(self) -> None:
        """The guest leaves SMM; a latched INIT or SMI is looked at again. ValueError outside SMM, where RSM is #UD."""
        if not self.smm:
            raise ValueError("RSM outside SMM is #UD")
        load("leave_smm")(self._handle, self.index)

    @property
    def cr8(self) -> int:
        """CR8 as the guest reads it: TPR[7:4]."""
        return self._mem[L.PAGE + self.index * L.PAGE_STRIDE + (R.APIC_TASKPRI >> 3)] >> 4 & 0xF

    @property
    def irq_window(self) -> bool:
        """KVM asked for an exit when the guest can take an interrupt (VMX INTERRUPT_WINDOW, SVM VINTR)."""
        return bool(self._mem[self.own + L.K_IRQ_WINDOW])

    @property
    def nmi_window(self) -> bool:
        """KVM asked for an exit when the guest can take an NMI."""
        return bool(self._mem[self.own + L.K_NMI_WINDOW])

    @property
    def request_interrupt_window(self) -> bool:
        """run->request_interrupt_window: user space wants KVM_EXIT_IRQ_WINDOW_OPEN.

        With a full irqchip the PIC is KVM's, which ignores it (dm_request_for_irq_injection): it stays False.
        """
        return bool(self._mem[self.own + L.K_USER_WINDOW])

    @request_interrupt_window.setter
    def request_interrupt_window(self, on: bool) -> None:
        self._mem[self.own + L.K_USER_WINDOW] = int(bool(on and self._mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP))

    @property
    def report_tpr_access(self) -> bool:
        """KVM_TPR_ACCESS_REPORTING: every access to TPR leaves with KVM_EXIT_TPR_ACCESS."""
        return bool(self._mem[self.own + L.K_TPR_REPORT])

    @report_tpr_access.setter
    def report_tpr_access(self, on: bool) -> None:
        self._mem[self.own + L.K_TPR_REPORT] = int(bool(on))

    @property
    def pv_eoi(self) -> bool:
        """The guest's PV EOI flag: set while it may end its interrupt by clearing it instead of writing EOI.

        Where the machine has a guest's memory it is bit 0 of ``assist``.
        """
        if self._mem[L.H_GUEST_BYTES]:
            return bool(self.assist & R.PV_EOI_ENABLED)
        return bool(self._mem[self.own + L.K_PV_EOI_FLAG])

    @pv_eoi.setter
    def pv_eoi(self, on: bool) -> None:
        if self._mem[L.H_GUEST_BYTES]:
            self.assist = int(bool(on))
        else:
            self._mem[self.own + L.K_PV_EOI_FLAG] = int(bool(on))

    def _assist_at(self) -> int | None:
        cell = self._mem[self.own + L.K_PV_EOI_MSR]
        at = cell & ~R.PV_EOI_ENABLED
        return at if cell & R.PV_EOI_ENABLED and at < self._mem[L.H_GUEST_BYTES] else None

    @property
    def assist(self) -> int:
        """The byte of the guest's memory that is PV EOI's cell: Hyper-V's EOI assist, or KVM's own. 0 without one.

        It is where VP_ASSIST_PAGE or MSR_KVM_PV_EOI_EN said last. A guest that finds bit 0 set may clear it, in one
        step, instead of writing EOI.
        """
        at = self._assist_at()
        return 0 if at is None else self.machine.guest_memory[at]

    @assist.setter
    def assist(self, value: int) -> None:
        value, at = integer(value, "assist byte", 0xFF), self._assist_at()
        if at is None:
            raise ValueError("no PV EOI is enabled in the guest's memory: write VP_ASSIST_PAGE first")
        self.machine.guest_memory[at] = value

    # --------------------------------------------------------------------------------------------- IOAPIC and LVTs

    @property
    def ioapic_handled(self) -> frozenset[int]:
        """Vectors whose EOI the IOAPIC wants, by its entries or routes: KVM's ioapic_handled_vectors.

        KVM makes the set anew when the vCPU enters the guest and something has asked for it. With KVM's own IOAPIC the
        vCPU with id 0 begins with vector 0, where the RTC's pin rests until the guest programs it: with APICv, an EOI
        with nothing in service is an EOI_INDUCED exit there. A set that is assigned stays, whatever is programmed.
        """
        words = [self._mem[self.own + L.K_IOAPIC_HANDLED + i] for i in range(4)]
        return frozenset(v for v in range(256) if words[v >> 6] >> (v & 63) & 1)

    @ioapic_handled.setter
    def ioapic_handled(self, vectors: Iterable[int]) -> None:
        words = [0] * 4
        for vector in vectors:
            vector = integer(vector, "vector", 0xFF)
            words[vector >> 6] |= 1 << (vector & 63)
        for i, word in enumerate(words):
            self._mem[self.own + L.K_IOAPIC_HANDLED + i] = word
        self._mem[L.IRQ + self.index * L.IRQ_STRIDE + L.IRQ_GIVEN] = 1
        load("make_request")(self._handle, self.index, R.REQ_LOAD_EOI_EXITMAP)

    @property
    def ioapic_eoi(self) -> tuple[int, bool] | None:
        """The last EOI that went to KVM's IOAPIC: vector, and whether TMR called it level; None before the first.

        On a split irqchip: the vector of the last KVM_EXIT_IOAPIC_EOI (run->eoi.vector), level meaning nothing.
        """
        mem, own = self._mem, self.own
        if not mem[own + L.K_IOAPIC_EOIS] and not mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP:
            return None
        return mem[own + L.K_IOAPIC_EOI] & 0xFF, bool(mem[own + L.K_IOAPIC_EOI] >> 8)

    def local_interrupt(self, offset: int) -> int:
        """A local source signals its LVT entry (regs.APIC_LVTPC, ...): APICs that accepted, 0 or 1.

        kvm_apic_local_deliver. ValueError for an offset that is no LVT entry.
        """
        lvts = (R.APIC_LVTT, R.APIC_LVTTHMR, R.APIC_LVTPC, R.APIC_LVT0, R.APIC_LVT1, R.APIC_LVTERR, R.APIC_LVTCMCI)
        offset = member(offset, "LVT offset", lvts)
        if offset == R.APIC_LVTCMCI and not self._mem[L.H_CONFIG] & L.CONFIG_CMCI:
            raise ValueError("this APIC has no CMCI entry (cmci=False)")
        return OUTCOMES[load("local_deliver")(self._handle, self.index, offset, L.NONE)].accepted

    @property
    def timer_advance_ns(self) -> int:
        """How early deadline timers fire now; KVM adapts it."""
        return self._mem[self.own + L.K_TIMER_ADVANCE]

    @property
    def waited_ns(self) -> int:
        """How long entries have waited, in all, for deadlines that fired early; a simulator adds it to its time."""
        return self._mem[self.own + L.K_WAITED]

    @property
    def hv_timer(self) -> bool:
        """The VMX preemption timer, not an hrtimer, counts for this vCPU."""
        return self._mem[self.own + L.K_HV_DEADLINE] != L.NONE
