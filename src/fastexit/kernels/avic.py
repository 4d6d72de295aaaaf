"""AVIC: what the CPU does with a guest's APIC accesses, and the two exits where it gives up.

Models: avic_incomplete_ipi_interception, avic_unaccelerated_access_interception, avic_kick_target_vcpus with its fast
variant; hardware's side as the APM tells it. avictable.py has the tables.
Not modelled: nested AVIC, the tracepoint of an unaccelerated access. Assumed of hardware: targets are checked before
any IRR bit is set, the index of an incomplete IPI is that of the first target that does not run, an IPI leaves its
target's TMR alone. Spec: APM vol. 2 15.29.

wrmsr, rdmsr, mmio_write and mmio_read are the instruction itself: ``CODE_HARDWARE``, with CODE_GP or effects, when the
CPU has done it, else ``CODE_EXIT`` and the exit code in bits 47:32. An incomplete IPI then has its number (AvicIpi) in
bits 7:0 and the index in 24:16, an unaccelerated access the vector in bits 7:0, the register (offset >> 4) in 23:16
and bit 24 for a write. Both are traps for the registers of is_trap: the instruction is complete, RIP has moved.
What was read is in K_MSR_DATA.
"""

from ..jit.declare import kernel
from . import typed as k
from .accelerated import write_nodecode
from .avictable import load as load
from .avictable import logical_entry, max_index, owner, update_dfr, update_id, update_ldr, x2avic_active
from .avictable import put as put
from .ipi import ACCEPT, combine, complete_delivery, destination, send
from .irq import clear_isr, compute_ppr, highest_isr
from .lapic import in_x2apic_mode, reg_write
from .lapic import readable as known
from .lapicreg import reg, set_reg, vector_slot
from .match import delivery_mode, matches
from .shared import emit, hot, or_word, own, tell, vec, wake

WRITE = k.ONE << k.AVIC_WRITE_SHIFT
BAD, FOUND, RUNS = k.ZERO, k.ONE, k.U(2)


@kernel("u8(words, u8)")
def find_vcpu(m, vcpu_id):
    """kvm_get_vcpu_by_id: vCPU index + 1, 0 when there is none. Most vCPUs have the id that is their index."""
    n = m[k.H_NVCPUS]
    if vcpu_id < n and m[own(m, vcpu_id) + k.K_VCPU_ID] == vcpu_id:
        return vcpu_id + k.ONE
    for i in range(n):
        v = k.U(i)
        if m[own(m, v) + k.K_VCPU_ID] == vcpu_id:
            return v + k.ONE
    return k.ZERO


# ------------------------------------------------------------------------------------------- KVM's side: incomplete IPI


@kernel("u8(words, u8, u8, u8)")
def _kick_by_id(m, v, vcpu_id, icr):
    """avic_kick_vcpu_by_physical_id: hardware has set the IRR bit, what is left is to make the target see it."""
    found = find_vcpu(m, vcpu_id)
    if not found:
        return k.ZERO
    m[vec(m, found - k.ONE) + k.VEC_IRR_PENDING] = k.ONE
    return tell(m, v, found - k.ONE, complete_delivery(m, found - k.ONE, icr, v))


@kernel("u8(words, u8, u8, u8)")
def _kick_logical(m, v, icr, dest):
    """The fast variant for logical destinations: one bit, one vCPU, which AVIC's inhibits guarantee.

    CODE_EXIT where it leaves them to the scan: several bits in 6.1, which looks in x2APIC mode at the wrong half.
    """
    x2apic = in_x2apic_mode(m, v)
    if m[k.H_RULES] & k.R_AVIC_MANY_SCANNED and x2apic:
        return k.CODE_EXIT if dest >> k.U(16) else k.ZERO
    if x2apic:
        bits = dest & k.U(0xFFFF)
        first = (dest >> k.U(16)) << k.U(4)
    elif reg(m, v, k.APIC_DFR) == k.DFR_FLAT:
        bits = dest
        first = k.ZERO
    else:
        bits = dest & k.U(0xF)
        first = (dest >> k.U(4)) << k.U(2)
    if m[k.H_RULES] & k.R_AVIC_MANY_SCANNED and bits & (bits - k.ONE):
        return k.CODE_EXIT
    code = k.ZERO
    for i in range(16):
        if not (bits >> k.U(i)) & k.ONE:
            continue
        index = first + k.U(i)
        if x2apic:
            code = code | _kick_by_id(m, v, index, icr)
        else:
            entry = logical_entry(m, index)
            if entry & k.AVIC_LOGICAL_VALID:
                code = code | _kick_by_id(m, v, entry & k.AVIC_GUEST_ID, icr)
    return code


