"""One virtual CPU: doors for its exits, and what its hardware would do.

ioctls.py has what user space does with it, vcpustate.py its state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import access_size, integer
from fastexit.exits.exit import Exit
from fastexit.ioctls import VcpuIoctls
from fastexit.jit.declare import load
from fastexit.outcome import (
    CODE_FAULT,
    CODE_GP,
    CODE_USER,
    OUTCOMES,
    REENTRIES,
    SHORT,
    SHORT_CODES,
    GeneralProtection,
    InvalidOpcode,
    Outcome,
    Target,
    user_read,
)
from fastexit.settle import settle, take
from fastexit.targets import for_itself, outcome_of, told

if TYPE_CHECKING:
    from fastexit.events import Event
    from fastexit.exits.dispatcher import Dispatcher
    from fastexit.machine import Machine


HYPERCALL_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")


def _halves(xmm: Any) -> tuple[int, ...]:
    """XMM0 to XMM5 as far as they are given, in halves."""
    if isinstance(xmm, str | bytes) or not isinstance(xmm, Iterable):
        raise TypeError(f"xmm is {type(xmm).__name__}, not up to {L.XMM_WORDS} numbers")
    halves = tuple(integer(half, "half of an XMM register", L.NONE) for half in xmm)
    if len(halves) > L.XMM_WORDS:
        raise ValueError(f"xmm has {len(halves)} numbers: XMM0 to XMM5 have {L.XMM_WORDS} halves")
    return halves


class Notification(NamedTuple):
    """Where a posted-interrupt descriptor sends its notifications: host vector and pCPU."""

    vector: int
    cpu: int


class Vcpu(VcpuIoctls):
    """One virtual CPU; ``m.vcpus[i]``. ``index`` is its creation order, ``vcpu_id`` its x2APIC id."""

    __slots__ = ("_loop", "where")

    if TYPE_CHECKING:
        hot: int
        own: int
        where: int
        _loop: Dispatcher

    def __init__(self, machine: Machine, index: int, vcpu_id: int) -> None:
        self.machine = machine
        self.index = index
        self.vcpu_id = vcpu_id
        self.hot = L.HOT + index * L.HOT_STRIDE
        self.own = L.KVM + index * L.KVM_STRIDE
        self._loop = machine.dispatcher
        self._mem = machine.mem
        self._handle = machine.handle
        self.where = machine.handle + index

    @property
    def vec(self) -> int:
        """Word index of its row of layout.VEC."""
        return L.VEC + self.index * L.VEC_STRIDE

    def __repr__(self) -> str:
        return f"<Vcpu {self.index} id {self.vcpu_id}>"

    # --------------------------------------------------------------------------------------------- guest exits

    def wrmsr(self, msr: int, value: int) -> Outcome:
        """A guest WRMSR: one VM exit, through the dispatcher, until the guest runs again.

        ``msr`` is ECX (32 bits), ``value`` EDX:EAX (64 bits); ValueError or TypeError for anything else.
        """
        loop = self._loop
        code = None
        if loop.wrmsr_fast:
            try:
                code = loop.fast_exit(self.where, msr, value)
                if code < SHORT_CODES:
                    return SHORT[code]
            except (TypeError, OverflowError):  # no int, or beyond 64 bits: looked at below
                pass
            else:
                outcome = REENTRIES.get(code)
                if outcome is not None:
                    return outcome
        return loop.wrmsr(self, integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE), code)

    def rdmsr(self, msr: int) -> int:
        """A guest RDMSR: its value, a UserRead where it leaves to user space; GeneralProtection for #GP(0)."""
        msr = integer(msr, "MSR", 0xFFFF_FFFF)
        code = self._loop.run_exit(self, Exit(self._loop.vendor.rdmsr_reason, msr, length=R.INSN_LEN_WRMSR))
        return self._got(code, msr)

    def _got(self, code: int, msr: int) -> int:
        """What an RDMSR came to."""
        if code & CODE_GP:
            raise self._faulted(msr)
        return user_read(code, self.read_data)

    def _faulted(self, msr: int) -> GeneralProtection:
        return GeneralProtection(f"RDMSR {msr:#x} on vCPU {self.index}: #GP(0)")

    def exit(self, reason: int, **info: Any) -> Outcome:
        """Any other exit, by VMX reason or SVM code.

        ``info`` are the fields of exits.exit.Exit; ``offset`` in the xAPIC page may stand for ``gpa``; ``rcx``, ``rax``
        and ``rdx`` (or ``ecx`` ...) may stand for ``msr`` and ``value``; a hypercall takes ``rax``, ``rbx``, ``rcx``,
        ``rdx``, ``rsi``, ``rdi``, ``r8`` and ``xmm``. ``length`` is that of the instruction if one of known length
        exits.
        """
        reason = integer(reason, "exit reason", 0xFFFF_FFFF)
        reason, failed = self._loop.vendor.failed_entry(reason)
        if failed:
            info["failed_entry"] = True
        for short, name in (("ecx", "rcx"), ("eax", "rax"), ("edx", "rdx")):
            if short in info:
                info[name] = info.pop(short)
        if reason == self._loop.vendor.hypercall_reason:
            info["args"] = tuple(integer(info.pop(name, 0), name.upper(), L.NONE) for name in HYPERCALL_REGISTERS)
        if "xmm" in info:
            info["xmm"] = _halves(info["xmm"])
        if "rcx" in info:
            info["msr"] = integer(info.pop("rcx"), "RCX", L.NONE) & 0xFFFF_FFFF
        if "rax" in info or "rdx" in info:
            low = integer(info.pop("rax", 0), "RAX", L.NONE) & 0xFFFF_FFFF
            info["value"] = integer(info.pop("rdx", 0), "RDX", L.NONE) << 32 & L.NONE | low
        if "offset" in info:
            if "gpa" in info:
                raise ValueError("give the offset in the xAPIC page or the guest-physical address, not both")
            info["gpa"] = self.apic_page + integer(info.pop("offset"), "offset", R.APIC_PAGE_BYTES - 1)
        unknown = sorted(set(info) - set(Exit.__dataclass_fields__))
        if unknown:
            known = ", ".join(f for f in Exit.__dataclass_fields__ if f not in ("reason", "args", "xmm"))
            raise ValueError(f"exit information {', '.join(unknown)} is unknown: one of {known}, offset, rcx, rax, rdx")
        tops = {"msr": 0xFFFF_FFFF, "length": 15, "intr_info": 0xFFFF_FFFF, "cpl": 3}
        tops["gpa"] = (1 << self._mem[L.H_MAXPHYADDR]) - 1
        as_is = "args", "xmm"
        fields: dict[str, Any] = {
            name: value if name in as_is or type(value) is bool else integer(value, name, tops.get(name, L.NONE))
            for name, value in info.items()
        }
        length = self._loop.vendor.rows[reason].length
        if fields.setdefault("length", length) != length and reason in (
            self._loop.vendor.wrmsr_reason,
            self._loop.vendor.rdmsr_reason,
        ):
            raise ValueError(f"length {fields['length']} of an MSR access: RDMSR and WRMSR are 2 bytes long")
        exit = Exit(reason, **fields)
        access_size(exit.size, "access size", most=8)
        if reason == self._loop.vendor.io_reason:
            self._loop.vendor.io_access(exit.info1)
        return outcome_of(self._mem, self.index, self._loop.run_exit(self, exit))

    def hypercall(
        self, number: int, a0: int = 0, a1: int = 0, a2: int = 0, a3: int = 0, bits64: bool = True
    ) -> Outcome:
        """A guest's VMCALL or VMMCALL (regs.HC_SEND_IPI, ...); its RAX is ``read_data`` afterwards.

        ``bits64``: the guest is in long mode; otherwise registers have 32 bits, RAX among them.
        """
        values = (number, a0, a1, a2, a3)
        args = tuple(integer(value, name, L.NONE) for value, name in zip(values, HYPERCALL_REGISTERS, strict=False))
        reason = self._loop.vendor.hypercall_reason
        exit = Exit(reason, args=args, bits64=bool(bits64), length=self._loop.vendor.rows[reason].length)
        return outcome_of(self._mem, self.index, self._loop.run_exit(self, exit))

    def hv_hypercall(self, control: int, input: int = 0, output: int = 0, xmm: Iterable[int] = ()) -> int:
        """A 64-bit guest's VMCALL or VMMCALL by Hyper-V's rules: its result, HV_STATUS in the low 16 bits, as in RAX.

        ``control`` is RCX, ``input`` RDX, ``output`` R8 (fast calls have their input in the latter two, and XMM0 to
        XMM5 in ``xmm``: up to 12 numbers of 64 bits, the low half of XMM0 first). Whom an IPI was for, ``targets``
        tells; exit() gives such a call's Outcome. It is a call of KVM's own while the guest OS id is 0.

        0 where it leaves to user space (``exit_reason`` HYPERV); complete_hypercall has the answer.
        InvalidOpcode when the guest gets #UD.
        """
        registers = {"rcx": control, "rdx": input, "r8": output}
        args = tuple(integer(registers.get(name, 0), name.upper(), L.NONE) for name in HYPERCALL_REGISTERS)
        reason = self._loop.vendor.hypercall_reason
        length = self._loop.vendor.rows[reason].length
        code = self._loop.run_exit(self, Exit(reason, args=args, xmm=_halves(xmm), length=length))
        if code & CODE_FAULT:
            why = ", for it is in real mode: boot_x2apic and real_mode = False end that" if self.real_mode else ""
            raise InvalidOpcode(f"hypercall {control:#x} on vCPU {self.index}: #UD{why}")
        return 0 if code & CODE_USER else self.read_data

    def mem_write(self, gpa: int, value: int, length: int = 4) -> Outcome:
        """A guest's write to a device at a guest-physical address, ``length`` 1, 2, 4 or 8 bytes.

        What no device of the machine claims leaves to user space: ``user_mmio`` is the access then. RIP does not move:
        the instruction's length is unknown.
        """
        gpa, length = self._gpa(gpa), access_size(length, most=8)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        exit = Exit(self._loop.vendor.mmio_reason, value=value, gpa=gpa, size=length, write=True)
        return outcome_of(self._mem, self.index, self._loop.run_exit(self, exit))

    def mem_read(self, gpa: int, length: int = 4) -> int:
        """A guest's read from a device; a UserRead where it leaves to user space, whose answer is complete_access."""
        gpa, length = self._gpa(gpa), access_size(length, most=8)
        return self._read(Exit(self._loop.vendor.mmio_reason, gpa=gpa, size=length))

    def _read(self, exit: Exit) -> int:
        code = self._loop.run_exit(self, exit)
        return user_read(code, self.read_data)

    def _gpa(self, gpa: int) -> int:
        return integer(gpa, "guest-physical address", (1 << self._mem[L.H_MAXPHYADDR]) - 1)

    def mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """A guest's write to its xAPIC page at ``offset`` 0..0xFFF, ``length`` 1, 2, 4 or 8 bytes."""
        offset = integer(offset, "xAPIC page offset", R.APIC_PAGE_BYTES - 1)
        return self.mem_write(self.apic_page + offset, value, length)

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """A guest's read from its xAPIC page; 0 where KVM leaves the destination as it was, a UserRead as mem_read."""
        offset = integer(offset, "xAPIC page offset", R.APIC_PAGE_BYTES - 1)
        return self.mem_read(self.apic_page + offset, length)

    def io_write(self, port: int, value: int, length: int = 1) -> Outcome:
        """A guest's OUT of 1, 2 or 4 bytes. What no device claims leaves to user space: ``user_io`` is the access."""
        length = access_size(length)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        info1 = self.machine.io_info(port, length, write=True)
        return outcome_of(
            self._mem,
            self.index,
            self._loop.run_exit(self, Exit(self._loop.vendor.io_reason, value=value, info1=info1)),
        )

    def io_read(self, port: int, length: int = 1) -> int:
        """A guest's IN of 1, 2 or 4 bytes; a UserRead where it leaves to user space: complete_access answers."""
        return self._read(Exit(self._loop.vendor.io_reason, info1=self.machine.io_info(port, length)))

    @property
    def targets(self) -> tuple[Target, ...]:
        """Whom the effects of the vCPU's last exit, ``hw_`` access, run() or ioctl are for, in the order of sending.

        Each Target is a vCPU's index and what the host has to do for it, so the effects of all of them together are
        Outcome.effects. A vCPU that accepted the interrupt and needs nothing is not among them. The next exit of this
        vCPU, by whatever door, begins a new list; other vCPUs have lists of their own. Read it in the vCPU's thread.
        Those of an exit's way back to the guest, an INIT that the vCPU takes there among it, are the exit's; so are
        those of the KVM_RUN that an exit of a vCPU outside the guest stands for.
        """
        return told(self._mem, self.index)

    # ---------------------------------------------------------------------- what the guest's CPU does, exit or not

    def hw_wrmsr(self, msr: int, value: int) -> Outcome:
        """WRMSR as the CPU executes it: Path.HARDWARE when it needs no exit, else the exit that it causes.

        A #GP of the CPU's own goes to the guest without KVM: Outcome.fault says so and RIP stays.
        """
        msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", L.NONE)
        return outcome_of(self._mem, self.index, self.machine.hardware.wrmsr(self, msr, value))

    def hw_rdmsr(self, msr: int) -> int:
        """RDMSR as the CPU executes it: as rdmsr."""
        msr = integer(msr, "MSR", 0xFFFF_FFFF)
        return self._got(self.machine.hardware.rdmsr(self, msr), msr)

    def hw_mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """A write to the xAPIC page as the CPU executes it. RIP does not move: the instruction's length is unknown."""
        offset = integer(offset, "xAPIC page offset", 0xFFF)
        length = access_size(length)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        return outcome_of(self._mem, self.index, self.machine.hardware.mmio_write(self, offset, value, length))

    def hw_mmio_read(self, offset: int, length: int = 4) -> int:
        """A read of the xAPIC page as the CPU executes it: as mmio_read, of 1, 2 or 4 bytes."""
        offset = integer(offset, "xAPIC page offset", 0xFFF)
        code = self.machine.hardware.mmio_read(self, offset, access_size(length))
        return user_read(code, self.read_data)

    @property
    def cr8(self) -> int:
        """CR8 as the guest reads it: TPR[7:4]. Assigning it is the guest's MOV to CR8 as its CPU executes it.

        That needs an exit without TPR shadow (SVM, while CR8 is intercepted), and where it falls below the TPR
        threshold; ``targets`` are those of that exit. GeneralProtection for more than 15.
        """
        return super().cr8

    @cr8.setter
    def cr8(self, value: int) -> None:
        value = integer(value, "CR8", L.NONE)
        if self.machine.hardware.move_to_cr8(self, value) & CODE_FAULT:
            raise GeneralProtection(f"MOV of {value:#x} to CR8 on vCPU {self.index}: #GP(0)")

    def hw_deliver(self) -> int | None:
        """Virtual-interrupt delivery by the CPU (VMX with APICv), if the guest runs and takes any: the vector."""
        vector = load("deliver_pending")(self._handle, self.index)
        return None if vector == L.NONE else vector

    def hw_notify(self) -> bool:
        """0xF2 reaches the pCPU on which the vCPU is loaded: True when its CPU moved something from PIR to IRR.

        False: the guest does not run, and the host's handler got the vector, or nothing was posted.
        """
        return bool(load("process_notification")(self._handle, self.index))

    @property
    def notification(self) -> Notification:
        """What Effect.NOTIFY asks the host to send for this vCPU: vector 0xF2, or 0xF1 once it blocks, and the pCPU."""
        control = R.PID_CONTROL.decode(self._mem[self.hot + L.PID_CONTROL_WORD])
        return Notification(control["NV"], control["NDST"])

    # ------------------------------------------------------------------------------- what the guest's CPU would do

    def settle(self) -> bool:
        """Everything between two instructions of the guest: True when its CPU may go on, with what take() gives first.

        KVM_RUN if the vCPU is outside, the exit of a kick, the exit that KVM asked for when the guest opens its window
        for interrupts or NMIs (by ``rflags``, ``shadow`` and ``nmi_masked`` as the embedder has set them), and a
        notification. Nothing of it while something waits to be taken, because the CPU's state is not yet what
        that makes of it. ``targets`` has whom all of it is for.

        False: the vCPU waits (``exit_reason`` is None), or KVM_RUN has returned (``exit_reason``).
        """
        return settle(self)

    def run_timers(self) -> list[Outcome]:
        """Fire this vCPU's timers that are due, at the machine's time: what they did, in order, as Machine.set_time.

        Its own thread calls it, beside other vCPUs'. An hrtimer fires first, then a preemption timer that has run out
        makes the vCPU exit, if that is in guest mode.
        """
        happened = []
        while (which := load("due_timer_of")(self._handle, self.index)) != L.NONE:
            outcome = OUTCOMES[load("fire_timer")(self._handle, which)]
            happened.append(for_itself(self.index, outcome))
        while load("hv_timer_exits")(self._handle, self.index):
            code = self._loop.run_exit(self, Exit(self._loop.vendor.forced_reason))
            happened.append(outcome_of(self._mem, self.index, code))
        return happened

    def next_timer(self) -> int | None:
        """When run_timers has something to do next, ns, or None. A preemption timer counts in guest mode only."""
        ns = load("next_timer_of")(self._handle, self.index)
        return None if ns == L.NONE else ns

    def take(self) -> Event | None:
        """What goes into the guest's CPU next, once: Interrupt, ExtInt, Nmi, Smi, Init, Sipi, or None.

        What entries have injected comes in the order in which it went in; five that nobody has taken are remembered.
        Then what virtual-interrupt delivery or AVIC delivers by itself, if the guest takes interrupts now. An
        exception is not among them: Outcome.fault tells of it.
        """
        return take(self)

    def pending(self) -> int | None:
        """The vector that would be delivered now (PIR synced, PPR applied), or None. kvm_apic_has_interrupt."""
        vector = load("pending")(self._handle, self.index)
        return None if vector == L.NONE else vector

    def ack(self) -> int | None:
        """Deliver it: IRR to ISR, PPR raised; the vector, or None when nothing is deliverable."""
        vector = load("ack")(self._handle, self.index)
        return None if vector == L.NONE else vector

    def eoi(self) -> int | None:
        """End of interrupt: the vector that left service, or None when none was. apic_set_eoi."""
        vector = load("eoi")(self._handle, self.index)
        return None if vector == L.NONE else vector
