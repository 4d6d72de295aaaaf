"""A vCPU's thread on and off a pCPU.

Models: kvm_arch_vcpu_load and kvm_arch_vcpu_put as far as interrupts go. What they do to descriptors (pi.py) and AVIC's
tables (avictable.py) decides whether senders have to wake or to notify. Not modelled: the short vcpu_load of other
ioctls than KVM_RUN.
"""

from ..jit.declare import kernel
from . import avictable, pi
from . import typed as k
from .clock import hv_in_use
from .shared import make_request, own
from .timer import restart


@kernel("u8(words, u8, u8)")
def vcpu_load(m, v, cpu):
    """vcpu_load, or the preempt notifier's sched_in: the vCPU's state is on this pCPU now."""
    row = own(m, v)
    moved = m[row + k.K_CPU] != cpu
    if m[row + k.K_LOADED] and not moved:
        return k.ZERO
    m[row + k.K_CPU] = cpu
    m[row + k.K_LOADED] = k.ONE
    m[row + k.K_PREEMPTED] = k.ZERO
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        avictable.load(m, v, cpu)
    else:
        pi.load(m, v, cpu)
    if moved:
        if hv_in_use(m, v):
            restart(m, v)
        make_request(m, v, k.REQ_MIGRATE_TIMER)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def vcpu_put(m, v, blocking):
    """vcpu_put, or sched_out; ``blocking``: the thread sleeps in kvm_vcpu_block. NOTIFY: see pi.put."""
    row = own(m, v)
    if not m[row + k.K_LOADED]:
        return k.ZERO
    m[row + k.K_LOADED] = k.ZERO
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        return avictable.put(m, v, blocking)
    return pi.put(m, v, blocking)