@kernel("u8(words, u8, u8, u8)")
def kick_targets(m, v, icr, index):
    """avic_kick_target_vcpus of the 64-bit ICR: Effect code. Shorthands and broadcasts, and an index that is not the
    destination, take the scan over all vCPUs.
    """
    low = icr & k.LOW32
    dest = destination(m, v, icr)
    if not low & k.ICR_SHORTHAND:
        if low & k.ICR_LOGICAL:
            code = _kick_logical(m, v, low, dest)
            if code != k.CODE_EXIT:
                return code
        broadcast = k.X2APIC_BROADCAST if in_x2apic_mode(m, v) else k.XAPIC_BROADCAST
        if not low & k.ICR_LOGICAL and dest != broadcast and dest == index:
            return _kick_by_id(m, v, dest, low)
    if m[k.H_CONFIG] & k.CONFIG_TRACE and m[k.H_TRAITS] & k.T_TRACE_DOORBELL:
        emit(m, k.TP_AVIC_KICK_VCPU_SLOWPATH, v, icr, index, k.ZERO)
    code = k.ZERO
    for i in range(m[k.H_NVCPUS]):
        target = k.U(i)
        if matches(m, target, v, low, dest):
            m[vec(m, target) + k.VEC_IRR_PENDING] = k.ONE
            code = code | tell(m, v, target, complete_delivery(m, target, low, v))
    return code


@kernel("u8(words, u8, u8, u8)")
def _incomplete_of_old(m, v, icr, why):
    """Up to 5.15: what hardware cannot send is written as two registers, whoever does not run is woken, and an IPI of
    which a target does not exist is lost.
    """
    if why == k.AVIC_INVALID_INT_TYPE:
        code = reg_write(m, v, k.APIC_ICR2, icr >> k.U(32))
        return (code | reg_write(m, v, k.APIC_ICR, icr & k.LOW32)) & k.CODE_DELIVERY
    code = k.ZERO
    if why == k.AVIC_TARGET_NOT_RUNNING:
        for i in range(m[k.H_NVCPUS]):
            target = k.U(i)
            runs = m[own(m, target) + k.K_AVIC_ENTRY] & k.AVIC_RUNNING
            if not runs and matches(m, target, v, icr & k.LOW32, destination(m, v, icr)):
                code = code | tell(m, v, target, wake(m, target))
    return code


@kernel("u8(words, u8, u8, u8)")
def incomplete_ipi(m, v, info1, info2):
    """avic_incomplete_ipi_interception: delivery code. The write of ICR is done, only the IPI is not.

    An IPI that hardware cannot send, or of which a target does not exist, is sent here, to all its targets. One whose
    target does not run has reached every IRR already.
    """
    why = info2 >> k.U(32)
    index = info2 & k.AVIC_INDEX
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_AVIC_INCOMPLETE_IPI, v, info1, why, index)
    if m[k.H_RULES] & k.R_AVIC_OLD:
        return _incomplete_of_old(m, v, info1, why)
    if why == k.AVIC_TARGET_NOT_RUNNING:
        return kick_targets(m, v, info1, index)
    if why != k.AVIC_INVALID_INT_TYPE and why != k.AVIC_INVALID_TARGET:
        return k.ZERO  # a backing page that is invalid only warns; a vector below 16 goes nowhere
    if info1 & k.ICR_BUSY:
        return write_nodecode(m, v, k.APIC_ICR)
    return send(m, v, info1)


# ------------------------------------------------------------------------------------- KVM's side: unaccelerated access


