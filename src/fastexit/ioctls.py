"""What user space and the host's scheduler do with a vCPU from outside.

Models: KVM_RUN, KVM_SET/GET_MSRS, KVM_GET/SET_LAPIC, KVM_GET/SET_MP_STATE, KVM_GET/SET_VCPU_EVENTS, KVM_SET_SREGS and
KVM_INTERRUPT as far as the local APIC goes, the preempt notifiers. Every ioctl first takes the vCPU out of the guest,
as KVM's vcpu mutex would demand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer, member
from fastexit.hyperv import HvExit
from fastexit.jit.declare import load
from fastexit.outcome import CODE_GP, CODE_USER, OUTCOMES, Effect
from fastexit.reasons import KvmExit
from fastexit.traits import Trait
from fastexit.vcpustate import VcpuState

if TYPE_CHECKING:
    from fastexit.machine import Machine

    class Loop(Protocol):
        """What user space's calls need of exits.dispatcher.Dispatcher; ``v`` is the Vcpu that VcpuIoctls is half of."""

        def kvm_run(self, v: Any) -> bool: ...

        def leave_guest(self, v: Any) -> None: ...

        def out_of_guest(self, v: Any) -> None: ...

        def return_to_user(self, v: Any, user: int) -> None: ...


class Events(NamedTuple):
    """KVM_GET_VCPU_EVENTS as far as interrupts go.

    ``nmi_pending`` counts at most two (one while NMIs are masked, and up to 6.1 always); ``latched_init`` is a pending
    INIT; ``exception`` is the vector waiting to be injected, or None; ``interrupt`` the vector whose delivery was cut
    short, or None.
    """

    nmi_pending: int
    nmi_masked: bool
    smi_pending: bool
    latched_init: bool
    exception: int | None
    smm: bool = False
    interrupt: int | None = None


class UserHypercall(NamedTuple):
    """run->hyperv.u.hcall: the control word, and the other two registers."""

    input: int
    params: tuple[int, int]


class UserMsr(NamedTuple):
    """run->msr: index, data (of a write) and why the access is user space's."""

    index: int  # type: ignore[assignment] # it hides tuple.index
    data: int
    reason: R.MsrExit


class UserMmio(NamedTuple):
    """run->mmio: guest-physical address, data (of a write), length in bytes, is_write."""

    gpa: int
    data: int
    length: int
    write: bool


class UserIo(NamedTuple):
    """run->io: port, data (of a write), size in bytes, direction."""

    port: int
    data: int
    length: int
    write: bool


class UserSynic(NamedTuple):
    """run->hyperv.u.synic: the MSR that the guest wrote, SCONTROL, SIEFP and SIMP."""

    msr: int
    control: int
    evt_page: int
    msg_page: int


