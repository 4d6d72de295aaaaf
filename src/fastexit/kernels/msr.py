"""Generic MSR emulation and the skip of the instruction that exited.

Models: kvm_set_msr_common/kvm_get_msr_common as far as APIC state goes (IA32_APICBASE, 0x800-0x8FF, TSC_DEADLINE),
kvm_emulate_wrmsr/rdmsr, kvm_skip_emulated_instruction. Other MSRs are unknown here and fault. Not modelled yet: MSR
filters and exits to user space for MSRs, nested single-step bookkeeping, retired-instruction counts.
"""

from . import typed as k
from ._jit import kernel
from .lapic import x2apic_msr_read, x2apic_msr_write
from .lapicstate import set_base
from .shared import emit, hot, make_request, own


@kernel("u8(words, u8)")
def _deadline_usable(m, v):
    """kvm_set/get_lapic_tscdeadline_msr act only on an enabled APIC in deadline mode."""
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW and m[own(m, v) + k.K_TIMER_MODE] == k.TIMER_DEADLINE:
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8)")
def set_tsc_deadline(m, v, value):
    """A write outside deadline mode is dropped in silence."""
    if _deadline_usable(m, v):
        m[own(m, v) + k.K_TIMER_PENDING] = k.ZERO
        m[own(m, v) + k.K_TSC_DEADLINE] = value
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def set_msr(m, v, msr, value, host):
    """kvm_set_msr_common: delivery code, with CODE_GP where the write faults (for the host: the ioctl stops there)."""
    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:
        return x2apic_msr_write(m, v, msr, value)
    if msr == k.MSR_TSC_DEADLINE:
        return set_tsc_deadline(m, v, value)
    if msr == k.MSR_APICBASE:
        return set_base(m, v, value, host)
    return k.CODE_GP


@kernel("u8(words, u8, u8)")
def get_msr(m, v, msr):
    """kvm_get_msr_common: value in K_MSR_DATA (0 when it faults), CODE_GP when it faults."""
    out = own(m, v) + k.K_MSR_DATA
    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:
        return x2apic_msr_read(m, v, msr)
    m[out] = k.ZERO
    if msr == k.MSR_TSC_DEADLINE:
        if _deadline_usable(m, v):
            m[out] = m[own(m, v) + k.K_TSC_DEADLINE]
        return k.ZERO
    if msr == k.MSR_APICBASE:
        m[out] = m[own(m, v) + k.K_APIC_BASE]
        return k.ZERO
    return k.CODE_GP


@kernel("u8(words, u8, u8)")
def skip(m, v, length):
    """kvm_skip_emulated_instruction: 0, or the USER code KVM_EXIT_DEBUG when user space single-steps the guest.

    TF counts as it was before the instruction. With TF but without a debugger a #DB is queued, and its EVENT request
    ends a re-entry loop.
    """
    row = own(m, v)
    m[row + k.K_RIP] = m[row + k.K_RIP] + length
    m[row + k.K_SHADOW] = k.ZERO
    if not m[row + k.K_RFLAGS] & k.RFLAGS_TF:
        return k.ZERO
    if m[row + k.K_GUEST_DEBUG] & k.GUESTDBG_SINGLESTEP:
        return k.USER_DEBUG
    m[row + k.K_PENDING_DB] = k.DR6_BS
    make_request(m, v, k.REQ_EVENT)
    return k.ZERO


@kernel("u8(words, u8)")
def inject_gp(m, v):
    """kvm_inject_gp: #GP(0) waits for the next entry; RIP stays."""
    m[own(m, v) + k.K_EXCEPTION] = k.U(14)
    make_request(m, v, k.REQ_EVENT)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def emulate_wrmsr(m, v, msr, value):
    """kvm_emulate_wrmsr by the guest: outcome code (delivery, fault, and USER when the skip asks for it)."""
    code = set_msr(m, v, msr, value, k.ZERO)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_MSR_WRITE, v, msr, value, k.ONE if code & k.CODE_GP else k.ZERO)
    if code & k.CODE_GP:
        inject_gp(m, v)
        return code
    return code | skip(m, v, k.INSN_LEN_WRMSR)


@kernel("u8(words, u8, u8)")
def emulate_rdmsr(m, v, msr):
    """kvm_emulate_rdmsr: value in K_MSR_DATA."""
    code = get_msr(m, v, msr)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        faults = k.ONE if code & k.CODE_GP else k.ZERO
        emit(m, k.TP_MSR_READ, v, msr, m[own(m, v) + k.K_MSR_DATA], faults)
    if code & k.CODE_GP:
        inject_gp(m, v)
        return code
    return code | skip(m, v, k.INSN_LEN_WRMSR)