@kernel("u8(u8)")
def is_trap(offset):
    """is_avic_unaccelerated_access_trap: registers whose write exits behind the instruction."""
    if offset >= k.APIC_EOI and offset <= k.APIC_SPIV:
        return k.ONE
    if offset == k.APIC_ID or offset == k.APIC_ESR or offset == k.APIC_ICR:
        return k.ONE
    if (offset >= k.APIC_LVTT and offset <= k.APIC_TMICT) or offset == k.APIC_TDCR:
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8)")
def unaccelerated(m, v, offset):
    """avic_unaccel_trap_write: delivery code, or CODE_EXIT for an access that was no trap and is the emulator's.

    The tables follow ID, LDR and DFR. Where they cannot, KVM_RUN returns with what exit reason it had last, and the
    register's side effects do not happen; later kernels know no such error, and drop a write to RRR.
    """
    if not is_trap(offset):
        return k.CODE_EXIT
    if offset == k.APIC_RRR and not m[k.H_RULES] & k.R_AVIC_LDR_LOOSE:
        return k.ZERO
    refused = k.ZERO
    if offset == k.APIC_LDR:
        refused = update_ldr(m, v)
    elif offset == k.APIC_ID:
        refused = update_id(m, v)
    elif offset == k.APIC_DFR:
        update_dfr(m, v)
    if refused:
        return k.USER_UNKNOWN
    if m[k.H_RULES] & k.R_AVIC_OLD:
        return reg_write(m, v, offset, reg(m, v, offset)) & k.CODE_DELIVERY
    return write_nodecode(m, v, offset)


# ---------------------------------------------------------------------------------------------------- hardware: the IPI


@kernel("u8(u8, u8)")
def exit_code(reason, detail):
    """Code of an access that exits."""
    return k.CODE_EXIT | (reason << k.CODE_EXIT_REASON_SHIFT) | detail


@kernel("u8(u8, u8)")
def _incomplete(why, index):
    return exit_code(k.SVM_AVIC_INCOMPLETE_IPI, why | ((index & k.AVIC_INDEX) << k.AVIC_INDEX_SHIFT))


@kernel("u8(words, u8, u8)")
def _entry_of(m, v, vcpu_id):
    """The physical entry of an id as hardware of this vCPU reads it, 0 when it is beyond the table or not valid."""
    if vcpu_id > max_index(m, v):
        return k.ZERO
    entry = m[k.AVIC_PHYSICAL + vcpu_id]
    return entry if entry & k.AVIC_VALID else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _reach(m, v, vcpu_id, vector):
    """Hardware delivers to one valid target: IRR bit, then IsRunning; RUNS, and DOORBELL if it rang one.

    In this order: a target that stops running clears IsRunning before it looks at its IRR for the last time.
    """
    target = owner(m, m[k.AVIC_PHYSICAL + vcpu_id])
    if target == k.NONE:
        return RUNS
    or_word(m, vec(m, target) + k.VEC_IRR + (vector >> k.U(6)), k.ONE << (vector & k.U(63)))
    entry = m[k.AVIC_PHYSICAL + vcpu_id]
    if not entry & k.AVIC_RUNNING:
        return FOUND
    if target == v or entry & k.AVIC_HOST_ID == m[own(m, v) + k.K_CPU] & k.AVIC_HOST_ID:
        return RUNS
    return tell(m, v, target, RUNS | (k.EF_DOORBELL << k.CODE_EFFECTS_SHIFT))


@kernel("u8(words, u8, u8, u8, u8)")
def _one_target(m, v, vcpu_id, vector, index):
    """A physical destination."""
    if not _entry_of(m, v, vcpu_id):
        return _incomplete(k.AVIC_INVALID_TARGET, index)
    reached = _reach(m, v, vcpu_id, vector)
    if not reached & RUNS:
        return _incomplete(k.AVIC_TARGET_NOT_RUNNING, index)
    return k.CODE_HARDWARE | ACCEPT | (reached & ~RUNS)


