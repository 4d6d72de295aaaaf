"""A posted-interrupt descriptor's life: which pCPU its notifications go to, and which vector they carry there.

Models: vmx_vcpu_pi_load, vmx_vcpu_pi_put, pi_enable_wakeup_handler, pi_wakeup_handler, pi_has_pending_interrupt,
pi_pre_block and pi_post_block (up to 5.15), and the hardware on both ends: a device (VT-d) or a CPU with IPI
virtualisation that posts, the target's CPU that takes a notification. Posting by software and PIR to IRR by software
are pid.py's. Not modelled: xAPIC hosts (NDST holds a host x2APIC id, which is the pCPU's number), nested descriptors.
Spec: SDM vol. 3C "Posted-Interrupt Processing", VT-d "Interrupt Posting".

Devices and CPUs set ON at any time, so whoever changes the control word exchanges it as a whole and begins again when
it was not what he had read. SN is cleared before PIR is read: a device that still saw SN has set its bit by then, and
load makes an ON of it. NV becomes the wake-up vector before ON is read: an earlier notification went to a vector that
wakes nobody, and put makes up for it with a wake-up vector to its own pCPU.
"""

from ..jit.atomics import fence, load_acquire, store_release
from ..jit.declare import ctz, inlined, kernel, msb, umax
from . import typed as k
from .pid import posted_words
from .shared import clear_bits_first, clear_word_bits, hot, or_word, own, replace_if, take, tell, vec, wake

INTR_INFO_VALID = k.U(1 << 31)


@kernel("u8(words)")
def enabled(m):
    """enable_apicv of kvm_intel: the machine has descriptors, whatever inhibits APICv at the moment."""
    return k.ONE if m[k.H_CONFIG] & (k.CONFIG_SVM | k.CONFIG_APICV) == k.CONFIG_APICV else k.ZERO


@kernel("u8(words, u8)")
def control(m, v):
    """Word index of a descriptor's control word."""
    return hot(m, v) + k.PID_CONTROL_WORD


@kernel("u8(words, u8)")
def publish(m, v):
    """The end of vmx_vcpu_create: the new vCPU's entry in the PID-pointer table of IPI virtualisation.

    An entry is the descriptor's physical address, here its offset in the machine's memory, with bit 0 for valid. It
    stays for ever: unlike the APIC map it knows nothing of modes, ids that a guest changed, or disabled APICs.
    """
    if enabled(m) and m[k.H_CONFIG] & k.CONFIG_IPIV:
        address = hot(m, v) << k.U(3)
        store_release(m, k.PID_TABLE + m[own(m, v) + k.K_VCPU_ID], address | k.PID_POINTER_VALID)
    return k.ZERO


@kernel("u8(words, u8)")
def has_posted(m, v):
    """Whether PIR holds anything."""
    pid = hot(m, v) + k.PID_PIR
    return k.ONE if m[pid] | m[pid + k.ONE] | m[pid + k.U(2)] | m[pid + k.U(3)] else k.ZERO


@kernel("u8(words, u8)")
def has_pending(m, v):
    """pi_has_pending_interrupt: ON, or a vector that was posted in silence."""
    word = load_acquire(m, control(m, v))
    if word & k.PID_ON:
        return k.ONE
    return has_posted(m, v) if word & k.PID_SN else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _exchange(m, at, fields, value):
    """Give some fields of a control word a value, all at once; the word as it is then."""
    old = load_acquire(m, at)
    while True:
        new = old & ~fields | value
        was = replace_if(m, at, old, new)
        if was == old:
            return new
        old = was


# ------------------------------------------------------------------------------------------------- the host's scheduler


