"""What Python may call: every entry takes the machine's address and integers, and returns one integer.

An index that names no vCPU gives NO_VCPU and touches nothing. The address is opened here and nowhere else; kernels
below work on the words. One exit keeps the GIL, because giving it up would cost more than the exit; a batch gives it
up.
"""

from ..jit.declare import entry, kernel, open_words
from . import (
    accelerated,
    apicv,
    avic,
    batch,
    bus,
    cdoor,
    chipstate,
    clock,
    cr8,
    eoi,
    events,
    fastpath,
    halt,
    hostrow,
    hosttimers,
    hvtimer,
    hypercall,
    i8254,
    inhibit,
    instruction,
    ioapic,
    irq,
    irte,
    lapic,
    lapicstate,
    loop,
    msi,
    msr,
    pi,
    picdev,
    routes,
    sched,
    shared,
    single,
    steps,
    stimerservice,
    synic,
    tick,
    tsc,
    unicast,
    vcpu,
)
from . import typed as k

NO_VCPU = k.NONE


def _on_vcpu(name, inner, more):
    """Let Python call a kernel of one vCPU and ``more`` integers, behind a check of the vCPU's index."""
    if more == 0:

        def call(handle, v):
            m = open_words(handle, k.WORDS)
            return inner(m, v) if v < m[k.H_NVCPUS] else NO_VCPU

    elif more == 1:

        def call(handle, v, a):
            m = open_words(handle, k.WORDS)
            return inner(m, v, a) if v < m[k.H_NVCPUS] else NO_VCPU

    elif more == 2:

        def call(handle, v, a, b):
            m = open_words(handle, k.WORDS)
            return inner(m, v, a, b) if v < m[k.H_NVCPUS] else NO_VCPU

    else:

        def call(handle, v, a, b, c):
            m = open_words(handle, k.WORDS)
            return inner(m, v, a, b, c) if v < m[k.H_NVCPUS] else NO_VCPU

    call.__name__ = call.__qualname__ = name
    entry(kernel(f"u8(u8, u8{', u8' * more})", nogil=False)(call))


_ON_ONE_VCPU = {
    0: {
        "door_leave": loop.leave_guest,
        "door_run": loop.kvm_run,
        "door_smi": cdoor.smi,
        "door_rsm": cdoor.rsm,
        "out_of_guest": loop.out_of_guest,
        "due_timer_of": stimerservice.due_of,
        "hv_timer_exits": hvtimer.exits_now,
        "next_timer_of": stimerservice.next_of,
        "sync_cr8_to_lapic": cr8.sync_cr8_to_lapic,
        "come_in": loop.come_in,
        "start_run": loop.start_run,
        "tpr_below_threshold": accelerated.tpr_below_threshold,
        "deliver_pending": apicv.deliver_pending,
        "accept_events": events.accept_events,
        "inject_events": events.inject_events,
        "leave_l2": events.leave_l2,
        "leave_smm": events.leave_smm,
        "process_nmi": events.process_nmi,
        "queue_nmi": events.queue_nmi,
        "process_smi": events.process_smi,
        "take_event": events.take_event,
        "emulate_halt": halt.emulate_halt,
        "init_blocked": halt.init_blocked,
        "nested_changed": inhibit.nested_changed,
        "ack": irq.ack,
        "eoi": eoi.end,
        "pending": irq.has_interrupt,
        "complete_access": bus.complete,
        "take_pv_eoi": eoi.take_pv_eoi,
        "get_state": lapicstate.get_state,
        "set_state": lapicstate.set_state,
        "pi_has_pending": pi.has_pending,
        "process_notification": pi.process_notification,
        "begin_run": steps.begin_run,
        "block": steps.block,
        "enter": steps.enter,
        "exits_at_once": steps.exits_at_once,
        "loop_tail": steps.loop_tail,
        "pre_run": steps.pre_run,
        "service_requests": steps.service_requests,
        "vm_entry": steps.vm_entry,
        "wake_up": steps.wake_up,
        "trace_wait": tick.trace_wait,
    },
    1: {
        "door_reset": cdoor.reset_vcpu,
        "door_interrupt": cdoor.interrupt,
        "door_window": instruction.window,
        "apic_access_eoi": accelerated.access_eoi,
        "set_eoi_accelerated": accelerated.set_eoi,
        "write_nodecode": accelerated.write_nodecode,
        "apicv_cr8": apicv.move_to_cr8,
        "apicv_rdmsr": apicv.rdmsr,
        "avic_cr8": cr8.move_to_cr8,
        "avic_load": avic.load,
        "avic_put": avic.put,
        "avic_rdmsr": avic.rdmsr,
        "requeue": events.requeue,
        "set_mp_state": halt.set_mp_state,
        "irq_window": inhibit.irq_window,
        "clear_request": shared.clear_request,
        "complete_msr": msr.complete,
        "set_cr8": cr8.set_sregs_cr8,
        "set_tsc_khz": tsc.set_khz,
        "skip": msr.skip,
        "enable_synic": synic.activate,
        "external_interrupt": pi.external_interrupt,
        "pi_load": pi.load,
        "pi_put": pi.put,
        "vcpu_load": sched.vcpu_load,
        "vcpu_put": sched.vcpu_put,
        "kick": shared.kick,
        "make_request": shared.make_request,
    },
    2: {
        "apicv_mmio_read": apicv.mmio_read,
        "apicv_wrmsr": apicv.wrmsr,
        "avic_incomplete_ipi": avic.incomplete_ipi,
        "avic_mmio_read": avic.mmio_read,
        "avic_wrmsr": avic.wrmsr,
        "latch": events.latch,
        "ioapic_read": ioapic.mmio_read,
        "mmio_read": lapic.mmio_read,
        "pit_read": i8254.io_read,
        "emulate_cr8": msr.emulate_cr8,
        "emulate_rdmsr": msr.emulate_rdmsr,
        "finish_run": steps.finish_run,
        "pic_read": picdev.io_read,
    },
    3: {
        "access_to_user": bus.to_user,
        "apicv_mmio_write": apicv.mmio_write,
        "avic_mmio_write": avic.mmio_write,
        "pic_write": picdev.io_write,
        "ioapic_write": ioapic.mmio_write,
        "mmio_write": lapic.mmio_write,
        "pit_write": i8254.io_write,
        "emulate_wrmsr": msr.emulate_wrmsr,
    },
}
"""Name -> kernel, by how many integers it takes besides the vCPU's index."""

