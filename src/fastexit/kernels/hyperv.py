"""Hyper-V's MSRs: who may use them, the VM's, and the local APIC's by another door.

Models: kvm_hv_set_msr_common, kvm_hv_get_msr_common and what they call, but for the synthetic interrupt controller
(synic.py) and synthetic timers (stimer.py); hv_check_msr_access; kvm_hv_vapic_msr_write, kvm_hv_vapic_msr_read. No mode
of the APIC matters: EOI, ICR and TPR work with the APIC disabled and in xAPIC mode, and the ICR's destination lies
where the sender's mode has it.

Not modelled: what the reference TSC page has, a task's run time (time that passes stands for it), tracepoints of the
synthetic debugger, whose MSRs are user space's to store. Spec: TLFS, "Partition Properties", "Virtual Interrupt
Controller", "Timers".

Differs by generation: up to 5.10 every guest may use them; before 6.0 the ICR is written and read in two halves.
"""

from ..jit.declare import kernel
from . import guestmemory, stimer, synic
from . import typed as k
from .clock import virtual_khz
from .irq import set_pv_eoi
from .lapic import icr_read, reg_read, reg_write, x2apic_icr_write
from .shared import hv, make_request, own, vp_index


@kernel("u8(words)")
def time_ref(m):
    """get_time_ref_counter: TIME_REF_COUNT, in units of 100 ns."""
    return m[k.H_NOW] // k.U(100)


# ---------------------------------------------------------------------------------------------------------- who may


@kernel("u8(words)")
def gate(m):
    """vcpu->arch.hyperv_enabled: the guest's CPUID says "Hv#1", which 5.15 began to ask for."""
    if not m[k.H_CONFIG] & k.CONFIG_KVM_HYPERV:
        return k.ZERO
    if not m[k.H_HYPERV_RULES] & k.HVR_GATED:
        return k.ONE
    return k.ONE if m[k.H_CONFIG] & k.CONFIG_HYPERV else k.ZERO


@kernel("u8(words, u8)")
def enforced(m, feature):
    """1 where the guest's CPUID does not have the feature and KVM_CAP_HYPERV_ENFORCE_CPUID says that it counts."""
    if not m[k.H_CONFIG] & k.CONFIG_HYPERV_ENFORCE:
        return k.ZERO
    return k.ZERO if m[k.H_HV_FEATURES] & feature else k.ONE


@kernel("u8(u8)")
def _feature(msr):
    """hv_check_msr_access: the feature that an MSR belongs to; 0, which nobody has, for the synthetic debugger's."""
    if msr <= k.MSR_HV_HYPERCALL:
        return k.HVF_HYPERCALL
    if msr == k.MSR_HV_VP_INDEX:
        return k.HVF_VP_INDEX
    if msr == k.MSR_HV_RESET:
        return k.HVF_RESET
    if msr == k.MSR_HV_VP_RUNTIME:
        return k.HVF_VP_RUNTIME
    if msr == k.MSR_HV_TIME_REF_COUNT:
        return k.HVF_TIME_REF_COUNT
    if msr == k.MSR_HV_REFERENCE_TSC:
        return k.HVF_REFERENCE_TSC
    if msr == k.MSR_HV_TSC_FREQUENCY or msr == k.MSR_HV_APIC_FREQUENCY:
        return k.HVF_FREQUENCIES
    if msr >= k.MSR_HV_EOI and msr <= k.MSR_HV_VP_ASSIST_PAGE:
        return k.HVF_APIC_ACCESS
    if msr >= k.MSR_HV_SCONTROL and msr <= k.MSR_HV_SINT15:
        return k.HVF_SYNIC
    if msr >= k.MSR_HV_STIMER0_CONFIG and msr <= k.MSR_HV_STIMER3_COUNT:
        return k.HVF_STIMER
    if msr >= k.MSR_HV_CRASH_P0 and msr <= k.MSR_HV_CRASH_CTL:
        return k.HVF_CRASH
    if msr >= k.MSR_HV_REENLIGHTENMENT_CONTROL and msr <= k.MSR_HV_TSC_EMULATION_STATUS:
        return k.HVF_REENLIGHTENMENT
    return k.HVF_TSC_INVARIANT if msr == k.MSR_HV_TSC_INVARIANT_CONTROL else k.ZERO


