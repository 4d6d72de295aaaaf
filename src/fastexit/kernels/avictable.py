"""AVIC's two tables: who is who, who runs where.

Models: avic_init_backing_page, avic_vcpu_load, avic_vcpu_put, avic_refresh_virtual_apic_mode, avic_handle_ldr_update,
avic_handle_dfr_update, avic_handle_apic_id_update (up to 5.15). The physical table has a word a vCPU id: the pCPU, a
valid bit, IsRunning, and the backing page, whose frame is made up (AVIC_FIRST_PAGE_FRAME + vCPU index), since a
register page here has no physical address. The logical table maps xAPIC logical ids to physical ones; x2AVIC derives
those and does not look. Not modelled: the IOMMU. Spec: APM vol. 2 15.29.

Who writes: the vCPU's own thread, one plain store for the physical entry; two logical entries share a word, so those
are changed atomically.
"""

from ..jit.declare import ctz, kernel
from . import typed as k
from .lapicreg import reg
from .shared import clear_word_bits, hot, or_word, own


@kernel("u8(words)")
def in_use(m):
    """Whether the machine has AVIC at all (enable_apicv on SVM)."""
    wanted = k.CONFIG_SVM | k.CONFIG_APICV
    return k.ONE if m[k.H_CONFIG] & wanted == wanted else k.ZERO


@kernel("u8(words)")
def max_id(m):
    """Highest vCPU id that the physical table can hold."""
    return k.X2AVIC_MAX_ID if m[k.H_CONFIG] & k.CONFIG_X2AVIC else k.AVIC_MAX_ID


@kernel("u8(words, u8)")
def addressable(m, v):
    """Whether a vCPU has an entry in the physical table: a machine with AVIC, an id that fits."""
    return k.ONE if in_use(m) and m[own(m, v) + k.K_VCPU_ID] <= max_id(m) else k.ZERO


@kernel("u8(words, u8)")
def x2avic_active(m, v):
    """Hardware virtualises the vCPU's x2APIC MSRs; with AVIC but without this, x2APIC mode has doorbells only."""
    flags = m[hot(m, v) + k.HOT_FLAGS]
    both = k.FLAG_APICV | k.FLAG_X2APIC
    return k.ONE if m[k.H_CONFIG] & k.CONFIG_X2AVIC and flags & both == both else k.ZERO


@kernel("u8(words, u8)")
def max_index(m, v):
    """The highest index of the physical table that the vCPU's VMCB lets hardware use."""
    return k.X2AVIC_MAX_ID if x2avic_active(m, v) else k.AVIC_MAX_ID


# ------------------------------------------------------------------------------------------------------- physical table


@kernel("u8(words, u8, u8)")
def _publish(m, v, entry):
    """The table's copy. It never has KVM's own flag, and IsRunning only where IPIs are virtualised."""
    entry = entry & ~k.AVIC_GA_LOG
    if not m[k.H_CONFIG] & k.CONFIG_IPIV:
        entry = entry & ~k.AVIC_RUNNING
    moved = m[own(m, v) + k.K_AVIC_PLACE]
    m[k.AVIC_PHYSICAL + (moved - k.ONE if moved else m[own(m, v) + k.K_VCPU_ID])] = entry
    return entry


@kernel("u8(words, u8)")
def create(m, v):
    """avic_init_backing_page: a valid entry, not running. Valid from here on, so that broadcasts find the vCPU."""
    row = own(m, v)
    m[row + k.K_AVIC_DFR] = k.DFR_FLAT
    entry = k.AVIC_VALID | ((k.AVIC_FIRST_PAGE_FRAME + v) << k.AVIC_BACKING_SHIFT)
    m[row + k.K_AVIC_ENTRY] = entry
    return _publish(m, v, entry)


@kernel("u8(words, u8, u8)")
def start_running(m, v, cpu):
    """__avic_vcpu_load: the vCPU runs on this pCPU."""
    row = own(m, v)
    if not addressable(m, v) or cpu & ~k.AVIC_HOST_ID:
        return k.ZERO
    entry = m[row + k.K_AVIC_ENTRY] & ~(k.AVIC_HOST_ID | k.AVIC_GA_LOG)
    entry = entry | cpu | k.AVIC_RUNNING
    m[row + k.K_AVIC_ENTRY] = entry
    return _publish(m, v, entry)


