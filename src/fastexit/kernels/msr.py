"""Generic MSR emulation and the skip of the instruction that exited.

Models: kvm_set_msr_common/kvm_get_msr_common as far as APIC state and time go (IA32_APICBASE, 0x800-0x8FF, IA32_TSC,
IA32_TSC_ADJUST, TSC_DEADLINE, MSR_KVM_PV_EOI_EN, Hyper-V's), kvm_msr_allowed, kvm_emulate_wrmsr/rdmsr with
kvm_msr_user_space, kvm_skip_emulated_instruction, kvm_set_cr8. Other MSRs are unknown here and fault. Not modelled:
nested single-step bookkeeping, counts of retired instructions.
"""

from ..jit.declare import inlined, kernel, umin
from . import hyperv, tsc
from . import typed as k
from .clock import guest_tsc, tsc_row
from .irq import set_pv_eoi, update_ppr
from .lapic import x2apic_msr_read, x2apic_msr_write
from .lapicreg import reg, set_reg
from .lapicstate import set_base
from .shared import emit, make_request, own
from .timer import get_deadline, set_deadline


@kernel("u8(words, u8, u8, u8)")
def allowed(m, v, msr, access):
    """kvm_msr_allowed: user space's filter lets this access (MSR_FILTER_READ or _WRITE) be emulated.

    x2APIC registers cannot be filtered. The first range that has the MSR decides, then the default. A range's end has
    32 bits, so one that reaches the last MSR has none.
    """
    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:
        return k.ONE
    for i in range(umin(m[k.H_FILTER_RANGES], k.FILTER_RANGES)):
        at = k.FILTER + k.U(i) * k.FILTER_STRIDE
        first = m[at + k.FILTER_BASE]
        count = umin(m[at + k.FILTER_COUNT], k.FILTER_BITMAP_BYTES << k.U(3))
        if m[at + k.FILTER_FLAGS] & access and msr >= first and msr < (first + count) & k.LOW32:
            bit = msr - first
            return (m[at + k.FILTER_BITMAP + (bit >> k.U(6))] >> (bit & k.U(63))) & k.ONE
        if m[k.H_RULES] & k.R_FILTER_RANGES_COUNTED:
            m[own(m, v) + k.K_EXITS] = m[own(m, v) + k.K_EXITS] + k.ONE
    return k.ZERO if m[k.H_FILTER_DENY] else k.ONE


@inlined
@kernel("u8(words, u8, u8, u8, u8)")
def set_msr(m, v, msr, value, host):
    """kvm_set_msr_common: delivery code, with CODE_GP and MSR_WHY where it faults (for the host: the ioctl stops)."""
    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:
        return x2apic_msr_write(m, v, msr, value)
    if msr == k.MSR_TSC_DEADLINE:
        set_deadline(m, v, value)
        return k.ZERO
    if msr == k.MSR_APICBASE:
        return set_base(m, v, value, host)
    if msr == k.MSR_TSC:
        return tsc.write(m, v, value, host)
    if msr == k.MSR_TSC_ADJUST:
        return tsc.write_adjust(m, v, value, host)
    if msr == k.MSR_KVM_PV_EOI_EN:
        return set_pv_eoi(m, v, value)
    if hyperv.serves(m, msr):
        return hyperv.set_msr(m, v, msr, value, host)
    return k.CODE_GP | k.MSR_WHY_UNKNOWN


@kernel("u8(words, u8, u8, u8)")
def get_msr(m, v, msr, host):
    """kvm_get_msr_common: value in K_MSR_DATA (0 when it faults), CODE_GP and MSR_WHY when it faults."""
    out = own(m, v) + k.K_MSR_DATA
    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:
        return x2apic_msr_read(m, v, msr)
    m[out] = k.ZERO
    if msr == k.MSR_TSC_DEADLINE:
        m[out] = get_deadline(m, v)
        return k.ZERO
    if msr == k.MSR_APICBASE:
        m[out] = m[own(m, v) + k.K_APIC_BASE]
        return k.ZERO
    if msr == k.MSR_TSC:
        m[out] = guest_tsc(m, v)
        return k.ZERO
    if msr == k.MSR_TSC_ADJUST:
        m[out] = m[tsc_row(v) + k.TSC_ADJUST]
        return k.ZERO
    if msr == k.MSR_KVM_PV_EOI_EN:
        m[out] = m[own(m, v) + k.K_PV_EOI_MSR]
        return k.ZERO
    if hyperv.serves(m, msr):
        return hyperv.get_msr(m, v, msr, host)
    return k.CODE_GP | k.MSR_WHY_UNKNOWN


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