@kernel("u8(words, u8, u8)")
def _logical_target(m, v, index):
    """vCPU id of a logical index + 1: x2APIC derives it, xAPIC reads the logical table; 0 when the entry is invalid."""
    if in_x2apic_mode(m, v):
        return index + k.ONE
    entry = logical_entry(m, index)
    return (entry & k.AVIC_GUEST_ID) + k.ONE if entry & k.AVIC_LOGICAL_VALID else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _logical_targets(m, v, dest, vector):
    """Every bit of a logical destination has to name a valid target, else nothing is sent."""
    if in_x2apic_mode(m, v):
        bits = dest & k.U(0xFFFF)
        first = (dest >> k.U(16)) << k.U(4)
    elif reg(m, v, k.APIC_DFR) == k.DFR_FLAT:
        bits = dest & k.U(0xFF)
        first = k.ZERO
    else:
        bits = dest & k.U(0xF)
        first = (dest >> k.U(4)) << k.U(2)
    for i in range(16):
        if (bits >> k.U(i)) & k.ONE:
            target = _logical_target(m, v, first + k.U(i))
            if not target or not _entry_of(m, v, target - k.ONE):
                return _incomplete(k.AVIC_INVALID_TARGET, first + k.U(i))
    code = k.CODE_HARDWARE
    asleep = k.NONE
    for i in range(16):
        if (bits >> k.U(i)) & k.ONE:
            index = first + k.U(i)
            reached = _reach(m, v, _logical_target(m, v, index) - k.ONE, vector)
            if not reached & RUNS and asleep == k.NONE:
                asleep = index
            code = combine(code, ACCEPT | (reached & ~(RUNS | FOUND)))
    return code if asleep == k.NONE else _incomplete(k.AVIC_TARGET_NOT_RUNNING, asleep)


@kernel("u8(words, u8, u8, u8)")
def _broadcast(m, v, but_self, vector):
    """All valid entries; ids that have none are passed over."""
    code = k.CODE_HARDWARE
    asleep = k.NONE
    for i in range(max_index(m, v) + k.ONE):
        vcpu_id = k.U(i)
        entry = _entry_of(m, v, vcpu_id)
        if not entry or (but_self and owner(m, entry) == v):
            continue
        reached = _reach(m, v, vcpu_id, vector)
        if not reached & RUNS and asleep == k.NONE:
            asleep = vcpu_id
        code = combine(code, ACCEPT | (reached & ~(RUNS | FOUND)))
    return code if asleep == k.NONE else _incomplete(k.AVIC_TARGET_NOT_RUNNING, asleep)


@kernel("u8(words, u8, u8)")
def hardware_ipi(m, v, icr):
    """What the CPU makes of an ICR that was written: Fixed and edge only, everything else is KVM's to send."""
    low = icr & k.LOW32
    vector = low & k.ICR_VECTOR
    if delivery_mode(low) != k.DM_FIXED or low & k.ICR_TRIGGER:
        return _incomplete(k.AVIC_INVALID_INT_TYPE, k.ZERO)
    if vector < k.U(16):
        return _incomplete(k.AVIC_INVALID_VECTOR, k.ZERO)
    shorthand = (low & k.ICR_SHORTHAND) >> k.ICR_SHORTHAND_SHIFT
    if shorthand == k.SH_SELF:
        or_word(m, vec(m, v) + k.VEC_IRR + (vector >> k.U(6)), k.ONE << (vector & k.U(63)))
        return k.CODE_HARDWARE | ACCEPT
    if shorthand:
        return _broadcast(m, v, k.ONE if shorthand == k.SH_ALLBUT else k.ZERO, vector)
    dest = destination(m, v, icr)
    physical_xapic = not low & k.ICR_LOGICAL and not in_x2apic_mode(m, v)
    if dest == k.X2APIC_BROADCAST or (dest == k.XAPIC_BROADCAST and physical_xapic):
        return _broadcast(m, v, k.ZERO, vector)
    if low & k.ICR_LOGICAL:
        return _logical_targets(m, v, dest, vector)
    return _one_target(m, v, dest, vector, dest)


# -------------------------------------------------------------------------------------- hardware: registers of the page


@kernel("u8(u8, u8, u8)")
def _unaccelerated(offset, write, vector):
    detail = vector | ((offset >> k.U(4)) << k.AVIC_INDEX_SHIFT)
    if write:
        detail = detail | WRITE
    return exit_code(k.SVM_AVIC_UNACCELERATED_ACCESS, detail)


@kernel("u8(words, u8)")
def _end_interrupt(m, v):
    """EOI: hardware ends an edge interrupt; a level one exits, its ISR bit still set, for the IOAPIC to hear of it."""
    vector = highest_isr(m, v)
    if vector == k.NONE:
        return k.CODE_HARDWARE
    if (m[hot(m, v) + k.HOT_TMR + (vector >> k.U(6))] >> (vector & k.U(63))) & k.ONE:
        return _unaccelerated(k.APIC_EOI, k.ONE, vector)
    clear_isr(m, v, vector)
    compute_ppr(m, v)
    return k.CODE_HARDWARE


