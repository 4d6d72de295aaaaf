"""Bit layouts and numbers of the local APIC, posted interrupts and VM exits.

Models: nothing. This file holds declarations only: no state, no behaviour, no numpy, no numba, so that the
kernels, the test oracle and the trace reader can share it without sharing logic.

Every register is declared once, in bit order, reserved bits named; all masks are computed from that.
Sources: Intel SDM vol. 3A ch. "APIC" and vol. 3C "Posted-Interrupt Processing"; AMD APM vol. 2 ch. 15-16; names as
KVM prints them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import NamedTuple


class Field(NamedTuple):
    """One field of a register: ``lsb`` is its lowest bit, ``width`` its number of bits."""

    name: str
    lsb: int
    width: int

    @property
    def mask(self) -> int:
        return ((1 << self.width) - 1) << self.lsb


def shown(value: int) -> str:
    """A number as an error quotes it: not a screenful."""
    return f"{value:#x}" if value.bit_length() <= 128 else f"({value.bit_length():,} bits)"


class Layout:
    """A register as named fields, highest bit first, that must add up to its width.

    ``Layout(32, VECTOR=8, DM=3, ...)`` lists widths from bit 0 upwards; a name that begins with ``_`` is reserved.

    >>> ICR.mask("VECTOR"), ICR.shift("SHORTHAND")
    (255, 18)
    >>> ICR.decode(0x1000000FD)["DEST"]
    1
    """

    def __init__(self, width: int, **fields: int) -> None:
        self.width = width
        self.fields: dict[str, Field] = {}
        lsb = 0
        for name, bits in fields.items():
            self.fields[name] = Field(name, lsb, bits)
            lsb += bits
        if lsb != width:
            raise ValueError(f"fields add up to {lsb} bits, the register has {width}")

    @property
    def reserved(self) -> int:
        """Mask of all reserved bits."""
        return sum(f.mask for f in self.fields.values() if f.name.startswith("_"))

    def mask(self, *names: str) -> int:
        """Mask of the named fields, in place."""
        return sum(self.fields[n].mask for n in names)

    def shift(self, name: str) -> int:
        """Lowest bit of a field."""
        return self.fields[name].lsb

    def decode(self, value: int) -> dict[str, int]:
        """Field values of ``value``, reserved fields left out."""
        return {n: (value & f.mask) >> f.lsb for n, f in self.fields.items() if not n.startswith("_")}

    def encode(self, values: Mapping[str, int]) -> int:
        """The register value with these fields; TypeError or ValueError when a value does not fit its field."""
        word = 0
        for name, value in values.items():
            field = self.fields[name]
            if type(value) is not int:
                try:
                    value = operator.index(value)
                except TypeError:
                    raise TypeError(f"{name} is {type(value).__name__}, not an integer") from None
            if not 0 <= value < (1 << field.width):
                raise ValueError(f"{name}={shown(value)} does not fit {field.width} bit{'s' * (field.width > 1)}")
            word |= value << field.lsb
        return word


# ------------------------------------------------------------------------------ interrupt command register (SDM 10.6.1)


class DeliveryMode(IntEnum):
    """ICR/LVT/MSI delivery mode, bits 10:8. Member names are the ones KVM's tracepoints print."""

    Fixed = 0
    LowPrio = 1
    SMI = 2
    Res3 = 3  # remote read; KVM uses it as the paravirtual unhalt message
    NMI = 4
    INIT = 5
    SIPI = 6
    ExtINT = 7


class Shorthand(IntEnum):
    """ICR destination shorthand, bits 19:18."""

    NONE = 0
    SELF = 1
    ALL = 2
    ALL_BUT_SELF = 3