@kernel("u8(words, u8)")
def serves(m, msr):
    """1 for an MSR that kvm_set_msr_common leaves to Hyper-V; whatever else lies between them is unknown to KVM."""
    if not m[k.H_CONFIG] & k.CONFIG_KVM_HYPERV or msr < k.MSR_HV_FIRST or msr > k.MSR_HV_LAST:
        return k.ZERO
    if msr <= k.MSR_HV_SINT15:
        return k.ONE
    if msr >= k.MSR_HV_STIMER0_CONFIG and msr <= k.MSR_HV_STIMER3_COUNT:
        return k.ONE
    if msr >= k.MSR_HV_SYNDBG_CONTROL and msr <= k.MSR_HV_SYNDBG_PENDING_BUFFER:
        return k.ONE
    if msr >= k.MSR_HV_CRASH_P0 and msr <= k.MSR_HV_TSC_EMULATION_STATUS:
        return k.ONE
    if msr == k.MSR_HV_TSC_INVARIANT_CONTROL:
        return k.ONE if m[k.H_HYPERV_RULES] & k.HVR_TSC_INVARIANT else k.ZERO
    return k.ONE if msr == k.MSR_HV_SYNDBG_OPTIONS else k.ZERO


@kernel("u8(words, u8)")
def _refused(m, msr):
    """1 for a guest's access that is no guest's, or not this one's."""
    if not gate(m):
        return k.ONE
    if msr >= k.MSR_HV_SYNDBG_CONTROL and msr <= k.MSR_HV_SYNDBG_OPTIONS:
        return k.ONE
    return enforced(m, _feature(msr))


# ------------------------------------------------------------------------------------------------------------ the VM's


@kernel("u8(words, u8)")
def _set_hypercall(m, value):
    """HV_X64_MSR_HYPERCALL: ignored while the guest has not said what it is; enabled, the page gets its code."""
    if not m[k.H_HV_GUEST_OS_ID]:
        return k.ZERO
    if value & k.HV_PAGE_ENABLED:
        page = value >> k.HV_PAGE_SHIFT << k.HV_PAGE_SHIFT
        if not guestmemory.reaches(m, page, k.U(4)):
            return k.CODE_GP
        svm = m[k.H_CONFIG] & k.CONFIG_SVM
        guestmemory.store(m, page, k.U(4), k.HV_HYPERCALL_CODE_SVM if svm else k.HV_HYPERCALL_CODE_VMX)
    m[k.H_HV_HYPERCALL] = value
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _set_stored(m, v, msr, value, host):
    """MSRs that are kept for user space: a guest's crash data, re-enlightenment, TSC emulation."""
    at = k.H_HV_STORED + (msr - k.MSR_HV_CRASH_P0)
    if msr == k.MSR_HV_CRASH_CTL:
        if host:
            m[at] = value & k.HV_CRASH_NOTIFY
        elif value & k.HV_CRASH_NOTIFY:
            make_request(m, v, k.REQ_HV_CRASH)
        return k.ZERO
    guest_only_clears = m[k.H_HYPERV_RULES] & k.HVR_EMULATION_STATUS_CLEARED
    if msr == k.MSR_HV_TSC_EMULATION_STATUS and value and not host and guest_only_clears:
        return k.CODE_GP
    m[at] = value
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _set_tsc_invariant(m, value, host):
    if value & ~k.ONE or (not host and m[k.H_HV_TSC_INVARIANT] and not value):
        return k.CODE_GP
    m[k.H_HV_TSC_INVARIANT] = value
    return k.ZERO


@kernel("u8(u8)")
def _syndbg(msr):
    return k.H_HV_SYNDBG + (k.U(5) if msr == k.MSR_HV_SYNDBG_OPTIONS else msr - k.MSR_HV_SYNDBG_CONTROL)