@kernel("u8(words, u8, u8)")
def load(m, v, cpu):
    """vmx_vcpu_pi_load: notifications go to this pCPU, as 0xF2, and devices may send them.

    A vCPU that comes back to its pCPU, and did not block, needs SN cleared only. KVM tells by vcpu->cpu; NDST, which
    every other load sets, says the same.
    """
    if not enabled(m):
        return k.ZERO
    at = control(m, v)
    ndst = (cpu & k.LOW32) << k.PID_NDST_SHIFT
    old = load_acquire(m, at)
    if m[k.H_RULES] & k.R_NV_BEFORE_BLOCKING:
        return _load_up_to_5_15(m, v, ndst, old)
    if old & k.PID_NV != k.POSTED_INTR_WAKEUP_VECTOR << k.PID_NV_SHIFT and old & k.PID_NDST == ndst:
        if not clear_word_bits(m, at, k.PID_SN) & k.PID_SN:
            return k.ZERO
    else:
        m[own(m, v) + k.K_WAKEUP_CPU] = k.ZERO
        value = ndst | k.POSTED_INTR_VECTOR << k.PID_NV_SHIFT
        _exchange(m, at, k.PID_NDST | k.PID_NV | k.PID_SN, value)
    fence()
    if has_posted(m, v):
        or_word(m, at, k.PID_ON)
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _load_up_to_5_15(m, v, ndst, old):
    """The same where NV is not load's business: only SN and, unless the vCPU has blocked, NDST."""
    at = control(m, v)
    same = old & k.PID_NDST == ndst
    if same and not old & k.PID_SN:
        return k.ZERO
    if same or old & k.PID_NV == k.POSTED_INTR_WAKEUP_VECTOR << k.PID_NV_SHIFT:
        clear_word_bits(m, at, k.PID_SN)
    else:
        _exchange(m, at, k.PID_NDST | k.PID_SN, ndst)
    fence()
    if has_posted(m, v):
        or_word(m, at, k.PID_ON)
    return k.ZERO


@kernel("u8(words, u8)")
def interrupt_blocked(m, v):
    """vmx_interrupt_blocked: an interrupt would not be taken now. One that makes L2 exit to L1 always would."""
    row = own(m, v)
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2 and m[row + k.K_L1_WANTS_EXIT]:
        return k.ZERO
    return k.ONE if m[row + k.K_SHADOW] or not m[row + k.K_RFLAGS] & k.RFLAGS_IF else k.ZERO


@kernel("u8(words, u8, u8)")
def put(m, v, blocking):
    """vmx_vcpu_pi_put, where devices or CPUs can post: the effect code NOTIFY, or 0.

    A vCPU that blocks for an interrupt goes on its pCPU's wake-up list and has notifications sent as 0xF1; any other
    one will look at PIR when it is loaded, so they are suppressed; up to 6.16 only where the thread was preempted, be
    it on its way to sleep. NOTIFY: ON was set already; the host sends 0xF1 to the pCPU it runs on.
    """
    posts = k.CONFIG_IPIV | k.CONFIG_VTD_PI
    if m[k.H_RULES] & k.R_NV_BEFORE_BLOCKING:
        blocking = k.ZERO
        posts = k.CONFIG_VTD_PI
    if not enabled(m) or not m[k.H_CONFIG] & posts:
        return k.ZERO
    at = control(m, v)
    row = own(m, v)
    if m[k.H_RULES] & k.R_SN_ON_EVERY_PUT:
        blocking = k.ZERO if m[row + k.K_PREEMPTED] else blocking
        suppress = k.ONE
    else:
        suppress = m[row + k.K_PREEMPTED]
    code = k.ZERO
    if blocking and not interrupt_blocked(m, v):
        suppress = m[row + k.K_PREEMPTED]
        m[row + k.K_WAKEUP_CPU] = (load_acquire(m, at) >> k.PID_NDST_SHIFT) + k.ONE
        if _exchange(m, at, k.PID_NV, k.POSTED_INTR_WAKEUP_VECTOR << k.PID_NV_SHIFT) & k.PID_ON:
            code = k.EFFECT_NOTIFY_CODE
    if suppress:
        or_word(m, at, k.PID_SN)
    return code


@kernel("u8(words, u8)")
def pre_block(m, v):
    """pi_pre_block, of kernels that have the wake-up vector set before the thread blocks: 1 where it must not.

    An interrupt that was posted already keeps it awake, even where the guest would not take it.
    """
    row = own(m, v)
    if not m[k.H_RULES] & k.R_NV_BEFORE_BLOCKING or not enabled(m) or not m[k.H_CONFIG] & k.CONFIG_VTD_PI:
        return k.ZERO
    if m[row + k.K_WAKEUP_CPU] or (not m[k.H_RULES] & k.R_NV_WHATEVER_IF and interrupt_blocked(m, v)):
        return k.ZERO
    cpu = m[row + k.K_CPU] & k.LOW32
    m[row + k.K_WAKEUP_CPU] = cpu + k.ONE
    value = cpu << k.PID_NDST_SHIFT | k.POSTED_INTR_WAKEUP_VECTOR << k.PID_NV_SHIFT
    if not _exchange(m, control(m, v), k.PID_NDST | k.PID_NV, value) & k.PID_ON:
        return k.ZERO
    post_block(m, v)
    return k.ONE


