"""Modelled time of the compiled loop: what its steps and its handlers cost, charged where loop.py takes them.

Models: what costs/dispatcher.py charges and costs/meter.py knows of handlers; tests hold the two against each other,
exit by exit. The handler of an exit is known by its operation.
"""

from ..jit.declare import apart, kernel
from . import hypervcall, virtualized
from . import typed as k
from .meter import begin, charge, deliveries, row
from .shared import hot, own

_ACCEPTED = k.CODE_ACCEPTED_NONE >> k.CODE_ACCEPTED_SHIFT
_PAGE = k.U(0xFFF)
SENDS, TIMES = k.ONE, k.U(2)
"""What a register's access may have done: an IPI, a timer that moved."""


@kernel("u8(u8)")
def accepted_count(code):
    """How many APICs have accepted, by an outcome code; nobody that matched is nobody."""
    count = code >> k.CODE_ACCEPTED_SHIFT & _ACCEPTED
    return k.ZERO if count > _ACCEPTED >> k.ONE else count


# -------------------------------------------------------------------------------------------------- what a handler did


@kernel("u8(words, u8, u8, u8)")
def _register(m, v, offset, write):
    """One register of the local APIC: SENDS, TIMES or 0."""
    if write and offset == k.APIC_ICR:
        charge(m, v, k.P_ICR, k.ONE)
        return SENDS
    charge(m, v, k.P_LAPIC_ACCESS, k.ONE)
    timer = offset == k.APIC_LVTT or offset == k.APIC_TMICT or offset == k.APIC_TDCR
    return TIMES if write and timer else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _msr(m, v, msr, write):
    """RDMSR or WRMSR, generic emulation not among it: as _register."""
    if msr == k.MSR_HV_ICR:
        charge(m, v, k.P_ICR if write else k.P_LAPIC_ACCESS, k.ONE)
        return SENDS if write else k.ZERO
    if msr == k.MSR_HV_EOI or msr == k.MSR_HV_TPR:
        charge(m, v, k.P_LAPIC_ACCESS, k.ONE)
        return k.ZERO
    if msr == k.MSR_TSC_DEADLINE:
        charge(m, v, k.P_TIMER, k.ONE)
        return TIMES if write else k.ZERO
    if msr < k.MSR_X2APIC_BASE or msr >= k.MSR_X2APIC_BASE + k.U(0x100):
        return k.ZERO
    if write and msr == k.MSR_X2APIC_SELF_IPI:
        charge(m, v, k.P_ICR, k.ONE)
        return SENDS
    return _register(m, v, (msr - k.MSR_X2APIC_BASE) << k.U(4), write)


@kernel("u8(words, u8, u8, u8)")
def _page(m, v, gpa, write):
    """An access by way of the instruction emulator: as _register."""
    charge(m, v, k.P_EMULATOR, k.ONE)
    if gpa >> k.U(12) == k.IOAPIC_DEFAULT_BASE >> k.U(12):
        charge(m, v, k.P_DEVICE, k.ONE)
        return k.ZERO
    return _register(m, v, gpa & _PAGE, write)


@kernel("u8(words, u8, u8)")
def _hypercall(m, v, control):
    """A hypercall of KVM's own, or one of Hyper-V's by its control word; an IPI looks at every vCPU, in turn."""
    if not hypervcall.enabled(m):
        return charge(m, v, k.P_HYPERCALL, k.ONE)
    spent = charge(m, v, k.P_HV_HYPERCALL, k.ONE)
    code = control & k.HV_CALL_CODE
    reads = k.ONE
    if code == k.HVCALL_SEND_IPI_EX:
        reads = k.U(2)
    elif code != k.HVCALL_SEND_IPI and code != k.HVCALL_SIGNAL_EVENT:
        return spent
    if m[own(m, v) + k.K_MSR_DATA] & k.HV_CALL_CODE:
        return spent
    if not control & k.HV_CALL_FAST:
        charge(m, v, k.P_GUEST_MEMORY, reads)
    return spent if code == k.HVCALL_SIGNAL_EVENT else charge(m, v, k.P_HV_TARGET, m[k.H_NVCPUS])