@kernel("u8(words, u8, u8, u8)")
def _store(m, v, offset, value):
    """A register write that hardware takes or traps: the value is in the backing page before anybody looks at it."""
    if offset == k.APIC_TASKPRI:
        set_reg(m, v, offset, value & k.U(0xFF))
        if m[k.H_RULES] & k.R_V_TPR_KEPT_BY_AVIC:
            m[own(m, v) + k.K_V_TPR] = ((value >> k.U(4)) & k.U(0xF)) + k.ONE
        compute_ppr(m, v)
        return k.CODE_HARDWARE
    if offset == k.APIC_EOI:
        code = _end_interrupt(m, v)
        if code != k.CODE_HARDWARE:
            set_reg(m, v, offset, value)
        return code
    if offset == k.APIC_ICR:
        set_reg(m, v, offset, value & ~k.ICR_BUSY)
        high = reg(m, v, k.APIC_ICR2) << k.U(32)
        return hardware_ipi(m, v, high | (value & k.LOW32 & ~k.ICR_BUSY))
    set_reg(m, v, offset, value)
    if offset == k.APIC_ICR2:
        return k.CODE_HARDWARE
    return _unaccelerated(offset, k.ONE, k.ZERO)


@kernel("u8(words, u8, u8)")
def _fetch(m, v, offset):
    """A register read that hardware answers."""
    if offset >= k.APIC_ISR and offset < k.APIC_ESR:
        return vector_slot(m, v, offset)
    if offset == k.APIC_PROCPRI:
        compute_ppr(m, v)
    return reg(m, v, offset)


@kernel("u8(u8)")
def readable(offset):
    """xAPIC registers that hardware reads from the backing page; TMCCT is not among them, only KVM can compute it."""
    if offset >= k.APIC_ISR and offset <= k.APIC_ESR:
        return k.ONE
    if offset == k.APIC_ID or offset == k.APIC_LVR or (offset >= k.APIC_TASKPRI and offset <= k.APIC_SPIV):
        return k.ONE
    if offset == k.APIC_TDCR or (offset >= k.APIC_ICR and offset <= k.APIC_TMICT):
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def _page_virtualised(m, v):
    """Whether the vCPU's xAPIC page is AVIC's: in use, in xAPIC mode, not deleted because of a vCPU in x2APIC mode."""
    flags = m[hot(m, v) + k.HOT_FLAGS]
    wanted = k.FLAG_APICV | k.FLAG_HW
    if flags & (wanted | k.FLAG_X2APIC | k.FLAG_L2) != wanted or m[k.H_NO_ACCESS_PAGE]:
        return k.ZERO
    return k.ONE if m[own(m, v) + k.K_APIC_BASE] & k.APICBASE_PAGE == k.APIC_DEFAULT_PHYS_BASE else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def mmio_write(m, v, offset, length, value):
    """A store to the xAPIC page: HARDWARE, or the exit."""
    if not _page_virtualised(m, v):
        return exit_code(k.SVM_NPF, k.ZERO)
    aligned = offset & k.AVIC_OFFSET
    if length != k.U(4) or offset != aligned:
        return _unaccelerated(aligned, k.ONE, k.ZERO)
    if aligned == k.APIC_TASKPRI or aligned == k.APIC_ICR2 or is_trap(aligned):
        return _store(m, v, aligned, value & k.LOW32)
    return _unaccelerated(aligned, k.ONE, k.ZERO)


@kernel("u8(words, u8, u8, u8)")
def mmio_read(m, v, offset, length):
    """A load from the xAPIC page: HARDWARE with the value in K_MSR_DATA, or the exit."""
    if not _page_virtualised(m, v):
        return exit_code(k.SVM_NPF, k.ZERO)
    aligned = offset & k.AVIC_OFFSET
    if length != k.U(4) or offset != aligned or not readable(aligned):
        return _unaccelerated(aligned, k.ZERO, k.ZERO)
    m[own(m, v) + k.K_MSR_DATA] = _fetch(m, v, aligned)
    return k.CODE_HARDWARE


# ------------------------------------------------------------------------------------------------ hardware: x2APIC MSRs