ICR = Layout(
    64,
    VECTOR=8,
    DM=3,
    DEST_MODE=1,
    BUSY=1,
    _13=1,
    LEVEL=1,
    TRIGGER=1,
    _16=2,
    SHORTHAND=2,
    _20=12,
    DEST=32,
)
ICR_VECTOR = ICR.mask("VECTOR")
ICR_DM = ICR.mask("DM")
ICR_DM_SHIFT = ICR.shift("DM")
ICR_LOGICAL = ICR.mask("DEST_MODE")
ICR_BUSY = ICR.mask("BUSY")
ICR_LEVEL = ICR.mask("LEVEL")
ICR_TRIGGER = ICR.mask("TRIGGER")
ICR_SHORTHAND = ICR.mask("SHORTHAND")
ICR_SHORTHAND_SHIFT = ICR.shift("SHORTHAND")
ICR_DEST_SHIFT = ICR.shift("DEST")
ICR_RESERVED = ICR.reserved
XAPIC_DEST_SHIFT = 24

DM_FIXED = DeliveryMode.Fixed.value
DM_LOWEST = DeliveryMode.LowPrio.value
DM_SMI = DeliveryMode.SMI.value
DM_REMRD = DeliveryMode.Res3.value
DM_NMI = DeliveryMode.NMI.value
DM_INIT = DeliveryMode.INIT.value
DM_STARTUP = DeliveryMode.SIPI.value
DM_EXTINT = DeliveryMode.ExtINT.value
SH_NONE = Shorthand.NONE.value
SH_SELF = Shorthand.SELF.value
SH_ALLINC = Shorthand.ALL.value
SH_ALLBUT = Shorthand.ALL_BUT_SELF.value

XAPIC_BROADCAST = 0xFF
X2APIC_BROADCAST = 0xFFFF_FFFF


def _named(value: IntEnum | int | str, kind: type[IntEnum], what: str) -> int:
    """A member of an enumeration as a number; a name is one of its members in any case, with - or _."""
    if not isinstance(value, str):
        return value
    names = {member.name.lower().replace("_", "-"): member for member in kind}
    try:
        return names[value.lower().replace("_", "-")]
    except KeyError:
        raise ValueError(f"unknown {what} {value[:40]!r}: one of {', '.join(names)}") from None


def _flag(value: bool | int) -> int:
    """A truth value as a bit, numpy's among them; what is none stays what it is, and does not fit one bit."""
    return int(value) if value in (0, 1) else value


def icr(
    dest: int = 0,
    vector: int = 0,
    *,
    delivery: DeliveryMode | int | str = DeliveryMode.Fixed,
    logical: bool = False,
    level: bool = False,
    trigger_level: bool = False,
    shorthand: Shorthand | int | str = Shorthand.NONE,
    busy: bool = False,
) -> int:
    """The 64-bit x2APIC ICR value of one IPI (SDM 10.12.9).

    ``dest`` is the 32-bit destination (0xFFFFFFFF broadcasts), ``vector`` 0..255. ``level`` is the assert bit 14,
    ``trigger_level`` the trigger mode bit 15. ``delivery`` and ``shorthand`` may also be names: "nmi", "all-but-self".
    TypeError or ValueError when a value does not fit its field.

    >>> hex(icr(dest=1, vector=0xFD))
    '0x1000000fd'
    >>> hex(icr(vector=0xFD, shorthand="all-but-self"))
    '0xc00fd'
    """
    return ICR.encode(
        {
            "VECTOR": vector,
            "DM": _named(delivery, DeliveryMode, "delivery mode"),
            "DEST_MODE": _flag(logical),
            "BUSY": _flag(busy),
            "LEVEL": _flag(level),
            "TRIGGER": _flag(trigger_level),
            "SHORTHAND": _named(shorthand, Shorthand, "shorthand"),
            "DEST": dest,
        }
    )


# --------------------------------------------------------------------------------- register page (SDM table 10-1, 10-6)

