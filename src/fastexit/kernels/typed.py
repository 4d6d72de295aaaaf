"""Every number of regs, hyperv, reasons, layout, outcome, traits and exits/table.py as uint64, for kernels.

numba types ``uint64 & 0xff`` as int64; a mask that is a uint64 itself keeps the unsigned type through the expression.
Kernels therefore write ``k.ICR_BUSY``, never a bare literal, wherever bit 63 may be set. Values are frozen into
compiled code; the kernel cache notices an edit in any of them.
"""

import numpy as np

from fastexit import hyperv, layout, outcome, reasons, regs
from fastexit.exits import table
from fastexit.traits import HYPERV, RULES, Trait

U = np.uint64


def _typed(namespace: dict) -> dict:
    return {
        name: U(value)
        for name, value in namespace.items()
        if name[:1] != "_" and name.isupper() and type(value) is int and 0 <= value < 1 << 64
    }


for _module in regs, hyperv, reasons, layout, outcome, table:
    globals().update(_typed(vars(_module)))
globals().update({f"T_{trait.name}": U(trait.value) for trait in Trait if trait.value >> RULES == 0})
globals().update(
    {
        f"R_{trait.name}": U(trait.value >> RULES)
        for trait in Trait
        if trait.value >> RULES and not trait.value >> HYPERV
    }
)
globals().update({f"HVR_{trait.name}": U(trait.value >> HYPERV) for trait in Trait if trait.value >> HYPERV})
globals().update({f"RF_{refusal.name}": U(refusal.value) for refusal in outcome.Refusal})
globals().update({f"EF_{effect.name}": U(effect.value) for effect in outcome.Effect if effect})
globals().update({f"VMX_{reason.name}": U(reason.value) for reason in reasons.VmxExit})
globals().update({f"SVM_{reason.name}": U(reason.value) for reason in reasons.SvmExit})
globals().update({f"HVCALL_{call.name}": U(call.value) for call in hyperv.HvCall})
globals().update({f"HVSTATUS_{status.name}": U(status.value) for status in hyperv.HvStatus})
globals().update({f"HVEXIT_{reason.name}": U(reason.value) for reason in hyperv.HvExit})
globals().update({f"HVF_{feature.name}": U(feature.value) for feature in hyperv.HvFeature})
globals().update({f"OP_{op.name}": U(op.value) for op in table.Op})
globals().update({f"INHIBIT_{reason.name}": U(1 << reason.value) for reason in regs.Inhibit})
globals().update({f"USER_{reason.name}": U(reason.value + 1 << outcome.CODE_USER_SHIFT) for reason in reasons.KvmExit})

ZERO = U(0)
ONE = U(1)
LOW16 = U(0xFFFF)
LOW32 = U(0xFFFF_FFFF)
HIGH32 = U(0xFFFF_FFFF_0000_0000)
EFFECT_NOTIFY_CODE = U(outcome.Effect.NOTIFY << outcome.CODE_EFFECTS_SHIFT)
