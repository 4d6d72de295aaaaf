"""What the running kernel's KVM is: read from it, so that a model can be configured like it.

Models: nothing. Capabilities come from KVM_CHECK_EXTENSION, module parameters from sysfs; what neither tells is found
out by an experiment on a VM that lives for its length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from fastexit import regs as R
from fastexit.kvm import device as D
from fastexit.kvm import guest as G
from fastexit.kvm import ioctl as K
from fastexit.kvm.device import LOCAL, Device
from fastexit.kvm.device import KvmUnavailable as KvmUnavailable
from fastexit.layout import MAX_VCPU_ID, MAX_VCPUS
from fastexit.releases import FIRST
from fastexit.releases import generation as generation_of
from fastexit.releases import release as numbers
from fastexit.traits import OLDEST

VENDOR_MODULES = ("kvm_intel", "kvm_amd", "kvm_pvm")
NOWHERE = 0x7FFF_FFF0
"""A destination that no vCPU has."""
TRIED_VECTOR = 0x41
IOREGSEL_AT, TABLE_AT, FIRST_ENTRY = 8, 24, 0x10
"""Offsets in struct kvm_ioapic_state, and the register that has the first entry's low half."""
CPUID_ADDRESS_SIZES = 0x8000_0008


@dataclass(frozen=True)
class Host:
    """One kernel's KVM, as far as it shows in a local APIC.

    Attributes:
        release: the kernel's release. kernel: the generation of `fastexit.profiles()` that it belongs to.
        module: the module that runs guests, "" when none of the known ones is loaded.
        api, api_split: the KVM_CAP_X2APIC_API flags taken with a full and with a split irqchip.
        icr_split: the x2APIC ICR is kept in two registers, as AVIC wants it.
        fastpath: the exit of a guest's WRMSR goes by the fast path, which shows where that does not ask the MSR filter.
        eoi_at_injection: an interrupt that KVM injects is ended at once (a module that has no use for its ISR bit does
            so): the highest vector in service leaves it, whoever's it is, and its EOI goes to the IOAPIC.
        vector_hashing, min_timer_period_us, pi_inject_timer, ignore_msrs: module parameters.
        smm, cmci: what VMs may have. quirks: those that can be disabled. bus_cycles: the bus clock can be set.
        max_vcpus, max_vcpu_id: how many vCPUs a VM may have, and what their ids must be below; no more than a Machine.
        version: what the release does not say of itself, a distribution's patch level (6.1.192); "" where unknown.
        nrips: kvm_amd learns the next RIP from the CPU. maxphyaddr: physical address bits that guests can be given.
        hyperv: the kernel has CONFIG_KVM_HYPERV.
    """

    release: str
    kernel: str
    module: str
    api: R.X2ApicApi
    api_split: R.X2ApicApi
    icr_split: bool
    fastpath: bool
    eoi_at_injection: bool
    vector_hashing: bool
    min_timer_period_us: int
    pi_inject_timer: bool
    ignore_msrs: bool
    apicv: bool
    smm: bool
    cmci: bool
    quirks: int
    bus_cycles: bool
    max_vcpus: int
    max_vcpu_id: int
    version: str = ""
    nrips: bool = True
    maxphyaddr: int = 48
    hyperv: bool = True
    enforces_hyperv: bool = False
    """Whether it has KVM_CAP_HYPERV_ENFORCE_CPUID."""
    one_entry: bool = False
    """Whether a guest's instructions are emulated one after the other within one entry: what they request of their
    vCPU is looked at by the next KVM_RUN."""

    def keywords(self) -> dict[str, Any]:
        """Keywords of `fastexit.Machine` that make the model like this host."""
        return {
            "kernel": self.version if self._is_of(self.version) else self.kernel,
            "vendor": {"kvm_amd": "svm", "kvm_intel": "vmx"}.get(self.module, "svm" if self.icr_split else "vmx"),
            "apicv": self.apicv,
            "hv_timer": False,
            "vector_hashing": self.vector_hashing,
            "min_timer_period_us": self.min_timer_period_us,
            "pi_inject_timer": self.pi_inject_timer,
            "smm": self.smm,
            "nrips": self.nrips,
            "kvm_hyperv": self.hyperv,
        }

    def _is_of(self, version: str) -> bool:
        """Whether a version is one of the releases that ``kernel`` stands for."""
        return generation(version) == self.kernel if version else False

    def as_dict(self) -> dict[str, Any]:
        """All attributes with plain values, for JSON."""
        return asdict(self) | {"api": int(self.api), "api_split": int(self.api_split)}


