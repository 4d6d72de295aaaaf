"""A vCPU's first moments: kvm_arch_vcpu_create as far as APIC state goes."""

from ..jit.atomics import store_release
from ..jit.declare import kernel
from . import avictable, tsc
from . import typed as k
from .apicmap import mark_dirty, recalculate
from .avictable import addressable
from .inhibit import begin
from .lapicstate import reset
from .pi import publish
from .shared import hot, make_request, own


@kernel("u8(words, u8)")
def create(m, vcpu_id):
    """A new vCPU after the existing ones: its index.

    Its own reset rebuilds the map before other vCPUs can see it, so it is missing from the map until something else
    makes the map dirty.
    """
    v = m[k.H_NVCPUS]
    row = own(m, v)
    pid = hot(m, v)
    m[row + k.K_VCPU_ID] = vcpu_id
    m[pid + k.PID_CONTROL_WORD] = k.PID_SN | (k.POSTED_INTR_VECTOR << k.PID_NV_SHIFT)
    m[row + k.K_HRTIMER] = k.NONE
    m[row + k.K_HV_DEADLINE] = k.NONE
    m[row + k.K_TIMER_ADVANCE] = m[k.H_TIMER_ADVANCE_NS]
    m[row + k.K_MP_STATE] = k.MP_RUNNABLE if vcpu_id == m[k.H_BSP_ID] else k.MP_UNINITIALIZED
    m[row + k.K_RFLAGS] = k.RFLAGS_FIXED
    m[row + k.K_RIP] = k.U(0xFFF0)
    m[row + k.K_CS] = k.U(0xF000)
    m[row + k.K_HFLAGS] = k.HF_REAL_MODE
    m[row + k.K_L1_WANTS_EXIT] = k.ONE
    m[row + k.K_DIVIDE] = k.U(2)
    tsc.synchronize(m, v, k.ZERO, k.ONE)
    publish(m, v)
    m[row + k.K_CPU] = v
    # Enabled from the start, as kvm_create_lapic stuffs it: the RESET below then changes no mode.
    m[row + k.K_APIC_BASE] = k.APICBASE_EN
    begin(m, v)
    if addressable(m, v):
        avictable.create(m, v)
    reset(m, v, k.ZERO)
    make_request(m, v, k.REQ_EVENT)
    avictable.init_vmcb(m, v)
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV and m[k.H_CONFIG] & k.CONFIG_SVM:
        m[hot(m, v) + k.HOT_FLAGS] = m[hot(m, v) + k.HOT_FLAGS] | k.FLAG_CR8_FREE  # a VMCB begins with no intercepts
    store_release(m, k.H_NVCPUS, v + k.ONE)
    return v


@kernel("u8(words, u8)")
def refused_by_avic(m, vcpu_id):
    """avic_init_backing_page's EINVAL, ahead of anything that others could see."""
    if not m[k.H_RULES] & k.R_AVIC_ID_REFUSED or not avictable.in_use(m):
        return k.ZERO
    return k.ONE if vcpu_id > avictable.max_id(m) else k.ZERO


@kernel("u8(words)")
def refuse(m):
    """KVM_CREATE_VCPU of an id that is taken: known only after the new vCPU's reset, which has rebuilt the map."""
    mark_dirty(m)
    return recalculate(m, k.HOST)
