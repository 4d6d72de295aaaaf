"""From an ICR value to accepted interrupts: decode, resolve, accept.

Models: kvm_apic_send_ipi, kvm_irq_delivery_to_apic(_fast), __apic_accept_irq and the vendors'
deliver_interrupt. Not modelled: nested posted interrupts (a target in L2 takes the path of its L1).
An interrupt is (icr, dest, hint): the low 32 ICR bits, the destination already cut to the sender's mode, and the MSI's
redirection hint. ``src`` is the sending vCPU or NONE (MSI). ``me`` is the vCPU that runs on this CPU, or a number from
HOST on where none does; it has the list of whom the effects are for. NONE: no vCPU runs here, and nobody will ask.
Results are delivery codes: accepted count and Effect bits of outcome.CODE. Spec: SDM vol. 3A 10.6.
"""

from ..jit.atomics import load_acquire
from ..jit.declare import apart, ctz, inlined, kernel
from . import typed as k
from .apicmap import MEMBER_BITS, UNRESOLVED, member, members
from .irq import set_irr
from .lapicreg import reg, word
from .match import delivery_mode, lowest_priority, matches
from .meter import accepted, reached
from .pid import post
from .shared import clear_word_bits, emit, hot, increment, kick, make_request, or_word, own, tell, wake

ACCEPT = k.ONE << k.CODE_ACCEPTED_SHIFT
NOBODY = k.CODE_ACCEPTED_NONE


@kernel("u8(u8, u8)")
def combine(a, b):
    """Two delivery codes as one: counts add, effects unite."""
    accepted = ((a & k.CODE_ACCEPTED_NONE) + (b & k.CODE_ACCEPTED_NONE)) & k.CODE_ACCEPTED_NONE
    return accepted | ((a | b) & ~k.CODE_ACCEPTED_NONE)


@kernel("u8(words, u8, u8)")
def destination(m, v, icr):
    """Destination field by the sender's mode: 32 bits in x2APIC mode, else bits 63:56 of (ICR2 << 32)."""
    dest = icr >> k.ICR_DEST_SHIFT
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        return dest
    return dest >> k.XAPIC_DEST_SHIFT


@kernel("u8(words, u8, u8, u8)")
def _deliver_vmx(m, v, vector, me):
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        return post(m, v, vector, me)
    set_irr(m, v, vector)
    make_request(m, v, k.REQ_EVENT)
    return kick(m, v, me)


@kernel("u8(words, u8, u8)")
def ring_doorbell(m, v, me):
    """avic_ring_doorbell: not to the pCPU that this is."""
    cpu = m[own(m, v) + k.K_CPU]
    if v == me or (me < k.MAX_VCPUS and m[own(m, me) + k.K_CPU] == cpu):
        return k.ZERO
    if m[k.H_CONFIG] & k.CONFIG_TRACE and m[k.H_TRAITS] & k.T_TRACE_DOORBELL:
        emit(m, k.TP_AVIC_DOORBELL, me, m[own(m, v) + k.K_VCPU_ID], cpu, k.ZERO)
    return k.EF_DOORBELL << k.CODE_EFFECTS_SHIFT


@kernel("u8(words, u8, u8, u8)")
def complete_delivery(m, v, icr, me):
    """svm_complete_interrupt_delivery: IRR has the vector. Mode is read before the APICv flag.

    The first kernels (svm_deliver_avic_intr) ring the doorbell of whoever is loaded on a pCPU, in the guest or not.
    """
    in_guest = load_acquire(m, hot(m, v) + k.HOT_MODE) == k.IN_GUEST_MODE
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        make_request(m, v, k.REQ_EVENT)
        return kick(m, v, me)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APICV_ACCEPT_IRQ, me, m[own(m, v) + k.K_VCPU_ID], icr, k.ZERO)
    if m[k.H_RULES] & k.R_AVIC_OLD:
        in_guest = m[own(m, v) + k.K_AVIC_ENTRY] & k.AVIC_RUNNING != k.ZERO
    code = ring_doorbell(m, v, me) if in_guest else wake(m, v)
    return reached(m, me, code) if m[k.H_CONFIG] & k.CONFIG_COSTS else code