@kernel("u8(u8)")
def passed_through(offset):
    """KVM's list of x2APIC MSRs that x2AVIC lets through: not SELF_IPI, not LVTT (hardware knows no deadline mode), and
    only the first of ISR, TMR and IRR each.
    """
    if offset == k.APIC_ID or offset == k.APIC_LVR or (offset >= k.APIC_TASKPRI and offset <= k.APIC_ISR):
        return k.ONE
    if offset == k.APIC_TMR or offset == k.APIC_IRR or offset == k.APIC_ESR or offset == k.APIC_TDCR:
        return k.ONE
    if offset == k.APIC_ICR or offset == k.APIC_ICR2 or (offset >= k.APIC_LVTTHMR and offset <= k.APIC_TMCCT):
        return k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _is_hardware_msr(m, v, msr, write):
    if msr < k.MSR_X2APIC_BASE or msr > k.MSR_X2APIC_END or not x2avic_active(m, v):
        return k.ZERO
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
        return k.ZERO
    offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
    if not m[k.H_RULES] & k.R_X2AVIC_WRITES_EXIT:
        return passed_through(offset)
    if not write:
        return known(m, v, offset) if offset != k.APIC_TMCCT else k.ZERO
    accelerated = offset == k.APIC_TASKPRI or offset == k.APIC_EOI
    return k.ONE if accelerated or offset == k.APIC_ICR or offset == k.APIC_SELF_IPI else k.ZERO


@kernel("u8(words, u8)")
def _retire(m, v):
    """The instruction is done as far as the guest is concerned."""
    row = own(m, v)
    m[row + k.K_RIP] = m[row + k.K_RIP] + k.INSN_LEN_WRMSR
    m[row + k.K_SHADOW] = k.ZERO
    return k.ZERO


@kernel("u8(u8, u8)")
def _write_faults(offset, value):
    """What hardware itself answers with #GP(0): read-only registers, reserved bits, an EOI that is not 0."""
    if offset == k.APIC_ICR:
        return k.ONE if value & (k.ICR_RESERVED | k.ICR_BUSY) else k.ZERO
    if value >> k.U(32):
        return k.ONE
    if offset == k.APIC_TASKPRI:
        return k.ONE if value > k.U(0xFF) else k.ZERO
    if offset == k.APIC_EOI or offset == k.APIC_ESR:
        return k.ONE if value else k.ZERO
    if offset == k.APIC_SELF_IPI:
        return k.ONE if value > k.U(0xFF) else k.ZERO
    writable = offset == k.APIC_SPIV or offset >= k.APIC_LVTTHMR
    return k.ZERO if writable else k.ONE


@kernel("u8(words, u8, u8, u8)")
def wrmsr(m, v, msr, value):
    """A WRMSR: HARDWARE, with CODE_GP where it faulted, or the exit."""
    if not _is_hardware_msr(m, v, msr, k.ONE):
        return exit_code(k.SVM_MSR, k.ZERO)
    offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
    if _write_faults(offset, value):
        return k.CODE_HARDWARE | k.CODE_GP
    if offset == k.APIC_TMCCT:
        return _unaccelerated(offset, k.ONE, k.ZERO)
    if offset == k.APIC_ICR:
        set_reg(m, v, k.APIC_ICR2, value >> k.U(32))
    _retire(m, v)
    if offset == k.APIC_SELF_IPI:
        return hardware_ipi(m, v, value | (k.SH_SELF << k.ICR_SHORTHAND_SHIFT))
    return _store(m, v, offset, value & k.LOW32)


@kernel("u8(words, u8, u8)")
def rdmsr(m, v, msr):
    """An RDMSR: HARDWARE with the value in K_MSR_DATA, CODE_GP where it faulted, or the exit."""
    if not _is_hardware_msr(m, v, msr, k.ZERO):
        return exit_code(k.SVM_MSR, k.ZERO)
    offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
    out = own(m, v) + k.K_MSR_DATA
    if offset == k.APIC_TMCCT:
        return _unaccelerated(offset, k.ZERO, k.ZERO)
    if offset == k.APIC_ARBPRI or offset == k.APIC_EOI or offset == k.APIC_RRR or offset == k.APIC_DFR:
        m[out] = k.ZERO
        return k.CODE_HARDWARE | k.CODE_GP
    if offset == k.APIC_ICR2:
        m[out] = k.ZERO
        return k.CODE_HARDWARE | k.CODE_GP
    value = _fetch(m, v, offset)
    if offset == k.APIC_ICR:
        value = value | (reg(m, v, k.APIC_ICR2) << k.U(32))
    m[out] = value
    _retire(m, v)
    return k.CODE_HARDWARE
