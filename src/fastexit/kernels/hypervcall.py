"""Hyper-V's hypercalls: IPIs to virtual processors, TLB flushes, and those that are user space's.

Models: kvm_hv_hypercall, hv_check_hypercall_access, kvm_hv_send_ipi, kvm_get_sparse_vp_set, kvm_hv_flush_tlb as far as
the guest sees it (all TLBs are empty here), kvm_hvcall_signal_event, kvm_hv_hypercall_complete. Not modelled: L2's
direct flushes, the debugger's calls (its CPUID leaf is not offered: unknown codes, if not fast).
Spec: TLFS ch. "Hypercall Interface" and "Virtual Processors".

A call is (control, input, output) of HV_CALL_*: with HV_CALL_FAST the latter two are the first 16 bytes of its input
and XMM registers are the rest, else guest-physical addresses. Virtual processors are meant by VP index, never by APIC
id, and interrupts go straight into their APICs: no ICR, no APIC map, no kvm_apic_ipi.
"""

from ..jit.declare import kernel, popcount, umin
from . import guestmemory, hyperv
from . import typed as k
from .ipi import accept, combine
from .msr import skip
from .shared import emit, hv, increment, make_request, own, vp_index

SPARSE, ALL = k.ZERO, k.ONE
"""Formats of a set of virtual processors; KVM's IPIs take whatever is not ALL as sparse, its flushes the reverse."""
BANKS = k.U(64)
MOST_FLUSHED = k.U(15)
"""Entries of a flush list that KVM keeps for a vCPU; of a longer list it reads none, and flushes all."""
CONNECTION = k.U(0xFF_FFFF)
HIGHEST_VECTOR = k.U(0xFF)


@kernel("u8(words)")
def enabled(m):
    """kvm_hv_hypercall_enabled: a VMCALL is Hyper-V's. Whether the hypercall page is there does not matter."""
    return hyperv.gate(m) if m[k.H_HV_GUEST_OS_ID] else k.ZERO


# ---------------------------------------------------------------------------------------------------------- the control


@kernel("u8(u8)")
def _code(control):
    return control & k.HV_CALL_CODE


@kernel("u8(u8)")
def _variable(control):
    return (control >> k.HV_CALL_VAR_COUNT_SHIFT) & ((k.ONE << k.HV_CALL_VAR_COUNT_BITS) - k.ONE)


@kernel("u8(u8)")
def _repeats(control):
    return (control >> k.HV_CALL_REP_COUNT_SHIFT) & ((k.ONE << k.HV_CALL_REP_COUNT_BITS) - k.ONE)


@kernel("u8(u8)")
def _repeats_from(control):
    return (control >> k.HV_CALL_REP_START_SHIFT) & ((k.ONE << k.HV_CALL_REP_START_BITS) - k.ONE)


@kernel("u8(words, u8)")
def _is_simple(m, control):
    """Tell whether a call has neither repetitions nor, as far as its generation looks, a variable header."""
    if _repeats(control) or _repeats_from(control):
        return k.ZERO
    return k.ZERO if m[k.H_HYPERV_RULES] & k.HVR_CALL_VAR_COUNT and _variable(control) else k.ONE


@kernel("u8(u8)")
def _takes_xmm(code):
    """is_xmm_fast_hypercall."""
    if code == k.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE or code == k.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST:
        return k.ONE
    if code == k.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX or code == k.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX:
        return k.ONE
    return k.ONE if code == k.HVCALL_SEND_IPI_EX else k.ZERO


@kernel("u8(words, u8)")
def _is_extended(m, code):
    """Tell whether a code is an extended call, where the generation knows them."""
    if code < k.HVCALL_EXT_CALL_QUERY_CAPABILITIES or code > k.HVCALL_EXT_CALL_LAST:
        return k.ZERO
    return k.ONE if m[k.H_HYPERV_RULES] & k.HVR_CALL_EXTENDED else k.ZERO


