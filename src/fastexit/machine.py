"""Machine and Vcpu: they own the memory, check what comes from outside, and answer user space's calls.

Models: the vCPU and VM ioctls that touch the local APIC (KVM_CREATE_VCPU, KVM_SET/GET_MSRS, KVM_GET/SET_LAPIC,
KVM_GET_MP_STATE, KVM_GET_VCPU_EVENTS, KVM_SIGNAL_MSI), and the doors for guest exits. Every vCPU ioctl first takes the
vCPU out of the guest, as KVM's vcpu mutex would demand.
"""

from __future__ import annotations

import mmap
import operator
import struct
import weakref
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.dispatcher import Dispatcher, Exit
from fastexit.handlers import Handlers, MsrHandlers
from fastexit.kernels import _jit
from fastexit.kernels import entries as _entries
from fastexit.outcome import CODE_ACCEPTED_SHIFT, CODE_GP, OUTCOMES, GeneralProtection, Outcome
from fastexit.profile import PROFILES, profile
from fastexit.svm import Svm
from fastexit.tracepoints import Trace
from fastexit.vmx import Vmx

_NONE = L.NONE
_VENDORS = {"vmx": Vmx, "svm": Svm}
_IRQCHIPS = ("full", "split")
_SNAPSHOT = struct.Struct("<8sIIII")
_SNAPSHOT_MAGIC = b"FXSNAP\0\0"


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