APIC_ID = 0x020
APIC_LVR = 0x030
APIC_TASKPRI = 0x080
APIC_ARBPRI = 0x090
APIC_PROCPRI = 0x0A0
APIC_EOI = 0x0B0
APIC_RRR = 0x0C0
APIC_LDR = 0x0D0
APIC_DFR = 0x0E0
APIC_SPIV = 0x0F0
APIC_ISR = 0x100
APIC_TMR = 0x180
APIC_IRR = 0x200
APIC_ESR = 0x280
APIC_LVTCMCI = 0x2F0
APIC_ICR = 0x300
APIC_ICR2 = 0x310
APIC_LVTT = 0x320
APIC_LVTTHMR = 0x330
APIC_LVTPC = 0x340
APIC_LVT0 = 0x350
APIC_LVT1 = 0x360
APIC_LVTERR = 0x370
APIC_TMICT = 0x380
APIC_TMCCT = 0x390
APIC_TDCR = 0x3E0
APIC_SELF_IPI = 0x3F0
APIC_EFEAT = 0x400
APIC_ECTRL = 0x410

REGISTER_NAMES: dict[int, str] = {
    value: name for name, value in list(globals().items()) if name.startswith("APIC_") and name != "APIC_LVTCMCI"
}
"""Offset -> name as the kvm_apic tracepoint prints it; an offset that is not here prints as hex."""

LAPIC_PAGE_BYTES = 1024
"""Size of KVM_GET_LAPIC's page; registers are the first dword of each 16-byte slot."""

MSR_X2APIC_BASE = 0x800
MSR_X2APIC_END = 0x8FF
MSR_X2APIC_ICR = MSR_X2APIC_BASE + (APIC_ICR >> 4)
MSR_X2APIC_TPR = MSR_X2APIC_BASE + (APIC_TASKPRI >> 4)
MSR_X2APIC_EOI = MSR_X2APIC_BASE + (APIC_EOI >> 4)
MSR_X2APIC_SELF_IPI = MSR_X2APIC_BASE + (APIC_SELF_IPI >> 4)
MSR_TSC = 0x10
MSR_APICBASE = 0x1B
MSR_TSC_ADJUST = 0x3B
MSR_TSC_DEADLINE = 0x6E0
MSR_KVM_PV_EOI_EN = 0x4B56_4D04
PV_EOI_ENABLED = 1 << 0
PV_EOI_RESERVED = 1 << 1

SVR = Layout(32, VECTOR=8, ENABLE=1, FOCUS=1, _10=2, SUPPRESS_EOI=1, _13=19)
SVR_ENABLE = SVR.mask("ENABLE")
SVR_SUPPRESS_EOI = SVR.mask("SUPPRESS_EOI")
SVR_FOCUS = SVR.mask("FOCUS")
SVR_WRITABLE = SVR.mask("VECTOR", "ENABLE", "FOCUS")

APICBASE = Layout(64, _0=8, BSP=1, _9=1, EXTD=1, EN=1, BASE=52)
APICBASE_BSP = APICBASE.mask("BSP")
APICBASE_EXTD = APICBASE.mask("EXTD")
APICBASE_EN = APICBASE.mask("EN")
APICBASE_PAGE = APICBASE.mask("BASE")
APICBASE_RESERVED = APICBASE.reserved
APIC_DEFAULT_PHYS_BASE = 0xFEE0_0000
APIC_PAGE_BYTES = 0x1000

LVT = Layout(32, VECTOR=8, DM=3, _11=1, STATUS=1, POLARITY=1, REMOTE_IRR=1, TRIGGER=1, MASKED=1, TIMER_MODE=2, _19=13)
LVT_MASKED = LVT.mask("MASKED")
LVT_TIMER_PERIODIC = 1 << LVT.shift("TIMER_MODE")
LVT_TIMER_DEADLINE = 2 << LVT.shift("TIMER_MODE")
_LVT_COMMON = LVT.mask("VECTOR", "STATUS", "MASKED")
LVT_WRITABLE_TIMER = _LVT_COMMON
LVT_WRITABLE_ERROR = _LVT_COMMON
LVT_WRITABLE_LOCAL = _LVT_COMMON | LVT.mask("DM")
LVT_WRITABLE_LINT = LVT_WRITABLE_LOCAL | LVT.mask("POLARITY", "REMOTE_IRR", "TRIGGER")
LVT_READ_ONLY = LVT.mask("STATUS", "REMOTE_IRR")
LVT0_BOOT = DM_EXTINT << LVT.shift("DM")

ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7
"""Errors as ESR shows them (SDM 10.5.3)."""

