"""What Python may call: every function here takes the machine's address and integers, and returns one integer.

An index that names no vCPU gives NO_VCPU and touches nothing. The address is opened here and nowhere else; kernels
below work on the words. One exit keeps the GIL, because giving it up would cost more than the exit; a batch gives it
up.
"""

from . import avic, batch, inhibit, irq, lapic, lapicstate, msi, msr, runloop, shared, vcpu
from . import typed as k
from ._jit import entry, kernel, open_words
from .fastpath import reenter
from .fastpath import wrmsr as fast_wrmsr_kernel

NO_VCPU = k.NONE


@kernel("u8(words, u8, u8, u8)")
def _fast_and_reenter(m, v, msr_index, value):
    code = reenter(m, v, fast_wrmsr_kernel(m, v, msr_index, value))
    if m[k.H_CONFIG] & k.CONFIG_TRACE and code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
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
            runloop.trace_exit(m, v, reason, k.ONE if svm else k.ZERO, k.ZERO)
    return _fast_and_reenter(m, v, msr_index, value)


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def fast_reenter(handle, v, msr_index, value):
    """fast_exit behind its kvm_exit line, for a vCPU that is in guest mode."""
    m = open_words(handle, k.WORDS)
    if v >= m[k.H_NVCPUS]:
        return NO_VCPU
    return _fast_and_reenter(m, v, msr_index, value)


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def fast_irqoff(handle, v, msr_index, value):
    """The fast handler alone, as handle_exit_irqoff of the first generations called it."""
    m = open_words(handle, k.WORDS)
    return fast_wrmsr_kernel(m, v, msr_index, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def emulate_wrmsr(handle, v, msr_index, value):
    m = open_words(handle, k.WORDS)
    return msr.emulate_wrmsr(m, v, msr_index, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def emulate_rdmsr(handle, v, msr_index):
    m = open_words(handle, k.WORDS)
    return msr.emulate_rdmsr(m, v, msr_index) if v < m[k.H_NVCPUS] else NO_VCPU


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
    return runloop.accept_events(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def process_nmi(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.process_nmi(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def service_requests(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.service_requests(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def inject_events(handle, v):
    m = open_words(handle, k.WORDS)
    return runloop.inject_events(m, v) if v < m[k.H_NVCPUS] else NO_VCPU


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
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def trace_exit(handle, v, reason, info1, info2):
    m = open_words(handle, k.WORDS)
    return runloop.trace_exit(m, v, reason, info1, info2) if v < m[k.H_NVCPUS] else NO_VCPU


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
