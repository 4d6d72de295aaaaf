"""The synthetic interrupt controller of one vCPU: its MSRs, and how its sources raise interrupts.

Models: synic_set_msr, synic_get_msr, synic_set_sint, synic_update_vector, synic_exit, synic_set_irq,
kvm_hv_synic_set_irq, kvm_hv_activate_synic. KVM stores SCONTROL and never looks at it; SIEFP's page is the guest's and
user space's alone. Spec: TLFS, "Virtual Interrupt Controller".

Differs by generation: up to 5.10 the controller itself inhibits APICv for good; later a SINT with auto-EOI does, for as
long as any vCPU has one.
"""

from ..jit.declare import kernel
from . import guestmemory
from . import typed as k
from .inhibit import change, update_vcpu
from .ipi import accept
from .shared import clear_request, emit, hv, make_request, own, replace_if, vp_index
from .sint import notify_acked, vector_of


@kernel("u8(words, u8)")
def active(m, v):
    return m[hv(m, v) + k.HV_SYNIC] & k.SYNIC_ACTIVE


@kernel("u8(words, u8, u8)")
def activate(m, v, keeps):
    """kvm_hv_activate_synic: KVM_CAP_HYPERV_SYNIC, or SYNIC2, which keeps what is in the guest's pages. Effect code.

    Where that inhibits APICv, this vCPU's goes off at once, the others' at their next entry: kvm_request_apicv_update.
    """
    row = hv(m, v)
    m[row + k.HV_SYNIC] = k.SYNIC_ACTIVE | (k.SYNIC_KEEPS_PAGES if keeps else k.ZERO)
    m[row + k.HV_SCONTROL] = k.HV_SYNIC_ENABLED
    if not m[k.H_HYPERV_RULES] & k.HVR_SYNIC_INHIBITS:
        return k.ZERO
    effects = change(m, v, k.INHIBIT_HYPERV, k.ONE)  # nothing without inhibits, where it is this vCPU's alone
    clear_request(m, v, k.REQ_APICV_UPDATE)
    update_vcpu(m, v)
    return effects


# ------------------------------------------------------------------------------------------------------------- sources


@kernel("u8(words, u8)")
def _uses_auto_eoi(m, v):
    at = hv(m, v) + k.HV_AUTO_EOI
    return k.ONE if m[at] | m[at + k.ONE] | m[at + k.U(2)] | m[at + k.U(3)] else k.ZERO


@kernel("u8(words, u8, u8)")
def _count_auto_eoi(m, v, on):
    """One vCPU more or less uses auto-EOI; the inhibit follows the count. Effect code."""
    while True:
        old = m[k.H_HV_AUTO_EOI_VCPUS]
        new = old + k.ONE if on else old - k.ONE
        if replace_if(m, k.H_HV_AUTO_EOI_VCPUS, old, new) == old:
            break
    return change(m, v, k.INHIBIT_HYPERV, k.ONE if new else k.ZERO)


@kernel("u8(words, u8, u8)")
def _update_vector(m, v, vector):
    """synic_update_vector: whether any SINT has the vector, and any with auto-EOI. Effect code of the inhibit."""
    if vector < k.HV_LOWEST_VECTOR:
        return k.ZERO
    row = hv(m, v)
    bit = k.ONE << (vector & k.U(63))
    has, ends = k.ZERO, k.ZERO
    for i in range(k.SINTS):
        if vector_of(m, v, k.U(i)) == vector:
            has = bit
            if m[row + k.HV_SINT + k.U(i)] & k.HV_SINT_AUTO_EOI:
                ends = bit
    used = _uses_auto_eoi(m, v)
    at = row + k.HV_CONNECTED + (vector >> k.U(6))
    m[at] = (m[at] & ~bit) | has
    at = row + k.HV_AUTO_EOI + (vector >> k.U(6))
    m[at] = (m[at] & ~bit) | ends
    uses = _uses_auto_eoi(m, v)
    if used == uses or m[k.H_HYPERV_RULES] & k.HVR_SYNIC_INHIBITS:
        return k.ZERO
    return _count_auto_eoi(m, v, uses)


@kernel("u8(words, u8, u8, u8, u8)")
def _set_sint(m, v, sint, value, host):
    """synic_set_sint. The old vector is looked at first; the IOAPIC is scanned for the EOIs that are wanted now."""
    vector = value & k.HV_SINT_VECTOR
    if vector < k.HV_LOWEST_VECTOR and not host and not value & k.HV_SINT_MASKED:
        return k.CODE_GP
    at = hv(m, v) + k.HV_SINT + sint
    old = m[at] & k.HV_SINT_VECTOR
    m[at] = value ^ k.HV_SINT_MASKED
    effects = _update_vector(m, v, old)
    effects = effects | _update_vector(m, v, vector)
    make_request(m, v, k.REQ_SCAN_IOAPIC)
    return effects


# ---------------------------------------------------------------------------------------------------------------- MSRs


