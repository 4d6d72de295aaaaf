"""APICv inhibits: reasons for which a machine that has APICv does not use it for the time being.

Models: kvm_set_or_clear_apicv_inhibit, kvm_vcpu_update_apicv, required_apicv_inhibits of both vendors,
kvm_lapic_xapic_id_updated (6.1), the inhibits of the APIC map, svm_enable_irq_window; synic.py has Hyper-V's. Not
modelled: the PIT and SEV, whose reasons user space may set; apicv_update_lock, because a request that comes during an
update stays.

A reason is one bit of a word of the machine. Only when the word becomes zero or stops being zero does anything happen:
every vCPU is asked to look again, at its next entry. What a reason does not do is empty PIR: what was posted before
APICv went off is synced by the next entry, as ever.

Differs by vendor: which reasons count; in L2 AVIC is off without any reason. By generation: 5.6-5.15 know no reason
that a guest's APIC can give, but for the offer of x2APIC mode from 5.7 on, and trace only what switches APICv; up to
5.10 the running vCPU is updated at once, and nobody asks for an EVENT; 6.1 keeps a modified id inhibited for good; 7.3
counts the vCPUs whose interrupt window inhibits, and looks at the count at every change; the seed's kernel has no
inhibits. Where an id beyond AVIC's reach does not inhibit, the vCPU is refused.
"""

from ..jit.declare import ctz, kernel
from . import typed as k
from .avictable import addressable, refresh
from .irq import recount
from .lapicreg import reg
from .shared import ask_all, clear_word_bits, emit, hot, hv, make_request, or_word, own, replace_if, sent_on_the_way

EARLY = k.INHIBIT_DISABLED | k.INHIBIT_HYPERV
EARLY_SVM = k.INHIBIT_NESTED | k.INHIBIT_IRQWIN | k.INHIBIT_PIT_REINJ
LATER = k.INHIBIT_ABSENT | k.INHIBIT_BLOCKIRQ | k.INHIBIT_APIC_ID_MODIFIED | k.INHIBIT_APIC_BASE_MODIFIED


@kernel("u8(words)")
def required(m):
    """required_apicv_inhibits: the reasons that count for this vendor in this generation."""
    traits = m[k.H_TRAITS]
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    refused = m[k.H_RULES] & k.R_AVIC_ID_REFUSED
    reasons = k.INHIBIT_PHYSICAL_ID_TOO_BIG if svm and not refused else k.ZERO
    if not traits & k.T_INHIBITS:
        return reasons
    reasons = reasons | EARLY | (EARLY_SVM if svm else k.ZERO)
    if svm and m[k.H_RULES] & k.R_INHIBIT_X2APIC:
        reasons = reasons | k.INHIBIT_X2APIC
    if traits & k.T_INHIBIT_ID_BASE:
        reasons = reasons | LATER | (k.INHIBIT_SEV if svm else k.ZERO)
    if traits & k.T_INHIBIT_MAP:
        reasons = reasons | k.INHIBIT_PHYSICAL_ID_ALIASED | (k.INHIBIT_LOGICAL_ID_ALIASED if svm else k.ZERO)
    return reasons


@kernel("u8(words, u8, u8, u8, u8)")
def _trace(m, reason, on, inhibits, switches):
    """kvm_apicv_inhibit_changed; kvm_apicv_update_request, which only what switches APICv has."""
    traced = k.T_INHIBITS if switches else k.T_INHIBIT_ID_BASE
    if m[k.H_CONFIG] & k.CONFIG_TRACE and m[k.H_TRAITS] & traced:
        emit(m, k.TP_APICV_INHIBIT_CHANGED, k.NONE, ctz(reason), k.ONE if on else k.ZERO, inhibits)
    return k.ZERO


@kernel("u8(words, u8)")
def _count(m, windows):
    """IRQWIN as the count of windows has it."""
    return or_word(m, k.H_INHIBITS, windows) if windows else clear_word_bits(m, k.H_INHIBITS, k.INHIBIT_IRQWIN)


@kernel("u8(words, u8, u8, u8)")
def change(m, me, reason, on):
    """kvm_set_or_clear_apicv_inhibit of a reason's bit: Effect code. Traced even when nothing changes, since 6.1."""
    if not m[k.H_CONFIG] & k.CONFIG_APICV or not required(m) & reason:
        return k.ZERO
    if on:
        old = or_word(m, k.H_INHIBITS, reason)
        new = old | reason
    else:
        old = clear_word_bits(m, k.H_INHIBITS, reason)
        new = old & ~reason
    counted = m[k.H_RULES] & k.R_IRQWIN_COUNTED and reason != k.INHIBIT_IRQWIN
    final = new
    if counted:
        final = new | k.INHIBIT_IRQWIN if m[k.H_IRQ_WINDOW_VCPUS] else new & ~k.INHIBIT_IRQWIN
    switches = (old != k.ZERO) != (final != k.ZERO)
    _trace(m, reason, on, new, switches)
    if counted:
        _count(m, final & k.INHIBIT_IRQWIN)
        _trace(m, k.INHIBIT_IRQWIN, final & k.INHIBIT_IRQWIN, final, switches)
    return ask_all(m, k.REQ_APICV_UPDATE, me) if switches else k.ZERO


