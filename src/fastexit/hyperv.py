"""Hyper-V's numbers: MSRs, CPUID bits, hypercalls, the synthetic interrupt controller, synthetic timers.

Spec: Hyper-V Top Level Functional Specification (TLFS), of whose parts KVM serves those named here.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

MSR_HV_GUEST_OS_ID = 0x4000_0000
MSR_HV_HYPERCALL = 0x4000_0001
MSR_HV_VP_INDEX = 0x4000_0002
MSR_HV_RESET = 0x4000_0003
MSR_HV_VP_RUNTIME = 0x4000_0010
MSR_HV_TIME_REF_COUNT = 0x4000_0020
MSR_HV_REFERENCE_TSC = 0x4000_0021
MSR_HV_TSC_FREQUENCY = 0x4000_0022
MSR_HV_APIC_FREQUENCY = 0x4000_0023
MSR_HV_EOI = 0x4000_0070
MSR_HV_ICR = 0x4000_0071
MSR_HV_TPR = 0x4000_0072
MSR_HV_VP_ASSIST_PAGE = 0x4000_0073
MSR_HV_SCONTROL = 0x4000_0080
MSR_HV_SVERSION = 0x4000_0081
MSR_HV_SIEFP = 0x4000_0082
MSR_HV_SIMP = 0x4000_0083
MSR_HV_EOM = 0x4000_0084
MSR_HV_SINT0 = 0x4000_0090
MSR_HV_SINT15 = 0x4000_009F
MSR_HV_STIMER0_CONFIG = 0x4000_00B0
MSR_HV_STIMER3_COUNT = 0x4000_00B7
MSR_HV_SYNDBG_CONTROL = 0x4000_00F1
MSR_HV_SYNDBG_PENDING_BUFFER = 0x4000_00F5
MSR_HV_SYNDBG_OPTIONS = 0x4000_00FF
MSR_HV_CRASH_P0 = 0x4000_0100
MSR_HV_CRASH_CTL = 0x4000_0105
MSR_HV_REENLIGHTENMENT_CONTROL = 0x4000_0106
MSR_HV_TSC_EMULATION_CONTROL = 0x4000_0107
MSR_HV_TSC_EMULATION_STATUS = 0x4000_0108
MSR_HV_TSC_INVARIANT_CONTROL = 0x4000_0118
MSR_HV_FIRST, MSR_HV_LAST = MSR_HV_GUEST_OS_ID, MSR_HV_TSC_INVARIANT_CONTROL
"""All synthetic MSRs of KVM lie between these two."""

MSRS_LISTED = (
    *range(MSR_HV_GUEST_OS_ID, MSR_HV_RESET + 1),
    MSR_HV_VP_RUNTIME,
    *range(MSR_HV_TIME_REF_COUNT, MSR_HV_APIC_FREQUENCY + 1),
    MSR_HV_VP_ASSIST_PAGE,
    MSR_HV_SCONTROL,
    MSR_HV_STIMER0_CONFIG,
    *range(MSR_HV_SYNDBG_CONTROL, MSR_HV_SYNDBG_PENDING_BUFFER + 1),
    MSR_HV_SYNDBG_OPTIONS,
    *range(MSR_HV_CRASH_P0, MSR_HV_CRASH_CTL + 1),
    *range(MSR_HV_REENLIGHTENMENT_CONTROL, MSR_HV_TSC_EMULATION_STATUS + 1),
)
"""Those in KVM's emulated_msrs_all, but for TSC_INVARIANT_CONTROL, which came later."""

HV_PAGE_ENABLED = 1 << 0
"""Of HYPERCALL, VP_ASSIST_PAGE, SIEFP and SIMP: bit 0; the page frame is in the bits from HV_PAGE_SHIFT on."""
HV_PAGE_SHIFT = 12

HV_SYNIC_ENABLED = 1 << 0
"""Of SCONTROL, which KVM stores and never looks at."""
HV_CRASH_NOTIFY = 1 << 63
HV_HYPERCALL_CODE_VMX, HV_HYPERCALL_CODE_SVM = 0xC3C1_010F, 0xC3D9_010F
"""The hypercall page's code: VMCALL or VMMCALL, then RET."""

HV_SINT_VECTOR = 0xFF
HV_SINT_MASKED = 1 << 16
HV_SINT_AUTO_EOI = 1 << 17
HV_SINT_POLLING = 1 << 18
HV_LOWEST_VECTOR = 16
"""Vectors below are reserved: a guest gets #GP for an unmasked SINT, an IPI hypercall is invalid."""

HV_MESSAGE_BYTES = 256
HV_MESSAGE_PENDING = 1 << 0
HV_MESSAGE_TIMER_EXPIRED = 0x8000_0010
HV_MESSAGE_TIMER_PAYLOAD = 24

HV_STIMER_ENABLED = 1 << 0
HV_STIMER_PERIODIC = 1 << 1
HV_STIMER_LAZY = 1 << 2
HV_STIMER_AUTO_ENABLE = 1 << 3
HV_STIMER_VECTOR_SHIFT = 4
HV_STIMER_DIRECT = 1 << 12
HV_STIMER_SINT_SHIFT = 16

HV_CALL_CODE = 0xFFFF
HV_CALL_FAST = 1 << 16
HV_CALL_VAR_COUNT_SHIFT, HV_CALL_VAR_COUNT_BITS = 17, 10
HV_CALL_REP_COUNT_SHIFT, HV_CALL_REP_COUNT_BITS = 32, 12
HV_CALL_REP_START_SHIFT, HV_CALL_REP_START_BITS = 48, 12
HV_CALL_RESERVED = 0x1F << 27 | 0xF << 44 | 0xF << 60
"""Input of a hypercall: the control word in RCX. Bit 31, nested, is KVM's to refuse as well."""


