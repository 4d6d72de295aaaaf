"""What tracepoints call numbers: exit reasons, reasons to leave for user space, APICv inhibits, by kernel generation.

Models: __print_symbolic and __print_flags over VMX_EXIT_REASONS, SVM_EXIT_REASONS, kvm_trace_exit_reason and
APICV_INHIBIT_REASONS. A number that a generation has no name for prints as hex.
"""

from __future__ import annotations

from typing import Any

from fastexit import regs as R
from fastexit.profile import PROFILES
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit, SvmExit, VmxExit

ORDER = {kernel: position for position, kernel in enumerate(PROFILES)}
"""Generation -> its position, oldest first."""


def since(table: dict[str, Any], kernel: int) -> Any:
    """What holds in a generation: the last entry from it or from an older one; None when there is none."""
    entry = None
    for first, value in table.items():
        if ORDER[first] <= kernel:
            entry = value
    return entry


_SVM_NAMES = {
    **{reason: reason.name.lower() for reason in SvmExit},
    **{
        0x40 + vector: f"{name} excp"
        for vector, name in zip(
            (0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19),
            "DE DB BP OF BR UD NM DF TS NP SS GP PF MF AC MC XF".split(),
            strict=True,
        )
    },
    SvmExit.READ_TR: "read_rt",
    SvmExit.WRITE_TR: "write_rt",
    SvmExit.VMMCALL: "hypercall",
    SvmExit.IDLE_HLT: "idle-halt",
    SvmExit.ERR: "invalid_guest_state",
}
_SVM_SINCE = {
    SvmExit.WRITE_EFER_TRAP: "6.1",
    SvmExit.WRITE_CR0_TRAP: "6.1",
    SvmExit.WRITE_CR4_TRAP: "6.1",
    SvmExit.WRITE_CR8_TRAP: "6.1",
    SvmExit.INVPCID: "6.1",
    SvmExit.VMGEXIT: "6.1",
    SvmExit.IDLE_HLT: "6.18",
}
_VMX_NAMES = {reason: reason.name for reason in VmxExit if reason != VmxExit.OTHER_SMI}
_VMX_SINCE = {
    VmxExit.SIPI_SIGNAL: "6.1",
    VmxExit.BUS_LOCK: "6.1",
    VmxExit.NOTIFY: "6.1",
    VmxExit.MSR_READ_IMM: "6.18",
    VmxExit.MSR_WRITE_IMM: "6.18",
}
_VMX_RENAMED = {(VmxExit.INTERRUPT_WINDOW, "seed-v3"): "PENDING_INTERRUPT"}
_USER_SINCE = {KvmExit.X86_RDMSR: "6.1", KvmExit.X86_WRMSR: "6.1"}
_USER_NAMES = {reason: f"KVM_EXIT_{reason.name}" for reason in KvmExit if reason != KvmExit.X86_BUS_LOCK}
_INHIBITS = {
    "5.6": (
        R.Inhibit.DISABLED,
        R.Inhibit.HYPERV,
        R.Inhibit.NESTED,
        R.Inhibit.IRQWIN,
        R.Inhibit.PIT_REINJ,
    ),
    "6.1": (
        R.Inhibit.DISABLED,
        R.Inhibit.HYPERV,
        R.Inhibit.ABSENT,
        R.Inhibit.BLOCKIRQ,
        R.Inhibit.APIC_ID_MODIFIED,
        R.Inhibit.APIC_BASE_MODIFIED,
        R.Inhibit.NESTED,
        R.Inhibit.IRQWIN,
        R.Inhibit.PIT_REINJ,
        R.Inhibit.SEV,
    ),
    "6.12": tuple(reason for reason in R.Inhibit if reason != R.Inhibit.PHYSICAL_ID_TOO_BIG),
    "6.18": tuple(R.Inhibit),
}


def _symbol(number: int, names: dict[Any, str], first: dict[Any, str], kernel: int) -> str:
    """__print_symbolic: the name, or hex where this generation's table has none."""
    known = number in names and ORDER[first.get(number, "seed-v3")] <= kernel
    return names[number] if known else f"0x{number:x}"


def reason_text(reason: int, svm: bool, kernel: int) -> str:
    """An exit reason as kvm_exit prints it: the name, on VMX with the flags of the upper half behind it."""
    if svm:
        return _symbol(reason, _SVM_NAMES, _SVM_SINCE, kernel)
    basic, upper = reason & 0xFFFF, reason & 0xFFFF_0000
    words = [_VMX_RENAMED.get((basic, list(ORDER)[kernel])) or _symbol(basic, _VMX_NAMES, _VMX_SINCE, kernel)]
    if upper & VMX_FAILED_VMENTRY:
        words.append("FAILED_VMENTRY")
    if upper & ~VMX_FAILED_VMENTRY:
        words.append(f"0x{upper & ~VMX_FAILED_VMENTRY:x}")
    return " ".join(words)


def user_text(reason: int, kernel: int) -> str:
    """A KVM_EXIT_* reason as kvm_userspace_exit prints it."""
    return _symbol(reason, _USER_NAMES, _USER_SINCE, kernel)


def inhibits(kernel: int) -> tuple[R.Inhibit, ...]:
    """The APICv inhibit reasons of a generation, by the bit that it prints."""
    return since(_INHIBITS, kernel) or ()