@kernel("u8(words, u8, u8, u8, u8)")
def _virtualized(m, v, op, where, info):
    """An exit that the CPU has made of an access: as _register."""
    if op == virtualized.INCOMPLETE_IPI:
        charge(m, v, k.P_ICR, k.ONE)
        return SENDS
    if op == virtualized.APIC_WRITE:
        return _register(m, v, info & _PAGE, k.ONE) | (SENDS if info & _PAGE == k.APIC_SELF_IPI else k.ZERO)
    if op >= virtualized.INTERRUPT_WINDOW:
        charge(m, v, k.P_OTHER_EXIT, k.ONE)
        return k.ZERO
    write = k.ONE if where & virtualized.WRITE else k.ZERO
    if op == virtualized.APIC_ACCESS:
        return _page(m, v, info & _PAGE, write)
    if op == virtualized.EPT_VIOLATION:
        return _page(m, v, (where >> virtualized.OFFSET_SHIFT) & _PAGE, write)
    charge(m, v, k.P_LAPIC_ACCESS, k.ONE)
    if op != virtualized.UNACCELERATED_ACCESS or not info & k.AVIC_INFO1_WRITE:
        return k.ZERO
    return SENDS | TIMES if info & k.AVIC_OFFSET == k.APIC_ICR else TIMES


@kernel("u8(words, u8, u8, u8, u8)")
def _operation(m, v, op, where, info):
    """What an exit's handler is about: as _register."""
    if op == k.OP_WRMSR or op == k.OP_RDMSR:
        return _msr(m, v, where, k.ONE if op == k.OP_WRMSR else k.ZERO)
    if op == k.OP_MMIO_WRITE or op == k.OP_MMIO_READ:
        return _page(m, v, where, k.ONE if op == k.OP_MMIO_WRITE else k.ZERO)
    if op == k.OP_HYPERCALL:
        _hypercall(m, v, info)
        return SENDS
    if op == k.OP_HLT:
        charge(m, v, k.P_HALT, k.ONE)
    elif op == k.OP_IO_WRITE or op == k.OP_IO_READ:
        charge(m, v, k.P_DEVICE, k.ONE)
    elif op == k.OP_TIMER:
        charge(m, v, k.P_TIMER, k.ONE)
        return TIMES
    elif op >= virtualized.APIC_ACCESS:
        return _virtualized(m, v, op, where, info)
    return k.ZERO


@kernel("u8(u8)")
def _skips(op):
    """Whether an exit's instruction is skipped when its handler is done."""
    if op == k.OP_WRMSR or op == k.OP_RDMSR or op == k.OP_HLT or op == k.OP_HYPERCALL or op == virtualized.MOVE_TO_CR8:
        return k.ONE
    return k.ONE if op == k.OP_IO_WRITE or op == k.OP_IO_READ else k.ZERO


@apart
@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def work(m, v, op, where, info, code, generic):
    """The handler of an exit, fast or generic, by what it was and what it left behind.

    ``where`` is the MSR, the guest-physical address, or what virtualized.py has there; ``info`` a hypercall's control
    word or the exit qualification.
    """
    if generic and (op == k.OP_WRMSR or op == k.OP_RDMSR):
        charge(m, v, k.P_MSR_ACCESS, k.ONE)
    if code & k.CODE_FAULT or (code & k.CODE_USER and not code & k.CODE_FAST):
        return k.ZERO
    did = _operation(m, v, op, where, info)
    old, host = row(v) + k.METER_EOIS, own(m, v)
    if m[host + k.K_IOAPIC_EOIS] != m[old]:
        charge(m, v, k.P_IOAPIC_EOI, k.ONE)
    sends = did & SENDS
    deliveries(m, v, accepted_count(code) if sends else k.NONE, sends)
    if did & TIMES:
        if m[host + k.K_HV_DEADLINE] != m[old + k.ONE]:
            charge(m, v, k.P_PREEMPTION_TIMER, k.ONE)
        if m[host + k.K_HRTIMER] != m[old + k.U(2)]:
            charge(m, v, k.P_HRTIMER, k.ONE)
    if _skips(op) and code & k.CODE_COMPLETION != k.COMPLETION_SKIP:
        charge(m, v, k.P_SKIP, k.ONE)
    return k.ZERO