@kernel("u8(words, u8, u8, u8, u8)")
def _set_vm_msr(m, v, msr, value, host):
    """kvm_hv_set_msr_pw: 0, CODE_GP, or NONE for an MSR that each vCPU has of its own."""
    if msr == k.MSR_HV_GUEST_OS_ID:
        m[k.H_HV_GUEST_OS_ID] = value
        if not value:
            m[k.H_HV_HYPERCALL] = m[k.H_HV_HYPERCALL] & ~k.HV_PAGE_ENABLED
        return k.ZERO
    if msr == k.MSR_HV_HYPERCALL:
        return _set_hypercall(m, value)
    if msr == k.MSR_HV_RESET:
        if value == k.ONE:
            make_request(m, v, k.REQ_HV_RESET)
        return k.ZERO
    if msr == k.MSR_HV_TIME_REF_COUNT:
        return k.ZERO if host else k.CODE_GP
    if msr == k.MSR_HV_REFERENCE_TSC:
        m[k.H_HV_REFERENCE_TSC] = value
        return k.ZERO
    if msr >= k.MSR_HV_CRASH_P0 and msr <= k.MSR_HV_TSC_EMULATION_STATUS:
        return _set_stored(m, v, msr, value, host)
    if msr == k.MSR_HV_TSC_INVARIANT_CONTROL:
        return _set_tsc_invariant(m, value, host)
    if msr >= k.MSR_HV_SYNDBG_CONTROL and msr <= k.MSR_HV_SYNDBG_OPTIONS:
        m[_syndbg(msr)] = value
        return k.ZERO
    return k.NONE


@kernel("u8(words, u8)")
def _get_vm_msr(m, msr):
    """kvm_hv_get_msr_pw, of an MSR that is the VM's or 0."""
    if msr == k.MSR_HV_GUEST_OS_ID:
        return m[k.H_HV_GUEST_OS_ID]
    if msr == k.MSR_HV_HYPERCALL:
        return m[k.H_HV_HYPERCALL]
    if msr == k.MSR_HV_TIME_REF_COUNT:
        return time_ref(m)
    if msr == k.MSR_HV_REFERENCE_TSC:
        return m[k.H_HV_REFERENCE_TSC]
    if msr >= k.MSR_HV_CRASH_P0 and msr <= k.MSR_HV_TSC_EMULATION_STATUS:
        return m[k.H_HV_STORED + (msr - k.MSR_HV_CRASH_P0)]
    if msr >= k.MSR_HV_SYNDBG_CONTROL and msr <= k.MSR_HV_SYNDBG_OPTIONS:
        return m[_syndbg(msr)]
    return m[k.H_HV_TSC_INVARIANT] if msr == k.MSR_HV_TSC_INVARIANT_CONTROL else k.ZERO


# --------------------------------------------------------------------------------------------------------- the vCPU's


@kernel("u8(words, u8, u8, u8)")
def _set_vp_index(m, v, value, host):
    """Any vCPU may have any index, several the same."""
    index = value & k.LOW32
    if not host or index >= m[k.H_HV_VP_INDICES]:
        return k.CODE_GP
    m[hv(m, v) + k.HV_VP_INDEX] = index ^ v
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _set_assist_page(m, v, value):
    """HV_X64_MSR_VP_ASSIST_PAGE: its first dword becomes 0, its first byte PV EOI's cell. A refusal changes nothing."""
    row = hv(m, v)
    if not value & k.HV_PAGE_ENABLED:
        m[row + k.HV_VP_ASSIST_PAGE] = value
        return set_pv_eoi(m, v, k.ZERO)
    page = value >> k.HV_PAGE_SHIFT << k.HV_PAGE_SHIFT
    if not guestmemory.reaches(m, page, k.APIC_PAGE_BYTES):
        return k.CODE_GP
    guestmemory.store(m, page, k.U(4), k.ZERO)
    m[row + k.HV_VP_ASSIST_PAGE] = value
    return set_pv_eoi(m, v, page | k.PV_EOI_ENABLED)


@kernel("u8(words, u8, u8, u8)")
def _write_apic(m, v, offset, value):
    """kvm_hv_vapic_msr_write. The upper half of what is no ICR is looked at where x2APIC's is, too."""
    if offset == k.APIC_ICR:
        return x2apic_icr_write(m, v, value)
    if value >> k.U(32) and m[k.H_TRAITS] & k.T_MSR_UPPER_GP:
        return k.CODE_GP
    return reg_write(m, v, offset, value & k.LOW32)


