"""Numbers and words of memory that following shares: events, facts, doors, lanes, places, waiting accept lines."""

from __future__ import annotations

import numpy as np

from fastexit.kernels import typed as k

U = np.uint64
ROW = U(8)
"""Words of a row, and of a fact."""
BYTE = U(8)
NONE = U(1 << 63)
"""No time, no duration."""
SIGN = U(63)

# Of columns.Event, as numbers of this folder's own: compiled code is kept by this folder's text.
E_EXIT, E_ENTRY, E_MSR, E_APIC, E_APIC_IPI, E_ACCEPT, E_EOI, E_PV_EOI, E_INJ_VIRQ = (U(n) for n in range(2, 11))
E_SET_IRQ, E_IOAPIC_SET_IRQ, E_MSI_SET_IRQ, E_MMIO = U(12), U(13), U(14), U(18)
E_HYPERCALL, E_HV_HYPERCALL, E_HV_SEND_IPI, E_HV, E_APICV_ACCEPT = (U(n) for n in range(19, 24))
E_INJ_EXCEPTION, E_NESTED_VMEXIT, E_PAGE_FAULT, E_CR, E_AVIC = U(11), U(25), U(30), U(32), U(33)
BESIDE = U(sum(1 << n for n in (0, 1, 15, 16, 26, 28, 29, 34, 35, 36, 37, 38)))
"""Events that neither end nor continue anything: a bit each."""

FACT_EXIT, FACT_ACCEPT, FACT_ICR, FACT_ACCESS, FACT_ENTERED, FACT_SERVED, FACT_ENTRY = (U(n) for n in range(1, 8))

CLASS_MSR, CLASS_TRAP, CLASS_AVIC, CLASS_PAGE, CLASS_INDUCED, CLASS_HLT, CLASS_AGAIN, CLASS_CALL = (
    U(n) for n in range(1, 9)
)
CLASS_SYNIC, CLASS_STIMER, CLASS_INCOMPLETE = U(20), U(21), U(22)

DOOR_X2APIC, DOOR_SYNTHETIC, DOOR_HYPERCALL, DOOR_PAGE, DOOR_TRAP, DOOR_AVIC, DOOR_ASSIST, DOOR_INDUCED = (
    U(n) for n in range(1, 9)
)
DOOR_CR8, DOOR_UNTOLD = U(9), U(10)

FROM_IPI, FROM_MSI, FROM_IOAPIC, FROM_LINE, FROM_TIMER, FROM_SYNIC, FROM_STIMER, FROM_UNTOLD = (
    U(n) for n in range(1, 9)
)

REG_CALL, REG_DEADLINE = U(0xFFF), U(0xFFE)
"""Stand for the register where an IPI is no register write, and for the MSR of the TSC deadline."""