class VcpuIoctls(VcpuState):
    """The half of Vcpu that user space sees."""

    __slots__ = ()

    if TYPE_CHECKING:
        machine: Machine
        _loop: Loop

    def _rule(self, trait: Trait) -> bool:
        return bool(self.machine.profile.traits & trait)

    def set_msr(self, msr: int, value: int) -> bool:
        """KVM_SET_MSRS of one MSR: False where the ioctl stops. 0x830 really sends, 0x80B really ends an interrupt.

        IA32_TSC within a second of what other vCPUs' TSC has come to, or 0, gives the vCPU theirs.
        """
        msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE)
        self._loop.leave_guest(self)
        code = load("set_msr")(self._handle, self.index, msr, value)
        self.machine.last_host_code = code
        return not code & CODE_GP

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS of one MSR: None where the ioctl stops."""
        msr = integer(msr, "MSR", 0xFFFF_FFFF)
        self._loop.leave_guest(self)
        code = load("get_msr")(self._handle, self.index, msr)
        return None if code & CODE_GP else self.read_data

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: what the vCPU's TSC runs at from the clock's beginning on; 0: Machine's ``tsc_khz``.

        Timers that run are left alone. Within 250 ppm of the host's frequency the TSC runs as the host's, and only what
        counts in it goes by ``khz``. ValueError where KVM says EINVAL: beyond what the hardware can scale to, or 10
        million kHz.
        """
        khz = integer(khz, "TSC frequency in kHz", 0xFFFF_FFFF)
        self._loop.leave_guest(self)
        if load("set_tsc_khz")(self._handle, self.index, khz) & CODE_GP:
            raise ValueError(f"TSC frequency {khz} kHz: beyond what the hardware can scale to (EINVAL)")

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self._mem[L.H_TSC_KHZ] ^ self._mem[L.TSC + self.index * L.TSC_STRIDE + L.TSC_KHZ]

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: 1024 bytes, PIR synced first, PPR as it was stored last.

        ValueError where KVM says EINVAL: an earlier page has given the vCPU another id (up to 6.1), and 32-bit ids came
        after it.
        """
        self._loop.leave_guest(self)
        with self.machine.lock:  # one staging page for all vCPUs
            if not load("get_state")(self._handle, self.index) & CODE_GP:
                return self._mem[L.H_STAGE : L.H_STAGE + L.PAGE_STRIDE].tobytes()
        raise ValueError(f"the register page does not have the vCPU's id {self.vcpu_id:#x} (EINVAL)")

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
            refused = load("set_state")(self._handle, self.index) & CODE_GP
        if refused:
            found = int.from_bytes(page[R.APIC_ID : R.APIC_ID + 4], "little")
            raise ValueError(f"x2APIC id {found:#x} in the page is not the vCPU's id {self.vcpu_id:#x} (EINVAL)")

    def run(self) -> bool:
        """KVM_RUN: True when the vCPU is in the guest then; False when it waits, or KVM_RUN has returned already.

        It waits for INIT or SIPI, or for what ends a halt; ``exit_reason`` is None then. The answer to Effect.WAKE: the
        thread looks again, runs what is pending, and sleeps again if it still waits. ValueError where KVM says EINVAL:
        from 6.18 on for a vCPU that waits for SIPI where INIT is blocked.
        """
        runs = self._loop.kvm_run(self)
        if not runs and self.exit_reason is KvmExit.UNKNOWN:
            raise ValueError("KVM_RUN: the vCPU waits for SIPI, and INIT is blocked (EINVAL)")
        return runs

    @property
    def exit_reason(self) -> KvmExit | None:
        """run->exit_reason of the last return of KVM_RUN (INTR: a signal, the call gave EINTR); None while it runs."""
        reason = self._mem[self.own + L.K_USER_EXIT]
        return KvmExit(reason - 1) if reason else None

    def signal(self) -> Effect:
        """A signal for the vCPU's thread: KVM_RUN returns at the next look. Returns what the host has to do.

        A vCPU that is in the guest has to be kicked out of it: let it exit by an external interrupt.
        """
        load("make_request")(self._handle, self.index, R.REQ_SIGNAL)
        return OUTCOMES[load("kick")(self._handle, self.index, L.NONE)].effects

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE; processes a pending INIT and SIPI first. ``targets``: whom an INIT kicks."""
        self._loop.leave_guest(self)
        load("accept_events")(self._handle, self.index)
        self._mem[self.own + L.K_SENT] = 0  # there is no outcome, only targets
        state = self._mem[self.own + L.K_MP_STATE]
        if state in (R.MP_HALTED, R.MpState.AP_RESET_HOLD) and self._mem[self.own + L.K_PV_UNHALTED]:
            return R.MpState.RUNNABLE
        return R.MpState(state)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE; SIPI_RECEIVED becomes INIT_RECEIVED and a pending SIPI.

        ValueError for EINVAL: up to 6.12 for either of them where INIT is blocked. Later run() says so.
        """
        state = member(state, "mp_state", list(R.MpState))
        self._loop.leave_guest(self)
        waits = state in (R.MP_INIT_RECEIVED, R.MP_SIPI_RECEIVED) and not self._rule(Trait.MP_STATE_CHECKED_IN_RUN)
        blocked = load("init_blocked")(self._handle, self.index) or self._mem[self.own + L.K_SMI_PENDING]
        if waits and blocked:
            raise ValueError(f"mp_state {R.MpState(state).name}: INIT is blocked, or an SMI goes first (EINVAL)")
        if state == R.MP_SIPI_RECEIVED:
            load("latch")(self._handle, self.index, R.PENDING_SIPI, 1)
            state = R.MP_INIT_RECEIVED
        load("set_mp_state")(self._handle, self.index, state)
        load("make_request")(self._handle, self.index, R.REQ_EVENT)

    def events(self) -> Events:
        """KVM_GET_VCPU_EVENTS; queued NMIs become pending first."""
        self._loop.leave_guest(self)
        mem, own = self._mem, self.own
        counted = self._rule(Trait.NMI_COUNTED)
        load("process_nmi")(self._handle, self.index)
        if mem[self.hot + L.HOT_REQUESTS] & R.REQ_SMI and self._rule(Trait.SMI_FOLDED):
            load("clear_request")(self._handle, self.index, R.REQ_SMI)
            load("process_smi")(self._handle, self.index)
        exception = mem[own + L.K_EXCEPTION]
        again = mem[own + L.K_REINJECT]
        external = again & R.VECTORING_INFO_VALID and not again >> 8 & 7
        if again & R.VECTORING_INFO_VALID and again >> 8 & 7 == R.INTR_TYPE_EXCEPTION:
            exception = (again & 0xFF) + 1
        return Events(
            nmi_pending=mem[own + L.K_NMI_PENDING] if counted else int(mem[own + L.K_NMI_PENDING] > 0),
            nmi_masked=bool(mem[own + L.K_NMI_MASKED]),
            smi_pending=bool(mem[own + L.K_SMI_PENDING]),
            latched_init=bool(mem[own + L.K_PENDING_EVENTS] & R.PENDING_INIT),
            exception=exception - 1 if exception else None,
            smm=bool(mem[own + L.K_HFLAGS] & L.HF_SMM),
            interrupt=again & 0xFF if external else None,
        )

    def set_events(
        self,
        *,
        nmi_pending: int | None = None,
        nmi_masked: bool = False,
        sipi_vector: int | None = None,
        shadow: int | None = None,
        smm: bool | None = None,
        smi_pending: bool = False,
        smm_inside_nmi: bool = False,
        latched_init: bool = False,
        exception: int | None = None,
        interrupt: int | None = None,
    ) -> None:
        """KVM_SET_VCPU_EVENTS. None leaves out what a flag of the structure would make valid.

        ``exception`` and ``interrupt`` have no such flag: None is that there is none, whatever was queued before. An
        exception is one that was injected already: it wakes nobody, has no error code, and is injected again.
        ``smm`` makes the four SMM fields valid, ``latched_init`` among them: it sets or clears a pending INIT. The SIPI
        vector alone is no SIPI. Up to 6.1 ``nmi_pending`` is as it was given, later it is limited when it is looked at.
        ValueError where KVM says EINVAL.
        """
        mem, own = self._mem, self.own
        if nmi_pending is not None:
            nmi_pending = integer(nmi_pending, "number of NMIs", 0xFF)
        if sipi_vector is not None:
            sipi_vector = integer(sipi_vector, "SIPI vector", 0xFF)
        if shadow is not None:
            shadow = integer(shadow, "interrupt shadow", R.SHADOW_STI | R.SHADOW_MOV_SS)
        if exception is not None and integer(exception, "exception", 31) == R.VECTOR_NMI:
            raise ValueError("exception 2 is the NMI, which is no exception (EINVAL)")
        if interrupt is not None:
            interrupt = integer(interrupt, "vector", 0xFF)
        if (smm or smi_pending) and not (mem[L.H_CONFIG] & L.CONFIG_SMM or self._rule(Trait.SMI_ALWAYS)):
            raise ValueError("SMM: this kernel has no CONFIG_KVM_SMM (EINVAL)")
        waits = mem[own + L.K_MP_STATE] == R.MP_INIT_RECEIVED and not self._rule(Trait.MP_STATE_CHECKED_IN_RUN)
        if smm is not None and (smm or smi_pending) and waits:
            raise ValueError("SMM: the vCPU waits for SIPI, where SMIs are latched (EINVAL)")
        self._loop.leave_guest(self)
        load("process_nmi")(self._handle, self.index)
        # KVM keeps both and injects the exception; there is one place here for what is injected again.
        both = exception is not None and interrupt is not None
        again = 0 if interrupt is None else R.VECTORING_INFO_VALID | interrupt
        if exception is not None and not both:
            again = R.VECTORING_INFO_VALID | R.INTR_TYPE_EXCEPTION << 8 | exception
        mem[own + L.K_EXCEPTION] = exception + 1 if exception is not None and both else 0
        mem[own + L.K_PENDING_DB] = 0
        mem[own + L.K_REINJECT] = again
        if shadow is not None:
            mem[own + L.K_SHADOW] = shadow
        if nmi_pending is not None and not self._rule(Trait.NMI_COUNTED):
            mem[own + L.K_NMI_PENDING] = nmi_pending
        elif nmi_pending is not None:
            mem[own + L.K_NMI_PENDING] = 0
            mem[own + L.K_NMI_QUEUED] = nmi_pending
            if nmi_pending:
                load("make_request")(self._handle, self.index, R.REQ_NMI)
        mem[own + L.K_NMI_MASKED] = int(bool(nmi_masked))
        if sipi_vector is not None:
            mem[own + L.K_SIPI_VECTOR] = sipi_vector
        if smm is not None:
            flags = mem[own + L.K_HFLAGS] & ~(L.HF_SMM | L.HF_SMM_INSIDE_NMI | L.HF_SMM_INSIDE_REAL)
            if smm:
                flags |= L.HF_SMM | (L.HF_SMM_INSIDE_NMI if smm_inside_nmi else 0)
                flags |= L.HF_SMM_INSIDE_REAL if flags & L.HF_REAL_MODE else 0
            mem[own + L.K_HFLAGS] = flags
            mem[own + L.K_SMI_PENDING] = int(bool(smi_pending))
            if smm or not self._rule(Trait.LATCHED_INIT_WITH_SMM):
                load("latch")(self._handle, self.index, R.PENDING_INIT, int(bool(latched_init)))
        load("make_request")(self._handle, self.index, R.REQ_EVENT)

    def set_sregs(self, *, apic_base: int | None = None, cr8: int | None = None) -> None:
        """KVM_SET_SREGS as far as the APIC goes: APICBASE by host rules, then CR8, which clears TPR[3:0].

        None keeps the value that KVM_GET_SREGS would have given. ValueError where KVM says EINVAL.
        """
        base = self.apic_base if apic_base is None else integer(apic_base, "APICBASE", L.NONE)
        cr8 = self.cr8 if cr8 is None else integer(cr8, "CR8", L.NONE)
        self._loop.leave_guest(self)
        code = load("set_msr")(self._handle, self.index, R.MSR_APICBASE, base)
        self.machine.last_host_code = code
        if code & CODE_GP:
            raise ValueError(f"APICBASE {base:#x}: reserved bits or an impossible mode (EINVAL)")
        load("set_cr8")(self._handle, self.index, cr8)
        mem, own = self._mem, self.own
        if base & R.APICBASE_BSP and (mem[own + L.K_RIP], mem[own + L.K_CS]) == (0xFFF0, 0xF000):
            # For old user space: a boot CPU at the reset vector runs, whatever it waited for.
            load("set_mp_state")(self._handle, self.index, R.MP_RUNNABLE)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: an external interrupt of user space's PIC; it comes in where LINT0 is unmasked ExtINT.

        ValueError where KVM refuses: an in-kernel PIC (ENXIO), or a vector that still waits (EEXIST).
        """
        vector = integer(vector, "vector", 0xFF)
        self._loop.leave_guest(self)
        if not self._mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP:
            raise ValueError("KVM_INTERRUPT: the PIC is KVM's with a full irqchip (ENXIO)")
        if self._mem[self.own + L.K_EXTINT]:
            raise ValueError(f"KVM_INTERRUPT: vector {self._mem[self.own + L.K_EXTINT] - 1} still waits (EEXIST)")
        self._mem[self.own + L.K_EXTINT] = vector + 1
        load("make_request")(self._handle, self.index, R.REQ_EVENT)

    def nmi(self) -> None:
        """KVM_NMI: an NMI of user space's; as those of IPIs it is counted, two at most, when the vCPU looks."""
        self._loop.leave_guest(self)
        load("queue_nmi")(self._handle, self.index)

    def smi(self) -> None:
        """KVM_SMI; ValueError where the kernel has no SMM."""
        if not (self._mem[L.H_CONFIG] & L.CONFIG_SMM or self._rule(Trait.SMI_ALWAYS)):
            raise ValueError("KVM_SMI: this kernel has no CONFIG_KVM_SMM (ENOTTY)")
        self._loop.leave_guest(self)
        load("make_request")(self._handle, self.index, R.REQ_SMI)

    def complete_msr(self, *, error: bool = False, data: int | None = None) -> None:
        """User space's answer to KVM_EXIT_X86_RDMSR or X86_WRMSR: run->msr.error, and the data of a read.

        KVM_RUN gives it to the vCPU, and to one that was given none it gives ``error=False``. It returns at once, with
        exit_reason DEBUG, where the finished instruction ends a single step. ValueError when no MSR access waits.
        """
        if not self._mem[self.own + L.K_MSR_REASON]:
            raise ValueError("no MSR access waits for user space")
        if data is not None and not error:
            self._mem[self.own + L.K_MSR_DATA] = integer(data, "MSR value", L.NONE)
        code = load("complete_msr")(self._handle, self.index, int(bool(error)))
        if code & CODE_USER:
            self._loop.return_to_user(self, code)

    @property
    def user_msr(self) -> UserMsr | None:
        """The MSR access that waits for user space (run->msr), or None."""
        mem, own = self._mem, self.own
        if not mem[own + L.K_MSR_REASON]:
            return None
        return UserMsr(mem[own + L.K_MSR_INDEX], mem[own + L.K_MSR_DATA], R.MsrExit(mem[own + L.K_MSR_REASON]))

    def complete_hypercall(self, result: int) -> None:
        """User space's answer to KVM_EXIT_HYPERV for a hypercall: run->hyperv.u.hcall.result, an HV_STATUS.

        The next KVM_RUN ends the hypercall with it, and ``read_data`` has it then; without an answer, with whatever lay
        there. ValueError when no hypercall waits.
        """
        if self.user_hypercall is None:
            raise ValueError("no hypercall waits for user space")
        row = L.HV + self.index * L.HV_STRIDE
        self._mem[row + L.HV_EXIT_CONTROL] = integer(result, "result of a hypercall", L.NONE)

    @property
    def user_hypercall(self) -> UserHypercall | None:
        """The hypercall of Hyper-V's that waits for user space (run->hyperv.u.hcall), or None."""
        mem, row = self._mem, L.HV + self.index * L.HV_STRIDE
        if not mem[row + L.HV_CALL_LENGTH]:
            return None
        params = mem[row + L.HV_EXIT_EVT_PAGE], mem[row + L.HV_EXIT_MSG_PAGE]
        return UserHypercall(mem[row + L.HV_EXIT_MSR], params)

    def complete_access(self, data: int | None = None) -> None:
        """User space's answer to KVM_EXIT_MMIO or KVM_EXIT_IO: the data of a read; ``read_data`` has it then.

        KVM_RUN completes an access that was given none, a read with 0. The instruction ends: RIP moves by its length if
        the exit had one. KVM_RUN returns at once, with exit_reason DEBUG, where that ends a single step. ValueError
        when no access waits, and for data that are longer than it.
        """
        mem, own = self._mem, self.own
        info = mem[own + L.K_ACCESS_INFO]
        if not info:
            raise ValueError("no access to memory or to a port waits for user space")
        if data is not None:
            if info & L.ACCESS_WRITE:
                raise ValueError("a write has no data to give back")
            length = info & L.ACCESS_LENGTH
            mem[own + L.K_MSR_DATA] = integer(data, f"{length}-byte value", (1 << 8 * length) - 1)
        code = load("complete_access")(self._handle, self.index)
        if code & CODE_USER:
            self._loop.return_to_user(self, code)

    def _access(self, port: bool) -> tuple[int, int, int, bool] | None:
        mem, own = self._mem, self.own
        info = mem[own + L.K_ACCESS_INFO]
        if not info or bool(info & L.ACCESS_PORT) != port:
            return None
        written = bool(info & L.ACCESS_WRITE)
        return mem[own + L.K_ACCESS_ADDRESS], mem[own + L.K_ACCESS_DATA], info & L.ACCESS_LENGTH, written

    @property
    def user_mmio(self) -> UserMmio | None:
        """The access to memory that waits for user space (run->mmio), or None."""
        access = self._access(port=False)
        return None if access is None else UserMmio(*access)

    @property
    def user_io(self) -> UserIo | None:
        """The access to a port that waits for user space (run->io), or None."""
        access = self._access(port=True)
        return None if access is None else UserIo(*access)

    # ---------------------------------------------------------------------------------------------------- Hyper-V

    def enable_synic(self, version: int = 1) -> Effect:
        """KVM_CAP_HYPERV_SYNIC, or KVM_CAP_HYPERV_SYNIC2, which never zeroes the guest's message and event pages.

        Up to 5.10 it inhibits APICv for good: Effect.KICK if the host has to kick anybody (``targets``). One after the
        other changes the zeroing rule alone, and SCONTROL. ValueError where KVM says EINVAL: without CONFIG_KVM_HYPERV.
        """
        version = member(version, "SynIC version", (1, 2))
        if not self._mem[L.H_CONFIG] & L.CONFIG_KVM_HYPERV:
            raise ValueError("enable_synic: the kernel has no CONFIG_KVM_HYPERV (kvm_hyperv=False; EINVAL)")
        self._loop.leave_guest(self)
        return OUTCOMES[load("enable_synic")(self._handle, self.index, int(version == 2))].effects

    @property
    def user_hyperv(self) -> UserSynic | None:
        """run->hyperv.u.synic, if the last KVM_EXIT_HYPERV was of a SynIC; there is nothing to complete."""
        row = L.HV + self.index * L.HV_STRIDE
        if self._mem[row + L.HV_EXIT_TYPE] != HvExit.SYNIC:
            return None
        return UserSynic(*self._mem[row + L.HV_EXIT_MSR : row + L.HV_EXIT_MSG_PAGE + 1])

    @property
    def system_event(self) -> R.SystemEvent | None:
        """run->system_event.type of the last KVM_EXIT_SYSTEM_EVENT, None before the first."""
        event = self._mem[L.HV + self.index * L.HV_STRIDE + L.HV_SYSTEM_EVENT]
        return R.SystemEvent(event) if event else None

    # ------------------------------------------------------------------------------------------- the host's scheduler

    @property
    def cpu(self) -> int:
        """The pCPU on which the vCPU is or was loaded last; vCPU i begins on pCPU i."""
        return self._mem[self.own + L.K_CPU]

    def load(self, cpu: int | None = None) -> None:
        """The thread is scheduled in, on ``cpu`` or where it was: vcpu_load. KVM_RUN does it by itself."""
        cpu = self.cpu if cpu is None else integer(cpu, "pCPU", 0xFFFF_FFFF)
        self._leave_for_host()
        if self._mem[self.own + L.K_LOADED] and cpu != self.cpu:
            load("vcpu_put")(self._handle, self.index, 0)
        load("vcpu_load")(self._handle, self.index, cpu)

    def put(self, preempted: bool = False) -> None:
        """The thread is scheduled out: vcpu_put; ``preempted``: although it wanted to run on."""
        self._leave_for_host()
        self._mem[self.own + L.K_PREEMPTED] = int(bool(preempted))
        load("vcpu_put")(self._handle, self.index, 0)

    def _leave_for_host(self) -> None:
        if self._mem[self.hot + L.HOT_MODE] != R.OUTSIDE_GUEST_MODE:
            self._loop.out_of_guest(self)