APIC_VERSION = 0x50014
APIC_VERSION_CMCI = 0x60014
LVR_DIRECTED_EOI = 1 << 24
DFR_FLAT = 0xFFFF_FFFF
DFR_CLUSTER = 0x0FFF_FFFF
TDCR_WRITABLE = 0xB

TIMER_ONE_SHOT, TIMER_PERIODIC, TIMER_DEADLINE = 0, LVT_TIMER_PERIODIC, LVT_TIMER_DEADLINE

# ------------------------------------------------------------------- posted-interrupt descriptor (SDM 29.6, table 29-1)

PID_CONTROL = Layout(64, ON=1, SN=1, _2=14, NV=8, _24=8, NDST=32)
"""The u64 at byte 32 of the 64-byte descriptor; bytes 0..31 are PIR, bytes 40..63 reserved."""
PID_ON = PID_CONTROL.mask("ON")
PID_SN = PID_CONTROL.mask("SN")
PID_NV_SHIFT = PID_CONTROL.shift("NV")
POSTED_INTR_VECTOR = 0xF2
POSTED_INTR_WAKEUP_VECTOR = 0xF1
PID_NV = PID_CONTROL.mask("NV")
PID_NDST = PID_CONTROL.mask("NDST")
PID_NDST_SHIFT = PID_CONTROL.shift("NDST")
PID_POINTER_VALID = 1 << 0

# --------------------------------------------------------------------------------------- AVIC tables (APM vol. 2 15.29)

AVIC_PHYSICAL_ENTRY = Layout(64, HOST_ID=12, BACKING_PAGE=40, _52=9, GA_LOG=1, RUNNING=1, VALID=1)
"""Physical APIC id table. GA_LOG is KVM's own flag in its copy of the entry, reserved in the table."""
AVIC_HOST_ID = AVIC_PHYSICAL_ENTRY.mask("HOST_ID")
AVIC_BACKING = AVIC_PHYSICAL_ENTRY.mask("BACKING_PAGE")
AVIC_BACKING_SHIFT = AVIC_PHYSICAL_ENTRY.shift("BACKING_PAGE")
AVIC_GA_LOG = AVIC_PHYSICAL_ENTRY.mask("GA_LOG")
AVIC_RUNNING = AVIC_PHYSICAL_ENTRY.mask("RUNNING")
AVIC_VALID = AVIC_PHYSICAL_ENTRY.mask("VALID")
AVIC_FIRST_PAGE_FRAME = 0x1_0000
"""Made up: the frame of vCPU 0's backing page; that of vCPU i is i frames above."""

AVIC_LOGICAL_ENTRY = Layout(32, GUEST_ID=8, _8=23, VALID=1)
AVIC_GUEST_ID = AVIC_LOGICAL_ENTRY.mask("GUEST_ID")
AVIC_LOGICAL_VALID = AVIC_LOGICAL_ENTRY.mask("VALID")

AVIC_MAX_ID = 0xFE
X2AVIC_MAX_ID = 0x1FF


class AvicIpi(IntEnum):
    """Why AVIC hardware did not finish an IPI: EXITINFO2 bits 63:32 of exit 0x401."""

    INVALID_INT_TYPE = 0
    TARGET_NOT_RUNNING = 1
    INVALID_TARGET = 2
    INVALID_BACKING_PAGE = 3
    INVALID_VECTOR = 4