def parameter(name: str, module: str = "kvm", default: str = "", device: Device = LOCAL) -> str:
    """A module parameter's text; ``default`` where the kernel has none of that name."""
    text = device.text(D.MODULES / module / "parameters" / name)
    return default if text is None else text.strip()


def _module(device: Device) -> str:
    """The module that runs guests; both vendors' are there where they are built in, so the CPU's has precedence."""
    there = [name for name in VENDOR_MODULES if device.exists(D.MODULES / name)]
    cpu = device.text(D.CPUINFO) or ""
    amd = any(vendor in cpu for vendor in ("AuthenticAMD", "HygonGenuine"))
    return "kvm_amd" if amd and "kvm_amd" in there else next(iter(there), "")


def generation(release: str) -> str:
    """The newest generation that is not newer than a kernel release; the oldest one for what is older or unknown."""
    asked = numbers(release)
    return OLDEST if asked is None or asked.series < FIRST else generation_of(release).name


@contextmanager
def scratch(device: Device, split: bool = False) -> Iterator[tuple[int, int]]:
    """A VM with an in-kernel irqchip and one vCPU: file descriptors of both, closed at the end."""
    with device.opened() as system:
        fds: list[int] = []
        try:
            fds.append(device.call(system, K.CREATE_VM))
            if split:
                device.enable_cap(fds[0], K.CAP_SPLIT_IRQCHIP, 24)
            else:
                device.call(fds[0], K.CREATE_IRQCHIP)
            fds.append(device.call(fds[0], K.CREATE_VCPU, 0))
            yield fds[0], fds[1]
        finally:
            while fds:
                device.close(fds.pop())


class _Tried:
    """A VM with one vCPU, on which is found out what nothing tells."""

    def __init__(self, device: Device, vm: int, vcpu: int) -> None:
        self.device = device
        self.vm = vm
        self.vcpu = vcpu

    def page(self) -> Any:
        """KVM_GET_LAPIC."""
        page = K.ffi.new("struct kvm_lapic_state *")
        self.device.call(self.vcpu, K.GET_LAPIC, page)
        return page

    def icr_is_split(self, cpuid: Any) -> bool:
        """Sends an x2APIC IPI to nobody: the destination of one that is kept as a u64 is in the bytes behind."""
        self.device.call(self.vcpu, K.SET_CPUID2, cpuid)
        for msr, value in (
            (R.MSR_APICBASE, R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_BSP | R.APICBASE_EN | R.APICBASE_EXTD),
            (R.MSR_X2APIC_ICR, R.icr(NOWHERE, 0xFD)),
        ):
            self.set_msr(msr, value)
        return not any(self.page().regs[R.APIC_ICR + 4 : R.APIC_ICR + 8])

    def set_msr(self, msr: int, value: int) -> None:
        """KVM_SET_MSRS of one of x2APIC's; KvmUnavailable where there are none."""
        one = K.ffi.new("struct one_msr *", {"nmsrs": 1, "index": msr, "data": value})
        if self.device.call(self.vcpu, K.SET_MSRS, one) != 1:
            raise KvmUnavailable(0, f"this KVM refuses MSR {msr:#x}: it has no x2APIC")

    @contextmanager
    def guest(self, run_bytes: int) -> Iterator[G.Guest]:
        """A vCPU that can run programs."""
        with (
            closing(self.device.memory(self.vm)) as memory,
            closing(self.device.guest(self.vcpu, memory, run_bytes)) as guest,
        ):
            guest.flatten()
            yield guest

    def writes_past_filters(self, guest: G.Guest) -> bool:
        """Whether a WRMSR of the TSC deadline happens although a filter denies it."""
        bitmap = K.ffi.new("uint64_t *")
        denied = {"flags": R.MSR_FILTER_WRITE, "nmsrs": 1, "base": R.MSR_TSC_DEADLINE, "bitmap": bitmap}
        self.device.call(self.vm, K.X86_SET_MSR_FILTER, K.ffi.new("struct kvm_msr_filter *", {"ranges": [denied]}))
        return guest.execute(G.WRMSR, rcx=R.MSR_TSC_DEADLINE).port == G.PORT_DONE

    def ends_what_it_injects(self, guest: G.Guest) -> bool:
        """Lets a guest take an interrupt and looks whether it is in service then."""
        page = self.page()
        byte, bit = TRIED_VECTOR // 32 * 0x10 + TRIED_VECTOR % 32 // 8, 1 << TRIED_VECTOR % 8
        page.regs[R.APIC_SPIV + 1] |= R.SVR_ENABLE >> 8
        page.regs[R.APIC_IRR + byte] |= bit
        self.device.call(self.vcpu, K.SET_LAPIC, page)
        taken = guest.execute(G.NOTHING, interrupts=True).interrupt
        return taken == TRIED_VECTOR and not self.page().regs[R.APIC_ISR + byte] & bit