@kernel("u8(words, u8)")
def _denied(m, code):
    """hv_check_hypercall_access, negated: the guest's CPUID does not offer the call, and is enforced."""
    needs = k.ZERO
    if code == k.HVCALL_NOTIFY_LONG_SPIN_WAIT:
        needs = k.HVF_SPIN_WAIT
    elif code == k.HVCALL_POST_MESSAGE:
        needs = k.HVF_POST_MESSAGES
    elif code == k.HVCALL_SIGNAL_EVENT:
        needs = k.HVF_SIGNAL_EVENTS
    elif code == k.HVCALL_SEND_IPI or code == k.HVCALL_SEND_IPI_EX:
        needs = k.HVF_CLUSTER_IPI
    elif _takes_xmm(code):
        needs = k.HVF_REMOTE_TLB_FLUSH
    elif _is_extended(m, code):
        needs = k.HVF_EXTENDED_HYPERCALLS
    sparse = code >= k.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX and _takes_xmm(code)
    if sparse and hyperv.enforced(m, k.HVF_EX_PROCESSOR_MASKS):
        return k.ONE
    return hyperv.enforced(m, needs) if needs else k.ZERO


# ------------------------------------------------------------------------------------------ sets of virtual processors


@kernel("u8(words, u8, u8)")
def _xmm(m, v, half):
    """XMM0 to XMM5 in halves, the low one of XMM0 first."""
    return m[k.XMM + v * k.XMM_STRIDE + half]


@kernel("u8(words, u8, u8, u8)")
def _banks(m, control, valid, banks):
    """How many banks a sparse set has, or NONE where the call is invalid for it.

    The header's size has to be that of the mask where the generation looks at it, whatever the set's format.
    """
    count = popcount(valid)
    if m[k.H_HYPERV_RULES] & k.HVR_CALL_VAR_COUNT and _variable(control) != count:
        return k.NONE
    return k.NONE if count > banks else count


@kernel("u8(words, u8)")
def _bytes_read(m, banks):
    """How much of a slow call's sparse set is read: banks that no VP index can be in are not, where their number is
    looked at (kvm_hv_get_hc_data and its cap).
    """
    if m[k.H_HYPERV_RULES] & k.HVR_CALL_VAR_COUNT:
        banks = umin(banks, (m[k.H_HV_VP_INDICES] + BANKS - k.ONE) // BANKS)
    return banks << k.U(3)


@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def _is_target(m, v, me, fast, valid, first, one):
    """hv_is_vp_in_sparse_set: the vCPU's bit in the bank that has the rank of its bank's bit in the mask.

    ``first`` says where the banks begin: a half of XMM registers, or an address; with NONE ``one`` is the only bank.
    """
    index = vp_index(m, v)
    bank = index // BANKS
    if bank >= BANKS or not (valid >> bank) & k.ONE:
        return k.ZERO
    rank = popcount(valid & ((k.ONE << bank) - k.ONE))
    if first == k.NONE:
        bits = one
    elif fast:
        bits = _xmm(m, me, first + rank)
    else:
        at = first + (rank << k.U(3))
        if not guestmemory.reaches(m, at, k.U(8)):
            return k.ZERO
        bits = guestmemory.load(m, at, k.U(8))
    return (bits >> (index % BANKS)) & k.ONE


# ----------------------------------------------------------------------------------------------------------------- IPIs


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def _send(m, me, vector, all_of_them, fast, valid, first, one):
    """kvm_hv_send_ipi_to_many: a fixed interrupt to each virtual processor of a set, in the order of creation."""
    code = k.ZERO
    n = m[k.H_NVCPUS]
    for i in range(n):
        v = k.U(i)
        if all_of_them or _is_target(m, v, me, fast, valid, first, one):
            code = combine(code, accept(m, v, vector, me))
    return code


@kernel("u8(u8)")
def _bad_vector(vector):
    return k.ONE if vector < k.HV_LOWEST_VECTOR or vector > HIGHEST_VECTOR else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _trace_send(m, v, vector, mask):
    return emit(m, k.TP_HV_SEND_IPI, v, vector, mask, k.ZERO) if m[k.H_CONFIG] & k.CONFIG_TRACE else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def send_ipi(m, v, control, given, output):
    """HVCALL_SEND_IPI: delivery code; the status in K_MSR_DATA.

    The reserved half of its first word is looked at where it comes in a register, not in memory.
    """
    status = own(m, v) + k.K_MSR_DATA
    m[status] = k.HVSTATUS_INVALID_HYPERCALL_INPUT
    if not _is_simple(m, control):
        return k.ZERO
    if control & k.HV_CALL_FAST:
        if given >> k.U(32):
            return k.ZERO
        vector, mask = given, output
    else:
        if not guestmemory.reaches(m, given, k.U(16)):
            return k.ZERO
        vector, mask = guestmemory.load(m, given, k.U(4)), guestmemory.load(m, given + k.U(8), k.U(8))
    _trace_send(m, v, vector, mask)
    if _bad_vector(vector):
        return k.ZERO
    m[status] = k.HVSTATUS_SUCCESS
    return _send(m, v, vector, k.ZERO, k.ZERO, k.ONE, k.NONE, mask)


@kernel("u8(words, u8, u8, u8, u8)")
def send_ipi_ex(m, v, control, given, output):
    """HVCALL_SEND_IPI_EX: delivery code; the status in K_MSR_DATA. An empty set is a success, whatever its vector."""
    status = own(m, v) + k.K_MSR_DATA
    m[status] = k.HVSTATUS_INVALID_HYPERCALL_INPUT
    fast = control & k.HV_CALL_FAST
    if _repeats(control) or _repeats_from(control):
        return k.ZERO
    if fast:
        if not m[k.H_HYPERV_RULES] & k.HVR_CALL_XMM:
            return k.ZERO
        vector, kind, valid, first = given & k.LOW32, output, _xmm(m, v, k.ZERO), k.ONE
    else:
        if not guestmemory.reaches(m, given, k.U(24)):
            return k.ZERO
        vector, first = guestmemory.load(m, given, k.U(4)), given + k.U(24)
        kind, valid = guestmemory.load(m, given + k.U(8), k.U(8)), guestmemory.load(m, given + k.U(16), k.U(8))
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_SEND_IPI_EX, v, vector, kind, valid)
    count = _banks(m, control, valid, k.XMM_WORDS - k.ONE if fast and kind != ALL else BANKS)
    if count == k.NONE:
        return k.ZERO
    if kind != ALL and not count:
        m[status] = k.HVSTATUS_SUCCESS
        return k.ZERO
    if kind != ALL and not fast and not guestmemory.reaches(m, first, _bytes_read(m, count)):
        return k.ZERO
    if _bad_vector(vector):
        return k.ZERO
    m[status] = k.HVSTATUS_SUCCESS
    return _send(m, v, vector, k.ONE if kind == ALL else k.ZERO, fast, valid, first, k.ZERO)