for _more, _named in _ON_ONE_VCPU.items():
    for _name, _inner in _named.items():
        _on_vcpu(_name, _inner, _more)


@kernel("u8(words, u8, u8)")
def _reenter(m, v, code):
    code = fastpath.reenter(m, v, code)
    if code & k.CODE_COMPLETION == k.COMPLETION_REENTER:
        host = shared.own(m, v)
        if m[k.H_CONFIG] & k.CONFIG_TRACE or m[host + k.K_EXPIRED_DEADLINE] or m[host + k.K_FORCE_EXIT]:
            steps.trace_reentry(m, v)
    return code


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def fast_exit(handle, msr_index, value):
    """A WRMSR exit in the vendor's run function: fast handler and re-entry; or CODE_NOT_IN_GUEST.

    The result is a code, or a short one: outcome.SHORT, CODE_ADDRESSED.

    ``handle`` has the vCPU's index in its low bits, which are 0 in a page's address: an argument less to take apart. An
    MSR of more than 32 bits is refused with nothing touched.
    """
    m = open_words(handle & ~(k.MAX_VCPUS - k.ONE), k.WORDS)
    v = handle & (k.MAX_VCPUS - k.ONE)
    if v >= m[k.H_NVCPUS]:
        return NO_VCPU
    if msr_index == k.MSR_X2APIC_ICR and unicast.possible(m):
        code = unicast.send(m, v, value)
        if code:
            if not unicast.again(m, v):
                return _reenter(m, v, code)
            return single.short(m, v, code)
    elif msr_index > k.LOW32:
        return fastpath.refuse(k.RF_MSR)
    if m[shared.hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        return k.CODE_NOT_IN_GUEST
    m[shared.own(m, v) + k.K_TARGETS] = k.ZERO
    if m[k.H_CONFIG] & (k.CONFIG_TRACE | k.CONFIG_SVM):
        svm = m[k.H_CONFIG] & k.CONFIG_SVM
        cr8.sync_cr8_to_lapic(m, v)
        if m[k.H_CONFIG] & k.CONFIG_TRACE and not loop.traces_late(m):
            reason = k.SVM_MSR if svm else k.VMX_MSR_WRITE
            steps.trace_exit(m, v, reason, k.ONE if svm else k.ZERO, k.ZERO, k.ZERO)
    return _reenter(m, v, fastpath.wrmsr(m, v, msr_index, value, k.INSN_LEN_WRMSR))


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def single_exit(handle, reason, where, info, value):
    """``handle`` as in fast_exit."""
    m = open_words(handle & ~(k.MAX_VCPUS - k.ONE), k.WORDS)
    v = handle & (k.MAX_VCPUS - k.ONE)
    return single.run(m, v, reason, where, info, value) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def single_wrmsr(handle, msr_index, value):
    """``handle`` as in fast_exit."""
    m = open_words(handle & ~(k.MAX_VCPUS - k.ONE), k.WORDS)
    v = handle & (k.MAX_VCPUS - k.ONE)
    return single.wrmsr(m, v, msr_index, value) if v < m[k.H_NVCPUS] else NO_VCPU


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
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def fast_irqoff(handle, v, msr_index, value):
    """The fast handler alone, as handle_exit_irqoff of the first generations called it."""
    m = open_words(handle, k.WORDS)
    return fastpath.wrmsr(m, v, msr_index, value, k.INSN_LEN_WRMSR) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8, u8)", nogil=False)
