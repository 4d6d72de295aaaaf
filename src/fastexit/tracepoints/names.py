"""What tracepoints call numbers: exit reasons, reasons to leave for user space, APICv inhibits, by kernel release.

Models: __print_symbolic and __print_flags over VMX_EXIT_REASONS, SVM_EXIT_REASONS, kvm_trace_exit_reason and
APICV_INHIBIT_REASONS. A number that a release has no name for prints as hex.
"""

from __future__ import annotations

from fastexit import regs as R
from fastexit.exits.table import SVM, VMX
from fastexit.reasons import VMX_FAILED_VMENTRY, KvmExit
from fastexit.tracepoints.releases import Numbers, held
from fastexit.traits import OLDEST

_USER_SINCE = {KvmExit.X86_RDMSR: "5.10", KvmExit.X86_WRMSR: "5.10"}
_USER_NAMES = {
    int(reason): {_USER_SINCE.get(reason, OLDEST): f"KVM_EXIT_{reason.name}"}
    for reason in KvmExit
    if reason != KvmExit.X86_BUS_LOCK
}
_OLD_EXCEPTIONS = {
    0: "DE",
    1: "DB",
    3: "BP",
    4: "OF",
    5: "BR",
    6: "UD",
    7: "NM",
    8: "DF",
    10: "TS",
    11: "NP",
    12: "SS",
    13: "GP",
    14: "PF",
    16: "MF",
    17: "AC",
    18: "MC",
}
_NEW_EXCEPTIONS = {19: "XM", 20: "VE", 21: "CP", 28: "HV", 29: "VC", 30: "SX"}
_EXCEPTIONS = {vector: {OLDEST: f"#{name}"} for vector, name in _OLD_EXCEPTIONS.items()} | {
    vector: {"6.18": f"#{name}"} for vector, name in _NEW_EXCEPTIONS.items()
}
_I = R.Inhibit
_FIRST = (_I.DISABLED, _I.HYPERV, _I.NESTED, _I.IRQWIN, _I.PIT_REINJ)
_INHIBITS = {
    "5.6": _FIRST,
    "5.7": (*_FIRST, _I.X2APIC),
    "6.1": (
        _I.DISABLED,
        _I.HYPERV,
        _I.ABSENT,
        _I.BLOCKIRQ,
        _I.APIC_ID_MODIFIED,
        _I.APIC_BASE_MODIFIED,
        _I.NESTED,
        _I.IRQWIN,
        _I.PIT_REINJ,
        _I.SEV,
    ),
    "6.6": tuple(reason for reason in _I if reason < _I.PHYSICAL_ID_TOO_BIG),
    "6.18": tuple(reason for reason in _I if reason <= _I.PHYSICAL_ID_TOO_BIG),
}


def _symbol(number: int, names: dict[str, str], release: Numbers) -> str:
    """__print_symbolic: the name, or hex where this release's table has none."""
    return held(names, release) or f"0x{number:x}"


def reason_text(reason: int, svm: bool, release: Numbers) -> str:
    """An exit reason as kvm_exit prints it: the name, on VMX with the flags of the upper half behind it."""
    if svm:
        return _symbol(reason, SVM[reason].names(), release)
    basic, upper = reason & 0xFFFF, reason & 0xFFFF_0000
    words = [_symbol(basic, VMX[basic].names(), release)]
    if upper & VMX_FAILED_VMENTRY:
        words.append("FAILED_VMENTRY")
    if upper & ~VMX_FAILED_VMENTRY:
        words.append(f"0x{upper & ~VMX_FAILED_VMENTRY:x}")
    return " ".join(words)


def exception_text(vector: int, release: Numbers) -> str:
    """An exception as kvm_inj_exception prints it."""
    return _symbol(vector, _EXCEPTIONS.get(vector, {}), release)


def user_text(reason: int, release: Numbers) -> str:
    """A KVM_EXIT_* reason as kvm_userspace_exit prints it."""
    return _symbol(reason, _USER_NAMES.get(reason, {}), release)


def inhibits(release: Numbers) -> tuple[R.Inhibit, ...]:
    """The APICv inhibit reasons of a release, by the bit that it prints."""
    return held(_INHIBITS, release) or ()
