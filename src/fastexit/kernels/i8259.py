"""Move the lines of the PIC pair: edge and level detection, priorities, the pair's output and whom it wakes.

Models: pic_set_irq1, pic_get_irq, pic_update_irq, pic_irq_request, pic_unlock, kvm_pic_set_irq, kvm_pic_update_irq,
kvm_apic_accept_pic_intr. picdev.py has what a guest does with the chips. A chip is named by the first word of its row,
MASTER or SLAVE. Differs by generation: up to 6.12 a vCPU is woken also where the output stays low.
Spec: Intel 8259A data sheet, as far as KVM follows it; nothing looks at special mask mode.
"""

from ..jit.declare import kernel
from . import typed as k
from .lapicreg import reg
from .shared import emit, hot, kick, make_request, tell

MASTER = k.PIC
SLAVE = k.PIC + k.PIC_STRIDE
CASCADE = k.U(2)
"""The master's pin on which the slave's output is."""
NO_PIN = k.U(8)
IGNORED = k.CODE_ACCEPTED_NONE
"""A result of -1: the pin is masked."""


@kernel("u8(u8)")
def bit(pin):
    """Give a pin's bit in registers of its chip."""
    return k.ONE << (pin & k.U(7))


@kernel("u8(words, u8)")
def accepts_extint(m, v):
    """kvm_apic_accept_pic_intr: LINT0 lets the PIC through, or there is no local APIC in the way."""
    if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW:
        return k.ONE
    lint0 = reg(m, v, k.APIC_LVT0)
    return k.ONE if lint0 & (k.LVT_MASKED | k.ICR_DM) == k.DM_EXTINT << k.ICR_DM_SHIFT else k.ZERO


@kernel("u8(words)")
def first_accepting(m):
    """Find the first vCPU, in the order of creation, that takes interrupts of the PIC; NONE without one."""
    for i in range(m[k.H_NVCPUS]):
        if accepts_extint(m, k.U(i)):
            return k.U(i)
    return k.NONE


@kernel("u8(words, u8, u8, u8)")
def move_line(m, chip, pin, level):
    """pic_set_irq1: 1, 0 for a request that was there already, IGNORED where the pin is masked.

    An edge that comes without a fall in between is no new request, and its result is 1 all the same.
    """
    at = bit(pin)
    irr, last = m[chip + k.PIC_IRR], m[chip + k.PIC_LAST_IRR]
    triggers = m[chip + k.PIC_ELCR] & at or not last & at
    result = k.ZERO if level and triggers and irr & at else k.ONE
    if level:
        if triggers:
            m[chip + k.PIC_IRR] = irr | at
        m[chip + k.PIC_LAST_IRR] = last | at
    else:
        if m[chip + k.PIC_ELCR] & at:
            m[chip + k.PIC_IRR] = irr & ~at
        m[chip + k.PIC_LAST_IRR] = last & ~at
    return IGNORED if m[chip + k.PIC_IMR] & at else result


@kernel("u8(words, u8, u8)")
def priority(m, chip, pins):
    """get_priority: how far the first of the pins is from the chip's highest priority; NO_PIN for none."""
    first = m[chip + k.PIC_PRIORITY_ADD]
    for i in range(8):
        if pins & bit(first + k.U(i)):
            return k.U(i)
    return NO_PIN


@kernel("u8(words, u8)")
def wanted(m, chip):
    """pic_get_irq: the pin that a chip would deliver now, or NO_PIN.

    In special fully nested mode what the slave has in service does not hold up the master.
    """
    first = priority(m, chip, m[chip + k.PIC_IRR] & ~m[chip + k.PIC_IMR])
    in_service = m[chip + k.PIC_ISR]
    if chip == MASTER and m[chip + k.PIC_SPECIAL_FULLY_NESTED]:
        in_service = in_service & ~bit(CASCADE)
    if first >= priority(m, chip, in_service):
        return NO_PIN
    return (first + m[chip + k.PIC_PRIORITY_ADD]) & k.U(7)


@kernel("u8(words, u8)")
def _wake(m, me):
    """pic_unlock: of the vCPUs that take the PIC's interrupts only the first is told."""
    v = first_accepting(m)
    if v == k.NONE:
        return k.ZERO
    make_request(m, v, k.REQ_EVENT)
    return tell(m, me, v, kick(m, v, me))


@kernel("u8(words, u8)")
def update(m, me):
    """pic_update_irq, and pic_unlock behind it: the pair's output, and effects for the vCPU that is woken.

    The slave's request is a pulse on the master, which nothing takes back.
    """
    if wanted(m, SLAVE) != NO_PIN:
        move_line(m, MASTER, CASCADE, k.ONE)
        move_line(m, MASTER, CASCADE, k.ZERO)
    was = m[k.PIC_OUTPUT]
    level = k.ONE if wanted(m, MASTER) != NO_PIN else k.ZERO
    m[k.PIC_OUTPUT] = level
    if was or not (level or m[k.H_RULES] & k.R_PIC_WAKES_ANYWAY):
        return k.ZERO
    return _wake(m, me)


@kernel("u8(words, u8, u8, u8, u8)")
def set_irq(m, pin, level, source, me):
    """kvm_pic_set_irq: pin 0..15 of the pair for one source; its result in ACCEPTED.

    The line is up as long as any source holds it.
    """
    chip = SLAVE if pin & k.U(8) else MASTER
    at = chip + k.PIC_SOURCES + (pin & k.U(7))
    held = m[at] | bit(source) if level else m[at] & ~bit(source)
    m[at] = held
    result = move_line(m, chip, pin, k.ONE if held else k.ZERO)
    code = update(m, me) | (IGNORED if result == IGNORED else result << k.CODE_ACCEPTED_SHIFT)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        what = (pin & k.U(7)) | (pin >> k.U(3)) << k.U(8) | (k.ZERO if result else k.TRACE_COALESCED)
        emit(m, k.TP_PIC_SET_IRQ, me, what, m[chip + k.PIC_ELCR], m[chip + k.PIC_IMR])
    return code
