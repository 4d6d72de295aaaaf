"""One virtual CPU: doors for its exits, what its hardware would do, and the ioctls that user space makes on it.

Models: KVM_SET/GET_MSRS, KVM_GET/SET_LAPIC, KVM_GET_MP_STATE, KVM_GET_VCPU_EVENTS as far as the local APIC goes. Every
ioctl first takes the vCPU out of the guest, as KVM's vcpu mutex would demand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import access_size, integer
from fastexit.dispatcher import Exit
from fastexit.kernels import _jit
from fastexit.outcome import CODE_GP, OUTCOMES, GeneralProtection, Outcome

if TYPE_CHECKING:
    from fastexit.machine import Machine


class Events(NamedTuple):
    """KVM_GET_VCPU_EVENTS as far as the APIC feeds it.

    ``nmi_pending`` counts at most two (one while NMIs are masked); ``latched_init`` is a pending INIT; ``exception`` is
    the vector waiting to be injected, or None.
    """

    nmi_pending: int
    nmi_masked: bool
    smi_pending: bool
    latched_init: bool
    exception: int | None


class Vcpu:
    """One virtual CPU; ``m.vcpus[i]``. ``index`` is its creation order, ``vcpu_id`` its x2APIC id."""

    __slots__ = ("hot", "index", "machine", "own", "vcpu_id", "_loop", "_mem", "_handle")

    def __init__(self, machine: Machine, index: int, vcpu_id: int) -> None:
        self.machine = machine
        self.index = index
        self.vcpu_id = vcpu_id
        self.hot = L.HOT + index * L.HOT_STRIDE
        self.own = L.KVM + index * L.KVM_STRIDE
        self._loop = machine.dispatcher
        self._mem = machine.mem
        self._handle = machine.handle

    def __repr__(self) -> str:
        return f"<Vcpu {self.index} id {self.vcpu_id}>"

    # --------------------------------------------------------------------------------------------- guest exits

    def wrmsr(self, msr: int, value: int) -> Outcome:
        """A guest WRMSR: one VM exit, through the dispatcher, until the guest runs again.

        ``msr`` is ECX (32 bits), ``value`` EDX:EAX (64 bits); ValueError or TypeError for anything else.
        """
        if type(msr) is not int or type(value) is not int or msr >> 32 or value >> 64:
            msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE)
        return self._loop.wrmsr(self, msr, value)

    def rdmsr(self, msr: int) -> int:
        """A guest RDMSR: its value; GeneralProtection when the guest gets #GP(0)."""
        msr = integer(msr, "MSR", 0xFFFF_FFFF)
        code = self._loop.run_exit(self, Exit(self._loop.vendor.rdmsr_reason, msr, length=R.INSN_LEN_WRMSR))
        if code & CODE_GP:
            raise GeneralProtection(f"RDMSR {msr:#x} on vCPU {self.index}: #GP(0)")
        return self.read_data

    def exit(self, reason: int, **info: Any) -> Outcome:
        """Any other exit, by VMX reason or SVM code.

        ``info`` are the fields of dispatcher.Exit; ``rcx``, ``rax`` and ``rdx`` (or ``ecx`` ...) may stand
        for ``msr`` and ``value``.
        """
        reason = integer(reason, "exit reason", 0xFFFF_FFFF)
        reason, failed = self._loop.vendor.failed_entry(reason)
        if failed:
            info["failed_entry"] = True
        for short, name in (("ecx", "rcx"), ("eax", "rax"), ("edx", "rdx")):
            if short in info:
                info[name] = info.pop(short)
        if "rcx" in info:
            info["msr"] = integer(info.pop("rcx"), "RCX", L.NONE) & 0xFFFF_FFFF
        if "rax" in info or "rdx" in info:
            low = integer(info.pop("rax", 0), "RAX", L.NONE) & 0xFFFF_FFFF
            info["value"] = integer(info.pop("rdx", 0), "RDX", L.NONE) << 32 & L.NONE | low
        unknown = sorted(set(info) - set(Exit.__dataclass_fields__))
        if unknown:
            known = ", ".join(f for f in Exit.__dataclass_fields__ if f != "reason")
            raise ValueError(f"exit information {', '.join(unknown)} is unknown: one of {known}, rcx, rax, rdx")
        tops = {"msr": 0xFFFF_FFFF, "offset": 0xFFF, "length": 15}
        fields = {
            name: bool(value) if type(value) is bool else integer(value, name, tops.get(name, L.NONE))
            for name, value in info.items()
        }
        if reason in (self._loop.vendor.wrmsr_reason, self._loop.vendor.rdmsr_reason):
            if fields.setdefault("length", R.INSN_LEN_WRMSR) != R.INSN_LEN_WRMSR:
                raise ValueError(f"length {fields['length']} of an MSR access: RDMSR and WRMSR are 2 bytes long")
        exit = Exit(reason, **fields)
        access_size(exit.size, "access size")
        return OUTCOMES[self._loop.run_exit(self, exit)]

    def mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """A guest write to the xAPIC page at ``offset`` 0..0xFFF, ``length`` 1, 2 or 4 bytes."""
        offset = integer(offset, "xAPIC page offset", 0xFFF)
        length = access_size(length)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        exit = Exit(self._loop.vendor.mmio_reason, value=value, offset=offset, size=length, write=True)
        return OUTCOMES[self._loop.run_exit(self, exit)]

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """A guest read of the xAPIC page; 0 where KVM leaves the destination as it was."""
        offset = integer(offset, "xAPIC page offset", 0xFFF)
        length = access_size(length)
        self._loop.run_exit(self, Exit(self._loop.vendor.mmio_reason, offset=offset, size=length))
        return self.read_data

    # ---------------------------------------------------------------------- what the guest's CPU does, exit or not

    def hw_wrmsr(self, msr: int, value: int) -> Outcome:
        """WRMSR as the CPU executes it: Path.HARDWARE when it needs no exit, else the exit that it causes.

        A #GP of the CPU's own goes to the guest without KVM: Outcome.fault says so and RIP stays.
        """
        msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE)
        return OUTCOMES[self.machine.hardware.wrmsr(self, msr, value)]

    def hw_rdmsr(self, msr: int) -> int:
        """RDMSR as the CPU executes it: its value; GeneralProtection when the guest gets #GP(0)."""
        msr = integer(msr, "MSR", 0xFFFF_FFFF)
        if self.machine.hardware.rdmsr(self, msr) & CODE_GP:
            raise GeneralProtection(f"RDMSR {msr:#x} on vCPU {self.index}: #GP(0)")
        return self.read_data

    def hw_mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """A write to the xAPIC page as the CPU executes it. RIP does not move: the instruction's length is unknown."""
        offset = integer(offset, "xAPIC page offset", 0xFFF)
        length = access_size(length)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        return OUTCOMES[self.machine.hardware.mmio_write(self, offset, value, length)]

    def hw_mmio_read(self, offset: int, length: int = 4) -> int:
        """A read of the xAPIC page as the CPU executes it."""
        offset = integer(offset, "xAPIC page offset", 0xFFF)
        self.machine.hardware.mmio_read(self, offset, access_size(length))
        return self.read_data

    # ------------------------------------------------------------------------------- what the guest's CPU would do

    def pending(self) -> int | None:
        """The vector that would be delivered now (PIR synced, PPR applied), or None. kvm_apic_has_interrupt."""
        vector = _jit.load("pending")(self._handle, self.index)
        return None if vector == L.NONE else vector

    def ack(self) -> int | None:
        """Deliver it: IRR to ISR, PPR raised; the vector, or None when nothing is deliverable."""
        vector = _jit.load("ack")(self._handle, self.index)
        return None if vector == L.NONE else vector

    def eoi(self) -> int | None:
        """End of interrupt: the vector that left service, or None when none was. apic_set_eoi."""
        vector = _jit.load("eoi")(self._handle, self.index)
        return None if vector == L.NONE else vector

    # ----------------------------------------------------------------------------------------------- vCPU ioctls

    def set_msr(self, msr: int, value: int) -> bool:
        """KVM_SET_MSRS of one MSR: False where the ioctl stops. 0x830 really sends, 0x80B really ends an interrupt."""
        msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE)
        self._loop.leave_guest(self)
        code = _jit.load("set_msr")(self._handle, self.index, msr, value)
        self.machine.last_host_code = code
        return not code & CODE_GP

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS of one MSR: None where the ioctl stops."""
        msr = integer(msr, "MSR", 0xFFFF_FFFF)
        self._loop.leave_guest(self)
        code = _jit.load("get_msr")(self._handle, self.index, msr)
        return None if code & CODE_GP else self.read_data

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: 1024 bytes, PIR synced first, PPR as it was stored last."""
        self._loop.leave_guest(self)
        with self.machine.lock:  # one staging page for all vCPUs
            _jit.load("get_state")(self._handle, self.index)
            return self._mem[L.H_STAGE : L.H_STAGE + L.PAGE_STRIDE].tobytes()

    def set_lapic(self, data: bytes) -> None:
        """KVM_SET_LAPIC of 1024 bytes; ValueError where KVM says EINVAL, and even then SVR has been applied."""
        try:
            page = memoryview(data).cast("B")
        except TypeError:
            raise TypeError(f"a LAPIC page is 1024 bytes, not {type(data).__name__}") from None
        if len(page) != R.LAPIC_PAGE_BYTES:
            raise ValueError(f"a LAPIC page is 1024 bytes, not {len(page)}")
        self._loop.leave_guest(self)
        with self.machine.lock:
            self._mem[L.H_STAGE : L.H_STAGE + L.PAGE_STRIDE] = memoryview(bytes(page)).cast("Q")
            refused = _jit.load("set_state")(self._handle, self.index) & CODE_GP
        if refused:
            found = int.from_bytes(page[R.APIC_ID : R.APIC_ID + 4], "little")
            raise ValueError(f"x2APIC id {found:#x} in the page is not the vCPU's id {self.vcpu_id:#x} (EINVAL)")

    def run(self) -> bool:
        """KVM_RUN: True when the vCPU is in the guest then, False when it waits for INIT or SIPI.

        The answer to Effect.WAKE: the thread looks again, runs what is pending, and sleeps again if it still waits.
        """
        return self._loop.kvm_run(self)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE; processes a pending INIT and SIPI first."""
        self._loop.leave_guest(self)
        _jit.load("accept_events")(self._handle, self.index)
        return R.MpState(self._mem[self.own + L.K_MP_STATE])

    def events(self) -> Events:
        """KVM_GET_VCPU_EVENTS; queued NMIs become pending first."""
        self._loop.leave_guest(self)
        mem, own = self._mem, self.own
        if mem[own + L.K_NMI_QUEUED]:
            _jit.load("process_nmi")(self._handle, self.index)
        exception = mem[own + L.K_EXCEPTION]
        return Events(
            nmi_pending=mem[own + L.K_NMI_PENDING],
            nmi_masked=bool(mem[own + L.K_NMI_MASKED]),
            smi_pending=bool(mem[own + L.K_SMI_PENDING] or mem[self.hot + L.HOT_REQUESTS] & R.REQ_SMI),
            latched_init=bool(mem[own + L.K_PENDING_EVENTS] & R.PENDING_INIT),
            exception=exception - 1 if exception else None,
        )

    # ---------------------------------------------------------------------------------------------------- state

    @property
    def rip(self) -> int:
        """Guest RIP; an emulated WRMSR moves it by 2, a fault leaves it."""
        return self._mem[self.own + L.K_RIP]

    @rip.setter
    def rip(self, value: int) -> None:
        self._mem[self.own + L.K_RIP] = integer(value, "RIP", L.NONE)

    @property
    def rflags(self) -> int:
        """Guest RFLAGS. IF is 0 after reset: the embedder then delivers by ack(); with IF set, an entry injects."""
        return self._mem[self.own + L.K_RFLAGS]

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._mem[self.own + L.K_RFLAGS] = integer(value, "RFLAGS", L.NONE)

    @property
    def apic_base(self) -> int:
        """IA32_APICBASE."""
        return self._mem[self.own + L.K_APIC_BASE]

    @property
    def mode(self) -> int:
        """vcpu->mode: 0 outside, 1 in guest, 2 exiting."""
        return self._mem[self.hot + L.HOT_MODE]

    @property
    def nmi_masked(self) -> bool:
        """NMIs are blocked since one was injected; an IRET of the guest, here setting False, unblocks them."""
        return bool(self._mem[self.own + L.K_NMI_MASKED])

    @nmi_masked.setter
    def nmi_masked(self, on: bool) -> None:
        self._mem[self.own + L.K_NMI_MASKED] = int(bool(on))
        if not on:
            _jit.load("make_request")(self._handle, self.index, R.REQ_EVENT)

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
        return self._mem[self.hot + L.HOT_REQUESTS]

    @property
    def injected(self) -> int | None:
        """Vector of the interrupt that the last injecting entry delivered, or None."""
        vector = self._mem[self.own + L.K_INTERRUPT]
        return vector - 1 if vector else None

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
    def apicv(self) -> bool:
        """Whether APICv is active on this vCPU; it follows Machine.inhibits, L2 (SVM) and APICBASE at an entry."""
        return bool(self._mem[self.hot + L.HOT_FLAGS] & L.FLAG_APICV)

    @property
    def nested(self) -> bool:
        """Whether the vCPU runs L2."""
        return bool(self._mem[self.hot + L.HOT_FLAGS] & L.FLAG_L2)

    @nested.setter
    def nested(self, on: bool) -> None:
        flags = self._mem[self.hot + L.HOT_FLAGS]
        self._mem[self.hot + L.HOT_FLAGS] = flags | L.FLAG_L2 if on else flags & ~L.FLAG_L2
        if bool(flags & L.FLAG_L2) is not bool(on):
            _jit.load("nested_changed")(self._handle, self.index)

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
        }