# ---------------------------------------------------------------------------------------------------------- TLB flushes


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _trace_flush(m, event, v, a, b, c):
    return emit(m, event, v, a, b, c) if m[k.H_CONFIG] & k.CONFIG_TRACE else k.TRACE_CAPACITY


@kernel("u8(words, u8, u8, u8, u8)")
def _flush_set(m, v, control, given, output):
    """The input of a flush up to its list: where that begins, counted as in _is_target; NONE: an invalid call."""
    fast = control & k.HV_CALL_FAST
    if not fast and not guestmemory.reaches(m, given, k.U(24)):
        return k.NONE
    space = given if fast else guestmemory.load(m, given, k.U(8))
    flags = output if fast else guestmemory.load(m, given + k.U(8), k.U(8))
    third = _xmm(m, v, k.ZERO) if fast else guestmemory.load(m, given + k.U(16), k.U(8))
    if _code(control) < k.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX:
        _trace_flush(m, k.TP_HV_FLUSH_TLB, v, third, space, flags)
        return k.ONE if fast else given + k.U(24)
    if not fast and not guestmemory.reaches(m, given, k.U(32)):
        return k.NONE
    valid = _xmm(m, v, k.ONE) if fast else guestmemory.load(m, given + k.U(24), k.U(8))
    at = _trace_flush(m, k.TP_HV_FLUSH_TLB_EX, v, valid, third, space)
    if at < k.TRACE_CAPACITY:
        m[k.TRACE + at * k.TRACE_STRIDE + k.U(4)] = flags
    first = k.U(2) if fast else given + k.U(32)
    count = _banks(m, control, valid, k.XMM_WORDS - first if fast and third == SPARSE else BANKS)
    if count == k.NONE:
        return k.NONE
    if third == SPARSE and not fast and not guestmemory.reaches(m, first, _bytes_read(m, count)):
        return k.NONE
    return first + count if fast else first + (count << k.U(3))


@kernel("u8(words, u8, u8, u8, u8)")
def _flush_empty(m, v, control, given, output):
    """Tell whether a flush, whose input is there, is to nobody: it succeeds before its list is read."""
    if _code(control) < k.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX:
        return k.ZERO
    if control & k.HV_CALL_FAST:
        return k.ZERO if _xmm(m, v, k.ZERO) or _xmm(m, v, k.ONE) else k.ONE
    kind, valid = guestmemory.load(m, given + k.U(16), k.U(8)), guestmemory.load(m, given + k.U(24), k.U(8))
    return k.ZERO if kind or valid else k.ONE