def _looks_between_instructions(device: Device, run_bytes: int, cpuid: Any) -> bool:
    """Whether what a guest's store asks of its vCPU is done before the guest's next KVM_RUN.

    A store gives an IOAPIC's level-triggered entry another vector, which the vCPU has in service: whether an EOI of it
    reaches the entry then depends on whether the vCPU has looked at the IOAPIC again.
    """
    with scratch(device) as (vm, vcpu):
        tried = _Tried(device, vm, vcpu)
        device.call(vcpu, K.SET_CPUID2, cpuid)
        base = R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_BSP | R.APICBASE_EN | R.APICBASE_EXTD
        tried.set_msr(R.MSR_APICBASE, base)
        with tried.guest(run_bytes) as guest:
            guest.execute(G.NOTHING)
            chip = K.ffi.new("struct kvm_irqchip *", {"chip_id": 2})
            device.call(vm, K.GET_IRQCHIP, chip)
            image = K.ffi.buffer(chip.chip)
            entry = TRIED_VECTOR | R.REDIR_LEVEL | R.REDIR_MASK | R.REDIR_REMOTE_IRR
            image[IOREGSEL_AT : IOREGSEL_AT + 4] = struct.pack("<I", FIRST_ENTRY)
            image[TABLE_AT : TABLE_AT + 8] = struct.pack("<Q", entry)
            device.call(vm, K.SET_IRQCHIP, chip)
            page = tried.page()
            other = TRIED_VECTOR + 1
            byte, bit = other // 32 * 0x10 + other % 32 // 8, 1 << other % 8
            page.regs[R.APIC_SPIV + 1] |= R.SVR_ENABLE >> 8
            for bitmap in (R.APIC_ISR, R.APIC_TMR):
                page.regs[bitmap + byte] |= bit
            device.call(vcpu, K.SET_LAPIC, page)
            store = other | R.REDIR_LEVEL | R.REDIR_MASK
            guest.execute(G.STORES[4], rax=store, rdi=R.IOAPIC_DEFAULT_BASE + 0x10)
            tried.set_msr(R.MSR_X2APIC_EOI, 0)
            device.call(vm, K.GET_IRQCHIP, chip)
            (entry,) = struct.unpack_from("<Q", image, TABLE_AT)
            return not entry & R.REDIR_REMOTE_IRR


def supported_cpuid(device: Device, system: int) -> Any:
    """KVM_GET_SUPPORTED_CPUID: a struct cpuid_table."""
    table = K.ffi.new("struct cpuid_table *", {"nent": 256})
    device.call(system, K.GET_SUPPORTED_CPUID, table)
    return table