@kernel("u8(words, u8, u8)")
def stop_running(m, v, blocking):
    """__avic_vcpu_put: IsRunning goes, the pCPU stays, so that a doorbell on its way disturbs nobody else's pCPU.

    Before the vCPU looks at its IRR for the last time: an IPI that then finds IsRunning clear exits at its sender, one
    that found it set is in that IRR.
    """
    row = own(m, v)
    if not addressable(m, v):
        return k.ZERO
    entry = m[row + k.K_AVIC_ENTRY] & ~k.AVIC_RUNNING
    # Without IPI virtualisation the table says "not running" already and is left alone.
    if m[k.H_CONFIG] & k.CONFIG_IPIV:
        _publish(m, v, entry)
    if blocking:
        entry = entry | k.AVIC_GA_LOG
    m[row + k.K_AVIC_ENTRY] = entry
    return entry


@kernel("u8(words, u8)")
def update_id(m, v):
    """avic_handle_apic_id_update: the entry of the vCPU's own id goes to its xAPIC id; CODE_GP where that has none.

    What is at the vCPU's own id the second time is nothing, so an id that changes twice leaves no valid entry.
    """
    row = own(m, v)
    vcpu_id = m[row + k.K_VCPU_ID]
    new = reg(m, v, k.APIC_ID) >> k.U(24)
    if not m[k.H_RULES] & k.R_AVIC_OLD or not addressable(m, v) or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        return k.ZERO
    if new == vcpu_id:
        return k.ZERO
    if new > k.AVIC_MAX_ID:
        return k.CODE_GP
    entry = m[k.AVIC_PHYSICAL + vcpu_id]
    m[k.AVIC_PHYSICAL + new] = entry
    m[k.AVIC_PHYSICAL + vcpu_id] = k.ZERO
    m[row + k.K_AVIC_ENTRY] = entry
    m[row + k.K_AVIC_PLACE] = new + k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def owner(m, entry):
    """The vCPU whose page an entry has, or NONE."""
    v = ((entry & k.AVIC_BACKING) >> k.AVIC_BACKING_SHIFT) - k.AVIC_FIRST_PAGE_FRAME
    return v if v < m[k.H_NVCPUS] else k.NONE


@kernel("u8(words, u8, u8)")
def load(m, v, cpu):
    """avic_vcpu_load, by svm_vcpu_load or when the vCPU stops blocking; while it blocks, its pCPU does not matter."""
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV or m[hot(m, v) + k.HOT_BLOCKED]:
        return k.ZERO
    return start_running(m, v, cpu)


@kernel("u8(words, u8, u8)")
def put(m, v, blocking):
    """avic_vcpu_put, by svm_vcpu_put or before the vCPU blocks; nothing to do when it was not running already."""
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV or not m[own(m, v) + k.K_AVIC_ENTRY] & k.AVIC_RUNNING:
        return k.ZERO
    return stop_running(m, v, blocking)


# ------------------------------------------------------------------------------------------------------------- the VMCB


@kernel("u8(words, u8)")
def _switch_cr8(m, v):
    """avic_activate_vmcb, avic_deactivate_vmcb: CR8 writes are intercepted without AVIC and free with it; or, in older
    generations, as they were. FLAG_APICV.
    """
    at = hot(m, v) + k.HOT_FLAGS
    active = m[at] & k.FLAG_APICV
    if m[k.H_RULES] & k.R_CR8_FOLLOWS_AVIC:
        m[at] = m[at] | k.FLAG_CR8_FREE if active else m[at] & ~k.FLAG_CR8_FREE
    return active


@kernel("u8(words, u8)")
def init_vmcb(m, v):
    """init_vmcb, by the vCPU's creation and by INIT, as far as TPR goes. Behind the APIC's own reset."""
    if not m[k.H_CONFIG] & k.CONFIG_SVM:
        return k.ZERO
    if not _switch_cr8(m, v):
        m[hot(m, v) + k.HOT_FLAGS] = m[hot(m, v) + k.HOT_FLAGS] & ~k.FLAG_CR8_FREE
    if m[k.H_RULES] & k.R_V_TPR_KEPT_BY_AVIC and m[k.H_CONFIG] & k.CONFIG_APICV:
        m[own(m, v) + k.K_V_TPR] = k.ONE
    return k.ZERO