def operate(handle, v, reason, msr, value, info, length):
    """Do what an exit with an operation asks for; the instruction is ``length`` bytes long."""
    m = open_words(handle, k.WORDS)
    if v >= m[k.H_NVCPUS]:
        return NO_VCPU
    row = loop.find_row(m, reason, info) & k.ROW_OPERATION | length << k.ROW_LENGTH_SHIFT
    return loop.operate(m, v, row, msr, value, info)


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8, u8, u8, u8, u8)", nogil=False)
def emulate_hypercall(handle, v, rax, rbx, rcx, rdx, rsi, rdi, r8, how):
    """Which XMM registers there are, layout.XMM has; ``how`` is layout.CALL_*."""
    m = open_words(handle, k.WORDS)
    return hypercall.emulate(m, v, rax, rbx, rcx, rdx, rsi, rdi, r8, how) if v < m[k.H_NVCPUS] else NO_VCPU


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
    return msr.get_msr(m, v, msr_index, k.ONE) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def trace_exit(handle, v, reason, info1, info2, intr_info):
    m = open_words(handle, k.WORDS)
    return steps.trace_exit(m, v, reason, info1, info2, intr_info) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def emit(handle, event, v, a, b, c):
    """Append a trace record; the caller has looked whether tracing is on."""
    m = open_words(handle, k.WORDS)
    return shared.emit(m, event & k.U(0xFF), v, a, b, c) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def local_deliver(handle, v, offset, me):
    """kvm_apic_local_deliver of the LVT entry at an offset; ``me`` is the vCPU that runs here, NONE for the host."""
    m = open_words(handle, k.WORDS)
    if v >= m[k.H_NVCPUS] or offset > k.APIC_LVTERR or (me >= m[k.H_NVCPUS] and me != k.NONE):
        return NO_VCPU
    return tick.local_deliver(m, v, offset, me)


