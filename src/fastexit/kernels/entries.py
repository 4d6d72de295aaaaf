"""What Python may call: every function here takes the machine's address and integers, and returns one integer.

An index that names no vCPU gives NO_VCPU and touches nothing. The address is opened here and nowhere else; kernels
below work on the words. One exit keeps the GIL, because giving it up would cost more than the exit; a batch gives it
up.
"""

from . import (
    accelerated,
    apicv,
    avic,
    batch,
    events,
    fastpath,
    halt,
    hypercall,
    inhibit,
    irq,
    irte,
    lapic,
    lapicstate,
    msi,
    msr,
    pi,
    runloop,
    sched,
    shared,
    timer,
    vcpu,
)
from . import typed as k
from ._jit import entry, kernel, open_words

NO_VCPU = k.NONE


@kernel("u8(words, u8, u8)")
def _reenter(m, v, code):
    code = fastpath.reenter(m, v, code)
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        if m[k.H_CONFIG] & k.CONFIG_TRACE or m[shared.own(m, v) + k.K_EXPIRED_DEADLINE]:
            runloop.trace_reentry(m, v)
    return code


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def fast_exit(handle, v, reason, msr_index, value):
    """A WRMSR exit in the vendor's run function: fast handler and re-entry; or CODE_NOT_IN_GUEST."""
    m = open_words(handle, k.WORDS)
    if v >= m[k.H_NVCPUS]:
        return NO_VCPU
    if m[shared.hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        return k.CODE_NOT_IN_GUEST
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        svm = m[k.H_CONFIG] & k.CONFIG_SVM
        late = m[k.H_TRAITS] & (k.T_TRACE_EXIT_LATE_SVM if svm else k.T_TRACE_EXIT_LATE_VMX)
        if not late:
            runloop.trace_exit(m, v, reason, k.ONE if svm else k.ZERO, k.ZERO, k.ZERO)
    return _reenter(m, v, fastpath.wrmsr(m, v, msr_index, value, k.INSN_LEN_WRMSR))


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def fast_wrmsr(handle, v, msr_index, value, length):
    """fast_exit behind its kvm_exit line, for a vCPU that is in guest mode."""
    m = open_words(handle, k.WORDS)
    return _reenter(m, v, fastpath.wrmsr(m, v, msr_index, value, length)) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def fast_hlt(handle, v):
    m = open_words(handle, k.WORDS)
    return _reenter(m, v, fastpath.hlt(m, v)) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def fast_invd(handle, v, length):
    m = open_words(handle, k.WORDS)
    return _reenter(m, v, fastpath.invd(m, v, length)) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def fast_preemption_timer(handle, v):
    m = open_words(handle, k.WORDS)
    return _reenter(m, v, fastpath.preemption_timer(m, v)) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def handle_preemption_timer(handle, v):
    m = open_words(handle, k.WORDS)
    return fastpath.handle_preemption_timer(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def fast_irqoff(handle, v, msr_index, value):
    """The fast handler alone, as handle_exit_irqoff of the first generations called it."""
    m = open_words(handle, k.WORDS)
    return fastpath.wrmsr(m, v, msr_index, value, k.INSN_LEN_WRMSR) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def emulate_wrmsr(handle, v, msr_index, value, length):
    m = open_words(handle, k.WORDS)
    return msr.emulate_wrmsr(m, v, msr_index, value, length) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def emulate_rdmsr(handle, v, msr_index, length):
    m = open_words(handle, k.WORDS)
    return msr.emulate_rdmsr(m, v, msr_index, length) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def emulate_cr8(handle, v, value, write):
    m = open_words(handle, k.WORDS)
    return msr.emulate_cr8(m, v, value, write) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def set_cr8(handle, v, value):
    m = open_words(handle, k.WORDS)
    return msr.set_cr8(m, v, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def complete_msr(handle, v, error):
    m = open_words(handle, k.WORDS)
    return msr.complete(m, v, error) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def emulate_halt(handle, v):
    m = open_words(handle, k.WORDS)
    return halt.emulate_halt(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8, u8, u8)", nogil=False)
def emulate_hypercall(handle, v, number, a0, a1, a2, a3, bits64):
    m = open_words(handle, k.WORDS)
    return hypercall.emulate(m, v, number, a0, a1, a2, a3, bits64) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def skip(handle, v, length):
    m = open_words(handle, k.WORDS)
    return msr.skip(m, v, length) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def set_msr(handle, v, msr_index, value):
    """KVM_SET_MSRS of one MSR."""
    m = open_words(handle, k.WORDS)
    return msr.set_msr(m, v, msr_index, value, k.ONE) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def get_msr(handle, v, msr_index):
    """KVM_GET_MSRS of one MSR."""
    m = open_words(handle, k.WORDS)
    return msr.get_msr(m, v, msr_index) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def mmio_write(handle, v, offset, length, value):
    m = open_words(handle, k.WORDS)
    return lapic.mmio_write(m, v, offset, length, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def mmio_read(handle, v, offset, length):
    m = open_words(handle, k.WORDS)
    return lapic.mmio_read(m, v, offset, length) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def make_request(handle, v, request):
    m = open_words(handle, k.WORDS)
    return shared.make_request(m, v, request) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def get_state(handle, v):
    m = open_words(handle, k.WORDS)
    return lapicstate.get_state(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def set_state(handle, v):
    m = open_words(handle, k.WORDS)
    return lapicstate.set_state(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def pending(handle, v):
    m = open_words(handle, k.WORDS)
    return irq.has_interrupt(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def ack(handle, v):
    m = open_words(handle, k.WORDS)
    return irq.ack(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def eoi(handle, v):
    m = open_words(handle, k.WORDS)
    return irq.eoi(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def accept_events(handle, v):
    m = open_words(handle, k.WORDS)
    return events.accept_events(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def process_nmi(handle, v):
    m = open_words(handle, k.WORDS)
    return events.process_nmi(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def service_requests(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.service_requests(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def inject_events(handle, v):
    m = open_words(handle, k.WORDS)
    return events.inject_events(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def block(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.block(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def enter(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.enter(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def trace_entry(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.trace_entry(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def trace_exit(handle, v, reason, info1, info2, intr_info):
    m = open_words(handle, k.WORDS)
    return runloop.trace_exit(m, v, reason, info1, info2, intr_info) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def loop_tail(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.loop_tail(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def begin_run(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.begin_run(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def wake_up(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.wake_up(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def return_to_user(handle, v, reason, errno):
    m = open_words(handle, k.WORDS)
    return runloop.return_to_user(m, v, reason, errno) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def exits_at_once(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.exits_at_once(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def trace_reentry(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.trace_reentry(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def requeue(handle, v, info):
    m = open_words(handle, k.WORDS)
    return events.requeue(m, v, info) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def leave_smm(handle, v):
    m = open_words(handle, k.WORDS)
    return events.leave_smm(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def set_mp_state(handle, v, state):
    m = open_words(handle, k.WORDS)
    return halt.set_mp_state(m, v, state) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def init_blocked(handle, v):
    m = open_words(handle, k.WORDS)
    return halt.init_blocked(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def take_pv_eoi(handle, v):
    m = open_words(handle, k.WORDS)
    return irq.take_pv_eoi(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def vcpu_load(handle, v, cpu):
    m = open_words(handle, k.WORDS)
    return sched.vcpu_load(m, v, cpu) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def vcpu_put(handle, v, blocking):
    m = open_words(handle, k.WORDS)
    return sched.vcpu_put(m, v, blocking) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def local_deliver(handle, v, offset, me):
    m = open_words(handle, k.WORDS)
    if v >= m[k.H_NVCPUS] or offset > k.APIC_LVTERR or (me >= m[k.H_NVCPUS] and me != k.NONE):
        return NO_VCPU
    return timer.local_deliver(m, v, offset, me)


@entry
@kernel("u8(u8, u8)", nogil=False)
def fire_timer(handle, v):
    m = open_words(handle, k.WORDS)
    return timer.fire(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def kick(handle, v, me):
    m = open_words(handle, k.WORDS)
    return shared.kick(m, v, me) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def exit_requested(handle, v):
    m = open_words(handle, k.WORDS)
    return fastpath.exit_requested(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def emit(handle, event, v, a, b, c):
    """Append a trace record; the caller has looked whether tracing is on."""
    m = open_words(handle, k.WORDS)
    return shared.emit(m, event & k.U(0xFF), v, a, b, c) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8)", nogil=False)
def due_timer(handle):
    return timer.due(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def hv_timer_exit(handle, first):
    return timer.hv_exit(open_words(handle, k.WORDS), first)


@entry
@kernel("u8(u8)", nogil=False)
def next_timer(handle):
    return timer.next_event(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def create_vcpu(handle, vcpu_id):
    """Index of the new vCPU; NO_VCPU when the machine is full or the id does not fit its map."""
    m = open_words(handle, k.WORDS)
    if m[k.H_NVCPUS] >= k.MAX_VCPUS or vcpu_id > k.MAX_VCPU_ID:
        return NO_VCPU
    return vcpu.create(m, vcpu_id)


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def signal_msi(handle, address, data):
    return msi.signal_msi(open_words(handle, k.WORDS), address, data)


@entry
@kernel("u8(u8, u8, u8)")
def first_bad(handle, exits, n):
    return batch.first_bad(open_words(handle, k.WORDS), open_words(exits, n * k.EXIT_WORDS), n)


@entry
@kernel("u8(u8, u8, u8, u8, u8)")
def run(handle, exits, outcomes, first, n):
    return batch.run(
        open_words(handle, k.WORDS),
        open_words(exits, n * k.EXIT_WORDS),
        open_words(outcomes, n * k.OUTCOME_WORDS),
        first,
        n,
    )


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def apicv_wrmsr(handle, v, msr_index, value):
    m = open_words(handle, k.WORDS)
    return apicv.wrmsr(m, v, msr_index, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def apicv_rdmsr(handle, v, msr_index):
    m = open_words(handle, k.WORDS)
    return apicv.rdmsr(m, v, msr_index) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def apicv_mmio_write(handle, v, offset, length, value):
    m = open_words(handle, k.WORDS)
    return apicv.mmio_write(m, v, offset, length, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def apicv_mmio_read(handle, v, offset, length):
    m = open_words(handle, k.WORDS)
    return apicv.mmio_read(m, v, offset, length) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def deliver_pending(handle, v):
    m = open_words(handle, k.WORDS)
    return apicv.deliver_pending(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def process_notification(handle, v):
    m = open_words(handle, k.WORDS)
    return pi.process_notification(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def hardware_post(handle, v, vector):
    m = open_words(handle, k.WORDS)
    return pi.hardware_post(m, v, vector & k.ICR_VECTOR) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def pi_load(handle, v, cpu):
    m = open_words(handle, k.WORDS)
    return pi.load(m, v, cpu) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def pi_put(handle, v, blocking):
    m = open_words(handle, k.WORDS)
    return pi.put(m, v, blocking) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def pi_has_pending(handle, v):
    m = open_words(handle, k.WORDS)
    return pi.has_pending(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def pi_wake_next(handle, cpu, first):
    return pi.wake_next(open_words(handle, k.WORDS), cpu, first)


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def external_interrupt(handle, v, intr_info):
    m = open_words(handle, k.WORDS)
    return pi.external_interrupt(m, v, intr_info) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def write_nodecode(handle, v, offset):
    m = open_words(handle, k.WORDS)
    return accelerated.write_nodecode(m, v, offset) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def set_eoi_accelerated(handle, v, vector):
    m = open_words(handle, k.WORDS)
    return accelerated.set_eoi(m, v, vector) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def apic_access_eoi(handle, v, length):
    m = open_words(handle, k.WORDS)
    return accelerated.access_eoi(m, v, length) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def tpr_below_threshold(handle, v):
    m = open_words(handle, k.WORDS)
    return accelerated.tpr_below_threshold(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def update_irte(handle, host_irq, gsi, address, data, was_posted):
    """The vCPU's index for posted mode, NONE for remapped mode, CODE_GP where the route itself is refused."""
    m = open_words(handle, k.WORDS)
    if msi.route_invalid(m, address):
        return k.CODE_GP
    return irte.update(m, host_irq, gsi, address, data, was_posted)


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def set_inhibit(handle, reason, on):
    """kvm_set_or_clear_apicv_inhibit of reason number 0..63; above there is none."""
    m = open_words(handle, k.WORDS)
    return inhibit.change(m, k.ONE << reason, on) if reason < k.U(64) else k.ZERO


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def irq_window(handle, v, on):
    m = open_words(handle, k.WORDS)
    return inhibit.irq_window(m, v, on) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def nested_changed(handle, v):
    m = open_words(handle, k.WORDS)
    return inhibit.nested_changed(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def avic_load(handle, v, cpu):
    m = open_words(handle, k.WORDS)
    return avic.load(m, v, cpu) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def avic_put(handle, v, blocking):
    m = open_words(handle, k.WORDS)
    return avic.put(m, v, blocking) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def avic_incomplete_ipi(handle, v, info1, info2):
    m = open_words(handle, k.WORDS)
    return avic.incomplete_ipi(m, v, info1, info2) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def avic_unaccelerated(handle, v, offset):
    m = open_words(handle, k.WORDS)
    return avic.unaccelerated(m, v, offset & k.AVIC_OFFSET) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def avic_wrmsr(handle, v, msr_index, value):
    m = open_words(handle, k.WORDS)
    return avic.wrmsr(m, v, msr_index, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def avic_rdmsr(handle, v, msr_index):
    m = open_words(handle, k.WORDS)
    return avic.rdmsr(m, v, msr_index) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def avic_mmio_write(handle, v, offset, length, value):
    m = open_words(handle, k.WORDS)
    return avic.mmio_write(m, v, offset, length, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def avic_mmio_read(handle, v, offset, length):
    m = open_words(handle, k.WORDS)
    return avic.mmio_read(m, v, offset, length) if v < m[k.H_NVCPUS] else NO_VCPU