AVIC_INVALID_INT_TYPE = AvicIpi.INVALID_INT_TYPE.value
AVIC_TARGET_NOT_RUNNING = AvicIpi.TARGET_NOT_RUNNING.value
AVIC_INVALID_TARGET = AvicIpi.INVALID_TARGET.value
AVIC_INVALID_BACKING_PAGE = AvicIpi.INVALID_BACKING_PAGE.value
AVIC_INVALID_VECTOR = AvicIpi.INVALID_VECTOR.value
AVIC_INDEX = 0x1FF
AVIC_INDEX_SHIFT = 16
AVIC_OFFSET = 0xFF0
AVIC_WRITE_SHIFT = 24
AVIC_INFO1_WRITE = 1 << 32

# ------------------------------------------------------------------------------------------ IOAPIC, PIC pair, PIT, GSIs

IOAPIC_DEFAULT_BASE = 0xFEC0_0000
IOAPIC_BYTES = 0x100
IOAPIC_VERSION = 0x17_0011
REDIR_LOGICAL = 1 << 11
REDIR_STATUS = 1 << 12
REDIR_REMOTE_IRR = 1 << 14
REDIR_LEVEL = 1 << 15
REDIR_MASK = 1 << 16
REDIR_DEST_SHIFT = 56

PIC_PORT = 0x20
PIC_PORT_SLAVE = 0xA0
PIC_PORT_ELCR = 0x4D0
PIC_ELCR_MASKS = 0xF8, 0xDE
"""Lines that can be level-triggered: master's, slave's."""

PIT_HZ = 1_193_181
"""KVM_PIT_FREQ."""
PIT_FLAG_HPET_LEGACY = 1 << 0
PIT_FLAG_SPEAKER = 1 << 1
"""KVM_PIT_FLAGS_SPEAKER_DATA_ON."""
PIT_HAS_SPEAKER = 1 << 1
"""Bit of layout.PIT_PRESENT: KVM_PIT_SPEAKER_DUMMY was given."""
PIT_STATE_BYTES = 72
PIT_STATE2_BYTES = 112

TSC_TOLERANCE_PPM = 250
"""KVM's module parameter tsc_tolerance_ppm."""
TSC_MOST_VMX, TSC_MOST_SVM = 1 << 16, 1 << 8
"""How often the host's frequency hardware can scale to: the integer part of VMX's and SVM's multipliers."""
TSC_MOST_KHZ = 10_000_000
"""Where the model ends; KVM's limit is 2^31 - 1."""

SOURCE_USER = 0
"""KVM_USERSPACE_IRQ_SOURCE_ID."""
SOURCE_RESAMPLE = 1
"""KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID."""
SOURCE_PIT = 2
"""KVM_PIT_IRQ_SOURCE_ID."""

# ---------------------------------------------------------------------------------------------------- KVM's own numbers

OUTSIDE_GUEST_MODE = 0
IN_GUEST_MODE = 1
EXITING_GUEST_MODE = 2
READING_SHADOW_PAGE_TABLES = 3

REQ_UNBLOCK = 1 << 2
REQ_MIGRATE_TIMER = 1 << 8
REQ_REPORT_TPR_ACCESS = 1 << 9
REQ_CLOCK_UPDATE = 1 << 12
REQ_EVENT = 1 << 14
REQ_NMI = 1 << 17
REQ_SMI = 1 << 20
REQ_SCAN_IOAPIC = 1 << 23
REQ_IOAPIC_EOI_EXIT = 1 << 27
REQ_HV_CRASH = 1 << 26
REQ_HV_RESET = 1 << 28
REQ_HV_EXIT = 1 << 29
REQ_HV_STIMER = 1 << 30
REQ_LOAD_EOI_EXITMAP = 1 << 31
REQ_APICV_UPDATE = 1 << 33
REQ_SIGNAL = 1 << 63
"""No request of KVM's: a signal waits for the thread. It shares the word so that an entry tests both at once."""