NOWHERE = k.LOW32
"""The lane of a row that has none: there is no room for its thread."""
L_STRIDE = U(56)
(
    L_PLACE, L_EXIT_TIME, L_EXIT_LINE, L_EXIT_NAME, L_EXIT_RIP, L_EXIT_CLASS, L_EXIT_INFO, L_NESTED, L_FRESH,
    L_OPEN, L_DOOR, L_ICR, L_HAVE, L_TARGETS, L_ICR_LINE, L_FAULT, L_DEST, L_REGISTER,
    L_SOURCE, L_SOURCE_VECTOR, L_GSI, L_HEAD, L_TAIL, L_REG, L_SKIP,
    L_RIP, L_RUN, L_RUN_LINE, L_RUN_TIME, L_SPIN, L_SPIN_RIP, L_SPIN_LINE, L_SPIN_NS,
    L_AGAIN, L_AGAIN_RUN, L_AGAIN_LINE, L_AGAIN_MOST, L_AGAIN_VECTOR, L_AGAIN_FIRST, L_LAST_LINE,
    L_EXIT_CPU, L_PAGE, L_PAGE_RUN, L_PAGE_LINE, L_AGAIN_PAGE, L_AGAIN_PAGE_LINE, L_GAP,
    L_FAULT_RIP, L_FAULT_NAME, L_FAULT_RUN, L_FAULT_LINE, L_FAULTS, L_FAULTS_RIP, L_FAULTS_NAME, L_FAULTS_LINE,
    L_SOURCE_GSI,
) = (U(n) for n in range(56))  # fmt: skip
"""A lane's words.

``L_PLACE`` is a place plus one, 0 for a thread that is no vCPU.
``L_EXIT_TIME`` ...: the exit that has no entry yet, where ``L_EXIT_LINE`` is not 0.
``L_OPEN`` ...: the ICR write in the making.
``L_SOURCE`` ...: what raises the next accept lines, ``L_SOURCE_GSI`` by which GSI plus one; from ``L_HEAD`` the list of
those whose source is not known.
``L_REG``: the APIC register, plus one, of a write whose door is not known.
``L_RIP`` ...: exits in a row at one address that end no instruction; ``L_SPIN`` ...: the longest such run.
``L_AGAIN`` ...: a vector that is injected again and again, and the address whose page fault stands before each time;
``L_PAGE`` ...: page faults in a row at one address.
``L_FAULT_RIP`` ...: an exception that is injected in a row at one address; ``L_FAULTS`` ...: most often.
``L_GAP``: the line behind the last gap.
"""

P_IN, P_APICV, P_INJECTS, P_WAITING, P_WAIT0 = (U(n) for n in range(5))
P_LVTT, P_ENTRIES, P_HALTED, P_CALLED, P_CALLED_LINE = (U(n) for n in range(12, 17))
WAITING = U(8)
V0, V_STRIDE = U(24), U(16)
P_STRIDE = V0 + U(256) * V_STRIDE
"""A place's words. ``P_IN``: 1 outside the guest, 2 inside, 0 not known. ``P_WAITING`` vectors from ``P_WAIT0`` wait
for an entry. ``P_LVTT``: the timer's vector plus one. ``P_HALTED``: the line of the HLT exit that it is in, and
``P_CALLED`` the time of the first interrupt it accepted since."""
(
    V_SINCE, V_LINE, V_TIME, V_KIND, V_SENT, V_ENTRY, V_MOST, V_TAKEN, V_MOST_NS,
    V_EOI, V_BACK, V_BACK_LINE, V_INJECTED, V_ACCEPTED, V_ENTRIES, V_MOST_ENTRIES,
) = (U(n) for n in range(16))  # fmt: skip
"""A vector's words at its place: accept lines since its last EOI, the first one's line, time, kind (1: source not known
yet, 2: IPI, 3: another), its sender's exit and the target's entry; the longest such series, and injections in the
present one; level interrupts that came back at once, injections and accept lines in all, entries of the place at the
series' begin and in the longest."""

POOL_STRIDE = U(8)
N_NEXT, N_WORD, N_TARGET, N_TIME, N_LINE, N_SENT, N_LABEL = (U(n) for n in range(7))
POOL = 8192
"""Accept lines that may wait for their source, over all lanes; word 0 of the pool heads the list of free ones."""
POOL_LANES = U(1)
"""The word of the pool that has the number of lanes."""

TRIGGER_VECTOR = k.ICR_VECTOR | k.ICR_TRIGGER
SELF = U(1 << 18)
LOWEST = U(1 << 8)
AT_ONCE = U(50_000)
GAP = U(60_000_000_000)
"""No exit but HLT's takes so long: the machine stood still, or these are two excerpts, and the lines are no pair."""
WINDOWS = U(0xFFFFF8)
ICR2 = U(0x310)
PAGE_FRAME = U(0xFEE00)
SEND_IPI, SEND_IPI_EX, KVM_SEND_IPI = U(0xB), U(0x15), U(10)
IPI_LINE, APIC_LINE, MMIO_LINE, CALL_LINE, AVIC_LINE = U(1), U(2), U(4), U(8), U(16)