@kernel("u8(words, u8, u8, u8)")
def _deliver_svm(m, v, icr, me):
    """IRR first, then mode: VMRUN re-evaluates the vIRR, so a target that is just entering sees the bit."""
    set_irr(m, v, icr & k.ICR_VECTOR)
    return complete_delivery(m, v, icr, me)


@kernel("u8(words, u8, u8, u8)")
def _accept_fixed(m, v, icr, me):
    trigger = icr & k.ICR_TRIGGER
    if trigger and not icr & k.ICR_LEVEL:
        return k.ZERO
    enabled = k.FLAG_HW | k.FLAG_SW
    if m[hot(m, v) + k.HOT_FLAGS] & enabled != enabled:
        return k.ZERO
    vector = icr & k.ICR_VECTOR
    tmr = hot(m, v) + k.HOT_TMR + (vector >> k.U(6))
    bit = k.ONE << (vector & k.U(63))
    # Read first: almost every interrupt is edge and finds its TMR bit clear, and a read keeps the line shared.
    is_level = m[tmr] & bit
    if trigger and not is_level:
        or_word(m, tmr, bit)
    elif is_level and not trigger:
        clear_word_bits(m, tmr, bit)
    config = m[k.H_CONFIG]
    if config & k.CONFIG_SVM:
        return tell(m, me, v, _deliver_svm(m, v, icr, me) | ACCEPT)
    effects = _deliver_vmx(m, v, vector, me)
    if config & k.CONFIG_TRACE and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        emit(m, k.TP_APICV_ACCEPT_IRQ, me, m[own(m, v) + k.K_VCPU_ID], icr, k.ZERO)
    return tell(m, me, v, effects | ACCEPT)


@kernel("u8(words, u8, u8, u8, u8)")
def _signal(m, v, request, me, code):
    make_request(m, v, request)
    return tell(m, me, v, code | kick(m, v, me))


@kernel("u8(words, u8, u8, u8)")
def _accept_other(m, v, icr, me):
    """All delivery modes that do not go through IRR; they ignore software-disable."""
    mode = delivery_mode(icr)
    row = own(m, v)
    if mode == k.DM_NMI:
        increment(m, row + k.K_NMI_QUEUED)
        return _signal(m, v, k.REQ_NMI, me, ACCEPT)
    if mode == k.DM_INIT:
        if icr & k.ICR_TRIGGER and not icr & k.ICR_LEVEL:
            return k.ZERO
        # A store, not an OR: INIT discards a SIPI that is still pending.
        m[row + k.K_PENDING_EVENTS] = k.PENDING_INIT
        return _signal(m, v, k.REQ_EVENT, me, ACCEPT)
    if mode == k.DM_STARTUP:
        # The vector is written before its bit, so that whoever takes the bit reads this vector.
        m[row + k.K_SIPI_VECTOR] = icr & k.ICR_VECTOR
        or_word(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI)
        return _signal(m, v, k.REQ_EVENT, me, ACCEPT)
    if mode == k.DM_REMRD:
        m[row + k.K_PV_UNHALTED] = k.ONE
        return _signal(m, v, k.REQ_EVENT, me, ACCEPT)
    if mode == k.DM_SMI and (m[k.H_CONFIG] & k.CONFIG_SMM or m[k.H_RULES] & k.R_SMI_ALWAYS):
        return _signal(m, v, k.REQ_SMI, me, ACCEPT)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _accept(m, v, icr, me):
    mode = delivery_mode(icr)
    if mode > k.DM_LOWEST:
        return _accept_other(m, v, icr, me)
    if mode == k.DM_LOWEST:
        increment(m, own(m, v) + k.K_ARB_PRIO)
    return _accept_fixed(m, v, icr, me)