@kernel("u8(words, u8)")
def activated(m, v):
    """kvm_vcpu_apicv_activated, and an APIC that is not disabled, which 6.1 began to ask for."""
    flags = m[hot(m, v) + k.HOT_FLAGS]
    if m[k.H_INHIBITS]:
        return k.ZERO
    if not m[k.H_TRAITS] & k.T_INHIBITS and m[hv(m, v) + k.HV_SYNIC]:
        return k.ZERO
    if m[k.H_TRAITS] & k.T_INHIBIT_ID_BASE:
        if m[k.H_CONFIG] & k.CONFIG_SVM and flags & k.FLAG_L2:
            return k.ZERO
        if not flags & (k.FLAG_HW | k.FLAG_X2APIC):
            return k.ZERO
    return k.ONE


@kernel("u8(words, u8)")
def update_vcpu(m, v):
    """kvm_vcpu_update_apicv, for REQ_APICV_UPDATE: APICv on or off as the reasons now say.

    Off, what is in IRR has to be injected, and while APICv was on nobody asked for an EVENT. Up to 5.10 nobody does
    then, and it waits for the next one.
    """
    row = hot(m, v)
    if not m[k.H_CONFIG] & k.CONFIG_APICV:
        return k.ZERO
    flags = m[row + k.HOT_FLAGS]
    avic_without_x2 = m[k.H_CONFIG] & (k.CONFIG_SVM | k.CONFIG_X2AVIC) == k.CONFIG_SVM
    if avic_without_x2 and flags & k.FLAG_X2APIC and m[k.H_TRAITS] & k.T_INHIBIT_MAP:
        # All vCPUs share the page tables: the access page would let this one reach its backing page by MMIO.
        m[k.H_NO_ACCESS_PAGE] = k.ONE
    active = activated(m, v)
    if (active != k.ZERO) == (flags & k.FLAG_APICV != k.ZERO):
        return k.ZERO
    m[row + k.HOT_FLAGS] = flags | k.FLAG_APICV if active else flags & ~k.FLAG_APICV
    recount(m, v)
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        refresh(m, v)
    if not active and m[k.H_RULES] & k.R_INHIBIT_REQUESTS_EVENT:
        make_request(m, v, k.REQ_EVENT)
    return k.ONE


@kernel("u8(words, u8)")
def begin(m, v):
    """A new vCPU: APICv counts as active, whatever the reasons, and its first entry looks; a vCPU that AVIC cannot
    address has none from the start, nor has any other vCPU from now on.
    """
    if not m[k.H_CONFIG] & k.CONFIG_APICV:
        return k.ZERO
    flags = hot(m, v) + k.HOT_FLAGS
    make_request(m, v, k.REQ_APICV_UPDATE)
    if m[k.H_CONFIG] & k.CONFIG_SVM and not addressable(m, v):
        return change(m, v, k.INHIBIT_PHYSICAL_ID_TOO_BIG, k.ONE)
    m[flags] = m[flags] | k.FLAG_APICV
    if m[k.H_CONFIG] & k.CONFIG_X2APIC_CPUID and m[k.H_RULES] & k.R_INHIBIT_X2APIC:
        return change(m, v, k.INHIBIT_X2APIC, k.ONE)
    return k.ZERO


# ------------------------------------------------------------------------------------------------- what the APIC does


@kernel("u8(words, u8, u8, u8, u8)")
def map_rebuilt(m, me, present, logical, modified):
    """What a new map means: dropped, its logical half useless, an xAPIC id that is not the vCPU's. Effect code."""
    if not m[k.H_TRAITS] & k.T_INHIBIT_MAP:
        return k.ZERO
    effects = change(m, me, k.INHIBIT_PHYSICAL_ID_ALIASED, k.ZERO if present else k.ONE)
    aliased = not present or logical == k.LOGICAL_DISABLED
    effects = effects | change(m, me, k.INHIBIT_LOGICAL_ID_ALIASED, k.ONE if aliased else k.ZERO)
    return effects | change(m, me, k.INHIBIT_APIC_ID_MODIFIED, modified)


