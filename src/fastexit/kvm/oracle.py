"""A VM of the running kernel, with the face of `fastexit.Machine` as far as ioctls and real instructions reach.

Models: nothing; this is what models are held against.
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from fastexit import regs as R
from fastexit.checks import integer, one_of
from fastexit.hyperv import ALL_FEATURES, CPUID_OF_FEATURE, HvFeature
from fastexit.kvm import guest as G
from fastexit.kvm import host as H
from fastexit.kvm import ioctl as K
from fastexit.kvm.chips import Chips
from fastexit.kvm.device import LOCAL, Device
from fastexit.kvm.vcpu import OracleVcpu

IOAPIC_PINS = 24
CPUID_FEATURES = 1
CPUID_1_ECX_X2APIC = 1 << 21
CPUID_1_ECX_DEADLINE = 1 << 24


class Oracle(Chips):
    """A real virtual machine; a context manager, and closed by itself when nobody holds it any more.

    Args:
        vcpus, apic_ids: number of vCPUs, or their ids in creation order.
        irqchip: "full" or "split". x2apic_api: KVM_CAP_X2APIC_API flags.
        x2apic, tsc_deadline: what the guest's CPUID offers. maxphyaddr: its physical address bits (48, or what the
            host has).
        bus_cycle_ns, disable_quirks, boot_cpu_id: as for Machine.
        cmci: MCG_CAP of every vCPU gets CMCI_P.
        hyperv, hyperv_features: as for Machine: Hyper-V's leaves in the guest's CPUID.
        device, host: where ioctls go, and what the kernel there is; /dev/kvm of this machine.

    `KvmUnavailable` (an OSError) where /dev/kvm cannot be used; ValueError for what this kernel does not have.
    ``keywords`` are those with which `fastexit.Machine` models this very VM.
    """

    def __init__(
        self,
        vcpus: int | None = None,
        *,
        apic_ids: Iterable[int] | None = None,
        irqchip: str = "full",
        x2apic_api: int = 0,
        x2apic: bool = True,
        tsc_deadline: bool = True,
        maxphyaddr: int | None = None,
        bus_cycle_ns: int = 1,
        disable_quirks: int = 0,
        boot_cpu_id: int = 0,
        cmci: bool = False,
        hyperv: bool | str = False,
        hyperv_features: int = int(ALL_FEATURES),
        device: Device = LOCAL,
        host: H.Host | None = None,
    ) -> None:
        if (vcpus is None) == (apic_ids is None):
            raise ValueError("give either the number of vCPUs or apic_ids")
        ids = list(apic_ids) if apic_ids is not None else list(range(integer(vcpus, "number of vCPUs", 4096)))
        self.device: Device = device
        self.host: H.Host = host or (H.running() if device is LOCAL else H.of(device))
        maxphyaddr = min(48, self.host.maxphyaddr) if maxphyaddr is None else maxphyaddr
        self._check(ids, one_of(irqchip, "irqchip", ("full", "split")), x2apic_api, bus_cycle_ns, disable_quirks, cmci)
        self.keywords: dict[str, Any] = self.host.keywords() | {
            "irqchip": irqchip,
            "x2apic_api": x2apic_api,
            "x2apic": x2apic,
            "tsc_deadline": tsc_deadline,
            "maxphyaddr": maxphyaddr,
            "bus_cycle_ns": bus_cycle_ns,
            "disable_quirks": disable_quirks,
            "boot_cpu_id": boot_cpu_id,
            "cmci": cmci,
        }
        if hyperv:
            self.keywords |= {"hyperv": hyperv, "hyperv_features": hyperv_features}
        self.vcpus: list[OracleVcpu] = []
        self._cmci = cmci
        self._enforces = hyperv == "enforce"
        self._held = _Held(device)
        self._finalizer = weakref.finalize(self, self._held.release)
        try:
            with device.opened() as system:
                self.fd: int = self._held.file(self.device.call(system, K.CREATE_VM))
                self.run_bytes: int = self.device.call(system, K.GET_VCPU_MMAP_SIZE)
                self._cpuid = _guest_cpuid(device, system, x2apic, tsc_deadline, maxphyaddr)
                if hyperv:
                    add_hyperv(self._cpuid, HvFeature(hyperv_features))
            if irqchip == "split":
                self.device.enable_cap(self.fd, K.CAP_SPLIT_IRQCHIP, IOAPIC_PINS)
            else:
                self.device.call(self.fd, K.CREATE_IRQCHIP)
            for cap, value, default in (
                (K.CAP_X2APIC_API, x2apic_api, 0),
                (K.CAP_X86_APIC_BUS_CYCLES_NS, bus_cycle_ns, 1),
                (K.CAP_DISABLE_QUIRKS, disable_quirks, 0),
            ):
                if value != default:
                    self.device.enable_cap(self.fd, cap, value)
            if boot_cpu_id:
                self.device.call(self.fd, K.SET_BOOT_CPU_ID, boot_cpu_id)
            for vcpu_id in ids:
                self.add_vcpu(vcpu_id)
        except BaseException:
            self.close()
            raise

    def _check(self, ids: list[int], irqchip: str, api: int, bus_cycle_ns: int, quirks: int, cmci: bool) -> None:
        """ValueError, in one line, for what the running kernel does not have."""
        host = self.host
        known = host.api_split if irqchip == "split" else host.api
        if not ids:
            raise ValueError("a machine needs at least one vCPU")
        if len(ids) > host.max_vcpus:
            raise ValueError(f"{len(ids)} vCPUs: kernel {host.release} takes at most {host.max_vcpus}")
        for vcpu_id in ids:
            integer(vcpu_id, "APIC id", host.max_vcpu_id - 1)
        if integer(api, "x2apic_api", 15) & ~known:
            raise ValueError(
                f"x2apic_api {api:#x}: kernel {host.release} takes {int(known):#x} with a {irqchip} irqchip"
            )
        for value, what, has in (
            (bus_cycle_ns != 1, "bus_cycle_ns", host.bus_cycles),
            (quirks, "disable_quirks", not quirks & ~host.quirks),
            (cmci, "cmci", host.cmci),
        ):
            if value and not has:
                raise ValueError(f"{what}: kernel {host.release} cannot do that")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Oracle {len(self.vcpus)} vCPUs, {self.host.release}, {self.host.module or 'KVM'}>"

    def close(self) -> None:
        """Gives back every file and mapping; twice does no harm. What comes behind it is OSError (EBADF)."""
        self._finalizer()
        self.fd = K.CLOSED
        for vcpu in self.vcpus:
            vcpu.fd = K.CLOSED

    def watch(self, *, states: bool = False) -> None:
        """Tells what will be asked behind each operation: a kernel that is far away answers in one go."""
        self.device.watch(self.fd, states=states)

    def wait(self, seconds: float) -> None:
        """Lets time pass where the VM is."""
        self.device.wait(seconds)

    def new_guest(self, vcpu_fd: int) -> G.Guest:
        """What runs programs on a vCPU; the first one brings the VM's memory with it."""
        held = self._held
        if held.memory is None:
            held.memory = self.device.memory(self.fd)
        held.guests.append(self.device.guest(vcpu_fd, held.memory, self.run_bytes))
        return held.guests[-1]

    def add_vcpu(self, vcpu_id: int) -> OracleVcpu:
        """KVM_CREATE_VCPU and KVM_SET_CPUID2: the new vCPU. ValueError for an id that is taken."""
        try:
            fd = self._held.file(self.device.call(self.fd, K.CREATE_VCPU, integer(vcpu_id, "APIC id", 0xFFFF_FFFF)))
        except FileExistsError:
            raise ValueError(f"APIC id {vcpu_id} is taken (EEXIST)") from None
        if self._cmci:
            self.device.call(fd, K.X86_SETUP_MCE, K.ffi.new("uint64_t *", K.MCG_CMCI_P | 32))
        self.device.call(fd, K.SET_CPUID2, self._cpuid)
        if self._enforces:
            self.device.enable_cap(fd, K.CAP_HYPERV_ENFORCE_CPUID, 1)
        self.device.created(self.fd, fd)
        vcpu = OracleVcpu(self, len(self.vcpus), vcpu_id, fd)
        self.vcpus.append(vcpu)
        return vcpu

    def boot_x2apic(self) -> None:
        """Every vCPU as a booted x2APIC guest has it: APICBASE EN and EXTD, SVR 0x1FF. By host writes."""
        for v in self.vcpus:
            if not v.set_msr(R.MSR_APICBASE, v.apic_base | R.APICBASE_EN | R.APICBASE_EXTD):
                raise ValueError("x2APIC cannot be enabled: the guest's CPUID does not offer it (x2apic=False)")
            v.set_msr(R.MSR_X2APIC_BASE + (R.APIC_SPIV >> 4), 0x1FF)

    def enable_x2apic_api(self, flags: int) -> None:
        """KVM_ENABLE_CAP of KVM_CAP_X2APIC_API, at any time; ValueError where KVM says EINVAL."""
        try:
            self.device.enable_cap(self.fd, K.CAP_X2APIC_API, flags)
        except OSError as error:
            raise ValueError(f"x2apic_api {flags:#x}: {error.strerror}") from error

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: number of APICs that accepted, 0, or -1 (EPERM); ValueError where KVM says EINVAL."""
        message = K.ffi.new(
            "struct kvm_msi *",
            {"address_lo": address & 0xFFFF_FFFF, "address_hi": address >> 32, "data": data},
        )
        try:
            return self.device.call(self.fd, K.SIGNAL_MSI, message)
        except PermissionError:
            return -1
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError(f"MSI address {address:#x}: KVM_SIGNAL_MSI: EINVAL") from error

    def set_msr_filter(
        self, default_deny: bool = False, ranges: Iterable[tuple[int, int, Iterable[bool]]] = ()
    ) -> None:
        """KVM_X86_SET_MSR_FILTER; ``ranges`` are (flags, first MSR, one bool an MSR: allowed).

        ValueError for more than 16 of them and where KVM says EINVAL.
        """
        one = K.ffi.new("struct kvm_msr_filter *", {"flags": bool(default_deny)})
        rows, keep = list(ranges), []
        if len(rows) > len(one.ranges):
            raise ValueError(f"{len(rows)} filter ranges: at most {len(one.ranges)}")
        for entry, (flags, first, bits) in zip(one.ranges, rows, strict=False):
            allowed = [bool(bit) for bit in bits]
            packed = sum(bit << n for n, bit in enumerate(allowed))
            keep.append(K.ffi.from_buffer(packed.to_bytes((len(allowed) + 63) // 64 * 8, "little")))
            entry.flags, entry.base, entry.nmsrs, entry.bitmap = flags, first, len(allowed), keep[-1]
        try:
            self.device.call(self.fd, K.X86_SET_MSR_FILTER, one)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError(f"KVM_X86_SET_MSR_FILTER of {len(rows)} ranges: EINVAL") from error

    @property
    def user_space_msr(self) -> int:
        """KVM_CAP_X86_USER_SPACE_MSR: which failing MSR accesses of guests leave to user space."""
        return getattr(self, "_user_space_msr", 0)

    @user_space_msr.setter
    def user_space_msr(self, reasons: int) -> None:
        self.device.enable_cap(self.fd, K.CAP_X86_USER_SPACE_MSR, integer(reasons, "user_space_msr", 7))
        self._user_space_msr = reasons

    def route(self, vectors: Iterable[int]) -> None:
        """KVM_SET_GSI_ROUTING: level-triggered messages to physical 0, one a pin of user space's IOAPIC.

        ValueError for more vectors than pins. vCPUs see it at their next KVM_RUN.
        """
        vectors = [integer(vector, "vector", 0xFF) for vector in vectors]
        if len(vectors) > IOAPIC_PINS:
            raise ValueError(f"{len(vectors)} routes: user space's IOAPIC has {IOAPIC_PINS} pins")
        table = K.ffi.new("struct routing_table *", {"nr": len(vectors)})
        for pin, (entry, vector) in enumerate(zip(table.entries, vectors, strict=False)):
            entry.gsi, entry.type, entry.address_lo, entry.data = pin, 2, 0xFEE0_0000, vector | 0x8000
        self.device.call(self.fd, K.SET_GSI_ROUTING, table)


class _Held:
    """What one VM holds, and how to let go of it: run areas, files, then memory.

    It knows no Oracle, so that one that nobody holds any more can be collected.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.files: list[int] = []
        self.guests: list[G.Guest] = []
        self.memory: G.Memory | None = None

    def file(self, fd: int) -> int:
        self.files.append(fd)
        return fd

    def release(self) -> None:
        while self.guests:
            self.guests.pop().close()
        while self.files:
            self.device.close(self.files.pop())
        if self.memory is not None:
            self.memory.close()
            self.memory = None


