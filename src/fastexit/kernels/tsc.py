"""A guest's TSC moved: IA32_TSC and IA32_TSC_ADJUST written by guest and user space, KVM_SET_TSC_KHZ.

Models: kvm_synchronize_tsc (kvm_write_tsc up to 5.8) with __kvm_synchronize_tsc, adjust_tsc_offset_guest,
kvm_set_tsc_khz. Timers that run are left alone, as KVM leaves them. H_TSC_MOVED says that somebody has moved one: where
nobody has, no timer looks at a vCPU's offset and rate. Not modelled: a host without TSC scaling, whose KVM lets a
guest's TSC catch up; an unstable host TSC; KVM_VCPU_TSC_OFFSET; masterclock and kvmclock; L2's own offset. Spec: SDM
vol. 3B 18.17.
"""

from ..jit.declare import kernel, umin
from . import typed as k
from .clock import cycles, guest_tsc, tsc_row, virtual_khz
from .shared import make_request

THOUSAND = k.U(1000)


@kernel("u8(words, u8, u8)")
def _near(m, v, value):
    """Whether a value is within a second of what the TSC that was written last has come to: then it means the same."""
    expected = m[k.TSC_LAST_WRITE] + cycles(m, v, m[k.H_NOW] - m[k.TSC_LAST_NSEC])
    second = virtual_khz(m, v) * THOUSAND
    return k.ONE if value < expected + second and value + second > expected else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _means_to_synchronise(m, v, value, host):
    """Whether a write is taken as one of several vCPUs' that are to have the same TSC.

    Later kernels take user space's first value of a VM as it is: there is nothing yet that it could have meant.
    """
    if not value and host:
        return k.ONE
    if m[k.H_RULES] & k.R_TSC_FIRST_WRITE_KEPT and not m[k.TSC_USER]:
        return k.ZERO
    return _near(m, v, value)


@kernel("u8(words, u8, u8, u8)")
def synchronize(m, v, value, host):
    """kvm_synchronize_tsc: the offset is that of the vCPUs before, if the same TSC is meant at the same frequency."""
    row = tsc_row(v)
    offset = value - (guest_tsc(m, v) - m[row + k.TSC_OFFSET])
    if _means_to_synchronise(m, v, value, host) and m[row + k.TSC_KHZ] == m[k.TSC_LAST_KHZ]:
        offset = m[k.TSC_CURRENT]
    else:
        m[k.TSC_CURRENT] = offset
    m[k.TSC_LAST_NSEC] = m[k.H_NOW]
    m[k.TSC_LAST_WRITE] = value
    m[k.TSC_LAST_KHZ] = m[row + k.TSC_KHZ]
    m[row + k.TSC_OFFSET] = offset
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def write(m, v, value, host):
    """IA32_TSC: user space's write may synchronise, a guest's moves its own TSC, and IA32_TSC_ADJUST with it.

    Up to 5.8 a guest's write synchronised too.
    """
    m[k.H_TSC_MOVED] = k.ONE
    row = tsc_row(v)
    was = m[row + k.TSC_OFFSET]
    if host:
        synchronize(m, v, value, k.ONE)
        m[k.TSC_USER] = k.ONE
        return k.ZERO
    if m[k.H_RULES] & k.R_TSC_SYNCED_BY_GUEST:
        synchronize(m, v, value, k.ZERO)
    else:
        m[row + k.TSC_OFFSET] = was + (value - guest_tsc(m, v))
    m[row + k.TSC_ADJUST] = m[row + k.TSC_ADJUST] + (m[row + k.TSC_OFFSET] - was)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def write_adjust(m, v, value, host):
    """IA32_TSC_ADJUST: the guest's write moves its TSC by the difference; user space's only says what is read."""
    row = tsc_row(v)
    if not host:
        m[k.H_TSC_MOVED] = k.ONE
        m[row + k.TSC_OFFSET] = m[row + k.TSC_OFFSET] + (value - m[row + k.TSC_ADJUST])
        make_request(m, v, k.REQ_CLOCK_UPDATE)
    m[row + k.TSC_ADJUST] = value
    return k.ZERO


@kernel("u8(words, u8, u8)")
def set_khz(m, v, khz):
    """kvm_set_tsc_khz: CODE_GP for EINVAL. Within 250 ppm of the host's frequency the TSC is not scaled."""
    host = m[k.H_TSC_KHZ]
    khz = khz if khz else host
    most = host * (k.TSC_MOST_SVM if m[k.H_CONFIG] & k.CONFIG_SVM else k.TSC_MOST_VMX) - k.ONE
    if khz >= umin(most, k.TSC_MOST_KHZ + k.ONE):
        return k.CODE_GP
    m[k.H_TSC_MOVED] = k.ONE
    million = k.U(1_000_000)
    low = host * (million - k.TSC_TOLERANCE_PPM) // million
    high = host * (million + k.TSC_TOLERANCE_PPM) // million
    m[tsc_row(v) + k.TSC_KHZ] = khz ^ host
    m[tsc_row(v) + k.TSC_RATE] = khz ^ host if khz < low or khz > high else k.ZERO
    return k.ZERO