@kernel("u8(words, u8)")
def id_modified(m, v):
    """1 when an xAPIC id is not the vCPU's; ids above 255 are compared by their low byte."""
    if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC:
        return k.ZERO
    return k.ONE if reg(m, v, k.APIC_ID) >> k.U(24) != m[own(m, v) + k.K_VCPU_ID] & k.U(0xFF) else k.ZERO


@kernel("u8(words, u8)")
def id_written(m, v):
    """kvm_lapic_xapic_id_updated of 6.1: inhibited for good; later the map tells."""
    traits = m[k.H_TRAITS]
    if traits & k.T_INHIBIT_MAP or not traits & k.T_INHIBIT_ID_BASE:
        return k.ZERO
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW or not id_modified(m, v):
        return k.ZERO
    return change(m, v, k.INHIBIT_APIC_ID_MODIFIED, k.ONE)


@kernel("u8(words, u8, u8)")
def base_written(m, v, changed):
    """The end of __kvm_apic_set_base: a new mode asks for an update, a moved page inhibits for good. Effect code."""
    traits = m[k.H_TRAITS]
    if changed & (k.APICBASE_EN | k.APICBASE_EXTD) and traits & k.T_INHIBIT_ID_BASE:
        if traits & k.T_INHIBIT_MAP:
            make_request(m, v, k.REQ_APICV_UPDATE)
        else:
            update_vcpu(m, v)
    base = m[own(m, v) + k.K_APIC_BASE]
    if base & k.APICBASE_EN and base & k.APICBASE_PAGE != k.APIC_DEFAULT_PHYS_BASE:
        return change(m, v, k.INHIBIT_APIC_BASE_MODIFIED, k.ONE)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _window_counted(m, v, on):
    """kvm_inc_or_dec_irq_window_inhibit: the first window inhibits, the last one's end does not any more.

    While there is another reason only the count changes; the next change of a reason looks at it.
    """
    if not m[k.H_CONFIG] & k.CONFIG_APICV:
        return k.ZERO
    m[own(m, v) + k.K_AVIC_WINDOW] = on
    while True:
        old = m[k.H_IRQ_WINDOW_VCPUS]
        new = old + k.ONE if on else old - k.ONE
        if replace_if(m, k.H_IRQ_WINDOW_VCPUS, old, new) == old:
            break
    if m[k.H_INHIBITS] & ~k.INHIBIT_IRQWIN or new != on:
        return k.ZERO
    return sent_on_the_way(m, v, change(m, v, k.INHIBIT_IRQWIN, on))


@kernel("u8(words, u8, u8)")
def window_served(m, v, waiting):
    """svm_inject_irq, where windows are counted: an interrupt goes in, and none waits behind it, or L2 runs."""
    if not m[own(m, v) + k.K_AVIC_WINDOW] or (waiting and not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2):
        return k.ZERO
    return _window_counted(m, v, k.ZERO)


@kernel("u8(words, u8, u8)")
def irq_window(m, v, on):
    """The APICv side of svm_enable_irq_window, and of the VINTR exit that closes the window: Effect code.

    A window needs a virtual interrupt, which AVIC ignores. In L2 AVIC is off anyway, so no window inhibits it there,
    but a window that was asked for in L1 may close in L2.
    """
    if not m[k.H_CONFIG] & k.CONFIG_SVM or (on and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2):
        return k.ZERO
    if m[k.H_RULES] & k.R_IRQWIN_COUNTED:
        return _window_counted(m, v, k.ONE) if on and not m[own(m, v) + k.K_AVIC_WINDOW] else k.ZERO
    effects = change(m, v, k.INHIBIT_IRQWIN, on)
    if on:  # by an entry; the exit that closes the window has an outcome
        effects = sent_on_the_way(m, v, effects)
    if not m[k.H_RULES] & k.R_APICV_AT_ENTRY:
        if clear_word_bits(m, hot(m, v) + k.HOT_REQUESTS, k.REQ_APICV_UPDATE) & k.REQ_APICV_UPDATE:
            update_vcpu(m, v)
    return effects


@kernel("u8(words, u8)")
def nested_changed(m, v):
    """AVIC stays out of L2: a VMRUN asks for an update, a nested exit makes it at once where no reason stands."""
    if not m[k.H_CONFIG] & k.CONFIG_SVM or not m[k.H_TRAITS] & k.T_INHIBIT_ID_BASE:
        return k.ZERO
    flags = m[hot(m, v) + k.HOT_FLAGS]
    if flags & k.FLAG_L2:
        return make_request(m, v, k.REQ_APICV_UPDATE) if flags & k.FLAG_APICV else k.ZERO
    return k.ZERO if m[k.H_INHIBITS] else update_vcpu(m, v)
