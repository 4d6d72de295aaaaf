"""Values without a reserved bit, for which the manual and KVM ask the same of an APIC.

Models: nothing.
"""

from __future__ import annotations

import random

from fastexit import regs as r
from fastexit.kvm.values import chance, vector

VECTOR = 0xFF
FIRST_VECTOR = 16
"""The first 16 are exceptions': an interrupt that has one of them is an error."""
MODES = (r.DM_FIXED, r.DM_SMI, r.DM_NMI, r.DM_INIT, r.DM_EXTINT)
"""What an entry of the LVT may deliver."""
WRITABLE: dict[int, int] = {
    r.APIC_TASKPRI: VECTOR,
    r.APIC_EOI: 0,
    r.APIC_LDR: 0xFF << r.XAPIC_DEST_SHIFT,
    r.APIC_SPIV: VECTOR | r.SVR_ENABLE,
    r.APIC_ESR: 0,
    r.APIC_ICR2: 0xFF << r.XAPIC_DEST_SHIFT,
    r.APIC_LVTT: VECTOR | r.LVT_MASKED | r.LVT_TIMER_PERIODIC,
    r.APIC_LVTTHMR: VECTOR | r.ICR_DM | r.LVT_MASKED,
    r.APIC_LVTPC: VECTOR | r.ICR_DM | r.LVT_MASKED,
    r.APIC_LVT0: VECTOR | r.ICR_DM | r.LVT_MASKED | r.LVT.mask("POLARITY", "TRIGGER"),
    r.APIC_LVT1: VECTOR | r.ICR_DM | r.LVT_MASKED | r.LVT.mask("POLARITY", "TRIGGER"),
    r.APIC_LVTERR: VECTOR | r.LVT_MASKED,
    r.APIC_TDCR: r.TDCR_WRITABLE,
    r.APIC_SELF_IPI: VECTOR,
}
"""Page offset -> bits that software may set."""
WITH_VECTOR = (r.APIC_LVTT, r.APIC_LVTTHMR, r.APIC_LVTPC, r.APIC_LVT0, r.APIC_LVT1, r.APIC_LVTERR, r.APIC_SELF_IPI)
WITH_MODE = (r.APIC_LVTTHMR, r.APIC_LVTPC, r.APIC_LVT0, r.APIC_LVT1)


def register(offset: int, value: int) -> int:
    """A value for a register with nothing in it that is reserved."""
    value &= WRITABLE.get(offset, 0xFFFF_FFFF)
    if offset in WITH_MODE and value >> r.ICR_DM_SHIFT & 7 not in MODES:
        value &= ~r.ICR_DM
    if offset in WITH_VECTOR and value & VECTOR < FIRST_VECTOR:
        value |= FIRST_VECTOR
    return value


def icr_low(rng: random.Random) -> int:
    """The low half of an ICR: Fixed, lowest priority, SMI or NMI, asserted, edge; to itself Fixed alone."""
    mode = rng.choices((r.DM_FIXED, r.DM_LOWEST, r.DM_NMI, r.DM_SMI), (80, 8, 8, 4))[0]
    shorthand = rng.choices((0, r.SH_SELF, r.SH_ALLINC, r.SH_ALLBUT), (70, 10, 10, 10))[0]
    if mode == r.DM_LOWEST:
        shorthand = 0
    elif shorthand in (r.SH_SELF, r.SH_ALLINC):
        mode = r.DM_FIXED
    low = mode << r.ICR_DM_SHIFT | shorthand << r.ICR_SHORTHAND_SHIFT | r.ICR_LEVEL
    if mode in (r.DM_FIXED, r.DM_LOWEST):
        low |= max(vector(rng), FIRST_VECTOR)
    return low | (r.ICR_LOGICAL if not shorthand and chance(rng, 0.4) else 0)
