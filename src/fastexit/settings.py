"""Settings: each of a machine's switches and numbers, declared once.

From the declaration come Machine's keywords and their documentation, the checks, the bits of the header's H_CONFIG and
what fx_config.flags of the C door mean. A new one is an entry here, its bit in layout.py, and its flag in fastexit.h
and embed/cabi.py's Open, for those numbers never change.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from fastexit import layout as L
from fastexit.checks import U32, quoted
from fastexit.hyperv import ALL_FEATURES, HvFeature
from fastexit.profile import NEWEST

_MAX_BUS_NS = (1 << 63) // (U32 * 128)
"""KVM refuses a bus cycle with which the longest period would overflow."""


@dataclass(frozen=True)
class Setting:
    """What belongs to one keyword of Machine, besides its name and type."""

    default: Any
    doc: str
    _: KW_ONLY
    bit: int = 0
    """layout.CONFIG_*: set for True, or for the second of ``choices``."""
    flags: Mapping[str, bool | str] = field(default_factory=dict)
    """Names of fx_config.flags without FX_, and the value that each stands for; the last one that is set counts."""
    choices: tuple[str, ...] = ()
    """The only values of a name, in the order of the C door's numbers."""
    limits: tuple[int, int] | None = None
    """The least and the greatest value of a number."""


class Settings(TypedDict, total=False):
    """Machine's keywords that say what user space, KVM's module parameters and the guest's CPUID make of it."""

    kernel: Annotated[
        str,
        Setting(
            NEWEST,
            "the generation to be like; fastexit.profiles() lists them, the last one is the default. "
            '"sdm" is the manual\'s APIC, and no kernel.',
        ),
    ]
    vendor: Annotated[str, Setting("vmx", 'Intel\'s "vmx" or AMD\'s "svm".', choices=("vmx", "svm"), bit=L.CONFIG_SVM)]
    apicv: Annotated[
        bool,
        Setting(True, "posted interrupts (VMX) or AVIC (SVM) in use.", bit=L.CONFIG_APICV, flags={"NO_APICV": False}),
    ]
    irqchip: Annotated[
        str,
        Setting(
            "full",
            '"full" (in-kernel IOAPIC) or "split".',
            choices=("full", "split"),
            bit=L.CONFIG_SPLIT_IRQCHIP,
            flags={"SPLIT_IRQCHIP": "split"},
        ),
    ]
    x2apic_api: Annotated[int, Setting(0, "KVM_CAP_X2APIC_API flags (regs.X2ApicApi).")]
    x2apic: Annotated[
        bool,
        Setting(True, "the guest's CPUID offers x2APIC mode.", bit=L.CONFIG_X2APIC_CPUID, flags={"NO_X2APIC": False}),
    ]
    tsc_deadline: Annotated[
        bool,
        Setting(
            True,
            "the guest's CPUID offers the TSC-deadline timer.",
            bit=L.CONFIG_DEADLINE_CPUID,
            flags={"NO_TSC_DEADLINE": False},
        ),
    ]
    threads: Annotated[
        bool,
        Setting(
            True,
            "other threads may act on this machine while one runs a vCPU (atomics); False: it has one owner.",
            bit=L.CONFIG_THREADS,
            flags={"ONE_OWNER": False},
        ),
    ]
    vector_hashing: Annotated[
        bool,
        Setting(
            True,
            "KVM's module parameter; lowest priority goes by vector instead of by arb_prio.",
            bit=L.CONFIG_VECTOR_HASHING,
            flags={"NO_VECTOR_HASHING": False},
        ),
    ]
    cmci: Annotated[bool, Setting(False, "a host whose MCG_CAP has CMCI_P.", bit=L.CONFIG_CMCI, flags={"CMCI": True})]
    smm: Annotated[
        bool,
        Setting(
            True,
            "a kernel with CONFIG_KVM_SMM, as distributions build theirs; up to 6.1 every kernel has it.",
            bit=L.CONFIG_SMM,
            flags={"NO_SMM": False, "SMM": True},
        ),
    ]
    kvm_hyperv: Annotated[
        bool,
        Setting(
            True,
            "a kernel with CONFIG_KVM_HYPERV, as distributions build theirs; up to 6.6 every kernel has it.",
            bit=L.CONFIG_KVM_HYPERV,
            flags={"NO_KVM_HYPERV": False},
        ),
    ]
    hyperv: Annotated[
        bool | str,
        Setting(
            False,
            'the guest\'s CPUID says "Hv#1", as Windows wants it; "enforce": and it can use only what hyperv_features '
            "has (KVM_CAP_HYPERV_ENFORCE_CPUID).",
            bit=L.CONFIG_HYPERV,
            flags={"HYPERV": True, "HYPERV_ENFORCE": "enforce"},
        ),
    ]
    hyperv_features: Annotated[
        HvFeature | Iterable[str],
        Setting(
            ALL_FEATURES,
            'the enlightenments in the guest\'s CPUID, as hyperv.HvFeature or by name: ("synic", "stimer").',
        ),
    ]
    nrips: Annotated[bool, Setting(True, "SVM saves the next RIP.", bit=L.CONFIG_NRIPS, flags={"NO_NRIPS": False})]
    hv_timer: Annotated[
        bool | None,
        Setting(
            None,
            "the VMX preemption timer can be used; None means on VMX.",
            bit=L.CONFIG_HV_TIMER,
            flags={"NO_HV_TIMER": False},
        ),
    ]
    ipiv: Annotated[
        bool | None,
        Setting(
            None,
            "IPI virtualisation (VMX), or AVIC's IsRunning bits in use (SVM); None means on SVM only.",
            bit=L.CONFIG_IPIV,
            flags={"NO_IPIV": False, "IPIV": True},
        ),
    ]
    vtd_pi: Annotated[
        bool, Setting(False, "devices can post interrupts (VMX).", bit=L.CONFIG_VTD_PI, flags={"VTD_PI": True})
    ]
    x2avic: Annotated[
        bool, Setting(False, "AVIC in x2APIC mode too (SVM).", bit=L.CONFIG_X2AVIC, flags={"X2AVIC": True})
    ]
    pi_inject_timer: Annotated[
        bool,
        Setting(
            False,
            "KVM's module parameter; timers are posted from the host's interrupt where nothing else can.",
            bit=L.CONFIG_PI_INJECT_TIMER,
            flags={"PI_INJECT_TIMER": True},
        ),
    ]
    retpoline: Annotated[
        bool,
        Setting(
            True,
            "a kernel with CONFIG_MITIGATION_RETPOLINE: common exits are handled without an indirect call.",
            bit=L.CONFIG_RETPOLINE,
            flags={"NO_RETPOLINE": False},
        ),
    ]
    maxphyaddr: Annotated[int, Setting(48, "guest physical address bits, which limit APICBASE.", limits=(32, 52))]
    tsc_khz: Annotated[
        int,
        Setting(
            1_000_000,
            "the host's TSC ticks a millisecond of the machine's clock, and so a guest's, but for KVM_SET_TSC_KHZ.",
            limits=(1, 10_000_000),
        ),
    ]
    bus_cycle_ns: Annotated[
        int, Setting(1, "APIC bus cycle (KVM_CAP_X86_APIC_BUS_CYCLES_NS).", limits=(1, _MAX_BUS_NS))
    ]
    min_timer_period_us: Annotated[
        int,
        Setting(200, "KVM's module parameter; shorter periodic timers are stretched.", limits=(0, 1_000_000)),
    ]
    timer_advance_ns: Annotated[
        int,
        Setting(
            0, "deadline timers fire that early and the entry waits (KVM begins with 1000); 0: off.", limits=(0, U32)
        ),
    ]
    disable_exits: Annotated[int, Setting(0, "KVM_CAP_X86_DISABLE_EXITS (regs.DisableExits).", limits=(0, 31))]
    disable_quirks: Annotated[
        int,
        Setting(
            0,
            "KVM_CAP_DISABLE_QUIRKS; bits 0 (LINT0_REENABLED) and 2 (LAPIC_MMIO_HOLE) matter here.",
            limits=(0, U32),
        ),
    ]
    boot_cpu_id: Annotated[int, Setting(0, "KVM_SET_BOOT_CPU_ID.", limits=(0, L.MAX_VCPU_ID))]