class MpState(IntEnum):
    """KVM_GET_MP_STATE values."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


MP_RUNNABLE = MpState.RUNNABLE.value
MP_UNINITIALIZED = MpState.UNINITIALIZED.value
MP_INIT_RECEIVED = MpState.INIT_RECEIVED.value
MP_HALTED = MpState.HALTED.value
MP_SIPI_RECEIVED = MpState.SIPI_RECEIVED.value
MP_AP_RESET_HOLD = MpState.AP_RESET_HOLD.value

PENDING_INIT = 1 << 0
PENDING_SIPI = 1 << 1


class X2ApicApi(IntFlag):
    """Flags of KVM_CAP_X2APIC_API (capability 129)."""

    USE_32BIT_IDS = 1
    DISABLE_BROADCAST_QUIRK = 2
    ENABLE_SUPPRESS_EOI_BROADCAST = 4
    DISABLE_SUPPRESS_EOI_BROADCAST = 8


X2API_32BIT_IDS = X2ApicApi.USE_32BIT_IDS.value
X2API_NO_BROADCAST_QUIRK = X2ApicApi.DISABLE_BROADCAST_QUIRK.value
X2API_SUPPRESS_EOI = X2ApicApi.ENABLE_SUPPRESS_EOI_BROADCAST.value
X2API_NO_SUPPRESS_EOI = X2ApicApi.DISABLE_SUPPRESS_EOI_BROADCAST.value

LOGICAL_SW_DISABLED = 0
LOGICAL_FLAT = 1
LOGICAL_CLUSTER = 2
LOGICAL_X2APIC = 3
LOGICAL_DISABLED = 4


class Inhibit(IntEnum):
    """Reasons for which APICv is off, by bit number, as kvm_apicv_inhibit_changed prints them in 6.18.

    X2APIC, of kernels from 5.7 to 5.15, has a number of the model's own.
    """

    DISABLED = 0
    HYPERV = 1
    ABSENT = 2
    BLOCKIRQ = 3
    PHYSICAL_ID_ALIASED = 4
    APIC_ID_MODIFIED = 5
    APIC_BASE_MODIFIED = 6
    NESTED = 7
    IRQWIN = 8
    PIT_REINJ = 9
    SEV = 10
    LOGICAL_ID_ALIASED = 11
    PHYSICAL_ID_TOO_BIG = 12
    X2APIC = 13


class SystemEvent(IntEnum):
    """KVM_SYSTEM_EVENT_*: what a Windows guest may ask for."""

    RESET = 2
    CRASH = 3


SYSTEM_EVENT_RESET = SystemEvent.RESET.value
SYSTEM_EVENT_CRASH = SystemEvent.CRASH.value


class DisableExits(IntFlag):
    """Bits of KVM_CAP_X86_DISABLE_EXITS."""

    MWAIT = 1
    HLT = 2
    PAUSE = 4
    CSTATE = 8
    APERFMPERF = 16


EXITS_MWAIT = DisableExits.MWAIT.value
EXITS_HLT = DisableExits.HLT.value
EXITS_PAUSE = DisableExits.PAUSE.value
EXITS_CSTATE = DisableExits.CSTATE.value


class MsrExit(IntFlag):
    """KVM_MSR_EXIT_REASON_*: why an MSR access is user space's, and the mask of KVM_CAP_X86_USER_SPACE_MSR."""

    INVAL = 1
    UNKNOWN = 2
    FILTER = 4


MSR_EXIT_INVAL = MsrExit.INVAL.value
MSR_EXIT_UNKNOWN = MsrExit.UNKNOWN.value
MSR_EXIT_FILTER = MsrExit.FILTER.value
MSR_FILTER_READ, MSR_FILTER_WRITE = 1, 2

QUIRK_LINT0_REENABLED = 1 << 0
QUIRK_LAPIC_MMIO_HOLE = 1 << 2

