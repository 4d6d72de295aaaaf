"""A vCPU of the running kernel, with the face of `fastexit.Vcpu` as far as ioctls and real instructions reach.

Models: nothing. What is asked of KVM_RUN is asked with one instruction of a guest in real mode (guest.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastexit import regs as R
from fastexit.checks import U32, U64, access_size, integer
from fastexit.ioctls import Events, UserMsr
from fastexit.kvm import guest as G
from fastexit.kvm import ioctl as K
from fastexit.outcome import CODE_GP, CODE_USER_SHIFT, OUTCOMES, GeneralProtection, Outcome
from fastexit.reasons import KvmExit

if TYPE_CHECKING:
    from fastexit.kvm.oracle import Oracle

HALT_SECONDS = 0.002
"""How long a halted guest may sleep before it counts as asleep."""


class OracleVcpu:
    """One vCPU; ``vm.vcpus[i]``. ``index`` is its creation order, ``vcpu_id`` its x2APIC id.

    Doors that exit (wrmsr, rdmsr, mmio_write, mmio_read, take, halt) make the vCPU run: it gets flat segments, becomes
    RUNNABLE, and KVM_RUN carries out whatever waited, for KVM_SET_REGS before it asks for events. Use them from the
    main thread: only there can a guest that does not come back be interrupted.
    """

    def __init__(self, vm: Oracle, index: int, vcpu_id: int, fd: int) -> None:
        self.vm = vm
        self.index = index
        self.vcpu_id = vcpu_id
        self.fd = fd
        self.call: Callable[..., int] = vm.device.call
        self._msr = K.ffi.new("struct one_msr *", {"nmsrs": 1})
        self._page = K.ffi.new("struct kvm_lapic_state *")
        self._page_bytes = K.ffi.buffer(self._page)
        self._state = K.ffi.new("struct kvm_mp_state *")
        self._events = K.ffi.new("struct kvm_vcpu_events *")
        self._guest: G.Guest | None = None
        self._waiting = False
        self._read = 0

    def __repr__(self) -> str:
        return f"<OracleVcpu {self.index} id {self.vcpu_id}>"

    # -------------------------------------------------------------------------------------------------------- ioctls

    def set_msr(self, msr: int, value: int) -> bool:
        """KVM_SET_MSRS of one MSR: False where the ioctl stops. 0x830 really sends, 0x80B really ends an interrupt."""
        self._msr.index, self._msr.data = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", U64)
        return self.call(self.fd, K.SET_MSRS, self._msr) == 1

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS of one MSR: None where the ioctl stops."""
        self._msr.index, self._msr.data = integer(msr, "MSR", 0xFFFF_FFFF), 0
        return self._msr.data if self.call(self.fd, K.GET_MSRS, self._msr) == 1 else None

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: 1024 bytes."""
        self.call(self.fd, K.GET_LAPIC, self._page)
        page: bytes = self._page_bytes[:]
        return page

    def set_lapic(self, data: bytes) -> None:
        """KVM_SET_LAPIC of 1024 bytes; ValueError where KVM says EINVAL."""
        if len(data) != R.LAPIC_PAGE_BYTES:
            raise ValueError(f"a LAPIC page is 1024 bytes, not {len(data)}")
        self._page_bytes[:] = data
        self._refusable("KVM_SET_LAPIC", K.SET_LAPIC, self._page)

    def get_mp_state(self) -> R.MpState:
        """KVM_GET_MP_STATE; processes a pending INIT and SIPI first."""
        self.call(self.fd, K.GET_MP_STATE, self._state)
        return R.MpState(self._state.mp_state)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE; ValueError where KVM says EINVAL."""
        self._state.mp_state = integer(state, "mp_state", 0xFFFF_FFFF)
        self._refusable("KVM_SET_MP_STATE", K.SET_MP_STATE, self._state)

    def events(self) -> Events:
        """KVM_GET_VCPU_EVENTS; queued NMIs become pending first."""
        events = self._events
        self.call(self.fd, K.GET_VCPU_EVENTS, events)
        exception, interrupt = events.exception, events.interrupt
        return Events(
            nmi_pending=events.nmi.pending,
            nmi_masked=bool(events.nmi.masked),
            smi_pending=bool(events.smi.pending),
            latched_init=bool(events.smi.latched_init),
            exception=exception.nr if exception.injected or exception.pending else None,
            smm=bool(events.smi.smm),
            interrupt=interrupt.nr if interrupt.injected and not interrupt.soft else None,
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
        """KVM_SET_VCPU_EVENTS; None leaves out what a flag of the structure would make valid. ValueError for EINVAL."""
        events = K.ffi.new("struct kvm_vcpu_events *")
        if exception is not None:
            events.exception.injected, events.exception.nr = 1, exception
        if interrupt is not None:
            events.interrupt.injected, events.interrupt.nr = 1, interrupt
        events.nmi.masked = bool(nmi_masked)
        if nmi_pending is not None:
            events.nmi.pending, events.flags = nmi_pending, events.flags | K.EVENTS_NMI_PENDING
        if sipi_vector is not None:
            events.sipi_vector, events.flags = sipi_vector, events.flags | K.EVENTS_SIPI_VECTOR
        if shadow is not None:
            events.interrupt.shadow, events.flags = shadow, events.flags | K.EVENTS_SHADOW
        if smm is not None:
            events.flags |= K.EVENTS_SMM
            events.smi.smm, events.smi.pending = bool(smm), bool(smi_pending)
            events.smi.smm_inside_nmi, events.smi.latched_init = bool(smm_inside_nmi), bool(latched_init)
        self._refusable("KVM_SET_VCPU_EVENTS", K.SET_VCPU_EVENTS, events)

    def set_sregs(self, *, apic_base: int | None = None, cr8: int | None = None) -> None:
        """KVM_SET_SREGS as far as the APIC goes; None keeps what KVM_GET_SREGS gave. ValueError for EINVAL."""
        sregs = self._sregs()
        if apic_base is not None:
            sregs.apic_base = apic_base
        if cr8 is not None:
            sregs.cr8 = cr8
        self._refusable("KVM_SET_SREGS", K.SET_SREGS, sregs)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT; ValueError where KVM refuses: ENXIO with a PIC of its own, EEXIST while a vector waits."""
        one = K.ffi.new("struct kvm_interrupt *", {"irq": integer(vector, "vector", 0xFF)})
        self._refusable("KVM_INTERRUPT", K.INTERRUPT, one, errno.ENXIO, errno.EEXIST)

    def nmi(self) -> None:
        """KVM_NMI."""
        self.call(self.fd, K.NMI)

    def smi(self) -> None:
        """KVM_SMI; ValueError where the kernel has no SMM."""
        self._refusable("KVM_SMI", K.SMI, None, errno.ENOTTY)

    @property
    def apic_base(self) -> int:
        """IA32_APICBASE."""
        return int(self._sregs().apic_base)

    @property
    def cr8(self) -> int:
        """CR8: bits 7:4 of TPR."""
        return int(self._sregs().cr8)

    @property
    def cs(self) -> int:
        """Selector of the code segment: 0xF000 after INIT, the SIPI vector times 0x100 after SIPI."""
        return int(self._sregs().segments[0].selector)

    @property
    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.call(self.fd, K.GET_TSC_KHZ)

    def _sregs(self) -> K.ffi.CData:
        sregs = K.ffi.new("struct kvm_sregs *")
        self.call(self.fd, K.GET_SREGS, sregs)
        return sregs

    def _refusable(self, name: str, request: int, argument: K.ffi.CData | None, *more: int) -> None:
        """An ioctl that may answer EINVAL, or ``more``, as a ValueError."""
        try:
            self.call(self.fd, request, argument)
        except OSError as error:
            if error.errno not in (errno.EINVAL, *more):
                raise
            raise ValueError(f"{name}: {errno.errorcode[error.errno]}") from error

    # --------------------------------------------------------------------------------------- as the guest, by real code

    def ready(self, *, again: bool = False) -> G.Guest:
        """Makes the vCPU able to run programs: RUNNABLE, with flat segments.

        KVM_GET_MP_STATE carries out INIT and SIPI. Segments that have to be set (with ``again`` they are in any case)
        cost TPR[3:0], for KVM_SET_SREGS writes CR8.
        """
        if self._guest is None:
            self._guest = self.vm.new_guest(self.fd)
        if self.get_mp_state() != R.MP_RUNNABLE:
            self.set_mp_state(R.MP_RUNNABLE)
        if again or not self._guest.is_flat():
            self._guest.flatten()
        return self._guest

    def is_flat(self) -> bool:
        """Whether the vCPU has the segments that programs need: `ready` gives it them, an INIT takes them away."""
        return self._guest is not None and self._guest.is_flat()

    def wrmsr(self, msr: int, value: int) -> Outcome:
        """A guest WRMSR. Who accepted an IPI and what the host did for it are KVM's own business: 0 and NONE here."""
        msr, value = integer(msr, "MSR", 0xFFFF_FFFF), integer(value, "MSR value", U64)
        return self._outcome(self.ready().execute(G.WRMSR, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32))

    def rdmsr(self, msr: int) -> int:
        """A guest RDMSR: its value; GeneralProtection when the guest gets #GP(0)."""
        stopped = self.ready().execute(G.RDMSR, rcx=integer(msr, "MSR", 0xFFFF_FFFF))
        if self._outcome(stopped).fault:
            raise GeneralProtection(f"RDMSR {msr:#x} on vCPU {self.index}: #GP(0)")
        return stopped.edx << 32 | stopped.eax

    def mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """A guest write to the xAPIC page, ``length`` 1, 2 or 4 bytes. ValueError for a page beyond 4 GiB."""
        offset, length = integer(offset, "xAPIC page offset", 0xFFF), access_size(length)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        return self._outcome(self.ready().execute(G.STORES[length], rax=value, rdi=self._page_at() + offset))

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """A guest read of the xAPIC page; what KVM leaves alone is whatever the emulator had in its hands."""
        offset, length = integer(offset, "xAPIC page offset", 0xFFF), access_size(length)
        stopped = self.ready().execute(G.LOADS[length], rdi=self._page_at() + offset)
        return stopped.eax & (1 << 8 * length) - 1

    def mem_write(self, gpa: int, value: int, length: int = 4) -> Outcome:
        """A guest's write to guest-physical memory, ``length`` 1, 2 or 4 bytes; ``left`` has it if it is nobody's."""
        length = access_size(length)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        return self._outcome(self.ready().execute(G.STORES[length], rax=value, rdi=integer(gpa, "address", U32)))

    def mem_read(self, gpa: int, length: int = 4) -> int:
        """A guest's read of guest-physical memory; what is nobody's is 0, and ``left`` has it."""
        length = access_size(length)
        stopped = self.ready().execute(G.LOADS[length], rdi=integer(gpa, "address", U32))
        return stopped.eax & (1 << 8 * length) - 1

    def io_write(self, port: int, value: int, length: int = 1) -> Outcome:
        """A guest's OUT of 1, 2 or 4 bytes; ``left`` has it if the port is nobody's."""
        length, port = access_size(length), integer(port, "port", R.IO_PORT)
        value = integer(value, f"{length}-byte value", (1 << 8 * length) - 1)
        return self._outcome(self.ready().execute(G.OUTS[length], rax=value, rdx=port))

    def io_read(self, port: int, length: int = 1) -> int:
        """A guest's IN of 1, 2 or 4 bytes; 0 from a port that is nobody's, and ``left`` has it."""
        length, port = access_size(length), integer(port, "port", R.IO_PORT)
        return self.ready().execute(G.INS[length], rdx=port).eax & (1 << 8 * length) - 1

    @property
    def left(self) -> list[G.Access]:
        """Accesses that came to user space since somebody emptied the list."""
        return [] if self._guest is None else self._guest.left

    def _page_at(self) -> int:
        """Where APICBASE has the page: 32-bit code has to reach it, and the guest's memory has to be elsewhere."""
        page = self.apic_base & R.APICBASE_PAGE
        if not G.MEMORY_BYTES <= page < 1 << 32:
            raise ValueError(f"the xAPIC page at {page:#x} is out of a real-mode guest's reach")
        return page

    def run_through(self) -> list[int]:
        """KVM_RUN of a guest that does nothing, interrupts off; vectors of the IOAPIC EOIs that came before it."""
        guest = self.ready()
        guest.ioapic_eois.clear()
        guest.execute(G.NOTHING)
        return list(guest.ioapic_eois)

    def take(self) -> int | None:
        """The vector of the interrupt that a guest takes with RFLAGS.IF set, or None."""
        return self.ready().execute(G.NOTHING, interrupts=True).interrupt

    def halt(self, *, interrupts: bool) -> int | str:
        """A guest that halts: the vector that ended it, "went on" behind the HLT, or "asleep"."""
        stopped = self.ready().halt(HALT_SECONDS, interrupts=interrupts)
        if stopped is None:
            return "asleep"
        return "went on" if stopped.interrupt is None else stopped.interrupt

    def complete_msr(self, error: bool = False, data: int | None = None) -> Outcome:
        """User space's answer to KVM_EXIT_X86_RDMSR or X86_WRMSR. ValueError when no MSR access waits."""
        if not self._waiting or self._guest is None:
            raise ValueError("no MSR access waits for user space")
        self._guest.answer_msr(error, self._guest.msr_access[1] if data is None else data)
        return self._outcome(self._guest.go_on())

    @property
    def read_data(self) -> int:
        """EDX:EAX behind the last instruction: the data of an RDMSR."""
        return self._read

    @property
    def ioapic_eois(self) -> list[int]:
        """Vectors of KVM_EXIT_IOAPIC_EOI since somebody emptied the list."""
        return [] if self._guest is None else self._guest.ioapic_eois

    @property
    def exit_reason(self) -> KvmExit | None:
        """run->exit_reason of the last return of KVM_RUN; None before the first."""
        return None if self._guest is None else self._guest.exit_reason

    @property
    def user_msr(self) -> UserMsr | None:
        """The MSR access that waits for user space (run->msr), or None."""
        if not self._waiting or self._guest is None:
            return None
        index, data, reason = self._guest.msr_access
        return UserMsr(index, data, R.MsrExit(reason))

    def _outcome(self, stopped: G.Stopped) -> Outcome:
        self._waiting = stopped.user is not None and stopped.port == 0
        self._read = stopped.edx << 32 | stopped.eax
        code = CODE_GP if stopped.port == G.PORT_FAULT else 0
        if stopped.user is not None:
            code |= (stopped.user + 1) << CODE_USER_SHIFT
        return OUTCOMES[code]