@kernel("u8(words, u8, u8, u8, u8)")
def flush_tlb(m, v, control, given, output):
    """kvm_hv_flush_tlb: the status, with the repetitions that are done, which are all."""
    fast, code = control & k.HV_CALL_FAST, _code(control)
    repeats, extended = _repeats(control), code >= k.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX
    rules = m[k.H_HYPERV_RULES]
    if fast and not rules & k.HVR_CALL_XMM:
        return k.HVSTATUS_INVALID_HYPERCALL_INPUT
    if not extended and rules & k.HVR_CALL_VAR_COUNT and _variable(control):
        return k.HVSTATUS_INVALID_HYPERCALL_INPUT
    listed = code == k.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST or code == k.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX
    if _repeats_from(control) or (listed and not repeats) or (repeats and not listed):
        return k.HVSTATUS_INVALID_HYPERCALL_INPUT
    first = _flush_set(m, v, control, given, output)
    if first == k.NONE:
        return k.HVSTATUS_INVALID_HYPERCALL_INPUT
    read = listed and rules & k.HVR_CALL_FLUSH_LIST and repeats <= MOST_FLUSHED
    if read and not _flush_empty(m, v, control, given, output):
        if fast:
            if first + repeats > k.XMM_WORDS:
                return k.HVSTATUS_INVALID_HYPERCALL_INPUT
        elif not guestmemory.reaches(m, first, repeats << k.U(3)):
            return k.HVSTATUS_INVALID_HYPERCALL_INPUT
    return k.HVSTATUS_SUCCESS | repeats << k.HV_CALL_REP_COUNT_SHIFT


# ----------------------------------------------------------------------------------------------- messages and events


@kernel("u8(words, u8)")
def _signal(m, parameter):
    """kvm_hvcall_signal_event: the eventfd of a connection is signalled; one without is user space's to look up."""
    if parameter & k.U(0xFFFF_0000_0000):
        return k.HVSTATUS_INVALID_PORT_ID
    if parameter & ~CONNECTION:
        return k.HVSTATUS_INVALID_HYPERCALL_INPUT
    for i in range(umin(m[k.H_HV_EVENTFDS], k.HV_EVENTFDS)):
        at = k.H_HV_EVENTFD + k.U(i) * k.HV_EVENTFD_STRIDE
        if m[at] == parameter:
            increment(m, at + k.HV_EVENTFD_SIGNALS)
            return k.HVSTATUS_SUCCESS
    return k.HVSTATUS_INVALID_PORT_ID


@kernel("u8(words, u8, u8)")
def _reads_aligned(m, control, given):
    """Tell whether SIGNAL_EVENT's eight bytes can be read. It is the only call with an alignment rule."""
    if control & k.HV_CALL_FAST:
        return k.ONE
    return k.ZERO if given & k.U(7) else guestmemory.reaches(m, given, k.U(8))


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _to_user(m, v, control, given, output, length):
    """KVM_EXIT_HYPERV for a hypercall, which ends when KVM_RUN is called again."""
    row = hv(m, v)
    m[row + k.HV_EXIT_TYPE] = k.HVEXIT_HCALL
    m[row + k.HV_EXIT_MSR] = control
    m[row + k.HV_EXIT_EVT_PAGE] = given
    m[row + k.HV_EXIT_MSG_PAGE] = output
    m[row + k.HV_CALL_LENGTH] = length
    return k.USER_HYPERV


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _post_or_signal(m, v, control, given, output, length):
    """POST_MESSAGE and SIGNAL_EVENT: the USER code, or 0 with the status in K_MSR_DATA."""
    status = own(m, v) + k.K_MSR_DATA
    m[status] = k.HVSTATUS_INVALID_HYPERCALL_INPUT
    if not _is_simple(m, control):
        return k.ZERO
    if _code(control) == k.HVCALL_SIGNAL_EVENT:
        if not _reads_aligned(m, control, given):
            m[status] = k.HVSTATUS_INVALID_ALIGNMENT
            return k.ZERO
        parameter = given if control & k.HV_CALL_FAST else guestmemory.load(m, given, k.U(8))
        m[status] = _signal(m, parameter)
        if m[status] != k.HVSTATUS_INVALID_PORT_ID:
            return k.ZERO
        if m[k.H_HYPERV_RULES] & k.HVR_SIGNAL_PARAMETER:
            given = parameter
        m[status] = k.HVSTATUS_INVALID_HYPERCALL_INPUT
    if not m[hv(m, v) + k.HV_SYNIC] & k.SYNIC_ACTIVE:
        return k.ZERO
    return _to_user(m, v, control, given, output, length)