@kernel("u8(words, u8, u8)")
def _exit(m, v, msr):
    """synic_exit: user space is told at the next entry; run->hyperv is as it is now."""
    row = hv(m, v)
    m[row + k.HV_EXIT_TYPE] = k.HVEXIT_SYNIC
    m[row + k.HV_EXIT_MSR] = msr
    m[row + k.HV_EXIT_CONTROL] = m[row + k.HV_SCONTROL]
    m[row + k.HV_EXIT_EVT_PAGE] = m[row + k.HV_SIEFP]
    m[row + k.HV_EXIT_MSG_PAGE] = m[row + k.HV_SIMP]
    make_request(m, v, k.REQ_HV_EXIT)
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def _set_page(m, v, msr, value, host):
    """SIEFP or SIMP: a guest's page is zeroed when it is enabled, unless user space took SYNIC2."""
    row = hv(m, v)
    if value & k.HV_PAGE_ENABLED and not host and not m[row + k.HV_SYNIC] & k.SYNIC_KEEPS_PAGES:
        page = value >> k.HV_PAGE_SHIFT << k.HV_PAGE_SHIFT
        if not guestmemory.reaches(m, page, k.APIC_PAGE_BYTES):
            return k.CODE_GP
        guestmemory.clear(m, page, k.APIC_PAGE_BYTES)
    m[row + (k.HV_SIEFP if msr == k.MSR_HV_SIEFP else k.HV_SIMP)] = value
    return k.ZERO if host else _exit(m, v, msr)


@kernel("u8(words, u8, u8, u8, u8)")
def set_msr(m, v, msr, value, host):
    """synic_set_msr: the trace line comes ahead of a refusal, but for those of an inactive controller."""
    if not active(m, v) and (not host or value):
        return k.CODE_GP
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_HV_SYNIC_SET_MSR, v, msr, value, host)
    row = hv(m, v)
    if msr >= k.MSR_HV_SINT0 and msr <= k.MSR_HV_SINT15:
        return _set_sint(m, v, msr - k.MSR_HV_SINT0, value, host)
    if msr == k.MSR_HV_SCONTROL:
        m[row + k.HV_SCONTROL] = value
        return k.ZERO if host else _exit(m, v, msr)
    if msr == k.MSR_HV_SVERSION:
        if not host:
            return k.CODE_GP
        m[row + k.HV_SVERSION] = value ^ k.ONE
        return k.ZERO
    if msr == k.MSR_HV_SIEFP or msr == k.MSR_HV_SIMP:
        return _set_page(m, v, msr, value, host)
    if msr == k.MSR_HV_EOM and active(m, v):
        for i in range(k.SINTS):
            notify_acked(m, v, k.U(i))
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def get_msr(m, v, msr, host):
    """synic_get_msr: value in K_MSR_DATA."""
    if not active(m, v) and not host:
        return k.CODE_GP
    row = hv(m, v)
    value = k.ZERO
    if msr >= k.MSR_HV_SINT0 and msr <= k.MSR_HV_SINT15:
        value = m[row + k.HV_SINT + (msr - k.MSR_HV_SINT0)] ^ k.HV_SINT_MASKED
    elif msr == k.MSR_HV_SCONTROL:
        value = m[row + k.HV_SCONTROL]
    elif msr == k.MSR_HV_SVERSION:
        value = m[row + k.HV_SVERSION] ^ k.ONE
    elif msr == k.MSR_HV_SIEFP:
        value = m[row + k.HV_SIEFP]
    elif msr == k.MSR_HV_SIMP:
        value = m[row + k.HV_SIMP]
    m[own(m, v) + k.K_MSR_DATA] = value
    return k.ZERO


# ---------------------------------------------------------------------------------------------------------- interrupts


@kernel("u8(words, u8, u8, u8)")
def raise_sint(m, v, sint, me):
    """synic_set_irq: a Fixed edge interrupt for the vCPU itself. Delivery code, or NOBODY for a SINT that has none."""
    if sint >= k.SINTS:
        return k.CODE_ACCEPTED_NONE
    vector = vector_of(m, v, sint)
    if vector == k.NONE:
        return k.CODE_ACCEPTED_NONE
    code = accept(m, v, vector, me)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        accepted = (code & k.CODE_ACCEPTED_NONE) >> k.CODE_ACCEPTED_SHIFT
        emit(m, k.TP_HV_SYNIC_SET_IRQ, v, sint, vector, accepted)
    return code


@kernel("u8(words, u8, u8)")
def set_irq(m, v, sint):
    """The interrupt behind a message of the vCPU's own: 0, -ENOENT for a masked SINT, -EFAULT where it is not taken."""
    code = raise_sint(m, v, sint, v) & k.CODE_ACCEPTED_NONE
    if code == k.CODE_ACCEPTED_NONE:
        return ~k.ENOENT + k.ONE
    return k.ZERO if code else ~k.EFAULT + k.ONE


@kernel("u8(words, u8)")
def _vcpu_of(m, wanted):
    """get_vcpu_by_vpidx: the vCPU with that creation index if its VP index is still the same, else the first that has
    it; NONE without one.
    """
    if wanted >= m[k.H_HV_VP_INDICES]:
        return k.NONE
    n = m[k.H_NVCPUS]
    if wanted < n and vp_index(m, wanted) == wanted:
        return wanted
    for i in range(n):
        if vp_index(m, k.U(i)) == wanted:
            return k.U(i)
    return k.NONE


@kernel("u8(words, u8, u8, u8, u8)")
def set_line(m, level, wanted, sint, me):
    """kvm_hv_set_sint, the handler of an hv_sint route: delivery code, NOBODY for any error.

    A level of 0 is one, too: a SINT has no level.
    """
    if not level:
        return k.CODE_ACCEPTED_NONE
    v = _vcpu_of(m, wanted)
    if v == k.NONE or not active(m, v):
        return k.CODE_ACCEPTED_NONE
    return raise_sint(m, v, sint, me)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def irq_line(m, gsi, level, wanted, sint, me):
    """KVM_IRQ_LINE of a GSI with one hv_sint route, in the table or not: delivery code, NOBODY for errors."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_SET_IRQ, me, gsi, level, k.ZERO)
    return set_line(m, level, wanted, sint, me)