def _guest_cpuid(device: Device, system: int, x2apic: bool, tsc_deadline: bool, maxphyaddr: int) -> Any:
    """KVM_GET_SUPPORTED_CPUID with the features that a local APIC asks about as wanted."""
    table = H.supported_cpuid(device, system)
    for entry in table.entries[0 : table.nent]:
        if entry.function == CPUID_FEATURES:
            entry.ecx &= ~(CPUID_1_ECX_X2APIC | CPUID_1_ECX_DEADLINE)
            entry.ecx |= CPUID_1_ECX_X2APIC * x2apic | CPUID_1_ECX_DEADLINE * tsc_deadline
        elif entry.function == H.CPUID_ADDRESS_SIZES:
            entry.eax = entry.eax & ~0xFF | maxphyaddr
    return table


def add_hyperv(table: Any, features: HvFeature) -> None:
    """Hyper-V's leaves in front of KVM's own, which move by 0x100; SPIN_WAIT is 0xFFF retries or none."""
    leaves: dict[int, dict[str, int]] = {
        0x4000_0000: {"eax": 0x4000_000A, "ebx": 0x7263_694D, "ecx": 0x666F_736F, "edx": 0x7648_2074},
        0x4000_0001: {"eax": 0x3123_7648},
        **{leaf: {} for leaf in (0x4000_0002, 0x4000_0003, 0x4000_0004, 0x4000_0005)},
    }
    for feature, (leaf, register, bit) in CPUID_OF_FEATURE.items():
        if feature in features:
            there = leaves[leaf]
            retries = feature == HvFeature.SPIN_WAIT
            there[register] = there.get(register, 0) | (0xFFF if retries else 1 << bit)
    for entry in table.entries[0 : table.nent]:
        if entry.function in (0x4000_0000, 0x4000_0001):
            entry.function += 0x100
            if entry.function == 0x4000_0100:
                entry.eax = 0x4000_0101
    for leaf, registers in leaves.items():
        entry = table.entries[table.nent]
        entry.function = leaf
        for register, value in registers.items():
            setattr(entry, register, value)
        table.nent += 1