@kernel("u8(words, u8)")
def post_block(m, v):
    """pi_post_block, behind the sleep of the same kernels."""
    row = own(m, v)
    if not m[row + k.K_WAKEUP_CPU] or not m[k.H_RULES] & k.R_NV_BEFORE_BLOCKING:
        return k.ZERO
    m[row + k.K_WAKEUP_CPU] = k.ZERO
    value = (m[row + k.K_CPU] & k.LOW32) << k.PID_NDST_SHIFT | k.POSTED_INTR_VECTOR << k.PID_NV_SHIFT
    return _exchange(m, control(m, v), k.PID_NDST | k.PID_NV, value)


@kernel("u8(words, u8, u8)")
def wake_next(m, cpu, first):
    """One step of pi_wakeup_handler: wake the next vCPU on this pCPU's list that has ON and sleeps; index or NONE.

    The list is searched from index ``first`` on; the order in which KVM walks it cannot be told afterwards.
    """
    linked = (cpu & k.LOW32) + k.ONE
    n = m[k.H_NVCPUS]
    if first >= n:
        return k.NONE  # range(first, n) would count from a negative number where bit 63 is set
    for i in range(first, n):
        v = k.U(i)
        if load_acquire(m, own(m, v) + k.K_WAKEUP_CPU) != linked:
            continue
        if load_acquire(m, control(m, v)) & k.PID_ON and wake(m, v):
            return v
    return k.NONE


@kernel("u8(words, u8, u8)")
def wakeup(m, me, cpu):
    """pi_wakeup_handler: the host took 0xF1 on this pCPU. Effect code WAKE if anybody slept."""
    code = k.ZERO
    v = wake_next(m, cpu, k.ZERO)
    while v != k.NONE:
        code = tell(m, me, v, k.EF_WAKE << k.CODE_EFFECTS_SHIFT)
        v = wake_next(m, cpu, v + k.ONE)
    return code


@kernel("u8(words, u8, u8)")
def external_interrupt(m, v, intr_info):
    """handle_external_interrupt_irqoff of a vCPU's exit: the host's own handlers of posted-interrupt vectors.

    0xF1 wakes whoever blocks on this pCPU, which is the one that the vCPU's descriptor names while it is loaded. 0xF2
    does nothing in the host, other vectors are none of KVM's business.
    """
    if intr_info & INTR_INFO_VALID and intr_info & k.U(0xFF) == k.POSTED_INTR_WAKEUP_VECTOR:
        return wakeup(m, v, load_acquire(m, control(m, v)) >> k.PID_NDST_SHIFT)
    return k.ZERO


# --------------------------------------------------------------------------------------------------------- the hardware


@kernel("u8(words, u8, u8)")
def hardware_post(m, v, vector):
    """A device or a CPU posts: the control word as it left it when a notification is due, else 0.

    The notification is the word's NV, to the pCPU that its NDST names: 0xF2, or 0xF1 while the vCPU blocks. Unlike
    software, hardware obeys SN, and does not stop at a PIR bit that was set already.
    """
    or_word(m, hot(m, v) + k.PID_PIR + (vector >> k.U(6)), k.ONE << (vector & k.U(63)))
    fence()
    at = control(m, v)
    old = load_acquire(m, at)
    while not old & (k.PID_ON | k.PID_SN):
        was = replace_if(m, at, old, old | k.PID_ON)
        if was == old:
            return old | k.PID_ON
        old = was
    return k.ZERO


@inlined
@kernel("u8(words, u8)")
def process_notification(m, v):
    """0xF2 arrives while the guest runs: PIR to IRR without an exit. 1 when the CPU moved something.

    0 when nothing was posted, or the guest does not run and the host's handler got it.

    RVI never goes down here, not even when ON was set over an empty PIR.
    """
    pid = hot(m, v)
    if not enabled(m) or m[pid + k.HOT_FLAGS] & (k.FLAG_APICV | k.FLAG_L2) != k.FLAG_APICV:
        return k.ZERO
    if m[pid + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE:
        return k.ZERO
    clear_bits_first(m, control(m, v), k.PID_ON)
    irr = vec(m, v) + k.VEC_IRR
    rvi = vec(m, v) + k.VEC_RVI
    words = posted_words(m, v)
    moved = k.ONE if words else k.ZERO
    while words:
        w = ctz(words)
        words = words & (words - k.ONE)
        bits = take(m, pid + k.PID_PIR + w)
        or_word(m, irr + w, bits)
        m[rvi] = umax(m[rvi], (w << k.U(6)) | msb(bits))
    return moved