@entry
@kernel("u8(u8)", nogil=False)
def due_timer(handle):
    """An hrtimer or work for fire_timer, or NO_VCPU; its vCPU's index is in the bits below MAX_VCPUS."""
    return hosttimers.due(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def fire_timer(handle, which):
    """``which`` is what due_timer gave. Targets of what belongs to no vCPU are in the row of HOST."""
    m = open_words(handle, k.WORDS)
    number = which >> hosttimers.WHICH_SHIFT
    if which & (k.MAX_VCPUS - k.ONE) >= m[k.H_NVCPUS] or (number > k.STIMERS and number < k.HOST_TIMERS):
        return NO_VCPU
    if number >= k.HOST_TIMERS:
        m[shared.own(m, k.HOST) + k.K_TARGETS] = k.ZERO
    return hosttimers.fire(m, which, k.HOST)


@entry
@kernel("u8(u8, u8)", nogil=False)
def hv_timer_exit(handle, first):
    return hvtimer.hv_exit(open_words(handle, k.WORDS), first)


@entry
@kernel("u8(u8, u8)", nogil=False)
def run_machine_timer(handle, sender):
    """hosttimers.run_one; ``sender`` as in signal_msi."""
    m = open_words(handle, k.WORDS)
    if not k.HOST <= sender < k.SENDERS:
        return NO_VCPU
    m[shared.own(m, sender) + k.K_TARGETS] = k.ZERO
    return hosttimers.run_one(m, sender)


@entry
@kernel("u8(u8)", nogil=False)
def next_machine_timer(handle):
    return hosttimers.next_of_machine(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def advance_clock(handle, ns):
    """The host's clock is at ``ns``, or later where another thread has said so: where it is."""
    return clock.advance(open_words(handle, k.WORDS), ns)


@entry
@kernel("u8(u8)", nogil=False)
def take_host_row(handle):
    return hostrow.take_row(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def give_host_row(handle, row):
    m = open_words(handle, k.WORDS)
    return hostrow.give_row(m, row) if k.HOST <= row < k.SENDERS else NO_VCPU


@entry
@kernel("u8(u8)", nogil=False)
def next_timer(handle):
    return hosttimers.next_event(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def create_vcpu(handle, vcpu_id):
    """Index of the new vCPU; NO_VCPU when the machine is full or the id does not fit its map."""
    m = open_words(handle, k.WORDS)
    if m[k.H_NVCPUS] >= k.MAX_VCPUS or vcpu_id > k.MAX_VCPU_ID or vcpu.refused_by_avic(m, vcpu_id):
        return NO_VCPU
    return vcpu.create(m, vcpu_id)


@entry
@kernel("u8(u8)", nogil=False)
def refuse_vcpu(handle):
    return vcpu.refuse(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def signal_msi(handle, address, data, sender):
    """``sender`` is a number from HOST on that no other call uses meanwhile."""
    m = open_words(handle, k.WORDS)
    return msi.signal_msi(m, address, data, sender) if k.HOST <= sender < k.SENDERS else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def hv_sint_line(handle, gsi, level, vp_index, sint, sender):
    """KVM_IRQ_LINE of a GSI that would have an hv_sint route; ``sender`` as in signal_msi."""
    m = open_words(handle, k.WORDS)
    if not k.HOST <= sender < k.SENDERS:
        return NO_VCPU
    m[shared.own(m, sender) + k.K_TARGETS] = k.ZERO
    return synic.irq_line(m, gsi, level, vp_index, sint, sender)


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def irq_line(handle, gsi, level, line_status, sender):
    """KVM_IRQ_LINE, with ``line_status`` KVM_IRQ_LINE_STATUS; ``sender`` as in signal_msi."""
    m = open_words(handle, k.WORDS)
    return routes.irq_line(m, gsi, level, line_status, sender) if k.HOST <= sender < k.SENDERS else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def irqfd_signal(handle, gsi, resample, sender):
    """An eventfd that KVM_IRQFD has tied to a GSI was written to; ``sender`` as in signal_msi."""
    m = open_words(handle, k.WORDS)
    return routes.signal(m, gsi, resample, sender) if k.HOST <= sender < k.SENDERS else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8)", nogil=False)
def irqfd_resample(handle, gsi, on, sender):
    """A GSI has one more or less resampling irqfd, see routes.resample; ``sender`` as in signal_msi."""
    m = open_words(handle, k.WORDS)
    return routes.resample(m, gsi, on, sender) if k.HOST <= sender < k.SENDERS else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def rerouted(handle, sender):
    """The words of the routing table have changed; ``sender`` as in signal_msi."""
    m = open_words(handle, k.WORDS)
    return routes.rerouted(m, sender) if k.HOST <= sender < k.SENDERS else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def get_irqchip(handle, chip):
    """KVM_GET_IRQCHIP into H_STAGE; NO_VCPU for a chip that there is not."""
    m = open_words(handle, k.WORDS)
    return chipstate.get_irqchip(m, chip) if chip <= chipstate.IOAPIC_CHIP else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def set_irqchip(handle, chip, sender):
    """KVM_SET_IRQCHIP from H_STAGE; ``sender`` as in signal_msi. NO_VCPU for a chip that there is not."""
    m = open_words(handle, k.WORDS)
    if chip > chipstate.IOAPIC_CHIP or not k.HOST <= sender < k.SENDERS:
        return NO_VCPU
    return chipstate.set_irqchip(m, chip, sender)


@entry
@kernel("u8(u8, u8, u8)")
def first_bad(handle, exits, n):
    return batch.first_bad(open_words(handle, k.WORDS), open_words(exits, n * k.EXIT_WORDS), n)


@entry
@kernel("u8(u8, u8, u8, u8, u8)")
def run(handle, exits, outcomes, first, n):
    """Where the batch stopped. From 0 on it is checked first: with all bits turned over, the first bad exit."""
    m = open_words(handle, k.WORDS)
    records = open_words(exits, n * k.EXIT_WORDS)
    if not first:
        bad = batch.first_bad(m, records, n)
        if bad < n:
            return ~bad
    return batch.run(m, records, open_words(outcomes, n * k.OUTCOME_WORDS), first, n)


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def hardware_post(handle, v, vector):
    m = open_words(handle, k.WORDS)
    return pi.hardware_post(m, v, vector & k.ICR_VECTOR) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def pi_wake_next(handle, cpu, first):
    return pi.wake_next(open_words(handle, k.WORDS), cpu, first)


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def update_irte(handle, host_irq, gsi, address, data, was_posted):
    """The vCPU's index for posted mode, NONE for remapped mode, CODE_GP where the route itself is refused."""
    m = open_words(handle, k.WORDS)
    if msi.route_invalid(m, address):
        return k.CODE_GP
    return irte.update(m, host_irq, gsi, address, data, was_posted)


@entry
@kernel("u8(u8, u8)", nogil=False)
def create_pit(handle, speaker):
    """Effect code; targets are in the row of HOST, here and in the next three."""
    m = open_words(handle, k.WORDS)
    m[shared.own(m, k.HOST) + k.K_TARGETS] = k.ZERO
    return i8254.create(m, speaker, k.HOST)


@entry
@kernel("u8(u8, u8)", nogil=False)
def pit_reinject(handle, on):
    m = open_words(handle, k.WORDS)
    m[shared.own(m, k.HOST) + k.K_TARGETS] = k.ZERO
    return i8254.set_reinject(m, k.ONE if on else k.ZERO, k.HOST)


@entry
@kernel("u8(u8)", nogil=False)
def get_pit(handle):
    return i8254.get_state(open_words(handle, k.WORDS))


@entry
@kernel("u8(u8, u8)", nogil=False)
def set_pit(handle, with_flags):
    m = open_words(handle, k.WORDS)
    m[shared.own(m, k.HOST) + k.K_TARGETS] = k.ZERO
    return i8254.set_state(m, with_flags, k.HOST)


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def set_inhibit(handle, reason, on):
    """kvm_set_or_clear_apicv_inhibit of reason number 0..63; above there is none."""
    m = open_words(handle, k.WORDS)
    m[shared.own(m, k.HOST) + k.K_TARGETS] = k.ZERO
    return inhibit.change(m, k.HOST, k.ONE << reason, on) if reason < k.U(64) else k.ZERO


@entry
@kernel("u8(u8, u8, u8)", nogil=False)
def avic_unaccelerated(handle, v, offset):
    m = open_words(handle, k.WORDS)
    return avic.unaccelerated(m, v, offset & k.AVIC_OFFSET) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8)", nogil=False)
def door_ipi(handle, icr):
    """``handle`` as in fast_exit."""
    v = handle & (k.MAX_VCPUS - k.ONE)
    m = open_words(handle & ~(k.MAX_VCPUS - k.ONE), k.WORDS)
    return cdoor.ipi(m, v, icr) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8)", nogil=False)
def door_hypercall(handle, v, control, given, output):
    """A 64-bit guest's hypercall, whose XMM registers are in layout.XMM: an outcome code, or NO_VCPU where none is."""
    m = open_words(handle, k.WORDS)
    return cdoor.hypercall(m, v, control, given, output) if v < m[k.H_NVCPUS] else NO_VCPU


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8)", nogil=False)
def door_access(handle, v, access, where, length, value):
    """An access as the guest's CPU executes it, see instruction.execute: an outcome code, or NO_VCPU where none is."""
    m = open_words(handle, k.WORDS)
    return instruction.execute(m, v, access, where, length, value) if v < m[k.H_NVCPUS] else NO_VCPU