@cache
def running() -> Host:
    """The KVM of the running kernel; KvmUnavailable, an OSError, says in one line why there is none."""
    return of(LOCAL)


def of(device: Device) -> Host:
    """The KVM of a device's kernel; KvmUnavailable where it cannot be used."""
    try:
        return _look(device)
    except KvmUnavailable:
        raise
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        text = f"no usable {device.name}: this kernel's KVM is not one to compare with ({why})"
        raise KvmUnavailable(getattr(error, "errno", 0), text) from error


def _address_bits(cpuid: Any) -> int:
    """MAXPHYADDR that this host offers its guests."""
    for entry in cpuid.entries[0 : cpuid.nent]:
        if entry.function == CPUID_ADDRESS_SIZES:
            return int(entry.eax & 0xFF)
    return 36


def _look(device: Device) -> Host:
    """Asks and tries; OSError or RuntimeError where something is missing."""
    with device.opened() as system, scratch(device) as (vm, vcpu), scratch(device, split=True) as (split, runner):
        run_bytes = device.call(system, K.GET_VCPU_MMAP_SIZE)
        cpuid = supported_cpuid(device, system)
        device.call(runner, K.SET_CPUID2, cpuid)
        tried = _Tried(device, split, runner)
        with tried.guest(run_bytes) as guest:
            eoi_at_injection = tried.ends_what_it_injects(guest)
            fastpath = tried.writes_past_filters(guest)

        def has(cap: int, fd: int = vm) -> int:
            return device.call(fd, K.CHECK_EXTENSION, cap)

        def said(name: str, default: str, module: str = "kvm") -> str:
            return parameter(name, module, default, device)

        mce = K.ffi.new("uint64_t *")
        device.call(system, K.X86_GET_MCE_CAP_SUPPORTED, mce)
        api, api_split = (R.X2ApicApi(has(K.CAP_X2APIC_API, fd) & 15) for fd in (vm, split))
        enable = R.X2ApicApi.ENABLE_SUPPRESS_EOI_BROADCAST
        needed = R.X2ApicApi.USE_32BIT_IDS | R.X2ApicApi.DISABLE_BROADCAST_QUIRK
        if needed not in api:
            raise KvmUnavailable(0, "this kernel's KVM lacks KVM_CAP_X2APIC_API")
        release = device.release()
        return Host(
            release=release,
            kernel=generation(release),
            module=_module(device),
            api=api & ~enable,
            api_split=api_split,
            icr_split=_Tried(device, vm, vcpu).icr_is_split(cpuid),
            fastpath=fastpath,
            eoi_at_injection=eoi_at_injection,
            vector_hashing=said("vector_hashing", "Y") == "Y",
            min_timer_period_us=int(said("min_timer_period_us", "200")),
            pi_inject_timer=said("pi_inject_timer", "N") in ("Y", "1"),
            ignore_msrs=said("ignore_msrs", "N") in ("Y", "1"),
            apicv="Y" in (said("enable_apicv", "", "kvm_intel"), said("avic", "", "kvm_amd")),
            version=device.version(),
            nrips=said("nrips", "1", "kvm_amd") in ("Y", "1"),
            smm=bool(has(K.CAP_X86_SMM)),
            cmci=bool(mce[0] & K.MCG_CMCI_P),
            quirks=has(K.CAP_DISABLE_QUIRKS2),
            bus_cycles=bool(has(K.CAP_X86_APIC_BUS_CYCLES_NS)),
            max_vcpus=min(has(K.CAP_MAX_VCPUS), MAX_VCPUS),
            max_vcpu_id=min(has(K.CAP_MAX_VCPU_ID), MAX_VCPU_ID + 1),
            maxphyaddr=_address_bits(cpuid),
            hyperv=bool(has(K.CAP_HYPERV)),
            enforces_hyperv=bool(has(K.CAP_HYPERV_ENFORCE_CPUID)),
            one_entry=not _looks_between_instructions(device, run_bytes, cpuid),
        )
