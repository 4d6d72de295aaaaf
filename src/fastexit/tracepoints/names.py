"""What tracepoints call numbers: exit reasons, reasons to leave for user space, APICv inhibits, by kernel generation.

Models: __print_symbolic and __print_flags over VMX_EXIT_REASONS, SVM_EXIT_REASONS, kvm_trace_exit_reason and
APICV_INHIBIT_REASONS. A number that a generation has no name for prints as hex.
"""

from __future__ import annotations

from fastexit import regs as R
from fastexit.exits.table import SVM, VMX
from fastexit.profile import as_of
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit
from fastexit.traits import OLDEST

_USER_SINCE = {KvmExit.X86_RDMSR: "6.1", KvmExit.X86_WRMSR: "6.1"}
_USER_NAMES = {
    int(reason): {_USER_SINCE.get(reason, OLDEST): f"KVM_EXIT_{reason.name}"}
    for reason in KvmExit
    if reason != KvmExit.X86_BUS_LOCK
}
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


def _symbol(number: int, names: dict[str, str], kernel: str) -> str:
    """__print_symbolic: the name, or hex where this generation's table has none."""
    return as_of(names, kernel) or f"0x{number:x}"


def reason_text(reason: int, svm: bool, kernel: str) -> str:
    """An exit reason as kvm_exit prints it: the name, on VMX with the flags of the upper half behind it."""
    if svm:
        return _symbol(reason, SVM[reason].names(), kernel)
    basic, upper = reason & 0xFFFF, reason & 0xFFFF_0000
    words = [_symbol(basic, VMX[basic].names(), kernel)]
    if upper & VMX_FAILED_VMENTRY:
        words.append("FAILED_VMENTRY")
    if upper & ~VMX_FAILED_VMENTRY:
        words.append(f"0x{upper & ~VMX_FAILED_VMENTRY:x}")
    return " ".join(words)


def user_text(reason: int, kernel: str) -> str:
    """A KVM_EXIT_* reason as kvm_userspace_exit prints it."""
    return _symbol(reason, _USER_NAMES.get(reason, {}), kernel)


def inhibits(kernel: str) -> tuple[R.Inhibit, ...]:
    """The APICv inhibit reasons of a generation, by the bit that it prints."""
    return as_of(_INHIBITS, kernel) or ()