@kernel("u8(words, u8, u8, u8, u8)")
def set_msr(m, v, msr, value, host):
    """kvm_hv_set_msr_common, of an MSR that ``serves`` knows: delivery code, with CODE_GP where it faults."""
    if not host and _refused(m, msr):
        return k.CODE_GP
    code = _set_vm_msr(m, v, msr, value, host)
    if code != k.NONE:
        return code
    if msr == k.MSR_HV_EOI:
        return _write_apic(m, v, k.APIC_EOI, value)
    if msr == k.MSR_HV_ICR:
        return _write_apic(m, v, k.APIC_ICR, value)
    if msr == k.MSR_HV_TPR:
        return _write_apic(m, v, k.APIC_TASKPRI, value)
    if msr == k.MSR_HV_VP_ASSIST_PAGE:
        return _set_assist_page(m, v, value)
    if (msr >= k.MSR_HV_SCONTROL and msr <= k.MSR_HV_EOM) or (msr >= k.MSR_HV_SINT0 and msr <= k.MSR_HV_SINT15):
        return synic.set_msr(m, v, msr, value, host)
    if msr >= k.MSR_HV_STIMER0_CONFIG and msr <= k.MSR_HV_STIMER3_COUNT:
        timer = (msr - k.MSR_HV_STIMER0_CONFIG) >> k.ONE
        if (msr - k.MSR_HV_STIMER0_CONFIG) & k.ONE:
            return stimer.set_count(m, v, timer, value, host)
        return stimer.set_config(m, v, timer, value, host)
    if msr == k.MSR_HV_VP_INDEX:
        return _set_vp_index(m, v, value, host)
    if not host:
        return k.CODE_GP
    if msr == k.MSR_HV_VP_RUNTIME:
        m[hv(m, v) + k.HV_RUNTIME_OFFSET] = value - time_ref(m)
        return k.ZERO
    return k.ZERO if msr == k.MSR_HV_TSC_FREQUENCY or msr == k.MSR_HV_APIC_FREQUENCY else k.CODE_GP


@kernel("u8(words, u8, u8)")
def _get_own(m, v, msr):
    """kvm_hv_get_msr: value in K_MSR_DATA, CODE_GP for an MSR that there is not, or that cannot be read."""
    out = own(m, v) + k.K_MSR_DATA
    row = hv(m, v)
    if msr == k.MSR_HV_VP_INDEX:
        m[out] = vp_index(m, v)
    elif msr == k.MSR_HV_ICR:
        m[out] = icr_read(m, v)
    elif msr == k.MSR_HV_TPR:
        m[out] = reg_read(m, v, k.APIC_TASKPRI, k.APIC_TASKPRI)
    elif msr == k.MSR_HV_VP_ASSIST_PAGE:
        m[out] = m[row + k.HV_VP_ASSIST_PAGE]
    elif msr == k.MSR_HV_VP_RUNTIME:
        m[out] = time_ref(m) + m[row + k.HV_RUNTIME_OFFSET]
    elif msr >= k.MSR_HV_STIMER0_CONFIG and msr <= k.MSR_HV_STIMER3_COUNT:
        index = msr - k.MSR_HV_STIMER0_CONFIG
        word = k.STIMER_COUNT if index & k.ONE else k.STIMER_CONFIG
        m[out] = m[row + k.HV_STIMER + (index >> k.ONE) * k.STIMER_STRIDE + word]
    elif msr == k.MSR_HV_TSC_FREQUENCY:
        m[out] = virtual_khz(m, v) * k.U(1000)
    elif msr == k.MSR_HV_APIC_FREQUENCY:
        m[out] = k.U(1_000_000_000) // m[k.H_BUS_NS]
    else:
        return k.CODE_GP
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def get_msr(m, v, msr, host):
    """kvm_hv_get_msr_common: value in K_MSR_DATA (0 where it faults)."""
    out = own(m, v) + k.K_MSR_DATA
    m[out] = k.ZERO
    if not host and _refused(m, msr):
        return k.CODE_GP
    if (msr >= k.MSR_HV_SCONTROL and msr <= k.MSR_HV_EOM) or (msr >= k.MSR_HV_SINT0 and msr <= k.MSR_HV_SINT15):
        return synic.get_msr(m, v, msr, host)
    vm = msr <= k.MSR_HV_HYPERCALL or msr == k.MSR_HV_RESET or msr >= k.MSR_HV_SYNDBG_CONTROL
    if vm or msr == k.MSR_HV_TIME_REF_COUNT or msr == k.MSR_HV_REFERENCE_TSC:
        m[out] = _get_vm_msr(m, msr)
        return k.ZERO
    return _get_own(m, v, msr)