# --------------------------------------------------------------------------------------------------- steps of the loop


@kernel("u8(words, u8)")
def _wrmsr_exit(m, op):
    """Whether an exit has the number of a WRMSR, which SVM's RDMSR shares."""
    return k.ONE if op == k.OP_WRMSR or (op == k.OP_RDMSR and m[k.H_CONFIG] & k.CONFIG_SVM) else k.ZERO


@apart
@kernel("u8(words, u8)")
def exits(m, v):
    """Step 11 up to the fast handler; how often SRCU has been taken by now."""
    begin(m, v)
    charge(m, v, k.P_EXIT, k.ONE)
    return m[own(m, v) + k.K_SRCU_LOCKS]


@apart
@kernel("u8(words, u8, u8, u8, u8, u8, u8)")
def ran(m, v, op, where, info, code, locks):
    """Step 11 with its fast handler, before which SRCU had been taken ``locks`` times, and the re-entry behind it."""
    fast = _wrmsr_exit(m, op) or op == k.OP_HLT or op == k.OP_TIMER
    if fast and not m[k.H_TRAITS] & k.T_HOOK_IRQOFF:
        locks = m[own(m, v) + k.K_SRCU_LOCKS] - locks
        charge(m, v, k.P_FAST_CHECK, k.ONE)
        charge(m, v, k.P_SRCU_LOCK, locks)
        if code & k.CODE_FAST:
            work(m, v, op, where, info, code, k.ZERO)
        charge(m, v, k.P_SRCU_UNLOCK, locks)
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        charge(m, v, k.P_REENTER, k.ONE)
    return k.ZERO


@apart
@kernel("u8(words, u8)")
def leaves(m, v):
    """Steps 13 and 14 up to its fast handler."""
    begin(m, v)
    return charge(m, v, k.P_LEAVE, k.ONE)


@apart
@kernel("u8(words, u8, u8, u8, u8, u8)")
def left(m, v, op, where, info, code):
    """Step 14 with the fast handler of the first generations, steps 15 to 18."""
    if m[k.H_TRAITS] & k.T_HOOK_IRQOFF and _wrmsr_exit(m, op):
        charge(m, v, k.P_FAST_CHECK, k.ONE)
        if code & k.CODE_FAST:
            work(m, v, op, where, info, code, k.ZERO)
    if op == k.OP_NOTHING:
        charge(m, v, k.P_HOST_IRQ, k.ONE)
    return charge(m, v, k.P_BACK, k.ONE)


@apart
@kernel("u8(words, u8, u8)")
def dispatched(m, v, direct):
    """Step 20 between its checks and the generic handler."""
    begin(m, v)
    return charge(m, v, k.P_DISPATCH_DIRECT if direct else k.P_DISPATCH_INDIRECT, k.ONE)


@apart
@kernel("u8(words, u8)")
def injected(m, v):
    """Step 3."""
    charge(m, v, k.P_EVENT_CHECK, k.ONE)
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        charge(m, v, k.P_CR8_INTERCEPT, k.ONE)
    if m[own(m, v) + k.K_ENTRY_INFO] & k.VECTORING_INFO_VALID:
        charge(m, v, k.P_INJECT, k.ONE)
    return k.ZERO


@apart
@kernel("u8(words, u8, u8)")
def entered(m, v, runs):
    """Steps 4 to 9, and up to the guest where they end in it; an entry that is cancelled takes SRCU again."""
    charge(m, v, k.P_SWITCH, k.ONE)
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        charge(m, v, k.P_SYNC_PIR, k.ONE)
    return charge(m, v, k.P_ENTRY if runs else k.P_SRCU_LOCK, k.ONE)


@apart
@kernel("u8(words, u8, u8, u8)")
def executed(m, v, icr, code):
    """An access that hardware did by itself; ``icr``: it was a write of the ICR."""
    spent = charge(m, v, k.P_HW_IPI if icr else k.P_HW_ACCESS, k.ONE)
    if icr and not code & k.CODE_FAULT and accepted_count(code):
        m[row(v) + k.METER_IPI] = spent
    return spent