# -------------------------------------------------------------------------------------------------------- logical table


@kernel("u8(words, u8, u8)")
def logical_index(m, ldr, flat):
    """avic_get_logical_id_entry: index of an LDR's entry; NONE without a bit, in cluster 15, and with several bits. Up
    to 6.1 the lowest of these is good enough.
    """
    bits = (ldr >> k.U(24)) & k.U(0xFF)
    cluster = k.ZERO
    if not flat:
        cluster = bits >> k.U(4)
        if cluster == k.U(0xF):
            return k.NONE
        bits = bits & k.U(0xF)
    if not bits or (bits & (bits - k.ONE) and not m[k.H_RULES] & k.R_AVIC_LDR_LOOSE):
        return k.NONE
    return (cluster << k.U(2)) + ctz(bits)


@kernel("u8(words, u8)")
def logical_entry(m, index):
    """The 32-bit entry at an index."""
    return (m[k.AVIC_LOGICAL + (index >> k.ONE)] >> ((index & k.ONE) << k.U(5))) & k.LOW32


@kernel("u8(words, u8)")
def _invalidate_logical(m, v):
    """avic_invalidate_logical_id_entry: the entry that this vCPU has, by the LDR and DFR it had when it was made."""
    row = own(m, v)
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        return k.ZERO
    index = logical_index(m, m[row + k.K_AVIC_LDR], k.ONE if m[row + k.K_AVIC_DFR] == k.DFR_FLAT else k.ZERO)
    if index == k.NONE:
        return k.ZERO
    return clear_word_bits(m, k.AVIC_LOGICAL + (index >> k.ONE), k.AVIC_LOGICAL_VALID << ((index & k.ONE) << k.U(5)))


@kernel("u8(words, u8)")
def update_ldr(m, v):
    """avic_handle_ldr_update: nothing in x2APIC mode, nor when the LDR is the one that the table knows; CODE_GP where
    that is an error, which leaves the LDR unknown to the table.
    """
    row = own(m, v)
    ldr = reg(m, v, k.APIC_LDR)
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC or ldr == m[row + k.K_AVIC_LDR]:
        return k.ZERO
    _invalidate_logical(m, v)
    index = logical_index(m, ldr, k.ONE if reg(m, v, k.APIC_DFR) == k.DFR_FLAT else k.ZERO)
    if index == k.NONE and ldr and m[k.H_RULES] & k.R_AVIC_LDR_LOOSE:
        return k.CODE_GP
    m[row + k.K_AVIC_LDR] = ldr
    if index == k.NONE:
        return k.ZERO
    at = k.AVIC_LOGICAL + (index >> k.ONE)
    shift = (index & k.ONE) << k.U(5)
    clear_word_bits(m, at, k.AVIC_GUEST_ID << shift)
    or_word(m, at, ((reg(m, v, k.APIC_ID) >> k.U(24)) | k.AVIC_LOGICAL_VALID) << shift)
    return k.ZERO


@kernel("u8(words, u8)")
def update_dfr(m, v):
    """avic_handle_dfr_update: the entry goes, and comes back only with the next LDR that differs."""
    row = own(m, v)
    dfr = reg(m, v, k.APIC_DFR)
    if m[row + k.K_AVIC_DFR] == dfr:
        return k.ZERO
    _invalidate_logical(m, v)
    m[row + k.K_AVIC_DFR] = dfr
    return k.ZERO


@kernel("u8(words, u8)")
def restore(m, v):
    """avic_apicv_post_state_restore: what changed in DFR, LDR and, once, the id without a trap, if AVIC is active."""
    if addressable(m, v) and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        if update_id(m, v):
            return k.ZERO
        update_dfr(m, v)
        update_ldr(m, v)
    return k.ZERO


@kernel("u8(words, u8)")
def refresh(m, v):
    """avic_refresh_apicv_exec_ctrl: AVIC was just switched on or off for this vCPU, which is loaded and runs."""
    restore(m, v)
    _switch_cr8(m, v)
    if m[k.H_RULES] & (k.R_AVIC_OLD | k.R_APICV_AT_ENTRY) == k.R_AVIC_OLD:
        return k.ZERO  # up to 5.10 only load and put touch the entry, and only while AVIC is active
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_APICV:
        return start_running(m, v, m[own(m, v) + k.K_CPU])
    return stop_running(m, v, k.ZERO)