@apart
@kernel("u8(words, u8, u8, u8)")
def _accept_watched(m, v, icr, me):
    """The same where somebody looks on: the trace, or whoever adds up what it costs."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_ACCEPT_IRQ, me, m[own(m, v) + k.K_VCPU_ID], icr, k.ZERO)
    code = _accept(m, v, icr, me)
    return accepted(m, me, code) if m[k.H_CONFIG] & k.CONFIG_COSTS else code


@kernel("u8(words, u8, u8, u8)")
def accept(m, v, icr, me):
    """__apic_accept_irq: one interrupt at one APIC. The trace line comes first, even if the interrupt is discarded."""
    if m[k.H_CONFIG] & (k.CONFIG_TRACE | k.CONFIG_COSTS):
        return _accept_watched(m, v, icr, me)
    return _accept(m, v, icr, me)


@kernel("u8(words, u8, u8, u8, u8)")
def _accept_each(m, base, found, icr, me):
    """The interrupt at each of the members of the map that a destination means."""
    bits = found >> MEMBER_BITS
    code = k.ZERO
    while bits:
        target = member(m, base, found, ctz(bits))
        bits = bits & (bits - k.ONE)
        if target:
            code = combine(code, accept(m, target - k.ONE, icr, me))
    return code


@kernel("u8(words, u8, u8, u8, u8, u8)")
def deliver_fast(m, src, icr, dest, hint, me):
    """kvm_irq_delivery_to_apic_fast: delivery code, or UNRESOLVED when only the slow scan can tell."""
    shorthand = icr & k.ICR_SHORTHAND
    if shorthand:
        if shorthand == k.SH_SELF << k.ICR_SHORTHAND_SHIFT and src != k.NONE:
            return accept(m, src, icr, me)
        return UNRESOLVED
    base = m[k.H_MAP]
    found = members(m, base, src, icr, dest, hint)
    if found == UNRESOLVED:
        return UNRESOLVED
    if found >> MEMBER_BITS != k.ONE:
        return _accept_each(m, base, found, icr, me)
    target = member(m, base, found, k.ZERO)
    return accept(m, target - k.ONE, icr, me) if target else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _is_candidate(m, v, src, icr_dest):
    """A present, software-enabled APIC that matches; icr_dest is icr | dest << 32."""
    flags = m[hot(m, v) + k.HOT_FLAGS]
    if not flags & k.FLAG_HW or not flags & k.FLAG_SW:
        return k.ZERO
    return matches(m, v, src, icr_dest & k.LOW32, icr_dest >> k.U(32))


@kernel("u8(words, u8, u8, u8)")
def choose_lowest(m, src, icr, dest):
    """Lowest priority over all vCPUs: the (vector mod n)-th candidate, or the smallest arb_prio without hashing; NONE
    where there is no candidate.
    """
    n = m[k.H_NVCPUS]
    both = icr | (dest << k.U(32))
    count = k.ZERO
    best = k.NONE
    for i in range(n):
        v = k.U(i)
        if _is_candidate(m, v, src, both):
            count = count + k.ONE
            if best == k.NONE or m[own(m, v) + k.K_ARB_PRIO] < m[own(m, best) + k.K_ARB_PRIO]:
                best = v
    if count and m[k.H_CONFIG] & k.CONFIG_VECTOR_HASHING:
        skip = (icr & k.ICR_VECTOR) % count
        for i in range(n):
            v = k.U(i)
            if _is_candidate(m, v, src, both):
                if skip == k.ZERO:
                    return v
                skip = skip - k.ONE
    return best


@kernel("u8(words, u8, u8, u8, u8, u8)")
def deliver_slow(m, src, icr, dest, hint, me):
    """The scan of kvm_irq_delivery_to_apic: every vCPU in creation order; NOBODY when none matches."""
    if lowest_priority(icr, hint):
        best = choose_lowest(m, src, icr, dest)
        return NOBODY if best == k.NONE else accept(m, best, icr, me)
    code = NOBODY
    n = m[k.H_NVCPUS]
    for i in range(n):
        v = k.U(i)
        if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW and matches(m, v, src, icr, dest):
            if code & k.CODE_ACCEPTED_NONE == NOBODY:
                code = code & ~k.CODE_ACCEPTED_NONE
            code = combine(code, accept(m, v, icr, me))
    return code


@kernel("u8(words, u8, u8, u8)")
def rewrite_lowest(m, icr, dest, hint):
    """Lowest priority, or any mode with the redirection hint, to physical 0xFF is delivered as Fixed."""
    if not icr & k.ICR_LOGICAL and dest == k.XAPIC_BROADCAST and lowest_priority(icr, hint):
        return icr & ~k.ICR_DM
    return icr


@apart
@kernel("u8(words, u8, u8, u8)")
def log_error(m, v, error, me):
    """An error for ESR (SDM 10.5.3): it waits in the dword behind that register until a write shows it.

    The first one since such a write is LVTERR's interrupt; the LVT's own vector may be an error, too.
    """
    at = word(m, v, k.APIC_ESR)
    old = or_word(m, at, error << k.U(32)) >> k.U(32)
    lvt = reg(m, v, k.APIC_LVTERR)
    takes = k.FLAG_HW | k.FLAG_SW
    if old or lvt & k.LVT_MASKED or m[hot(m, v) + k.HOT_FLAGS] & takes != takes:
        return k.ZERO
    if not lvt & k.U(0xF0):
        or_word(m, at, k.ESR_RECEIVE_ILLEGAL << k.U(32))
        return k.ZERO
    return accept(m, v, (lvt & k.ICR_VECTOR) | k.ICR_LEVEL, me) & ~k.CODE_ACCEPTED_NONE


@inlined
@kernel("u8(words, u8)")
def is_illegal(m, icr):
    """Tell whether an interrupt is an error: by the manual a vector below 16 does not go through IRR (SDM 10.5.2)."""
    if icr & k.U(0xF0) or not m[k.H_TRAITS] & k.T_ERRORS_LOGGED:
        return k.ZERO
    return k.ONE if delivery_mode(icr) <= k.DM_LOWEST else k.ZERO


@apart
@kernel("u8(words, u8, u8, u8, u8, u8)")
def log_illegal(m, src, icr, dest, hint, me):
    """An illegal vector: an error of its sender and of whom it would have reached, where it goes no further."""
    code = k.ZERO if src == k.NONE else log_error(m, src, k.ESR_SEND_ILLEGAL, me)
    if lowest_priority(icr, hint):
        best = choose_lowest(m, src, icr, dest)
        return code if best == k.NONE else combine(code, log_error(m, best, k.ESR_RECEIVE_ILLEGAL, me))
    for i in range(m[k.H_NVCPUS]):
        v = k.U(i)
        if _is_candidate(m, v, src, icr | dest << k.U(32)):
            code = combine(code, log_error(m, v, k.ESR_RECEIVE_ILLEGAL, me))
    return code


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8)")
def deliver(m, src, icr, dest, hint, me):
    """kvm_irq_delivery_to_apic: the map if it can, else the scan."""
    if m[k.H_TRAITS] & k.T_LOWEST_REWRITE_FIRST:
        icr = rewrite_lowest(m, icr, dest, hint)
    code = deliver_fast(m, src, icr, dest, hint, me)
    if code != UNRESOLVED:
        return code
    return deliver_slow(m, src, rewrite_lowest(m, icr, dest, hint), dest, hint, me)


@apart
@kernel("u8(words, u8, u8)")
def send_illegal(m, v, icr):
    """A send of an interrupt that is an error."""
    dest = destination(m, v, icr)
    low = icr & k.LOW32
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_IPI, v, low, dest, k.ZERO)
    return log_illegal(m, v, low, dest, k.ZERO, v)


@inlined
@kernel("u8(words, u8, u8)")
def send(m, v, icr):
    """kvm_apic_send_ipi for the 64-bit ICR value (ICR2 << 32 | ICR in xAPIC mode): traces, then delivers."""
    dest = destination(m, v, icr)
    low = icr & k.LOW32
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_APIC_IPI, v, low, dest, k.ZERO)
    return deliver(m, v, low, dest, k.ZERO, v)
