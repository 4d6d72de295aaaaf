"""What the C door needs besides the entries that Python calls: its hottest exit, and what vCPU ioctls do around theirs.

Models: KVM_RUN as user space calls it, a signal that takes a vCPU out of KVM_RUN, RESET and INIT by user space. The
Python dispatcher has the same steps in methods; a test compares both doors.
"""

from ..jit.atomics import load_acquire
from ..jit.declare import kernel
from . import typed as k
from .batch import behind_unicast, leave_guest, to_user, vcpu_run
from .events import reset_vcpu_init
from .halt import set_mp_state
from .lapicstate import reset
from .shared import clear_word_bits, hot, own
from .steps import begin_run, loop_tail, return_to_user, wake_up
from .unicast import again, possible, send


@kernel("u8(words, u8, u8)")
def ipi(m, v, icr):
    """An x2APIC ICR write up to the guest again: its outcome code, or 0 with nothing touched."""
    if not possible(m):
        return k.ZERO
    code = send(m, v, icr)
    if not code or again(m, v):
        return code
    return behind_unicast(m, v, code, icr)


@kernel("u8(words, u8)")
def leave(m, v):
    """Dispatcher.leave_guest: a signal takes the vCPU out of the guest, or out of its sleep, and out of KVM_RUN."""
    if load_acquire(m, hot(m, v) + k.HOT_MODE) != k.OUTSIDE_GUEST_MODE:
        leave_guest(m, v)
        loop_tail(m, v)
    elif m[own(m, v) + k.K_IN_RUN]:
        wake_up(m, v)
        if m[own(m, v) + k.K_MP_STATE] != k.MP_UNINITIALIZED:
            loop_tail(m, v)
    else:
        return k.ZERO
    return return_to_user(m, v, k.NONE, k.ZERO)


@kernel("u8(words, u8)")
def run(m, v):
    """Dispatcher.kvm_run: 0 when the vCPU is in the guest then, CODE_BLOCKED, or the USER code of a return."""
    if load_acquire(m, hot(m, v) + k.HOT_MODE) != k.OUTSIDE_GUEST_MODE:
        return k.ZERO
    user = begin_run(m, v)
    if user:
        to_user(m, v, user)
        return user
    return vcpu_run(m, v, k.ZERO)


@kernel("u8(words, u8, u8)")
def reset_vcpu(m, v, power):
    """INIT by user space, at once and whatever blocks it; with ``power`` the vCPU is as KVM_CREATE_VCPU left it."""
    leave(m, v)
    row = own(m, v)
    reset_vcpu_init(m, v)
    clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_INIT | k.PENDING_SIPI)
    if not power:
        state = k.MP_RUNNABLE if m[row + k.K_APIC_BASE] & k.APICBASE_BSP else k.MP_INIT_RECEIVED
        return set_mp_state(m, v, state)
    m[row + k.K_EXTINT] = k.ZERO
    m[row + k.K_TSC_DEADLINE] = k.ZERO
    m[row + k.K_HV_DEADLINE] = k.NONE
    reset(m, v, k.ZERO)
    return set_mp_state(m, v, k.MP_RUNNABLE if m[row + k.K_VCPU_ID] == m[k.H_BSP_ID] else k.MP_UNINITIALIZED)