SETTINGS: dict[str, Setting] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Settings, include_extras=True).items()
}
"""The declarations above by name, in their order."""

_Class = TypeVar("_Class")


def documented(made: type[_Class]) -> type[_Class]:
    """Show the settings in help() and inspect.signature of a class whose __init__ ends in ``**settings``.

    The class keeps its own Args, and those of the settings follow where its docstring has the line ``{settings}``.
    """
    init: Any = vars(made)["__init__"]
    *own, _ = inspect.signature(init).parameters.values()
    types = get_type_hints(Settings)
    init.__signature__ = inspect.Signature(
        [
            *own,
            *(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=setting.default, annotation=types[name])
                for name, setting in SETTINGS.items()
            ),
        ],
        return_annotation=None,
    )
    if made.__doc__:  # python -OO has none
        lines = (
            textwrap.fill(f"{name}: {setting.doc}", 120, initial_indent=" " * 8, subsequent_indent=" " * 12)
            for name, setting in SETTINGS.items()
        )
        made.__doc__ = made.__doc__.replace(" " * 8 + "{settings}", "\n".join(lines))
    return made


def refuse_unknown(given: Iterable[str], known: Collection[str]) -> None:
    """TypeError for a keyword that is no setting, with the known one that is most like it."""
    for name in given:
        if name not in known:
            like = get_close_matches(name, known, 1)
            raise TypeError(f"{quoted(name)[1:-1]} is no setting of a Machine{f': {like[0]}?' if like else ''}")