@kernel("u8(words, u8, u8, u8, u8)")
def _ask_user(m, v, msr, code, length):
    """kvm_msr_user_space: 1 when user space wants MSR accesses that fail for this reason."""
    why = code & k.CODE_MSR_WHY
    reason = k.MSR_EXIT_INVAL
    if why == k.MSR_WHY_UNKNOWN:
        reason = k.MSR_EXIT_UNKNOWN
    elif why == k.MSR_WHY_FILTER:
        reason = k.MSR_EXIT_FILTER
    if not m[k.H_USER_MSR] & reason:
        return k.ZERO
    m[own(m, v) + k.K_MSR_INDEX] = msr
    m[own(m, v) + k.K_MSR_REASON] = reason
    m[own(m, v) + k.K_MSR_LENGTH] = length
    return k.ONE


@kernel("u8(words, u8, u8, u8, u8)")
def emulate_wrmsr(m, v, msr, value, length):
    """kvm_emulate_wrmsr by the guest: outcome code (delivery, fault, and USER when the skip or user space asks)."""
    if allowed(m, v, msr, k.MSR_FILTER_WRITE):
        code = set_msr(m, v, msr, value, k.ZERO)
    else:
        code = k.CODE_GP | k.MSR_WHY_FILTER
    if code & k.CODE_GP and _ask_user(m, v, msr, code, length):
        m[own(m, v) + k.K_MSR_DATA] = value
        return (code & ~(k.CODE_GP | k.CODE_MSR_WHY)) | k.USER_X86_WRMSR
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_MSR_WRITE, v, msr, value, k.ONE if code & k.CODE_GP else k.ZERO)
    if code & k.CODE_GP:
        inject_gp(m, v)
        return code & ~k.CODE_MSR_WHY
    return code | skip(m, v, length)


@kernel("u8(words, u8, u8, u8)")
def emulate_rdmsr(m, v, msr, length):
    """kvm_emulate_rdmsr: value in K_MSR_DATA."""
    if allowed(m, v, msr, k.MSR_FILTER_READ):
        code = get_msr(m, v, msr, k.ZERO)
    else:
        m[own(m, v) + k.K_MSR_DATA] = k.ZERO
        code = k.CODE_GP | k.MSR_WHY_FILTER
    if code & k.CODE_GP and _ask_user(m, v, msr, code, length):
        return (code & ~(k.CODE_GP | k.CODE_MSR_WHY)) | k.USER_X86_RDMSR
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        faults = k.ONE if code & k.CODE_GP else k.ZERO
        emit(m, k.TP_MSR_READ, v, msr, m[own(m, v) + k.K_MSR_DATA], faults)
    if code & k.CODE_GP:
        inject_gp(m, v)
        return code & ~k.CODE_MSR_WHY
    return code | skip(m, v, length)


@kernel("u8(words, u8, u8)")
def complete(m, v, error):
    """User space's answer to KVM_EXIT_X86_RDMSR/WRMSR: #GP, or the instruction is done. complete_fast_msr_access."""
    m[own(m, v) + k.K_MSR_REASON] = k.ZERO
    if error:
        inject_gp(m, v)
        return k.CODE_GP
    return skip(m, v, m[own(m, v) + k.K_MSR_LENGTH])


@kernel("u8(words, u8, u8)")
def set_cr8(m, v, value):
    """kvm_set_cr8: the four bits become TPR[7:4] and TPR[3:0] is lost, but for bit 2 of old; CODE_GP for others."""
    if value & ~k.U(0xF):
        return k.CODE_GP
    kept = k.U(4) if m[k.H_RULES] & k.R_CR8_KEEPS_TPR_BIT_2 else k.ZERO
    set_reg(m, v, k.APIC_TASKPRI, value << k.U(4) | reg(m, v, k.APIC_TASKPRI) & kept)
    update_ppr(m, v)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def emulate_cr8(m, v, value, write):
    """A guest's MOV to or from CR8: handle_cr, cr8_write_interception; what was read is in K_MSR_DATA."""
    if not write:
        m[own(m, v) + k.K_MSR_DATA] = reg(m, v, k.APIC_TASKPRI) >> k.U(4)
        return skip(m, v, k.INSN_LEN_MOV_CR)
    if set_cr8(m, v, value):
        inject_gp(m, v)
        return k.CODE_GP
    return skip(m, v, k.INSN_LEN_MOV_CR)