HC_VAPIC_POLL_IRQ, HC_KICK_CPU, HC_SEND_IPI, HC_SCHED_YIELD = 1, 5, 10, 11
HC_ENOSYS, HC_EINVAL, HC_EOPNOTSUPP, HC_EPERM = 1000, 22, 95, 1

RFLAGS_FIXED = 1 << 1
RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9

GUESTDBG_SINGLESTEP = 1 << 1
SHADOW_STI = 1 << 0
SHADOW_MOV_SS = 1 << 1
DR6_BS = 1 << 14

VECTORING_INFO_VALID = 1 << 31
INTR_TYPE_EXCEPTION = 3
INTR_TYPE_NMI = 2
VECTOR_NMI = 2
VECTOR_DB, VECTOR_BP, VECTOR_UD, VECTOR_NM, VECTOR_GP, VECTOR_PF, VECTOR_AC, VECTOR_MC = 1, 3, 6, 7, 13, 14, 17, 18
REFLECTED_VECTORS = frozenset({VECTOR_DB, VECTOR_UD, VECTOR_NM, VECTOR_GP, VECTOR_PF, VECTOR_AC})
"""Exceptions that KVM intercepts for a reason of its own and gives back to the guest."""
ENOENT = 2
EINTR = 4
EFAULT = 14
EINVAL = 22

APIC_ACCESS = Layout(64, OFFSET=12, TYPE=4, _16=48)
"""Exit qualification of an APIC-access exit; the type of access is one of APIC_ACCESS_*."""
APIC_ACCESS_TYPE_SHIFT = APIC_ACCESS.shift("TYPE")
APIC_ACCESS_READ = 0
APIC_ACCESS_WRITE = 1
APIC_ACCESS_FETCH = 2

VMX_IO = Layout(64, SIZE=3, IN=1, STRING=1, REP=1, IMMEDIATE=1, _7=9, PORT=16, _32=32)
"""Exit qualification of an I/O instruction (SDM vol. 3C, basic VM-exit information); SIZE is the number of bytes less
1."""
VMX_IO_SIZE = VMX_IO.mask("SIZE")
VMX_IO_IN = VMX_IO.mask("IN")

EPT_VIOLATION_READ = 1 << 0
EPT_VIOLATION_WRITE = 1 << 1
EPT_VIOLATION_LINEAR = 3 << 7
"""The linear address is known, and the access is to what it translates to."""
SVM_IO = Layout(64, IN=1, _1=1, STRING=1, REP=1, SIZE=3, ADDRESS=3, SEGMENT=3, _13=3, PORT=16, _32=32)
"""EXITINFO1 of an I/O instruction (APM vol. 2, IOIO intercept information); SIZE and ADDRESS have a bit for each width,
so that SIZE is the number of bytes."""
SVM_IO_SIZE = SVM_IO.mask("SIZE")
SVM_IO_SIZE_SHIFT = SVM_IO.shift("SIZE")
SVM_IO_IN = SVM_IO.mask("IN")
IO_PORT = 0xFFFF
IO_PORT_SHIFT = 16
assert VMX_IO.shift("PORT") == SVM_IO.shift("PORT") == IO_PORT_SHIFT

INSN_LEN_WRMSR = 2
INSN_LEN_WRMSR_IMM = 9
INSN_LEN_HLT = 1
INSN_LEN_MOV_CR = 3

LINUX_VECTORS: dict[int, str] = {
    0xFD: "RESCHEDULE",
    0xFC: "CALL_FUNCTION",
    0xFB: "CALL_FUNCTION_SINGLE",
    0xF8: "REBOOT",
    0xF7: "X86_PLATFORM_IPI",
    0xF6: "IRQ_WORK",
    0xEC: "LOCAL_TIMER",
}
"""Vectors that Linux 5.x/6.x sends or takes as IPIs and local interrupts (arch/x86 irq_vectors)."""