class HvCall(IntEnum):
    """Call codes that KVM knows."""

    FLUSH_VIRTUAL_ADDRESS_SPACE = 0x0002
    FLUSH_VIRTUAL_ADDRESS_LIST = 0x0003
    NOTIFY_LONG_SPIN_WAIT = 0x0008
    SEND_IPI = 0x000B
    FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x0013
    FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x0014
    SEND_IPI_EX = 0x0015
    POST_MESSAGE = 0x005C
    SIGNAL_EVENT = 0x005D
    POST_DEBUG_DATA = 0x0069
    RETRIEVE_DEBUG_DATA = 0x006A
    EXT_CALL_QUERY_CAPABILITIES = 0x8001
    EXT_CALL_LAST = 0x8041


class HvStatus(IntEnum):
    """HV_STATUS_*: the low 16 bits of a hypercall's result."""

    SUCCESS = 0
    INVALID_HYPERCALL_CODE = 2
    INVALID_HYPERCALL_INPUT = 3
    INVALID_ALIGNMENT = 4
    INVALID_PARAMETER = 5
    ACCESS_DENIED = 6
    OPERATION_DENIED = 8
    INVALID_PORT_ID = 17


class HvExit(IntEnum):
    """KVM_EXIT_HYPERV_*: what KVM_EXIT_HYPERV is about."""

    SYNIC = 1
    HCALL = 2


class HvFeature(IntFlag):
    """What the Hyper-V leaves of a guest's CPUID offer, as far as KVM_CAP_HYPERV_ENFORCE_CPUID asks for it.

    The bits are the model's; CPUID_OF_FEATURE has the guest's. Names are those of Hyper-V's enlightenments.
    """

    VP_RUNTIME = 1 << 0
    TIME_REF_COUNT = 1 << 1
    SYNIC = 1 << 2
    STIMER = 1 << 3
    APIC_ACCESS = 1 << 4
    HYPERCALL = 1 << 5
    VP_INDEX = 1 << 6
    RESET = 1 << 7
    REFERENCE_TSC = 1 << 8
    FREQUENCIES = 1 << 9
    REENLIGHTENMENT = 1 << 10
    TSC_INVARIANT = 1 << 11
    POST_MESSAGES = 1 << 12
    SIGNAL_EVENTS = 1 << 13
    XMM_INPUT = 1 << 14
    CRASH = 1 << 15
    STIMER_DIRECT = 1 << 16
    REMOTE_TLB_FLUSH = 1 << 17
    APIC_ACCESS_RECOMMENDED = 1 << 18
    AUTO_EOI_DEPRECATED = 1 << 19
    CLUSTER_IPI = 1 << 20
    EX_PROCESSOR_MASKS = 1 << 21
    SPIN_WAIT = 1 << 22
    EXTENDED_HYPERCALLS = 1 << 23


class CpuidBit(NamedTuple):
    """Where a guest's CPUID has a bit; SPIN_WAIT is a whole register instead, whose value is the retries."""

    leaf: int
    register: str
    bit: int


CPUID_OF_FEATURE: dict[HvFeature, CpuidBit] = {
    HvFeature.VP_RUNTIME: CpuidBit(0x4000_0003, "eax", 0),
    HvFeature.TIME_REF_COUNT: CpuidBit(0x4000_0003, "eax", 1),
    HvFeature.SYNIC: CpuidBit(0x4000_0003, "eax", 2),
    HvFeature.STIMER: CpuidBit(0x4000_0003, "eax", 3),
    HvFeature.APIC_ACCESS: CpuidBit(0x4000_0003, "eax", 4),
    HvFeature.HYPERCALL: CpuidBit(0x4000_0003, "eax", 5),
    HvFeature.VP_INDEX: CpuidBit(0x4000_0003, "eax", 6),
    HvFeature.RESET: CpuidBit(0x4000_0003, "eax", 7),
    HvFeature.REFERENCE_TSC: CpuidBit(0x4000_0003, "eax", 9),
    HvFeature.FREQUENCIES: CpuidBit(0x4000_0003, "eax", 11),
    HvFeature.REENLIGHTENMENT: CpuidBit(0x4000_0003, "eax", 13),
    HvFeature.TSC_INVARIANT: CpuidBit(0x4000_0003, "eax", 15),
    HvFeature.POST_MESSAGES: CpuidBit(0x4000_0003, "ebx", 4),
    HvFeature.SIGNAL_EVENTS: CpuidBit(0x4000_0003, "ebx", 5),
    HvFeature.EXTENDED_HYPERCALLS: CpuidBit(0x4000_0003, "ebx", 20),
    HvFeature.XMM_INPUT: CpuidBit(0x4000_0003, "edx", 4),
    HvFeature.CRASH: CpuidBit(0x4000_0003, "edx", 10),
    HvFeature.STIMER_DIRECT: CpuidBit(0x4000_0003, "edx", 19),
    HvFeature.REMOTE_TLB_FLUSH: CpuidBit(0x4000_0004, "eax", 2),
    HvFeature.APIC_ACCESS_RECOMMENDED: CpuidBit(0x4000_0004, "eax", 3),
    HvFeature.AUTO_EOI_DEPRECATED: CpuidBit(0x4000_0004, "eax", 9),
    HvFeature.CLUSTER_IPI: CpuidBit(0x4000_0004, "eax", 10),
    HvFeature.EX_PROCESSOR_MASKS: CpuidBit(0x4000_0004, "eax", 11),
    HvFeature.SPIN_WAIT: CpuidBit(0x4000_0004, "ebx", 0),
}
ALL_FEATURES = HvFeature((1 << len(HvFeature)) - 1)
