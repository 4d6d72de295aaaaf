"""A vCPU's thread on and off a pCPU.

Models: kvm_arch_vcpu_load and kvm_arch_vcpu_put as far as interrupts go. Between KVM_RUN and the host's scheduler this
is called often, so what it does to descriptors and tables decides whether senders have to wake or to notify.
"""

from . import typed as k
from ._jit import kernel
from .shared import make_request, own
from .timer import hv_in_use, restart


@kernel("u8(words, u8, u8)")
def vcpu_load(m, v, cpu):
    """vcpu_load, or the preempt notifier's sched_in: the vCPU's state is on this pCPU now."""
    row = own(m, v)
    if m[row + k.K_LOADED] and m[row + k.K_CPU] == cpu:
        return k.ZERO
    moved = m[row + k.K_CPU] != cpu
    m[row + k.K_CPU] = cpu
    m[row + k.K_LOADED] = k.ONE
    m[row + k.K_PREEMPTED] = k.ZERO
    if moved:
        if hv_in_use(m, v):
            restart(m, v)
        make_request(m, v, k.REQ_MIGRATE_TIMER)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def vcpu_put(m, v, blocking):
    """vcpu_put, or the preempt notifier's sched_out; ``blocking``: the thread sleeps in kvm_vcpu_block."""
    row = own(m, v)
    if not m[row + k.K_LOADED]:
        return k.ZERO
    m[row + k.K_LOADED] = k.ZERO
    return k.ZERO