# ------------------------------------------------------------------------------------------------------------- the call


@kernel("u8(words, u8, u8, u8)")
def _finish(m, v, status, length):
    """kvm_hv_hypercall_complete: the USER code of the skip."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_HYPERCALL_DONE, v, status, k.ZERO, k.ZERO)
    m[own(m, v) + k.K_MSR_DATA] = status
    return skip(m, v, length)


@kernel("u8(words, u8)")
def complete(m, v):
    """End a hypercall that was user space's: 0, or USER_DEBUG. kvm_hv_hypercall_complete_userspace."""
    row = hv(m, v)
    length = m[row + k.HV_CALL_LENGTH]
    m[row + k.HV_CALL_LENGTH] = k.ZERO
    return _finish(m, v, m[row + k.HV_EXIT_CONTROL], length)


@kernel("u8(words, u8)")
def _undefined(m, v):
    """#UD: the call has no status, and RIP stays."""
    m[own(m, v) + k.K_EXCEPTION] = k.U(7)
    make_request(m, v, k.REQ_EVENT)
    return k.CODE_UD


@kernel("u8(words, u8, u8, u8, u8, u8)")
def emulate(m, v, control, given, output, how):
    """kvm_hv_hypercall: outcome code; RAX, or EDX:EAX, in K_MSR_DATA. ``how`` is CALL_HOW."""
    host = own(m, v)
    if how & k.CALL_CPL or m[host + k.K_HFLAGS] & k.HF_REAL_MODE:
        return _undefined(m, v)
    code, length = _code(control), how & k.CALL_LENGTH
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_HYPERCALL, v, control, given, output)
    if _denied(m, code):
        return _finish(m, v, k.HVSTATUS_ACCESS_DENIED, length)
    rules = m[k.H_HYPERV_RULES]
    if control & k.HV_CALL_RESERVED and rules & k.HVR_CALL_VAR_COUNT:
        return _finish(m, v, k.HVSTATUS_INVALID_HYPERCALL_INPUT, length)
    if control & k.HV_CALL_FAST and rules & k.HVR_CALL_XMM and _takes_xmm(code):
        if hyperv.enforced(m, k.HVF_XMM_INPUT):
            return _undefined(m, v)
    result = k.ZERO
    if code == k.HVCALL_SEND_IPI:
        result = send_ipi(m, v, control, given, output)
    elif code == k.HVCALL_SEND_IPI_EX:
        result = send_ipi_ex(m, v, control, given, output)
    elif _takes_xmm(code):
        m[host + k.K_MSR_DATA] = flush_tlb(m, v, control, given, output)
    elif code == k.HVCALL_NOTIFY_LONG_SPIN_WAIT:
        simple = _is_simple(m, control)
        m[host + k.K_MSR_DATA] = k.HVSTATUS_SUCCESS if simple else k.HVSTATUS_INVALID_HYPERCALL_INPUT
    elif code == k.HVCALL_POST_MESSAGE or code == k.HVCALL_SIGNAL_EVENT:
        result = _post_or_signal(m, v, control, given, output, length)
    elif _is_extended(m, code):
        if not control & k.HV_CALL_FAST:
            return _to_user(m, v, control, given, output, length)
        m[host + k.K_MSR_DATA] = k.HVSTATUS_INVALID_PARAMETER
    elif control & k.HV_CALL_FAST and (code == k.HVCALL_POST_DEBUG_DATA or code == k.HVCALL_RETRIEVE_DEBUG_DATA):
        # KVM looks at how they are called before it finds that there is no debugger.
        m[host + k.K_MSR_DATA] = k.HVSTATUS_INVALID_PARAMETER
    else:
        m[host + k.K_MSR_DATA] = k.HVSTATUS_INVALID_HYPERCALL_CODE
    if result & k.CODE_USER:
        return result
    return result | _finish(m, v, m[host + k.K_MSR_DATA], length)
