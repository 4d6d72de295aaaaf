"""Paravirtual IPIs: KVM_HC_SEND_IPI, KVM's answer to multicast, and KVM_HC_KICK_CPU.

Models: kvm_emulate_hypercall as far as interrupts go, kvm_pv_send_ipi, kvm_pv_kick_cpu_op. Not modelled: the guest's
CPUID bits for PV features (all are offered), hypercalls that only schedule, Xen's.
Spec: the hypercall chapter of KVM's documentation.
"""

from ..jit.declare import kernel
from . import hypervcall
from . import typed as k
from .apicmap import phys
from .ipi import accept, combine, deliver
from .msr import skip
from .shared import emit, own


@kernel("u8(u8)")
def _minus(error):
    """A negative errno as the guest's RAX holds it."""
    return ~error + k.ONE


@kernel("u8(words, u8, u8, u8, u8)")
def _deliver_bitmap(m, bits, first, icr, me):
    """Each set bit of one 64-bit bitmap, from the id of its first bit; ids above the map's maximum are dropped."""
    base = m[k.H_MAP]
    code = k.ZERO
    for i in range(64):
        apic_id = first + k.U(i)
        target = phys(m, base, apic_id) if (bits >> k.U(i)) & k.ONE else k.ZERO
        if target:
            code = combine(code, accept(m, target - k.ONE, icr, me))
    return code


@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def send_ipi(m, v, low, high, first, icr, bits64):
    """kvm_pv_send_ipi: delivery code, its result (accepted, or minus an errno) in K_MSR_DATA.

    Physical ids only, one delivery mode and vector for all of them, no trace line of its own; the APIC map must exist,
    there is no slow scan behind it.
    """
    result = own(m, v) + k.K_MSR_DATA
    if icr & (k.ICR_LOGICAL | k.ICR_SHORTHAND):
        m[result] = _minus(k.HC_EINVAL)
        return k.ZERO
    if not m[m[k.H_MAP] + k.MAP_PRESENT]:
        m[result] = _minus(k.HC_EOPNOTSUPP)
        return k.ZERO
    icr = icr & (k.ICR_VECTOR | k.ICR_DM | k.ICR_LEVEL | k.ICR_TRIGGER)
    size = k.U(64) if bits64 else k.U(32)
    first = first & k.LOW32
    code = _deliver_bitmap(m, low, first, icr, v)
    code = combine(code, _deliver_bitmap(m, high, (first + size) & k.LOW32, icr, v))
    m[result] = (code & k.CODE_ACCEPTED_NONE) >> k.CODE_ACCEPTED_SHIFT
    return code


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def _trace(m, v, number, a0, a1, a2, a3, bits64):
    """kvm_hypercall, with the registers as they are; which of their bits it prints is the text's to know."""
    at = emit(m, k.TP_HYPERCALL, v, number, a0, a1)
    if at < k.TRACE_CAPACITY:
        at = k.TRACE + at * k.TRACE_STRIDE
        m[at + k.U(4)] = a2
        m[at + k.U(5)] = a3
        m[at + k.U(6)] = k.ONE if bits64 else k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def _emulate_own(m, v, number, a0, a1, a2, a3, how):
    """kvm_emulate_hypercall for calls of KVM's own: delivery code; RAX in K_MSR_DATA."""
    result, bits64 = own(m, v) + k.K_MSR_DATA, how & k.CALL_BITS64
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        _trace(m, v, number, a0, a1, a2, a3, bits64)
    if not bits64:
        number, a0, a1, a2, a3 = number & k.LOW32, a0 & k.LOW32, a1 & k.LOW32, a2 & k.LOW32, a3 & k.LOW32
    m[result] = k.ZERO
    code = k.ZERO
    if how & k.CALL_CPL:
        m[result] = _minus(k.HC_EPERM)
    elif number == k.HC_SEND_IPI:
        code = send_ipi(m, v, a0, a1, a2, a3, bits64)
    elif number == k.HC_KICK_CPU:
        icr = k.DM_REMRD << k.ICR_DM_SHIFT
        code = deliver(m, k.NONE, icr, a1 & k.LOW32, k.ZERO, v) & k.CODE_DELIVERY & ~k.CODE_ACCEPTED_NONE
    elif number != k.HC_VAPIC_POLL_IRQ and number != k.HC_SCHED_YIELD:
        m[result] = _minus(k.HC_ENOSYS)
    if not bits64:
        m[result] = m[result] & k.LOW32
    return code | skip(m, v, how & k.CALL_LENGTH)


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8, u8, u8)")
def emulate(m, v, rax, rbx, rcx, rdx, rsi, rdi, r8, how):
    """kvm_emulate_hypercall: outcome code; RAX in K_MSR_DATA. ``how`` is CALL_*.

    A guest that has told Hyper-V's guest OS id means Hyper-V by every VMCALL; KVM has no calls of its own for it then.
    """
    if not hypervcall.enabled(m):
        return _emulate_own(m, v, rax, rbx, rcx, rdx, rsi, how)
    if how & k.CALL_BITS64:
        return hypervcall.emulate(m, v, rcx, rdx, r8, how)
    high = k.U(32)
    control, given, output = rdx << high | rax & k.LOW32, rbx << high | rcx & k.LOW32, rdi << high | rsi & k.LOW32
    return hypervcall.emulate(m, v, control, given, output, how)
