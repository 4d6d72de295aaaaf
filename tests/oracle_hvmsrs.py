"""The oracle's synthetic MSRs: which there are, and what of the guest's CPUID each needs."""

from __future__ import annotations

from fastexit import hyperv as h
from fastexit import regs as r

SINT_MSRS = range(h.MSR_HV_SINT0, h.MSR_HV_SINT15 + 1)
STIMER_MSRS = range(h.MSR_HV_STIMER0_CONFIG, h.MSR_HV_STIMER3_COUNT + 1)
SYNIC_MSRS = {h.MSR_HV_SCONTROL, h.MSR_HV_SVERSION, h.MSR_HV_SIEFP, h.MSR_HV_SIMP, h.MSR_HV_EOM, *SINT_MSRS}
APIC_MSRS = {
    h.MSR_HV_EOI: r.APIC_EOI,
    h.MSR_HV_ICR: r.APIC_ICR,
    h.MSR_HV_TPR: r.APIC_TASKPRI,
}
NEEDS = {
    h.MSR_HV_GUEST_OS_ID: h.HvFeature.HYPERCALL,
    h.MSR_HV_HYPERCALL: h.HvFeature.HYPERCALL,
    h.MSR_HV_VP_INDEX: h.HvFeature.VP_INDEX,
    h.MSR_HV_RESET: h.HvFeature.RESET,
    h.MSR_HV_TIME_REF_COUNT: h.HvFeature.TIME_REF_COUNT,
    h.MSR_HV_REFERENCE_TSC: h.HvFeature.REFERENCE_TSC,
    h.MSR_HV_TSC_FREQUENCY: h.HvFeature.FREQUENCIES,
    h.MSR_HV_APIC_FREQUENCY: h.HvFeature.FREQUENCIES,
    h.MSR_HV_VP_ASSIST_PAGE: h.HvFeature.APIC_ACCESS,
    **dict.fromkeys(APIC_MSRS, h.HvFeature.APIC_ACCESS),
    **dict.fromkeys(SYNIC_MSRS, h.HvFeature.SYNIC),
    **dict.fromkeys(STIMER_MSRS, h.HvFeature.STIMER),
}
"""The MSRs of this model, and which bit of the guest's CPUID each needs where CPUID is enforced."""
