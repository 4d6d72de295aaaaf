"""What a machine is made of: user space's choices, checked as KVM would check them, as words of the machine's header.

Models: the capabilities that must be set before the first vCPU (KVM_CAP_X2APIC_API, X86_DISABLE_EXITS,
X86_APIC_BUS_CYCLES_NS, DISABLE_QUIRKS, SPLIT_IRQCHIP), KVM's module parameters, what the guest's CPUID offers.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastexit import layout as L
from fastexit import regs as R
from fastexit.checks import integer, one_of
from fastexit.profile import profile

_U32 = 0xFFFF_FFFF
_MAX_BUS_NS = (1 << 63) // (_U32 * 128)
"""KVM refuses a bus cycle with which the longest period would overflow."""
_MAX_CLOCK = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Machine's keywords; Machine says what each means. ValueError for what KVM or the hardware would refuse."""

    kernel: str
    vendor: str
    apicv: bool
    irqchip: str
    x2apic_api: int
    x2apic: bool
    tsc_deadline: bool
    threads: bool
    vector_hashing: bool
    cmci: bool
    smm: bool
    nrips: bool
    hv_timer: bool | None
    ipiv: bool | None
    vtd_pi: bool
    x2avic: bool
    pi_inject_timer: bool
    retpoline: bool
    maxphyaddr: int
    tsc_khz: int
    bus_cycle_ns: int
    min_timer_period_us: int
    timer_advance_ns: int
    disable_exits: int
    disable_quirks: int
    boot_cpu_id: int

    def __post_init__(self) -> None:
        profile(self.kernel)
        one_of(self.vendor, "vendor", ("vmx", "svm"))
        one_of(self.irqchip, "irqchip", ("full", "split"))
        check_api(self.x2apic_api, self.irqchip)
        svm = self.vendor == "svm"
        for name, on, wants_svm, why in (
            ("hv_timer", self.hv_timer, False, "SVM has no preemption timer"),
            ("vtd_pi", self.vtd_pi, False, "VT-d posts to VMX's descriptors"),
            ("x2avic", self.x2avic, True, "x2AVIC is SVM's"),
        ):
            if on and svm is not wants_svm:
                raise ValueError(f"{name}=True: {why}")
        for name, value in (("ipiv", self.ipiv), ("vtd_pi", self.vtd_pi), ("x2avic", self.x2avic)):
            if value and not self.apicv:
                raise ValueError(f"{name}=True: needs apicv=True")
        for name, least, most in (
            ("maxphyaddr", 32, 52),
            ("tsc_khz", 1, 10_000_000),
            ("bus_cycle_ns", 1, _MAX_BUS_NS),
            ("min_timer_period_us", 0, 1_000_000),
            ("timer_advance_ns", 0, _U32),
            ("disable_exits", 0, 15),
            ("disable_quirks", 0, _U32),
            ("boot_cpu_id", 0, L.MAX_VCPU_ID),
        ):
            if integer(getattr(self, name), name, max(most, 63)) < least or getattr(self, name) > most:
                raise ValueError(f"{name} {getattr(self, name)} is out of range {least}..{most}")

    def header(self) -> dict[int, int]:
        """Header words of a machine like this."""
        svm = self.vendor == "svm"
        switches = {
            L.CONFIG_SVM: svm,
            L.CONFIG_APICV: self.apicv,
            L.CONFIG_THREADS: self.threads,
            L.CONFIG_SPLIT_IRQCHIP: self.irqchip == "split",
            L.CONFIG_X2APIC_CPUID: self.x2apic,
            L.CONFIG_DEADLINE_CPUID: self.tsc_deadline,
            L.CONFIG_VECTOR_HASHING: self.vector_hashing,
            L.CONFIG_CMCI: self.cmci,
            L.CONFIG_SMM: self.smm,
            L.CONFIG_NRIPS: self.nrips,
            L.CONFIG_HV_TIMER: not svm if self.hv_timer is None else self.hv_timer,
            L.CONFIG_IPIV: (svm and self.apicv) if self.ipiv is None else self.ipiv,
            L.CONFIG_VTD_PI: self.vtd_pi,
            L.CONFIG_X2AVIC: self.x2avic,
            L.CONFIG_PI_INJECT_TIMER: self.pi_inject_timer,
            L.CONFIG_RETPOLINE: self.retpoline,
            L.CONFIG_FASTPATH: True,
            L.CONFIG_LINT0_REENABLED: not self.disable_quirks & R.QUIRK_LINT0_REENABLED,
            L.CONFIG_MMIO_HOLE: not self.disable_quirks & R.QUIRK_LAPIC_MMIO_HOLE,
        }
        return {
            L.H_MAGIC: L.MAGIC,
            L.H_ABI: L.ABI_VERSION,
            L.H_WORDS: L.WORDS,
            L.H_CONFIG: sum(bit for bit, on in switches.items() if on),
            L.H_TRAITS: int(profile(self.kernel).traits),
            L.H_API: self.x2apic_api,
            L.H_MAP: L.MAP0,
            L.H_PROFILE: profile(self.kernel).number,
            L.H_MAXPHYADDR: self.maxphyaddr,
            L.H_TSC_KHZ: self.tsc_khz,
            L.H_BUS_NS: self.bus_cycle_ns,
            L.H_MIN_PERIOD_NS: self.min_timer_period_us * 1000,
            L.H_TIMER_ADVANCE_NS: self.timer_advance_ns,
            L.H_DISABLED_EXITS: self.disable_exits,
            L.H_BSP_ID: self.boot_cpu_id,
            L.H_INHIBITS: 0 if self.apicv else 1 << R.Inhibit.DISABLED,
        }


def latest_clock(tsc_khz: int) -> int:
    """The last ns that a machine's clock may be set to: it and the guest's TSC then have 63 bits.

    Above, a timer's deadline could lie before the TSC that it is counted from.
    """
    return min(_MAX_CLOCK, _MAX_CLOCK * 1_000_000 // tsc_khz)


def check_api(flags: int, irqchip: str) -> None:
    """What KVM_ENABLE_CAP of KVM_CAP_X2APIC_API would refuse."""
    flags = R.X2ApicApi(integer(flags, "x2apic_api", 15))
    enable, disable = R.X2ApicApi.ENABLE_SUPPRESS_EOI_BROADCAST, R.X2ApicApi.DISABLE_SUPPRESS_EOI_BROADCAST
    if enable in flags and (irqchip != "split" or disable in flags):
        raise ValueError(
            "x2apic_api: ENABLE_SUPPRESS_EOI_BROADCAST needs a split irqchip and excludes DISABLE (EINVAL)"
        )