def _index(value: Any, what: str, top: int) -> int:
    """``value`` as an int in 0..top; TypeError or ValueError in one line otherwise."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {type(value).__name__}, not an integer") from None
    if not 0 <= value <= top:
        raise ValueError(f"{what} {value:#x} is out of range 0..{top:#x}")
    return value


def _allocate() -> tuple[mmap.mmap, np.ndarray]:
    """Zeroed, page-aligned memory of one machine; pages cost nothing until they are used."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    block = mmap.mmap(-1, L.BYTES, flags=flags)
    return block, np.frombuffer(block, dtype=np.uint64)


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
            msr, value = _index(msr, "MSR", 0xFFFF_FFFF), _index(value, "MSR value", _NONE)
        return self._loop.wrmsr(self, msr, value)

    def rdmsr(self, msr: int) -> int:
        """A guest RDMSR: its value; GeneralProtection when the guest gets #GP(0)."""
        msr = _index(msr, "MSR", 0xFFFF_FFFF)
        code = self._loop.run_exit(self, Exit(self._loop.vendor.rdmsr_reason, msr, length=R.INSN_LEN_WRMSR))
        if code & CODE_GP:
            raise GeneralProtection(f"RDMSR {msr:#x} on vCPU {self.index}: #GP(0)")
        return self.read_data

    def exit(self, reason: int, **info: Any) -> Outcome:
        """Any other exit, by VMX reason or SVM code.

        ``info`` are the fields of dispatcher.Exit; ``rcx``, ``rax`` and ``rdx`` may stand for ``msr`` and ``value``.
        """
        reason = _index(reason, "exit reason", 0xFFFF_FFFF)
        if "rcx" in info:
            info["msr"] = _index(info.pop("rcx"), "RCX", _NONE) & 0xFFFF_FFFF
        if "rax" in info or "rdx" in info:
            low = _index(info.pop("rax", 0), "RAX", _NONE) & 0xFFFF_FFFF
            info["value"] = _index(info.pop("rdx", 0), "RDX", _NONE) << 32 & _NONE | low
        unknown = sorted(set(info) - set(Exit.__dataclass_fields__))
        if unknown:
            known = ", ".join(f for f in Exit.__dataclass_fields__ if f != "reason")
            raise ValueError(f"exit information {', '.join(unknown)} is unknown: one of {known}, rcx, rax, rdx")
        tops = {"msr": 0xFFFF_FFFF, "offset": 0xFFF, "length": 15}
        fields = {
            name: bool(value) if type(value) is bool else _index(value, name, tops.get(name, _NONE))
            for name, value in info.items()
        }
        if reason in (self._loop.vendor.wrmsr_reason, self._loop.vendor.rdmsr_reason):
            fields.setdefault("length", R.INSN_LEN_WRMSR)
        exit = Exit(reason, **fields)
        if exit.size not in (1, 2, 4):
            raise ValueError(f"access size {exit.size} is not 1, 2 or 4")
        return OUTCOMES[self._loop.run_exit(self, exit)]

    def mmio_write(self, offset: int, value: int, length: int = 4) -> Outcome:
        """A guest write to the xAPIC page at ``offset`` 0..0xFFF, ``length`` 1, 2 or 4 bytes."""
        offset = _index(offset, "xAPIC page offset", 0xFFF)
        length = self._length(length)
        value = _index(value, f"{length}-byte value", (1 << 8 * length) - 1)
        exit = Exit(self._loop.vendor.mmio_reason, value=value, offset=offset, size=length, write=True)
        return OUTCOMES[self._loop.run_exit(self, exit)]

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """A guest read of the xAPIC page; 0 where KVM leaves the destination as it was."""
        offset = _index(offset, "xAPIC page offset", 0xFFF)
        length = self._length(length)
        self._loop.run_exit(self, Exit(self._loop.vendor.mmio_reason, offset=offset, size=length))
        return self.read_data

    @staticmethod
    def _length(length: int) -> int:
        if _index(length, "access length", 8) not in (1, 2, 4):
            raise ValueError(f"access length {length} is not 1, 2 or 4")
        return length

    # ------------------------------------------------------------------------------- what the guest's CPU would do

    def pending(self) -> int | None:
        """The vector that would be delivered now (PIR synced, PPR applied), or None. kvm_apic_has_interrupt."""
        vector = _jit.load("pending")(self._handle, self.index)
        return None if vector == _NONE else vector

    def ack(self) -> int | None:
        """Deliver it: IRR to ISR, PPR raised; the vector, or None when nothing is deliverable."""
        vector = _jit.load("ack")(self._handle, self.index)
        return None if vector == _NONE else vector

    def eoi(self) -> int | None:
        """End of interrupt: the vector that left service, or None when none was. apic_set_eoi."""
        vector = _jit.load("eoi")(self._handle, self.index)
        return None if vector == _NONE else vector

    # ----------------------------------------------------------------------------------------------- vCPU ioctls

    def set_msr(self, msr: int, value: int) -> bool:
        """KVM_SET_MSRS of one MSR: False where the ioctl stops. 0x830 really sends, 0x80B really ends an interrupt."""
        msr, value = _index(msr, "MSR", 0xFFFF_FFFF), _index(value, "MSR value", _NONE)
        self._loop.leave_guest(self)
        code = _jit.load("set_msr")(self._handle, self.index, msr, value)
        self.machine.last_host_code = code
        return not code & CODE_GP

    def get_msr(self, msr: int) -> int | None:
        """KVM_GET_MSRS of one MSR: None where the ioctl stops."""
        msr = _index(msr, "MSR", 0xFFFF_FFFF)
        self._loop.leave_guest(self)
        code = _jit.load("get_msr")(self._handle, self.index, msr)
        return None if code & CODE_GP else self.read_data

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: 1024 bytes, PIR synced first, PPR as it was stored last."""
        self._loop.leave_guest(self)
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
        self._mem[L.H_STAGE : L.H_STAGE + L.PAGE_STRIDE] = memoryview(bytes(page)).cast("Q")
        if _jit.load("set_state")(self._handle, self.index) & CODE_GP:
            found = int.from_bytes(page[R.APIC_ID : R.APIC_ID + 4], "little")
            raise ValueError(f"x2APIC id {found:#x} in the page is not the vCPU's id {self.vcpu_id:#x} (EINVAL)")

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
        self._mem[self.own + L.K_RIP] = _index(value, "RIP", _NONE)

    @property
    def rflags(self) -> int:
        """Guest RFLAGS. IF is 0 after reset: the embedder then delivers by ack(); with IF set, an entry injects."""
        return self._mem[self.own + L.K_RFLAGS]

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._mem[self.own + L.K_RFLAGS] = _index(value, "RFLAGS", _NONE)

    @property
    def apic_base(self) -> int:
        """IA32_APICBASE."""
        return self._mem[self.own + L.K_APIC_BASE]

    @property
    def mode(self) -> int:
        """vcpu->mode: 0 outside, 1 in guest, 2 exiting."""
        return self._mem[self.hot + L.HOT_MODE]

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
        self._mem[self.own + L.K_DR0] = _index(value, "DR0", _NONE)

    @property
    def nested(self) -> bool:
        """Whether the vCPU runs L2."""
        return bool(self._mem[self.hot + L.HOT_FLAGS] & L.FLAG_L2)

    @nested.setter
    def nested(self, on: bool) -> None:
        flags = self._mem[self.hot + L.HOT_FLAGS]
        self._mem[self.hot + L.HOT_FLAGS] = flags | L.FLAG_L2 if on else flags & ~L.FLAG_L2

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


class Machine:
    """A virtual machine: vCPUs, their local APICs, the APIC map.

    Args:
        vcpus: number of vCPUs, ids 0..n-1; or give ``apic_ids``, one x2APIC id (0..4095) a vCPU in creation order.
        kernel: the generation to be like; ``fastexit.profiles()`` lists them.
        vendor: "vmx" or "svm".
        apicv: posted interrupts (VMX) or AVIC (SVM) in use.
        irqchip: "full" (in-kernel IOAPIC) or "split".
        x2apic_api: KVM_CAP_X2APIC_API flags (regs.X2ApicApi).
        x2apic, tsc_deadline: what the guest's CPUID offers.
        threads: other threads may act on this machine while one runs a vCPU (atomics); False: it has one owner.
        vector_hashing: KVM's module parameter; lowest priority goes by vector instead of by arb_prio.
        cmci, smm: a host whose MCG_CAP has CMCI_P, a kernel with CONFIG_KVM_SMM.
        nrips: SVM saves the next RIP.
        hv_timer: the VMX preemption timer can be used; None means on VMX.
        maxphyaddr: guest physical address bits, which limit APICBASE.

    Each vCPU is created as by KVM_CREATE_VCPU, so the last one is missing from the APIC map until a register write that
    concerns the map, such as boot_x2apic makes. ValueError for every argument out of range.
    """

    def __init__(
        self,
        vcpus: int | None = None,
        *,
        apic_ids: Iterable[int] | None = None,
        kernel: str = "6.18",
        vendor: str = "vmx",
        apicv: bool = True,
        irqchip: str = "full",
        x2apic_api: int = 0,
        x2apic: bool = True,
        tsc_deadline: bool = True,
        threads: bool = True,
        vector_hashing: bool = True,
        cmci: bool = False,
        smm: bool = False,
        nrips: bool = True,
        hv_timer: bool | None = None,
        maxphyaddr: int = 48,
    ) -> None:
        chosen = profile(kernel)
        if vendor not in _VENDORS:
            raise ValueError(f"unknown vendor {vendor!r}: one of vmx, svm")
        if irqchip not in _IRQCHIPS:
            raise ValueError(f"unknown irqchip {irqchip!r}: one of full, split")
        if (vcpus is None) == (apic_ids is None):
            raise ValueError("give either the number of vCPUs or apic_ids")
        if vcpus is not None:
            ids = list(range(_index(vcpus, "number of vCPUs", L.MAX_VCPUS)))
        else:
            ids = [_index(i, "APIC id", L.MAX_VCPU_ID) for i in apic_ids or ()]
        if not ids:
            raise ValueError("a machine needs at least one vCPU")
        switches = {
            L.CONFIG_SVM: vendor == "svm",
            L.CONFIG_APICV: apicv,
            L.CONFIG_THREADS: threads,
            L.CONFIG_SPLIT_IRQCHIP: irqchip == "split",
            L.CONFIG_X2APIC_CPUID: x2apic,
            L.CONFIG_DEADLINE_CPUID: tsc_deadline,
            L.CONFIG_VECTOR_HASHING: vector_hashing,
            L.CONFIG_CMCI: cmci,
            L.CONFIG_SMM: smm,
            L.CONFIG_NRIPS: nrips,
            L.CONFIG_HV_TIMER: vendor == "vmx" if hv_timer is None else hv_timer,
            L.CONFIG_FASTPATH: True,
            L.CONFIG_LINT0_REENABLED: True,
        }
        self._map_memory()
        mem = self.mem
        mem[L.H_MAGIC] = L.MAGIC
        mem[L.H_ABI] = L.ABI_VERSION
        mem[L.H_WORDS] = L.WORDS
        mem[L.H_CONFIG] = sum(bit for bit, on in switches.items() if on)
        mem[L.H_TRAITS] = int(chosen.traits)
        mem[L.H_API] = _index(x2apic_api, "x2apic_api", 15)
        mem[L.H_MAP] = L.MAP0
        mem[L.H_PROFILE] = list(PROFILES).index(kernel)
        mem[L.H_MAXPHYADDR] = _index(maxphyaddr, "maxphyaddr", 63)
        self._assemble()
        for vcpu_id in ids:
            self.add_vcpu(vcpu_id)

    def _map_memory(self) -> None:
        self._block, self.words = _allocate()
        self.mem = memoryview(self._block).cast("Q")
        self.handle = self.words.ctypes.data
        if not _jit.JIT:
            _jit.register(self.handle, self.words)
            weakref.finalize(self, _jit.unregister, self.handle)

    def _assemble(self) -> None:
        """The Python objects around the memory, from what its header says."""
        config = self.mem[L.H_CONFIG]
        self.profile = list(PROFILES.values())[self.mem[L.H_PROFILE]]
        common = MsrHandlers(self.mem, self.handle)
        vendor = (Svm if config & L.CONFIG_SVM else Vmx)(self.profile, common)
        self.dispatcher = Dispatcher(self.mem, self.handle, vendor, self.profile)
        common.loop = self.dispatcher
        self.trace = Trace(self)
        self.vcpus: list[Vcpu] = []
        self._ids: dict[int, int] = {}
        self.last_host_code = 0

    def __repr__(self) -> str:
        return f"<Machine {len(self.vcpus)} vCPUs, {self.vendor}, kernel {self.kernel}, apicv={self.apicv}>"

    # ----------------------------------------------------------------------------------------------------- state

    def _config(self, bit: int) -> bool:
        return bool(self.mem[L.H_CONFIG] & bit)

    @property
    def kernel(self) -> str:
        """Name of the kernel generation."""
        return self.profile.name

    @property
    def vendor(self) -> str:
        """Name of the vendor: vmx or svm."""
        return "svm" if self._config(L.CONFIG_SVM) else "vmx"

    @property
    def apicv(self) -> bool:
        """Whether interrupts are posted."""
        return self._config(L.CONFIG_APICV)

    @property
    def threads(self) -> bool:
        """Whether shared words are accessed with atomics."""
        return self._config(L.CONFIG_THREADS)

    @property
    def fastpath(self) -> bool:
        """The fast path is on; switch it off to see every exit take the generic path."""
        return self._config(L.CONFIG_FASTPATH)

    @fastpath.setter
    def fastpath(self, on: bool) -> None:
        config = self.mem[L.H_CONFIG]
        self.mem[L.H_CONFIG] = config | L.CONFIG_FASTPATH if on else config & ~L.CONFIG_FASTPATH

    @property
    def handlers(self) -> Handlers:
        """Generic exit handlers by exit number; assign to extend or replace."""
        return self.dispatcher.vendor.handlers  # type: ignore[return-value]

    @property
    def last_accepted(self) -> int:
        """APICs that accepted the IPI of the last set_msr; -1 when the slow scan matched nobody."""
        return (self.last_host_code >> CODE_ACCEPTED_SHIFT & 0xFFFF ^ 0x8000) - 0x8000

    # ----------------------------------------------------------------------------------------------- VM ioctls

    def add_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: the new vCPU. It is missing from the APIC map until something makes the map dirty."""
        vcpu_id = _index(vcpu_id, "APIC id", L.MAX_VCPU_ID)
        if vcpu_id in self._ids:
            raise ValueError(f"APIC id {vcpu_id} is taken by vCPU {self._ids[vcpu_id]} (EEXIST)")
        index = _jit.load("create_vcpu")(self.handle, vcpu_id)
        if index == _NONE:
            raise ValueError(f"a machine holds at most {L.MAX_VCPUS} vCPUs")
        self._ids[vcpu_id] = index
        v = Vcpu(self, index, vcpu_id)
        self.vcpus.append(v)
        return v

    def boot_x2apic(self) -> None:
        """Every vCPU as a booted x2APIC guest has it: APICBASE EN and EXTD, SVR 0x1FF. By host writes."""
        for v in self.vcpus:
            if not v.set_msr(R.MSR_APICBASE, v.apic_base | R.APICBASE_EN | R.APICBASE_EXTD):
                raise ValueError("x2APIC cannot be enabled: the guest's CPUID does not offer it (x2apic=False)")
            v.set_msr(R.MSR_X2APIC_BASE + (R.APIC_SPIV >> 4), 0x1FF)

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: number of APICs that accepted, 0, or -1 (EPERM: nobody matched in the slow scan).

        ``address`` is 64 bits, high word included; ValueError where KVM says EINVAL.
        """
        address = _index(address, "MSI address", _NONE)
        code = _jit.load("signal_msi")(self.handle, address, _index(data, "MSI data", 0xFFFF_FFFF))
        if code & CODE_GP:
            raise ValueError(f"MSI address {address:#x}: bits 39:32 must be 0 with 32-bit ids (EINVAL)")
        return OUTCOMES[code].accepted

    # ----------------------------------------------------------------------------------------------- batch door

    def run(self, exits: np.ndarray) -> np.ndarray:
        """Many exits in one compiled call, the GIL released: an array of layout.OUTCOME, one for each exit, in order.

        ``exits`` is a one-dimensional array of dtype layout.EXIT; results are those of the same exits one at a time.
        ValueError names the first exit that lies outside the machine, and then none is run.
        """
        if not isinstance(exits, np.ndarray) or exits.dtype != L.EXIT or exits.ndim != 1:
            found = f"{exits.dtype} {exits.shape}" if isinstance(exits, np.ndarray) else type(exits).__name__
            raise ValueError(f"exits must be a one-dimensional array of dtype fastexit.EXIT, not {found}")
        exits = np.ascontiguousarray(exits)
        n = len(exits)
        outcomes = np.zeros(n, dtype=L.OUTCOME)
        if n == 0:
            return outcomes
        source, target = self._open(exits), self._open(outcomes)
        try:
            bad = _jit.load("first_bad")(self.handle, source, n)
            if bad < n:
                raise ValueError(f"exit {bad} is outside the machine: {_describe(exits[bad], len(self.vcpus))}")
            done = 0
            kernel = _jit.load("run")
            while True:
                done = kernel(self.handle, source, target, done, n)
                if done >= n:
                    return outcomes
                self._run_in_python(exits[done], outcomes, done)
                done += 1
        finally:
            if not _jit.JIT:
                _jit.unregister(source)
                _jit.unregister(target)

    @staticmethod
    def _open(array: np.ndarray) -> int:
        address = array.ctypes.data
        if not _jit.JIT:
            _jit.register(address, array.view(np.uint64))
        return address

    def _run_in_python(self, record: np.void, outcomes: np.ndarray, at: int) -> None:
        vcpu, reason, msr, info, value = (int(record[name]) for name in ("vcpu", "reason", "msr", "info", "value"))
        if vcpu >= len(self.vcpus):
            raise ValueError(f"exit {at} is outside the machine: {_describe(record, len(self.vcpus))}")
        v, vendor = self.vcpus[vcpu], self.dispatcher.vendor
        if reason == vendor.mmio_reason:
            size = info & ~L.MMIO_WRITE
            exit = Exit(reason, value=value, offset=msr, size=size, write=bool(info & L.MMIO_WRITE))
        else:
            is_msr = reason in (vendor.wrmsr_reason, vendor.rdmsr_reason)
            exit = Exit(reason, msr, value, info, length=R.INSN_LEN_WRMSR if is_msr else 0)
        code = self.dispatcher.run_exit(v, exit)
        outcomes[at]["code"] = code
        is_read = (reason == vendor.mmio_reason and not exit.write) or (
            reason == vendor.rdmsr_reason and (reason != vendor.wrmsr_reason or not info)
        )
        outcomes[at]["value"] = v.read_data if is_read else 0

    # ------------------------------------------------------------------------------------------ snapshot and restore

    def _rows(self) -> list[slice]:
        n = self.mem[L.H_NVCPUS]
        return [
            slice(0, L.MAP1 + L.MAP_WORDS),
            slice(L.HOT, L.HOT + n * L.HOT_STRIDE),
            slice(L.VEC, L.VEC + n * L.VEC_STRIDE),
            slice(L.PAGE, L.PAGE + n * L.PAGE_STRIDE),
            slice(L.KVM, L.KVM + n * L.KVM_STRIDE),
        ]

    def snapshot(self) -> bytes:
        """The whole machine as bytes, without its trace. No other thread may act on it meanwhile."""
        body = b"".join(self.words[rows].tobytes() for rows in self._rows())
        head = _SNAPSHOT.pack(
            _SNAPSHOT_MAGIC, L.ABI_VERSION, len(self.vcpus), zlib.crc32(body), len(body) & 0xFFFF_FFFF
        )
        return head + body

    @classmethod
    def restore(cls, data: bytes) -> Machine:
        """A machine from its snapshot; ValueError says what is wrong with the bytes. Handlers are the built-in ones."""
        data = bytes(data)
        if len(data) < _SNAPSHOT.size:
            raise ValueError(f"snapshot is truncated: {len(data)} bytes")
        magic, abi, n, crc, length = _SNAPSHOT.unpack_from(data)
        if magic != _SNAPSHOT_MAGIC:
            raise ValueError("not a fastexit snapshot")
        if abi != L.ABI_VERSION:
            raise ValueError(f"snapshot has ABI version {abi}, this library has {L.ABI_VERSION}")
        body = data[_SNAPSHOT.size :]
        if len(body) != length:
            raise ValueError(f"snapshot is truncated: {len(body)} of {length} bytes")
        if zlib.crc32(body) != crc:
            raise ValueError("snapshot is damaged: checksum differs")
        m = cls.__new__(cls)
        m._map_memory()
        words = np.frombuffer(body, dtype=np.uint64)
        m.mem[L.H_NVCPUS] = n
        rows = m._rows()
        if sum(r.stop - r.start for r in rows) != len(words) or words[L.H_NVCPUS] != n:
            raise ValueError("snapshot is damaged: its size does not fit its vCPUs")
        at = 0
        for r in rows:
            m.words[r] = words[at : at + r.stop - r.start]
            at += r.stop - r.start
        m.mem[L.H_TRACE_HEAD] = 0
        m.mem[L.H_HANDLERS] = 0
        m._assemble()
        for index in range(n):
            vcpu_id = m.mem[L.KVM + index * L.KVM_STRIDE + L.K_VCPU_ID]
            m._ids[vcpu_id] = index
            m.vcpus.append(Vcpu(m, index, vcpu_id))
        return m


def _describe(record: np.void, vcpus: int) -> str:
    if record["vcpu"] >= vcpus:
        return f"vCPU {record['vcpu']} of {vcpus}"
    return f"xAPIC page offset {int(record['msr']):#x}, length {int(record['info']) & ~L.MMIO_WRITE}"


assert _entries.NO_VCPU == _NONE
